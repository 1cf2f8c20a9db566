"""The tar scanner against the standard library's, for every format that shards come in."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.samples import BadSample
from data.shards.scan import scan_shard, split_name
from data.shards.tar import Fault, Member, scan_tar

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


def test_a_finding_survives_the_way_between_processes() -> None:
    import pickle

    error = BadSample("broken_image", "cut at byte 7", shard="s.tar", key="k", member="k.png")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "s.tar: k.png: broken_image: cut at byte 7"
    assert (copy.reason, copy.shard, copy.key, copy.member) == ("broken_image", "s.tar", "k", "k.png")
