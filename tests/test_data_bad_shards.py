"""A generator of bad shards, and the law they are held to: a clear error, or an exact count; never silence."""

import functools
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from manifests import commit_corpus
from PIL import Image

from data.loading import ImageShards
from data.manifest import Counts, FileEntry
from data.samples import BadSample, encode_png
from data.shards.tar import scan_tar
from data.shards.writer import ShardWriter
from data.sources import WebDatasetConfig
from data.sources.source import said_left_out
from data.transforms import FILTER_REASONS, ImageViewConfig, view_sample
from pipelines.prepare_corpus import PrepareCorpusConfig, shard_makers, view_at_reading
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.stage.quarantine import files_and_counts, settle_quarantine

SAMPLES = 7
PLACES = {"start": 0, "middle": 3, "end": 6}
CLASSES = ("even", "odd")
VIEW = ImageViewConfig(resolution=8, channels=3, max_aspect=100, min_side=2)


class Entry(NamedTuple):
    """A member to be written: name, content, and tarfile's type."""

    name: str
    payload: bytes
    kind: bytes = tarfile.REGTYPE


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@functools.cache
def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def clean_sample(number: int, *, prefix: str = "b") -> list[Entry]:
    key = f"{prefix}{number:04d}"
    return [
        Entry(f"{key}.png", picture(number)),
        Entry(f"{key}.cls", b"%d" % (number % 2)),
        Entry(f"{key}.txt", f"number {number}".encode()),
        Entry(f"{key}.json", b'{"n": %d}' % number),
    ]


