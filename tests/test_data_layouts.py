"""WebDatasets in the layouts that others write: the same samples in place and copied, each of its true class."""

import io
import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import webdataset
from manifests import commit_corpus
from PIL import Image

from data.loading import ImageShards
from data.manifest import FileEntry
from data.sources import WebDatasetConfig
from data.transforms import ImageViewConfig, view_image
from pipelines.prepare_corpus import PrepareCorpusConfig, shard_makers, view_at_reading

NUMBERS = range(24)
CLASSES = ("ant", "bee", "cat")
VIEW = ImageViewConfig(resolution=8)


def picture(number: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (10 * number, 255 - 10 * number, 60)).save(buffer, form, quality=95)
    return buffer.getvalue()


class Layout(NamedTuple):
    """Shards by name: the members of each sample, its key and its suffixes, and how they are packed."""

    shards: str  # with {} for a number
    sample: Callable[[int], dict[str, bytes]]
    tar: tuple[str, ...] = ()  # options of GNU tar; without any, webdataset's writer packs
    options: Mapping[str, Any] = {}
    left_out: Mapping[str, int] = {}
    caption: Callable[[int], str] = "picture {}".format


def as_json(number: int, **more: Any) -> bytes:
    return json.dumps({"key": f"{number:09d}", "status": "success", "width": 12, **more}, indent=4).encode()


def image_text(number: int, key: str = "{:09d}", suffix: str = "jpg", **more: Any) -> dict[str, bytes]:
    name, form = key.format(number), {"webp": "WEBP", "png": "PNG"}.get(suffix, "JPEG")
    caption = f"picture {number}".encode()
    return {f"{name}.{suffix}": picture(number, form), f"{name}.txt": caption, f"{name}.json": as_json(number, **more)}


def image_class(number: int, key: str = "{:07d}", suffix: str = "jpg") -> dict[str, bytes]:
    name, form = key.format(number), "WEBP" if suffix == "webp" else "JPEG"
    return {f"{name}.{suffix}": picture(number, form), f"{name}.cls": b"%d" % (number % 3)}


def segmentation(number: int) -> dict[str, bytes]:
    name = f"{number:06d}"
    others = {"mask.webp": picture(0, "WEBP"), "seg.png": picture(0, "PNG"), "caption": b"a", "meta.json": b"{}"}
    return image_class(number, "{:06d}") | {f"{name}.{suffix}": payload for suffix, payload in others.items()}


def without_some_captions(number: int) -> dict[str, bytes]:
    """As img2dataset writes what has no caption, and numbers that pandas lacks."""
    members = image_text(number, punsafe=float("nan"))
    return {name: b"" if name.endswith(".txt") and number % 2 else payload for name, payload in members.items()}


LAYOUTS = {
    "img2dataset": Layout("{:05d}.tar", without_some_captions, caption=lambda n: "" if n % 2 else f"picture {n}"),
    "LAION, as webp": Layout("{:05d}.tar", lambda n: image_text(n, suffix="webp", similarity=0.3)),
    "DataComp": Layout("{:08d}.tar", lambda n: image_text(n, "{:032x}", uid=f"{n:032x}", face_bboxes=[[0, 0, 1, 1]])),
    "CC12M, keys with folders": Layout("cc12m-train-{:04d}.tar", lambda n: image_text(n, "00000/{:09d}")),
    "torchtitan's test": Layout("cc12m-train-{:04d}.tar", lambda n: dict(sorted(image_text(n).items())[::-1])),
    "webdataset's ImageNet": Layout("imagenet-train-{:06d}.tar", image_class, options={"classes": CLASSES}),
    "webdataset's OpenImages": Layout(
        "openimages-train-{:06d}.tar",
        lambda n: {f"{n:016x}.jpg": picture(n), f"{n:016x}.json": b'{"n": 1}'},
        tar=("--format=ustar",),
        caption=lambda n: "",
    ),
    "CLIP benchmark": Layout(
        "{}.tar", lambda n: image_class(n, "s{:07d}", "webp"), ("--format=gnu",), {"classes": CLASSES}
    ),
    "a folder that was not sorted": Layout(
        "photos-{}.tar", image_class, ("--format=pax",), {"classes": CLASSES}, {"README": 2, "hidden files": 2}
    ),
    "tar of Unix v7": Layout("old-{}.tar", image_class, ("--format=v7",), {"classes": CLASSES}),
    "masks and captions by other names": Layout(
        "seg-{}.tar.gz",
        segmentation,
        ("--gzip",),
        {"classes": CLASSES},
        {".mask.webp": 24, ".seg.png": 24, ".caption": 24, ".meta.json": 24},
    ),
}


