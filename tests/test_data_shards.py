"""Shards are the same bytes for the same samples, anyone can read them, and their index never lies."""

import contextlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.files import sha256_of
from data.manifest import FileEntry
from data.samples import BadSample, encode_npy, image_members
from data.shards.index import ShardIndex, index_path
from data.shards.writer import ShardWriter, _header


def image_of(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def members_of(number: int) -> dict[str, bytes]:
    return image_members(
        f"s{number}", image_of(number), label=number % 3, caption=f"no. {number}", metadata={"n": number}
    )


def write(path: Path, count: int = 5) -> ShardWriter:
    with ShardWriter(path) as shard:
        for number in range(count):
            shard.add(f"s{number}", members_of(number))
    return shard


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    one = write(tmp_path / "one.tar").entry
    (tmp_path / "two").mkdir()
    with ShardWriter(tmp_path / "two" / "one.tar") as shard:
        for number in range(5):
            shard.add(f"s{number}", dict(reversed(members_of(number).items())))
    assert shard.entry == one
    assert index_path(tmp_path / "one.tar").read_bytes() == index_path(tmp_path / "two" / "one.tar").read_bytes()


def test_the_entry_describes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    entry = write(path).entry
    assert entry is not None
    assert (entry.name, entry.bytes, entry.sha256, entry.samples) == (
        "one.tar",
        path.stat().st_size,
        sha256_of(path),
        5,
    )


def test_nobody_can_tell_when_or_by_whom_a_shard_was_written(tmp_path: Path) -> None:
    write(tmp_path / "one.tar")
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(i.mtime, i.uid, i.gid, i.uname, i.gname, i.mode) for i in tar} == {(0, 0, 0, "", "", 0o644)}


def test_a_shard_has_the_bytes_of_a_plain_tar(tmp_path: Path) -> None:
    """In the ustar format, also where key and suffix together are as long as its field for names."""
    samples = {f"s{number}": members_of(number) for number in range(5)}
    samples["k" * 80] = {"text_pooled_019.npy": b"", "json": b"1" * 512, "png": image_of(0).tobytes() * 999}
    assert max(len(f"{key}.{suffix}") for key, members in samples.items() for suffix in members) == 100
    expected = io.BytesIO()
    with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples.items():
            for suffix in sorted(members):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mode, info.mtime = len(members[suffix]), 0o644, 0
                tar.addfile(info, io.BytesIO(members[suffix]))
    with ShardWriter(tmp_path / "one.tar") as shard:
        for key, members in samples.items():
            shard.add(key, members)
    assert (tmp_path / "one.tar").read_bytes() == expected.getvalue()
    assert shard.entry == FileEntry.of(tmp_path / "one.tar", samples=6)


def test_headers_are_those_of_tarfile_for_any_name_and_size() -> None:
    for name in ("k.cls", "k" * 80 + ".text_pooled_019.npy", "k" * 80 + ".a_longer_name_019.npy", "k.\u00e9.npy"):
        for size in (0, 1, 511, 512, 10**7, 8**11 - 1, 8**11):
            info = tarfile.TarInfo(name)
            info.size = size
            assert _header(name, size) == info.tobuf(), (name, size)


