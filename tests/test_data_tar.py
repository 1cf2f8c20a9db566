"""The tar scanner against the standard library's, for every format that shards come in."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.samples import BadSample
from data.shards.scan import scan_shard, split_name
from data.shards.tar import BLOCK, Fault, Member, scan_tar, sum_of_bytes

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=150)


def archive(members: list[tuple[str, bytes]], form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def as_tarfile_sees(raw: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]


@settings(max_examples=60, deadline=None)
@given(members=st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6), form=st.sampled_from(["gnu", "pax"]))
def test_members_lie_where_tarfile_finds_them(members: list[tuple[str, bytes]], form: str) -> None:
    raw = archive(members, FORMATS[form])
    found = list(scan_tar(raw))
    assert [(m.name, m.offset, m.size) for m in found if isinstance(m, Member)] == as_tarfile_sees(raw)
    assert not [item for item in found if isinstance(item, Fault)]


@pytest.mark.parametrize("most", [0, 1, 127, 128, 255])
def test_the_sum_of_a_header_is_exact_for_letters_and_for_other_bytes(most: int) -> None:
    block = bytes([most]) * (BLOCK - 1) + b"\1"
    assert sum_of_bytes(block) == most * (BLOCK - 1) + 1


def as_v7(raw: bytes) -> bytes:
    """Rewrite the headers of an archive of plain members as Unix v7 had them: no magic, no owner's name."""
    out, position = bytearray(raw), 0
    while any(header := out[position : position + 512]):
        size = int(header[124:135], 8)
        header[257:512] = bytes(255)
        header[156:157] = b"\0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        out[position : position + 512] = header
        position += 512 + -(-size // 512) * 512
    return bytes(out)


def test_archives_of_unix_v7_are_read_and_their_damage_is_found() -> None:
    members = [(f"d/{n}.png", bytes([n]) * 700) for n in range(5)]
    raw = as_v7(archive([("d/", b""), *members], tarfile.USTAR_FORMAT))
    found = list(scan_tar(raw))
    assert [(m.name, m.offset, m.size) for m in found if isinstance(m, Member)] == as_tarfile_sees(raw)
    assert len(found) == 5, "a name that ends in a slash is a folder"
    damaged = bytearray(raw)
    damaged[512 + 2 * 1536 + 3] ^= 1
    found = list(scan_tar(bytes(damaged)))
    assert [item.name for item in found if isinstance(item, Member)] == ["d/0.png", "d/1.png", "d/3.png", "d/4.png"]
    assert [item.reason for item in found if isinstance(item, Fault)] == ["damaged_header"]
    for cut in range(512, len(raw) - 10240 + 6 * 1536, 256):
        assert any(isinstance(item, Fault) for item in scan_tar(raw[:cut]))


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (bz2.compress, "bzip2-compressed"),
        (lzma.compress, "xz-compressed"),
        (lambda raw: b"\x28\xb5\x2f\xfd" + raw, "zstd-compressed"),
        (gzip.compress, "name it .tar.gz"),
    ],
)
def test_what_another_program_compressed_is_named(packed: Callable[[bytes], bytes], reason: str) -> None:
    (fault,) = scan_tar(packed(archive([("a.png", b"1")], tarfile.USTAR_FORMAT)))
    assert isinstance(fault, Fault)
    assert reason in fault.detail


@pytest.mark.parametrize("form", FORMATS)
def test_folders_and_long_names_are_understood_in_every_format(form: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as tar:
        folder = tarfile.TarInfo("./part")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ["./part/a.png", "d" * 90 + "/" + "f" * 90 + ".png"]:
            tar.addfile(tarfile.TarInfo(name))
    assert [item.name for item in scan_tar(buffer.getvalue())] == ["part/a.png", "d" * 90 + "/" + "f" * 90 + ".png"]


def test_sizes_in_base_256_are_read() -> None:
    raw = bytearray(archive([("a.png", b"x" * 700)], tarfile.GNU_FORMAT))
    raw[124:136] = b"\x80" + (700).to_bytes(11, "big")
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    assert list(scan_tar(bytes(raw))) == [Member("a.png", 512, 700)]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_damage_ends_in_members_and_faults_never_in_an_exception_or_a_span_outside(data: st.DataObject) -> None:
    raw = bytearray(archive([(f"{n}.png", bytes([n]) * 600) for n in range(4)], FORMATS["pax"])[: 4 * 2048])
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    for item in scan_tar(bytes(raw)):
        if isinstance(item, Member):
            assert 512 <= item.offset <= item.offset + item.size <= len(raw)


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 6 * 512 + 1023))
def test_no_cut_goes_unnoticed(cut: int) -> None:
    raw = archive([("a.png", b"1" * 100), ("a.cls", b"1"), ("b.png", b"2" * 100)], FORMATS["gnu"])
    assert [item for item in scan_tar(raw[:cut]) if isinstance(item, Fault)]
    assert not [item for item in scan_tar(raw) if isinstance(item, Fault)]