def write_shards(layout: Layout, folder: Path) -> None:
    for shard, numbers in enumerate((NUMBERS[:12], NUMBERS[12:])):
        target = folder / layout.shards.format(shard)
        if not layout.tar:
            with webdataset.TarWriter(str(target), encoder=False) as writer:
                for number in numbers:
                    members = {name.partition("."): payload for name, payload in layout.sample(number).items()}
                    (key,) = {stem for stem, _, _ in members}
                    writer.write({"__key__": key, **{suffix: data for (_, _, suffix), data in members.items()}})
            continue
        files = folder / f"files-{shard}"
        files.mkdir()
        for name, payload in [pair for number in numbers for pair in layout.sample(number).items()]:
            (files / name).write_bytes(payload)
        names = sorted(path.name for path in files.iterdir())
        if layout.left_out.keys() & {"README"}:
            for name in ("README", "._0000000.jpg"):
                (files / name).write_bytes(b"made by hand")
            # All images, then all labels: a folder lists its files in any order.
            names = [".", "README", "._0000000.jpg", *sorted(names, key=lambda name: name.partition(".")[::-1])]
        words = [*layout.tar, "--no-recursion", *(f"./{name}" for name in names)]
        subprocess.run(["tar", "--create", "--file", str(target), *words], cwd=files, check=True)


def taken_in(source: WebDatasetConfig, folder: Path) -> list[tuple[int, str, bytes]]:
    """Prepare a corpus as the stage does; return label, caption and pixels of every sample, in one order."""
    config = PrepareCorpusConfig(source=source, view=VIEW, samples_per_shard=5)
    folder.mkdir()
    opened = source.open()
    results = [make() for make in shard_makers(config, opened, folder).values()]
    entries = [FileEntry(**result["entry"]) for result in results if result["entry"]["samples"]]
    more = {} if opened.copied else view_at_reading(config)
    manifest = commit_corpus(folder, entries, resolution=VIEW.resolution, channels=VIEW.channels, **more)
    found = []
    for split in ("train", "val"):
        images = ImageShards(folder, split=split, manifest=manifest)
        batch = images.read(np.arange(len(images)), carry=True)
        found += zip(batch.labels.tolist(), batch.captions, [image.tobytes() for image in batch.images], strict=True)
    return sorted(found)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_shards_of_every_layout_are_read_in_place_and_copied(
    kind: str, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTLINE_CACHE", str(tmp_path / "cache"))
    layout = LAYOUTS[kind]
    write_shards(layout, tmp_path)
    source = WebDatasetConfig(urls=(f"{tmp_path}/*.tar*",), val_fraction=0.3, copied=copied, **layout.options)
    assert source.open().left_out == layout.left_out
    expected = []
    for number in NUMBERS:
        image = next(payload for name, payload in layout.sample(number).items() if name.endswith((".jpg", ".webp")))
        label, caption = (number % 3, "") if layout.options else (-1, layout.caption(number))
        expected.append((label, caption, view_image(image, VIEW).tobytes()))
    assert taken_in(source, tmp_path / "corpus") == sorted(expected)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"a": NaN, "b": [Infinity, -Infinity]}',
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": "\\ud800"}',
        b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"a": 1e999}',
        b"{'a': 1}",
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_json_is_judged_alike_in_place_and_copied(payload: bytes, tmp_path: Path) -> None:
    layout = Layout("{}.tar", lambda n: {f"{n}.jpg": picture(n), f"{n}.json": payload})
    write_shards(layout, tmp_path)
    verdicts = []
    for copied in (False, True):
        source = WebDatasetConfig(urls=(f"{tmp_path}/*.tar",), val_fraction=0.3, copied=copied)
        config = PrepareCorpusConfig(source=source, view=VIEW, bad_samples="quarantine")
        (tmp_path / str(copied)).mkdir()
        results = [make() for make in shard_makers(config, source.open(), tmp_path / str(copied)).values()]
        verdicts.append(
            (sum(r["entry"]["samples"] for r in results), {q["reason"] for r in results for q in r["quarantined"]})
        )
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] in ((len(NUMBERS), set()), (0, {"bad_json"}))