def test_plain_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    import webdataset

    write(tmp_path / "one.tar")
    theirs = list(webdataset.WebDataset(str(tmp_path / "one.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in theirs] == [f"s{number}" for number in range(5)]
    for number, sample in enumerate(theirs):
        np.testing.assert_array_equal(sample["png"], image_of(number))
        assert (sample["cls"], sample["txt"], sample["json"]) == (number % 3, f"no. {number}", {"n": number})


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "one.tar") as shard:
        shard.add("s0", members_of(0))
        with pytest.raises(BadSample, match=r"one\.tar: s0: duplicate_key"):
            shard.add("s0", members_of(1))
    (tmp_path / "two").mkdir()
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "two" / "one.tar") as shard:
        raise RuntimeError(shard.path)
    assert list((tmp_path / "two").iterdir()) == []


def test_an_empty_shard_is_a_shard_of_no_samples(tmp_path: Path) -> None:
    entry = write(tmp_path / "one.tar", count=0).entry
    assert entry is not None
    assert entry.samples == len(ShardIndex.of(tmp_path / "one.tar", entry=entry)) == 0


def test_the_index_leads_to_every_member(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    entry = write(path).entry
    assert entry is not None
    index = ShardIndex.load(index_path(path))
    raw = path.read_bytes()
    assert index.labels.tolist() == [0, 1, 2, 0, 1]
    for row in range(5):
        assert index.key(row) == f"s{row}"
        for column, suffix in enumerate(index.suffixes):
            offset, size = index.offsets[row, column], index.sizes[row, column]
            assert raw[offset : offset + size] == members_of(row)[suffix]


def test_an_index_that_does_not_fit_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "one.tar"
    first = write(path).entry
    stale = index_path(path).read_bytes()
    second = write(path, count=6).entry
    assert first is not None
    assert second is not None
    fresh = index_path(path).read_bytes()
    for kept in (stale, fresh[:-9], b"", b"junk" * 99):
        index_path(path).write_bytes(kept)
        assert len(ShardIndex.of(path, entry=second)) == 6
        assert index_path(path).read_bytes() == fresh
    index_path(path).unlink()
    assert ShardIndex.of(path, entry=second).key(5) == "s5"


def test_no_flipped_bit_of_an_index_goes_unnoticed(tmp_path: Path) -> None:
    write(tmp_path / "one.tar", count=2)
    kept = index_path(tmp_path / "one.tar")
    sound, clean = ShardIndex.load(kept), kept.read_bytes()
    for position in range(len(clean)):
        damaged = bytearray(clean)
        damaged[position] ^= 1
        kept.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            # White space of the header may change; what is found may not.
            found = ShardIndex.load(kept)
            for name in ("offsets", "sizes", "labels", "key_bytes", "key_ends"):
                np.testing.assert_array_equal(getattr(found, name), getattr(sound, name))
    kept.write_bytes(clean[: len(clean) // 2])
    with pytest.raises(ValueError, match=r"one\.tar\.safetensors is not a readable shard index .*Delete it"):
        ShardIndex.load(kept)


def test_the_index_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write(tmp_path / "one.tar")
    index = ShardIndex.load(index_path(tmp_path / "one.tar"))
    for name, array in load_file(index_path(tmp_path / "one.tar")).items():
        np.testing.assert_array_equal(getattr(index, name), array)


def test_a_shard_that_holds_a_key_twice_has_no_index(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.tar", count=3)
    twice = (tmp_path / "0.tar").read_bytes().rstrip(b"\0")
    twice += bytes(-len(twice) % 512) + (tmp_path / "1.tar").read_bytes()
    (tmp_path / "twice.tar").write_bytes(twice)
    entry = FileEntry.of(tmp_path / "twice.tar", samples=6)
    with pytest.raises(BadSample, match=r"twice\.tar: s0: duplicate_key"):
        ShardIndex.build(tmp_path / "twice.tar", entry=entry)


def test_a_shard_with_another_count_than_its_manifest_says_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    entry = write(tmp_path / "one.tar").entry
    assert entry is not None
    with pytest.raises(BadSample, match=r"one\.tar: wrong_count: 5 samples, its manifest says 7"):
        ShardIndex.build(tmp_path / "one.tar", entry=replace(entry, samples=7))


def latent_shard(path: Path, arrays: list[bytes]) -> ShardWriter:
    with ShardWriter(path) as shard:
        for number, payload in enumerate(arrays):
            shard.add(f"s{number}", {"latent.npy": payload})
    return shard


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_shard_with_a_bad_array_is_never_committed_as_sound(place: int, tmp_path: Path) -> None:
    good = encode_npy(np.zeros((2, 1, 2, 2), dtype=np.float16))
    for bad in (object_array(), good[:-1], b""):
        arrays = [good] * 3
        arrays[place] = bad
        with pytest.raises(BadSample, match=rf"x\.tar: s{place}\.latent\.npy: bad_npy"):
            latent_shard(tmp_path / "x.tar", arrays)
        assert list(tmp_path.iterdir()) == []


def test_arrays_of_different_shapes_have_no_common_layout(tmp_path: Path) -> None:
    shapes = [(2, 1, 2, 2), (2, 1, 2, 2), (2, 1, 4, 4)]
    latent_shard(tmp_path / "x.tar", [encode_npy(np.zeros(shape, dtype=np.float16)) for shape in shapes])
    assert ShardIndex.load(index_path(tmp_path / "x.tar")).layouts == {}