@settings(max_examples=200, deadline=None)
@given(byte=st.integers(0, 511), flip=st.integers(1, 255), member=st.integers(0, 2))
def test_no_damaged_header_goes_unnoticed(byte: int, flip: int, member: int) -> None:
    raw = bytearray(archive([("a.png", b"1" * 100), ("a.cls", b"1"), ("b.png", b"2" * 100)], FORMATS["gnu"]))
    raw[1024 * member + byte] ^= flip
    clean = list(scan_tar(archive([("a.png", b"1" * 100), ("a.cls", b"1"), ("b.png", b"2" * 100)], FORMATS["gnu"])))
    found = list(scan_tar(bytes(raw)))
    # A checksum field may be written in more than one way; whatever is accepted must mean the same.
    assert found == clean or any(isinstance(item, Fault) for item in found)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.png", ("a", "png")),
        ("folder.x/a.latent.npy", ("folder.x/a", "latent.npy")),
        ("a.JPG", ("a", "jpg")),
        ("README", ("README", "")),
    ],
)
def test_names_split_at_the_first_dot_of_their_last_part(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


def test_samples_group_as_webdataset_groups_them() -> None:
    import webdataset

    members = [("d/a.png", b"1"), ("d/a.cls", b"2"), ("b.seg.PNG".lower(), b"3"), ("b.json", b"4"), ("c.txt", b"5")]
    raw = archive(members, FORMATS["pax"])
    stream = webdataset.tariterators.tar_file_iterator(io.BytesIO(raw))
    theirs = [
        (sample["__key__"], {key for key in sample if not key.startswith("__")})
        for sample in webdataset.tariterators.group_by_keys({**item, "__url__": "x"} for item in stream)
    ]
    assert [(sample.key, set(sample.members)) for sample in scan_shard(raw, shard="x")] == theirs


SAMPLES = {"a": ("jpg", "txt"), "b": ("jpg", "txt"), "c": ("jpg", "txt")}


def scanned(names: list[str], *, cut: int = 0) -> dict[str, tuple[set[str], list[str]]]:
    """Return the members and faults of each sample of a shard with these members; a key's second sample as KEY+."""
    raw = archive([(name, b"1") for name in names], FORMATS["gnu"])
    found: dict[str, tuple[set[str], list[str]]] = {}
    for sample in scan_shard(raw[: 1024 * len(names) - cut] if cut else raw, shard="x"):
        name = sample.key + "+" if sample.key in found else sample.key
        found[name] = set(sample.members), [fault.reason for fault in sample.faults]
    return found


@settings(max_examples=60, deadline=None)
@given(st.permutations([f"{key}.{suffix}" for key, suffixes in SAMPLES.items() for suffix in suffixes]))
def test_members_of_a_sample_are_found_in_any_order(names: list[str]) -> None:
    assert scanned(names) == {key: (set(suffixes), []) for key, suffixes in SAMPLES.items()}


def test_faults_among_members_that_lie_apart_hit_every_sample_that_may_lack_something() -> None:
    apart = ["a.jpg", "b.jpg", "c.jpg", "a.txt", "b.txt", "c.txt"]
    # Cut within the last member but one: nobody can say what came behind it.
    assert scanned(apart, cut=1024 + 512) == {
        "a": ({"jpg", "txt"}, []),
        "b": ({"jpg"}, ["truncated"]),
        "c": ({"jpg"}, ["truncated"]),
    }
    # A key that is there twice: whose the scattered members are cannot be said.
    twice = scanned(["a.jpg", "b.jpg", "a.txt", "b.txt", "a.jpg"])
    assert twice == {
        "a": ({"jpg", "txt"}, ["duplicate_key"]),
        "b": ({"jpg", "txt"}, []),
        "a+": ({"jpg"}, ["duplicate_key"]),
    }
    assert scanned(["a.jpg", "a.txt", "b.jpg", "a.jpg", "a.txt"]) == {
        "a": ({"jpg", "txt"}, []),
        "b": ({"jpg"}, []),
        "a+": ({"jpg", "txt"}, ["duplicate_key"]),
    }


def test_a_finding_survives_the_way_between_processes() -> None:
    import pickle

    error = BadSample("broken_image", "cut at byte 7", shard="s.tar", key="k", member="k.png")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "s.tar: k.png: broken_image: cut at byte 7"
    assert (copy.reason, copy.shard, copy.key, copy.member) == ("broken_image", "s.tar", "k", "k.png")
