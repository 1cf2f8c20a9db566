"""Any sample at any time: random access equals what was written, and what webdataset reads in order."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from clocks import quietest_round
from conftest import wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import commit_corpus, commit_latents

from data.loading import Buffers, ImageBatch, ImageShards, LatentShards
from data.manifest import FileEntry
from data.order.order import FullShuffleConfig, Order
from data.prefetch import Prefetch, pinned
from data.samples import BadSample, encode_npy, image_members, latent_members
from data.shards import split as shard_set
from data.shards.index import index_path
from data.shards.writer import ShardWriter
from data.transforms import ImageViewConfig, view_image

SHAPE = (2, 3, 4, 5)


def moments_of(number: int, *, flipped: bool = False) -> np.ndarray:
    return np.random.default_rng([number, flipped]).standard_normal(SHAPE).astype(np.float16)


def image_of(number: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def write_latents(
    folder: Path, counts: Sequence[int], *, flipped: bool = True, split: str = "train"
) -> list[FileEntry]:
    entries, number = [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for shard_number, count in enumerate(counts):
        with ShardWriter(folder / f"{split}-{shard_number:06d}.tar") as shard:
            for _ in range(count):
                carried = {"cls": b"%d" % (number % 7), "txt": b"number %d" % number}
                mirrored = moments_of(number, flipped=True) if flipped else None
                members = latent_members("k", moments_of(number), flipped=mirrored, carried=carried)
                shard.add(f"k{number}", {**members, "text_tokens.npy": encode_npy(np.full((2, 3), number, np.float32))})
                number += 1
        assert shard.entry is not None
        entries.append(shard.entry)
    commit_latents(folder, entries)
    return entries


def write_images(folder: Path, counts: Sequence[int]) -> list[FileEntry]:
    entries, number = [], 0
    folder.mkdir(parents=True, exist_ok=True)
    for shard_number, count in enumerate(counts):
        with ShardWriter(folder / f"train-{shard_number:06d}.tar") as shard:
            for _ in range(count):
                key, label = f"k{number}", number % 7
                shard.add(key, image_members(key, image_of(number), label=label, caption=f"no. {number}", metadata={}))
                number += 1
        assert shard.entry is not None
        entries.append(shard.entry)
    commit_corpus(folder, entries, resolution=6)
    return entries


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any), data=st.data())
def test_random_access_gives_what_was_written(
    counts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, counts)
    shards = LatentShards(folder, split="train", features=["text_tokens"], captions=True)
    assert len(shards) == sum(counts)
    indices = np.array(data.draw(st.lists(st.integers(0, len(shards) - 1), max_size=20)), dtype=np.int64)
    flips = np.array(data.draw(st.lists(st.booleans(), min_size=len(indices), max_size=len(indices))), dtype=bool)
    batch = shards.read(indices, flipped=flips)
    assert batch.moments.shape == (len(indices), *SHAPE)
    assert batch.moments.dtype == np.float16
    for place, (number, flip) in enumerate(zip(indices.tolist(), flips.tolist(), strict=True)):
        np.testing.assert_array_equal(batch.moments[place], moments_of(number, flipped=flip))
        np.testing.assert_array_equal(batch.features["text_tokens"][place], np.full((2, 3), number))
    assert batch.labels.tolist() == [number % 7 for number in indices]
    assert batch.keys == [f"k{number}" for number in indices]
    assert batch.captions == [f"number {number}" for number in indices]


def test_every_sample_is_read_once_an_epoch_over_all_ranks(tmp_path: Path) -> None:
    counts = [5, 0, 11, 1, 0, 6]
    write_latents(tmp_path, counts)
    order = Order(FullShuffleConfig(), num_samples=sum(counts), seed=3)
    for num_ranks in (1, 2, 4):
        readers = [LatentShards(tmp_path, split="train") for _ in range(num_ranks)]
        share, keys = 8 // num_ranks, []
        for batch in range(23):
            for rank, reader in enumerate(readers):
                keys += reader.read(order.indices(batch * 8 + rank * share, share)).keys
        for epoch in range(8):
            assert sorted(keys[epoch * 23 : (epoch + 1) * 23]) == sorted(f"k{number}" for number in range(23))


def test_images_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    entries = write_images(tmp_path, [4, 3])
    urls = [str(tmp_path / entry.name) for entry in entries]
    theirs = list(
        webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls", "txt")
    )
    for cache_bytes in (0, 1 << 20):
        batch = ImageShards(tmp_path, split="train", cache_bytes=cache_bytes).read(np.arange(7))
        assert [sample[0] for sample in theirs] == batch.keys
        np.testing.assert_array_equal(np.stack([sample[1] for sample in theirs]), batch.images)
        assert [sample[2] for sample in theirs] == batch.labels.tolist()
        assert [sample[3] for sample in theirs] == batch.captions


def test_a_cached_image_is_the_same_and_the_cache_cannot_be_spoilt(tmp_path: Path) -> None:
    write_images(tmp_path, [3])
    shards = ImageShards(tmp_path, split="train")
    shards.read(np.arange(3)).images[:] = 0
    np.testing.assert_array_equal(shards.read(np.array([2])).images[0], image_of(2))


def test_images_of_many_sizes_are_read_through_a_view(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-000000.tar") as shard:
        for number in range(3):
            key, image = f"k{number}", image_of(number, side=8 + number)
            shard.add(key, image_members(key, image, label=0, caption="", metadata={}))
    assert shard.entry is not None
    view, url = ImageViewConfig(resolution=8), str(tmp_path / shard.entry.name)
    commit_corpus(tmp_path, [replace(shard.entry, url=url)], resolution=8, view=view)
    batch = ImageShards(tmp_path, split="train").read(np.arange(3))
    for number in range(3):
        np.testing.assert_array_equal(batch.images[number], view_image(image_of(number, side=8 + number), view))
    commit_corpus(tmp_path, [shard.entry], resolution=8)
    with pytest.raises(BadSample, match=r"k1\.png: wrong_shape: \(9, 9, 3\) \(h w c\), but \(8, 8, 3\) is expected"):
        ImageShards(tmp_path, split="train").read(np.arange(3))


def test_bad_images_are_left_out_of_a_batch_and_reported_when_that_is_asked_for(tmp_path: Path) -> None:
    good = image_members("k", image_of(1), label=4, caption="fine", metadata={})
    with ShardWriter(tmp_path / "train-000000.tar") as shard:
        shard.add("k0", good)
        shard.add("k1", {**good, "png": good["png"][:-20]})
        shard.add("k2", {**good, "txt": b"\xff"})
        shard.add("k3", {"cls": b"1"})
        shard.add("k4", {**good, "cls": b"5"})
    assert shard.entry is not None
    commit_corpus(tmp_path, [shard.entry], resolution=6)
    for cache_bytes in (0, 1 << 20):
        shards, bad = ImageShards(tmp_path, split="train", cache_bytes=cache_bytes), []
        batch = shards.read(np.arange(5), bad=bad)
        assert (batch.keys, batch.labels.tolist(), batch.captions) == (["k0", "k4"], [4, 5], ["fine", "fine"])
        np.testing.assert_array_equal(batch.images, [image_of(1)] * 2)
        assert [(finding.reason, finding.key) for finding in bad] == [
            ("broken_image", "k1"),
            ("caption_not_utf8", "k2"),
            ("missing_image", "k3"),
        ]
        with pytest.raises(BadSample, match=r"^train-000000\.tar: k2\.txt: caption_not_utf8"):
            shards.read(np.array([0, 2]))


def test_what_goes_along_with_a_latent_is_carried_byte_for_byte(tmp_path: Path) -> None:
    write_images(tmp_path, [2, 2])
    members = image_members("k3", image_of(3), label=3, caption="no. 3", metadata={})
    batch = ImageShards(tmp_path, split="train").read(np.arange(2, 4), carry=True)
    assert batch.carried[1] == {suffix: members[suffix] for suffix in ("cls", "txt", "json")}


def test_the_ranges_of_the_shards_cover_the_split_in_order(tmp_path: Path) -> None:
    write_latents(tmp_path, [3, 0, 4])
    shards = LatentShards(tmp_path, split="train")
    assert np.concatenate([part.indices for part in shards.shards]).tolist() == list(range(7))
    assert shards.read(shards.shards[2].indices).keys == ["k3", "k4", "k5", "k6"]


def test_readers_hold_a_bounded_number_of_shards_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_set, "max_open_shards", lambda: 2)
    write_latents(tmp_path, [2] * 6)
    shards = LatentShards(tmp_path, split="train")
    for _ in range(3):
        np.testing.assert_array_equal(shards.read(np.arange(12)).moments, [moments_of(number) for number in range(12)])
        assert len(shards._open) <= 2


def test_threads_that_read_at_once_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_set, "max_open_shards", lambda: 1)
    write_latents(tmp_path, [4] * 4)
    write_images(tmp_path / "images", [8])
    latents, images = LatentShards(tmp_path, split="train"), ImageShards(tmp_path / "images", split="train")

    def both(seed: int) -> bool:
        latent_indices = np.random.default_rng(seed).permutation(16)
        image_indices = latent_indices[latent_indices < 8]
        return np.array_equal(
            latents.read(latent_indices).moments, [moments_of(number) for number in latent_indices]
        ) and np.array_equal(images.read(image_indices).images, [image_of(number) for number in image_indices])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(40)))


def test_an_index_outside_the_split_is_named(tmp_path: Path) -> None:
    write_latents(tmp_path, [3])
    shards = LatentShards(tmp_path, split="train")
    for index in (3, -1):
        with pytest.raises(IndexError, match=r"\(train\) has 3 samples; asked for"):
            shards.read(np.array([0, index]))


def test_a_split_without_shards_is_named(tmp_path: Path) -> None:
    write_latents(tmp_path, [3])
    with pytest.raises(ValueError, match=r"has no val shards; its manifest lists none named val-\*\.tar"):
        LatentShards(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match="has not finished"):
        LatentShards(tmp_path / "nothing", split="train")


def test_flipped_moments_are_only_given_where_they_were_encoded(tmp_path: Path) -> None:
    write_latents(tmp_path, [3], flipped=False)
    shards = LatentShards(tmp_path, split="train")
    assert not shards.has_flipped
    assert len(shards.read(np.arange(3), flipped=np.zeros(3, dtype=bool)).keys) == 3
    with pytest.raises(ValueError, match=r"holds no latent_flip\.npy: encode with flipped images, or never flip"):
        shards.read(np.arange(3), flipped=np.array([False, True, False]))


def test_shards_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_latents(tmp_path, [2])
    with ShardWriter(tmp_path / "train-000001.tar") as shard:
        shard.add("x", latent_members("x", np.zeros((2, 3, 4, 6)), carried={}))
    assert shard.entry is not None
    entries = [*LatentShards(tmp_path, split="train").manifest.files, shard.entry]
    commit_latents(tmp_path, entries)
    with pytest.raises(
        BadSample, match=r"train-000001\.tar: latent\.npy: wrong_layout: .*the corpus holds <f2 \(2, 3, 4, 5\)"
    ):
        LatentShards(tmp_path, split="train").read(np.arange(3))


@pytest.mark.parametrize("change", ["cut", "emptied", "grown", "gone", "cut while open", "grown while open"])
def test_a_shard_that_changed_is_an_error_not_a_crash(change: str, tmp_path: Path) -> None:
    entries = write_latents(tmp_path, [3, 3])
    shards = LatentShards(tmp_path, split="train")
    if "open" in change:
        shards.read(np.arange(6))
    path = tmp_path / entries[1].name
    if change == "gone":
        path.unlink()
    else:
        with open(path, "r+b") as file:
            file.truncate(0 if change == "emptied" else 4096 if "cut" in change else entries[1].bytes + 512)
    with pytest.raises(BadSample, match=r"train-000001\.tar: shard_(changed|missing)"):
        shards.read(np.arange(6))


def test_an_image_that_cannot_be_decoded_is_named_when_it_is_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-000000.tar") as shard:
        shard.add("bad", {"png": b"no picture"})
    assert shard.entry is not None
    commit_corpus(tmp_path, [shard.entry], resolution=6)
    with pytest.raises(BadSample, match=r"bad\.png: not_an_image"):
        ImageShards(tmp_path, split="train").read(np.arange(1))


def test_folders_that_cannot_be_written_are_read_all_the_same(tmp_path: Path) -> None:
    entries = write_latents(tmp_path, [3])
    kept = index_path(tmp_path / entries[0].name)
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_bytes(b"a file where the folder should be")
    assert LatentShards(tmp_path, split="train").read(np.arange(3)).keys == ["k0", "k1", "k2"]


def test_latents_are_read_ten_times_faster_than_by_plain_webdataset(tmp_path: Path) -> None:
    import webdataset

    rng = np.random.default_rng(0)
    entries = []
    for number in range(2):
        with ShardWriter(tmp_path / f"train-{number:06d}.tar") as shard:
            for row in range(512):
                moments = rng.standard_normal((2, 4, 32, 32)).astype(np.float16)
                shard.add(f"k{number}-{row}", latent_members("k", moments, carried={"cls": b"3"}))
        assert shard.entry is not None
        entries.append(shard.entry)
    commit_latents(tmp_path, entries)
    urls = [str(tmp_path / entry.name) for entry in entries]

    def theirs() -> dict[str, np.ndarray]:
        stream = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("__key__", "latent.npy").batched(256)
        return {key: row for keys, rows in stream for key, row in zip(keys, rows, strict=True)}

    ours = LatentShards(tmp_path, split="train")
    order = Order(FullShuffleConfig(), num_samples=1024, seed=0)
    expected, found = theirs(), {}
    for batch in (ours.read(order.indices(first, 256)) for first in range(0, 1024, 256)):
        found.update(zip(batch.keys, batch.moments, strict=True))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)

    ratios = []
    for _ in range(5):
        started = time.process_time()
        theirs()
        between = time.process_time()
        for first in range(0, 4096, 256):
            ours.read(order.indices(first, 256))
        ratios.append(4 * (between - started) / (time.process_time() - between))
    assert np.median(ratios) >= 10, ratios


def test_a_hundred_million_samples_are_opened_at_any_step_in_seconds_and_little_memory(tmp_path: Path) -> None:
    num_shards, samples = 10_000, 10_000
    with ShardWriter(tmp_path / "shard") as shard:
        payload = encode_npy(np.zeros((2, 1, 1, 1), dtype=np.float16))
        for number in range(samples):
            shard.add(f"k{number}", {"latent.npy": payload, "cls": b"1"})
    assert shard.entry is not None
    # Ten thousand names of one shard: the reader cannot tell.
    for number in range(num_shards):
        name = f"train-{number:06d}.tar"
        (tmp_path / name).hardlink_to(tmp_path / "shard")
        index_path(tmp_path / name).hardlink_to(index_path(tmp_path / "shard"))
    entries = [replace(shard.entry, name=f"train-{number:06d}.tar") for number in range(num_shards)]
    manifest = commit_latents(tmp_path, entries)
    order = Order(FullShuffleConfig(), num_samples=num_shards * samples, seed=0)

    process = psutil.Process()
    before, started = process.memory_info().rss, time.process_time()
    shards = LatentShards(tmp_path, split="train", manifest=manifest)
    assert len(shards) == 100_000_000
    assert len(set(shards.read(order.indices(123_456 * 256, 256)).keys)) > 200
    assert time.process_time() - started < 2  # reading all of it would take minutes
    assert process.memory_info().rss - before < 400 * 2**20


def test_prefetched_batches_come_in_order_from_where_they_start() -> None:
    def make(index: int) -> int:
        time.sleep(0.004 * (index % 3))
        return index * index

    with Prefetch(make, start=5, depth=4, threads=3) as batches:
        loaded = [next(batches) for _ in range(12)]
    assert [item.index for item in loaded] == list(range(5, 17))
    assert [item.batch for item in loaded] == [index * index for index in range(5, 17)]


def test_prefetching_holds_no_more_than_its_depth() -> None:
    made: list[int] = []
    with Prefetch(lambda index: made.append(index), depth=3, threads=2) as batches:
        for consumed in range(1, 5):
            next(batches)
            wait_until(lambda n=consumed: len(made) >= n + 3, seconds=60, what="making batches ahead")
            time.sleep(0.02)
            assert len(made) == consumed + 3


def test_an_exception_comes_up_in_the_place_of_its_batch() -> None:
    def make(index: int) -> int:
        if index == 3:
            raise BadSample("broken_image", "cut", shard="s.tar", key="k")
        return index

    batches = Prefetch(make, depth=6, threads=2)
    assert [next(batches).batch for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BadSample, match=r"s\.tar: k: broken_image"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_closing_leaves_no_thread_and_makes_nothing_more() -> None:
    before = threading.active_count()
    made: list[int] = []
    batches = Prefetch(lambda index: made.append(index), depth=8, threads=4)
    next(batches)
    batches.close()
    batches.close()
    count = len(made)
    time.sleep(0.02)
    assert len(made) == count
    assert threading.active_count() == before


def test_waiting_for_a_batch_is_measured() -> None:
    made = threading.Event()

    def make(index: int) -> None:
        time.sleep(0.05)
        if index:
            made.set()

    def waits() -> list[float]:
        made.clear()
        with Prefetch(make, depth=1) as batches:
            assert next(batches).wait_seconds > 0.02
            made.wait()
            time.sleep(0.02)
            return [next(batches).wait_seconds]

    assert max(quietest_round(waits, limit=0.02)) < 0.02


def test_memory_of_batches_is_used_again_only_when_nobody_looks_at_it() -> None:
    buffers, source = Buffers(), memoryview(bytes(range(100)))
    held = torch.from_numpy(buffers.joined([(source, start) for start in (0, 50, 90)], 10).view(np.uint16)[3:])
    address = held.data_ptr() - 6
    other = buffers.joined([(source, 20)] * 3, 10)
    assert other.ctypes.data != address
    assert bytes(held.numpy().tobytes()) == bytes([*range(6, 10), *range(50, 60), *range(90, 100)])
    del held
    assert buffers.joined([(source, 20)] * 3, 10).ctypes.data == address


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_tensors_are_pinned_wherever_they_are() -> None:
    batch = pinned({"a": [torch.zeros(2), (torch.zeros(3), "text")]})
    assert batch["a"][0].is_pinned()
    assert batch["a"][1][0].is_pinned()


def test_a_batch_keeps_its_structure_when_there_is_nothing_to_pin() -> None:
    batch = ImageBatch(
        indices=np.zeros(1, dtype=np.int64), images=np.zeros(1), labels=np.zeros(1), keys=["k"], captions=[""]
    )
    assert replace(pinned(batch)) == batch


def test_a_remote_copy_that_is_dropped_before_it_was_opened_is_fetched_again() -> None:
    entry = FileEntry(name="train-0.tar", bytes=1, sha256="", samples=1, url="s3://bucket/0.tar")
    for failures, outcome in ((shard_set.TRIES - 1, "shard"), (shard_set.TRIES, BadSample)):
        opens = iter([FileNotFoundError] * failures + ["shard"])

        def open_one(*_: object, opens: Any = opens, **__: object) -> Any:
            if (found := next(opens)) is FileNotFoundError:
                raise found
            return found

        reader: Any = SimpleNamespace(_open_one=open_one, folder=Path("corpus"))
        if outcome == "shard":
            assert shard_set.ShardSet._open_there(reader, entry, trusted=False) == "shard"
        else:
            with pytest.raises(BadSample, match="s3://bucket/0.tar is not there"):
                shard_set.ShardSet._open_there(reader, entry, trusted=False)