@functools.lru_cache(maxsize=512)  # most are those of clean samples
def header_and_payload(entry: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
    info = tarfile.TarInfo(entry.name)
    info.type = entry.kind
    if entry.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = "/etc/passwd"
    info.size = len(entry.payload)
    return info.tobuf(form) + entry.payload + bytes(-len(entry.payload) % 512)


def tar_of(samples: list[list[Entry]], form: int = tarfile.PAX_FORMAT) -> bytes:
    body = b"".join(header_and_payload(entry, form) for sample in samples for entry in sample)
    return body + bytes(1024) + bytes(-(len(body) + 1024) % 10240)


def clean_samples() -> list[list[Entry]]:
    return [clean_sample(number) for number in range(SAMPLES)]


Expected = dict[str, int]
Bad = tuple[bytes, Expected, int]  # the shard, bad samples by reason, good samples left in it


def with_member(place: int, suffix: str, change: Callable[[Entry], Entry | None], reason: str) -> Bad:
    """Change or drop one member of one sample; the others stay good."""
    samples = clean_samples()
    changed = [change(entry) if entry.name.endswith(suffix) else entry for entry in samples[place]]
    samples[place] = [entry for entry in changed if entry is not None]
    return tar_of(samples), {reason: 1}, SAMPLES - 1


def with_payload(place: int, suffix: str, payload: bytes, reason: str) -> Bad:
    return with_member(place, suffix, lambda entry: entry._replace(payload=payload), reason)


def with_renamed(place: int, old: str, new: str, reason: str) -> Bad:
    return with_member(place, old, lambda entry: entry._replace(name=entry.name.replace(old, new)), reason)


def with_extra(place: int, entry: Entry, reason: str, *, good: int = SAMPLES) -> Bad:
    """Put one more member between samples ``place`` and ``place + 1``."""
    samples = clean_samples()
    samples[place] = [*samples[place], entry]
    return tar_of(samples), {reason: 1}, good


def start_of(place: int, member: int = 0, *, form: int = tarfile.PAX_FORMAT) -> int:
    """Return the byte at which a member's header starts in the clean shard."""
    entries = [entry for sample in clean_samples()[:place] for entry in sample] + clean_samples()[place][:member]
    return sum(len(header_and_payload(entry, form)) for entry in entries)


def cut_between_samples(place: int) -> Bad:
    return tar_of(clean_samples())[: start_of(place, 0)], {"truncated": 1} if place else {"empty_file": 1}, place


def cut_between_members(place: int) -> Bad:
    # Of a shard with a single, cut sample nobody can say which members are missing: the cut counts on its own.
    reasons = {"truncated": 1} if place else {"truncated": 1, "missing_label": 1}
    return tar_of(clean_samples())[: start_of(place, 1)], reasons, place


def cut_in_header(place: int) -> Bad:
    reasons = {"truncated": 1} if place else {"truncated": 1, "missing_label": 1}
    return tar_of(clean_samples())[: start_of(place, 1) + 200], reasons, place


def cut_in_payload(place: int) -> Bad:
    return tar_of(clean_samples())[: start_of(place, 0) + 512 + 40], {"truncated": 1}, place


def corrupt_header(place: int, member: int) -> Bad:
    raw = bytearray(tar_of(clean_samples()))
    raw[start_of(place, member) + 10] ^= 0xFF
    return bytes(raw), {"damaged_header": 1}, SAMPLES - 1


def whole_sample_lost(place: int) -> Bad:
    raw = bytearray(tar_of(clean_samples()))
    for member in range(4):
        raw[start_of(place, member) + 10] ^= 0xFF
    # One fault a lost header, none of which hit a sample that can still be seen.
    return bytes(raw), {"damaged_header": 1}, SAMPLES - 1


def bad_size_field(place: int) -> Bad:
    raw = bytearray(tar_of(clean_samples()))
    at = start_of(place, 1)
    header = tarfile.TarInfo.frombuf(bytes(raw[at : at + 512]), "utf-8", "strict")
    header.size = 1 << 40
    raw[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    return bytes(raw), {"truncated": 1}, place


def flipped_payload_bit(place: int) -> Bad:
    raw = bytearray(tar_of(clean_samples()))
    raw[start_of(place, 0) + 512 + 60] ^= 0x10
    return bytes(raw), {"broken_image": 1}, SAMPLES - 1


def trailing_data(place: int) -> Bad:
    return tar_of(clean_samples()) + tar_of([clean_sample(100 + place)]), {"trailing_data": 1}, SAMPLES


def duplicate_near(place: int) -> Bad:
    samples = clean_samples()
    samples[place] = samples[place] * 2
    return tar_of(samples), {"duplicate_member": 1}, SAMPLES - 1


def duplicate_far(place: int) -> Bad:
    return tar_of([*clean_samples(), clean_sample(99), clean_sample(place)]), {"duplicate_key": 1}, SAMPLES + 1


def duplicate_across_shards(place: int) -> Bad:
    samples = clean_samples()
    samples[place] = clean_sample(place, prefix="a")
    return tar_of(samples), {"duplicate_key": 1}, SAMPLES - 1


def pax_sparse(place: int) -> Bad:
    samples = clean_samples()
    raw = tar_of(samples)
    info = tarfile.TarInfo("huge.png")
    info.size, info.pax_headers = 512, {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(1 << 40)}
    at = start_of(place, 0)
    return raw[:at] + info.tobuf(tarfile.PAX_FORMAT) + bytes(512) + raw[at:], {"sparse": 1}, SAMPLES


def gnu_sparse(place: int) -> Bad:
    raw = tar_of(clean_samples())
    info = tarfile.TarInfo("huge.png")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = 1  # one continuation header follows
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    at = start_of(place, 0)
    return raw[:at] + bytes(header) + bytes(1024) + raw[at:], {"sparse": 1}, SAMPLES


def raw_name(place: int, name: bytes, reason: str) -> Bad:
    """Rewrite the name in a member's header, checksum included."""
    raw = bytearray(tar_of(clean_samples(), tarfile.USTAR_FORMAT))
    at = start_of(place, 0, form=tarfile.USTAR_FORMAT)
    header = bytearray(raw[at : at + 512])
    header[:100] = name.ljust(100, b"\0")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    raw[at : at + 512] = header
    return bytes(raw), {reason: 1}, SAMPLES - 1


def bomb(width: int, height: int) -> bytes:
    """A PNG that leases to be huge, with sound checksums."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/latentline-was-executed",)


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


KINDS: dict[str, Callable[[int], Bad]] = {
    "cut between samples": cut_between_samples,
    "cut between the members of a sample": cut_between_members,
    "cut in a header": cut_in_header,
    "cut in a payload": cut_in_payload,
    "corrupt header of the first member": lambda place: corrupt_header(place, 0),
    "corrupt header of a middle member": lambda place: corrupt_header(place, 1),
    "corrupt header of the last member": lambda place: corrupt_header(place, 3),
    "size field beyond the file": bad_size_field,
    "flipped bit in a payload": flipped_payload_bit,
    "a second archive behind the first": trailing_data,
    "empty file": lambda place: (b"", {"empty_file": 1}, 0),
    "not a tar": lambda place: (b"<html>404 not found</html>" * 500, {"not_a_tar": 1}, 0),
    "zip under the name tar": lambda place: (b"PK\3\4" + bytes(2000), {"not_a_tar": 1}, 0),
    "gzip under the name tar": lambda place: (gzip.compress(tar_of(clean_samples())), {"gzip": 1}, 0),
    "pax sparse member": pax_sparse,
    "GNU sparse member": gnu_sparse,
    "duplicate key, next to it": duplicate_near,
    "duplicate key, far away": duplicate_far,
    "duplicate key in another shard": duplicate_across_shards,
    "missing image": lambda place: with_member(place, ".png", lambda e: None, "missing_image"),
    "missing label": lambda place: with_member(place, ".cls", lambda e: None, "missing_label"),
    "missing caption": lambda place: with_member(place, ".txt", lambda e: None, "missing_caption"),
    "failed download": lambda place: with_member(place, ".png", lambda e: None, "missing_image"),
    "image behind a second dot": lambda place: with_extra(place, Entry("photo.1.png", picture(1)), "missing_image"),
    "image of an unknown suffix": lambda place: with_renamed(place, ".png", ".heic", "missing_image"),
    "broken PNG": lambda place: with_payload(place, ".png", picture(1)[:-30], "broken_image"),
    "broken JPEG": lambda place: with_payload(
        place, ".png", encoded(Image.effect_noise((64, 64), 90), "JPEG")[:400], "broken_image"
    ),
    "text as an image": lambda place: with_payload(place, ".png", b"not an image", "not_an_image"),
    "empty image": lambda place: with_payload(place, ".png", b"", "not_an_image"),
    "executable image format": lambda place: with_payload(
        place, ".png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"
    ),
    "decompression bomb": lambda place: with_payload(place, ".png", bomb(60_000, 60_000), "too_many_pixels"),
    "just over the pixel bound": lambda place: with_payload(place, ".png", bomb(8_001, 8_000), "too_many_pixels"),
    "1 x 1 image": lambda place: with_payload(place, ".png", encoded(Image.new("RGB", (1, 1))), "too_small"),
    "20,000 pixels long": lambda place: with_payload(
        place, ".png", encoded(Image.new("RGB", (20_000, 2))), "extreme_aspect"
    ),
    "float pixels": lambda place: with_payload(place, ".png", encoded(Image.new("F", (8, 8)), "TIFF"), "colour_mode"),
    "32-bit pixels": lambda place: with_payload(place, ".png", encoded(Image.new("I", (8, 8)), "TIFF"), "colour_mode"),
    "Lab colours": lambda place: with_payload(place, ".png", encoded(Image.new("LAB", (8, 8)), "TIFF"), "colour_mode"),
    "animated WebP": lambda place: with_payload(place, ".png", animated("WEBP"), "animated"),
    "animated PNG": lambda place: with_payload(place, ".png", animated("PNG"), "animated"),
    "caption not UTF-8": lambda place: with_payload(place, ".txt", b"caf\xe9", "caption_not_utf8"),
    "empty caption": lambda place: with_payload(place, ".txt", b" \n", "caption_empty"),
    "10 MB caption": lambda place: with_payload(place, ".txt", b"a" * 10_000_000, "member_too_large"),
    "caption with NUL": lambda place: with_payload(place, ".txt", b"a\0b", "caption_has_nul"),
    "negative label": lambda place: with_payload(place, ".cls", b"-1", "label_out_of_range"),
    "label out of range": lambda place: with_payload(place, ".cls", b"2", "label_out_of_range"),
    "label not a number": lambda place: with_payload(place, ".cls", b"cat", "label_not_a_number"),
    "label of many digits": lambda place: with_payload(place, ".cls", b"1" * 60, "label_not_a_number"),
    "empty label": lambda place: with_payload(place, ".cls", b"", "label_not_a_number"),
    "broken json": lambda place: with_payload(place, ".json", b'{"a": ', "bad_json"),
    "json nested too deep": lambda place: with_payload(place, ".json", b"[" * 100_000, "bad_json"),
    "json not an object": lambda place: with_payload(place, ".json", b"[1]", "bad_json"),
    "name that climbs": lambda place: raw_name(place, b"../../b.png", "unsafe_name"),
    "absolute name": lambda place: raw_name(place, b"/tmp/latentline-was-written.png", "unsafe_name"),
    "name with a backslash": lambda place: raw_name(place, b"..\\b.png", "unsafe_name"),
    "name with a control character": lambda place: raw_name(place, b"b\x1b[2J.png", "unsafe_name"),
    "name not UTF-8": lambda place: raw_name(place, b"b\xff\xfe.png", "name_not_utf8"),
    "10,000-character name, pax": lambda place: with_extra(place, Entry("n" * 10_000 + ".png", b""), "long_name"),
    "symbolic link": lambda place: with_extra(place, Entry("link.png", b"", tarfile.SYMTYPE), "link"),
    "hard link": lambda place: with_extra(place, Entry("link.png", b"", tarfile.LNKTYPE), "link"),
    "character device": lambda place: with_extra(place, Entry("device.png", b"", tarfile.CHRTYPE), "device"),
    "named pipe": lambda place: with_extra(place, Entry("pipe.png", b"", tarfile.FIFOTYPE), "device"),
}


def corpus(folder: Path, bad: bytes) -> WebDatasetConfig:
    """A clean shard, the bad one, another clean one, and a validation shard."""
    for name, prefix in {"a": "a", "c": "c", "val": "v"}.items():
        (folder / f"{name}.tar").write_bytes(tar_of([clean_sample(n, prefix=prefix) for n in range(SAMPLES)]))
    (folder / "b.tar").write_bytes(bad)
    return WebDatasetConfig(
        urls=(str(folder / "{a,b,c}.tar"),), val_urls=(str(folder / "val.tar"),), classes=CLASSES, captions="required"
    )


def ingest(config: WebDatasetConfig, out: Path, *, strict: bool = False) -> tuple[int, int, list[BadSample]]:
    """Take in the training split as the stage does; return how many samples went in and came out, and the findings."""
    source = config.open()
    found: list[BadSample] = []
    with ShardWriter(out / "train-000000.tar") as shard:
        for index in range(source.count("train")):
            try:
                sample = source.read("train", index)
                shard.add(sample.key, {"png": encode_png(view_sample(sample, VIEW))})
            except BadSample as error:
                if strict:
                    raise
                found.append(error)
    assert shard.entry is not None
    return source.count("train"), shard.entry.samples, found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bad_input_is_counted_exactly_or_stops_with_its_name(kind: str, tmp_path: Path) -> None:
    for where, place in PLACES.items():
        folder, out = tmp_path / where, tmp_path / where / "out"
        out.mkdir(parents=True)
        bad, reasons, num_good = KINDS[kind](place)
        config = corpus(folder, bad)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

        num_in, num_out, found = ingest(config, out)
        assert Counter(finding.reason for finding in found) == reasons, where
        assert num_out == num_good + 2 * SAMPLES, where
        assert num_in == num_out + len(found), where
        assert all(finding.shard == str(folder / "b.tar") for finding in found), where

        with pytest.raises(BadSample) as stopped:
            ingest(config, out, strict=True)
        assert str(folder / "b.tar") in str(stopped.value)
        assert stopped.value.reason in str(stopped.value)
        assert stopped.value.reason in reasons

        changed = {p for p in tmp_path.rglob("*") if before.get(p) != p.stat().st_mtime_ns}
        changed = {p for p in changed if out not in (p, *p.parents)}
        assert not changed, where
    assert not Path("/tmp/latentline-was-executed").exists()
    assert not Path("/tmp/latentline-was-written.png").exists()


OTHER_MEMBERS = {
    "a mask": (Entry("b0003.mask.webp", picture(1)), ".mask.webp"),
    "a caption by another name": (Entry("b0003.caption", b"a bee"), ".caption"),
    "a program": (Entry("b0003.pyd", pickle.dumps(Trap())), ".pyd"),
    "a pickle of its own": (Entry("trap.pickle", pickle.dumps(Trap())), ".pickle"),
    "a name without an extension": (Entry("README", b"hello"), "README"),
    "a file of macOS": (Entry("__MACOSX/._b0003.png", b"\0\5\x16\7"), "hidden files"),
}


@pytest.mark.parametrize("kind", OTHER_MEMBERS)
def test_members_that_nothing_reads_are_counted_by_suffix_unless_asked_to_be_strict(kind: str, tmp_path: Path) -> None:
    entry, name = OTHER_MEMBERS[kind]
    samples = clean_samples()
    # In the midst of a sample: the others stay together.
    samples[3] = [*samples[3][:2], entry, *samples[3][2:]]
    config = corpus(tmp_path, tar_of(samples))
    assert ingest(config, tmp_path) == (3 * SAMPLES, 3 * SAMPLES, [])
    assert config.open().left_out == {name: 1}
    strict = ingest(config.model_copy(update={"other_members": "refused"}), tmp_path)[2]
    assert "unknown_extension" in {finding.reason for finding in strict}
    assert not Path("/tmp/latentline-was-executed").exists()


def test_what_is_left_out_is_said_and_part_of_the_counts(tmp_path: Path) -> None:
    names = [f"b{number:04d}.caption" for number in range(SAMPLES)] + [f"x.{number}" for number in range(60)]
    samples = [*clean_samples(), [Entry(name, b"") for name in names]]
    left_out = corpus(tmp_path, tar_of(samples)).open().left_out
    assert left_out[".caption"] == SAMPLES
    assert left_out["others"] == 60 - 31, "names without an end must not fill the memory"
    assert said_left_out({".caption": 7, "README": 1}) == "; left out: 7 .caption, 1 README"
    entry = {"name": "train-000000.tar", "bytes": 1, "sha256": "", "samples": 5}
    _, counts = files_and_counts([{"entry": entry}], Counter(missing_image=2), num_in=7, left_out={".caption": 3})
    assert counts == {"in": 10, "out": 5, "quarantined": {"missing_image": 2}, "left_out": {".caption": 3}}
    assert Counts(**counts).left_out == {".caption": 3}


@pytest.mark.parametrize(("kind", "copied"), [(kind, bool(number % 2)) for number, kind in enumerate(KINDS)])
def test_the_stage_settles_every_kind_of_bad_input(kind: str, copied: bool, tmp_path: Path) -> None:
    bad, reasons, num_good = KINDS[kind](PLACES["middle"])
    source = corpus(tmp_path, bad).model_copy(update={"copied": copied})
    inputs = sorted(tmp_path.iterdir())
    records = {}
    for policy in ("quarantine", "strict"):
        folder = tmp_path / policy
        config = PrepareCorpusConfig(source=source, view=VIEW, samples_per_shard=100, bad_samples=policy)
        makers = shard_makers(config, source.open(), folder)
        folder.mkdir()
        if policy == "strict" and not set(reasons) <= FILTER_REASONS:
            with pytest.raises(ConfigError, match=rf"{tmp_path}/b\.tar: .*{next(iter(reasons))}"):
                [make() for make in makers.values()]
            continue
        records = {name: make() for name, make in makers.items()}
    found = Counter(report["reason"] for record in records.values() for report in record["quarantined"])
    assert found == reasons
    assert all(report["shard"] == f"{tmp_path}/b.tar" for r in records.values() for report in r["quarantined"])
    entries = [FileEntry(**record["entry"]) for record in records.values() if record["entry"]["samples"]]
    assert sum(entry.samples for entry in entries) == num_good + 3 * SAMPLES
    # What was let in can be read, every sample of it, in the shards of others as in ours.
    more = {} if copied else view_at_reading(config)
    folder = tmp_path / ("strict" if set(reasons) <= FILTER_REASONS else "quarantine")
    manifest = commit_corpus(folder, entries, resolution=VIEW.resolution, channels=VIEW.channels, **more)
    for split in ("train", "val"):
        images = ImageShards(folder, split=split, manifest=manifest)
        batch = images.read(np.arange(len(images)), carry=True)
        assert batch.images.shape == (len(images), 8, 8, 3)
        assert all(0 <= label < 2 for label in batch.labels)
    assert {path for path in tmp_path.iterdir() if path.name not in ("strict", "quarantine")} == set(inputs)
    assert not Path("/tmp/latentline-was-executed").exists()


def test_the_report_names_every_sample_and_the_budget_stops_the_stage(tmp_path: Path) -> None:
    reasons = ["broken_image"] * 6 + ["too_small"] * 2
    reports = [{"shard": "b.tar", "key": f"k{n}", "member": f"k{n}.png", "reason": r} for n, r in enumerate(reasons)]
    records = [
        {"entry": {"name": name}, "quarantined": part}
        for name, part in (("train-000000.tar", reports[:4]), ("train-000001.tar", []), ("val-000000.tar", reports[4:]))
    ]
    (tmp_path / "parts").mkdir()
    for record in records:
        (tmp_path / "parts" / f"{record['entry']['name']}.json").touch()
    tracker = SimpleNamespace(log_artifact=lambda path: None)
    stage = SimpleNamespace(name="prepare_corpus", folder=tmp_path, is_main=True, tracker=tracker)

    def settle(fraction: float, *, num_in: int) -> Counter[str]:
        return settle_quarantine(stage, records, num_in=num_in, max_bad_fraction=fraction, free=FILTER_REASONS)

    # What the view drops by choice is counted, but is not bad.
    assert settle(0.03, num_in=200) == {"broken_image": 6, "too_small": 2}
    lines = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == reports
    (tmp_path / "quarantine.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"6 of 200 samples are bad .*'broken_image': 6.*max_bad_fraction = 0\.029"):
        settle(0.029, num_in=200)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 8
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["train-000001.tar.json"]
    # A few of a small corpus are within any budget but none.
    records[0]["quarantined"].pop(0)
    assert settle(0.001, num_in=100).total() == 7
    with pytest.raises(ConfigError, match="5 of 100 samples are bad"):
        settle(0, num_in=100)


def test_there_are_at_least_forty_kinds_of_bad_input() -> None:
    assert len(KINDS) >= 40


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("label not a number", "cls"),
        ("caption with NUL", "txt"),
        ("10 MB caption", "txt"),
        ("json not an object", "json"),
        ("broken PNG", "png"),
        ("cut in a payload", "png"),
        ("duplicate key, next to it", "png"),
        ("image of an unknown suffix", "heic"),
    ],
)
def test_findings_name_the_member_at_fault(kind: str, suffix: str, tmp_path: Path) -> None:
    bad, (reason,), _ = KINDS[kind](3)
    with pytest.raises(BadSample, match=rf"^{tmp_path}/b\.tar: b0003\.{suffix}: {reason}: "):
        ingest(corpus(tmp_path, bad), tmp_path, strict=True)


def test_samples_after_damage_are_found_again(tmp_path: Path) -> None:
    raw = bytearray(tar_of(clean_samples()))
    raw[start_of(2, 0) : start_of(4, 2)] = b"\xaa" * (start_of(4, 2) - start_of(2, 0))
    config = corpus(tmp_path, bytes(raw))
    num_in, num_out, found = ingest(config, tmp_path)
    # Samples 2 and 3 left no trace, 4 has lost its image and label: one finding, on the sample that shows it.
    assert [(finding.reason, finding.key) for finding in found] == [("damaged_header", "b0004")]
    assert (num_in, num_out) == (3 * SAMPLES - 2, 3 * SAMPLES - 3)


def test_names_with_the_spaces_and_joiners_of_any_script_are_allowed() -> None:
    names = ["Screenshot at 9\u202fAM.png", "a\u00a0b.png", "\u6771\u3000\u4eac.png", "\U0001f468\u200d\U0001f469.png"]
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())
        assert [found.name for found in scan_tar(buffer.getvalue())] == names


@pytest.mark.parametrize("change", ["vanish", "grow", "shrink"])
def test_a_shard_that_changes_during_the_run_is_named(change: str, tmp_path: Path) -> None:
    source = corpus(tmp_path, tar_of(clean_samples())).open()
    shard = tmp_path / "b.tar"
    if change == "vanish":
        shard.unlink()
    else:
        raw = shard.read_bytes()
        shard.write_bytes(raw + bytes(512) if change == "grow" else raw[:2048])
    reasons: Counter[str] = Counter()
    for index in range(source.count("train")):
        try:
            source.read("train", index)
        except BadSample as error:
            reasons[error.reason] += str(shard) in str(error)
    assert reasons == {"shard_missing" if change == "vanish" else "shard_changed": SAMPLES}


def test_bad_input_costs_little_memory(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS):
        (tmp_path / f"{number}.tar").write_bytes(KINDS[kind](PLACES["middle"])[0])
    # The size of what is leased, not of what is there.
    samples = clean_samples()
    samples[2][0] = samples[2][0]._replace(payload=bomb(20_000, 20_000))
    (tmp_path / "large.tar").write_bytes(tar_of(samples))
    (tmp_path / "val.tar").write_bytes(tar_of([clean_sample(1, prefix="v")]))
    code = """
import sys
from data.samples import BadSample
from data.sources import WebDatasetConfig
from data.transforms import ImageViewConfig, view_image
def peak():  # of this program alone: ru_maxrss begins with that of its parent
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
start = peak()
folder, bad = sys.argv[1], 0
urls = (f"{folder}/[0-9]*.tar", f"{folder}/large.tar")
source = WebDatasetConfig(urls=urls, val_urls=(f"{folder}/val.tar",), captions="required").open()
for index in range(source.count("train")):
    try:
        view_image(source.read("train", index).image, ImageViewConfig(resolution=8))
    except BadSample:
        bad += 1
print(bad, (peak() - start) // 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=200
    )
    bad, mebibytes = map(int, run.stdout.split())
    assert bad > len(KINDS)
    assert mebibytes < 256
