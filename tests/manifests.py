"""Manifests of shards that a test has written by itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.manifest import (
    CorpusManifest,
    FileEntry,
    LatentsManifest,
    UNetManifest,
    read_manifest,
    samples_by_split,
    write_manifest,
)


def samples(files: Sequence[FileEntry]) -> dict[str, Any]:
    """What the manifest of any shards holds."""
    count = sum(file.samples for file in files)
    return {
        "format_version": 1,
        "counts": {"in": count, "out": count},
        "splits": samples_by_split(files),
        "files": tuple(files),
    }


def commit_corpus(
    folder: Path, files: Sequence[FileEntry], *, resolution: int = 8, channels: int = 3, **more: Any
) -> CorpusManifest:
    """Commit the manifest of image shards."""
    image = {"resolution": resolution, "channels": channels}
    more = {"stage": "prepare_corpus", "value_range": (0, 255), **samples(files), **more}
    write_manifest(folder, CorpusManifest(image=image, **more))
    found = read_manifest(folder)
    assert isinstance(found, CorpusManifest)
    return found


def latents_manifest(
    files: Sequence[FileEntry] = (), *, channels: int = 4, size: int = 4, **more: Any
) -> LatentsManifest:
    """Make the manifest of latent shards whose statistics are those of a standard normal distribution."""
    statistics = {name: (value,) * channels for name, value in
                  {"mean": 0.0, "std": 1.0, "min": -5.0, "max": 5.0, "active": 1.0}.items()}  # fmt: skip
    more = {"stage": "encode_latents", "config": {"flipped": False, "dtype": "float16"}, **samples(files), **more}
    return LatentsManifest(vae="", latent={"channels": channels, "size": size}, statistics=statistics, **more)


def commit_latents(folder: Path, files: Sequence[FileEntry], **more: Any) -> LatentsManifest:
    """Commit the manifest of latent shards."""
    manifest = latents_manifest(files, **more)
    write_manifest(folder, manifest)
    return manifest


def commit_unet(folder: Path, made: dict[str, Any]) -> None:
    """Commit the manifest of a finished U-Net without files; ``made`` holds stage, config and parents."""
    folder.mkdir(exist_ok=True)
    counts = {"in": 0, "out": 0}
    write_manifest(folder, UNetManifest(format_version=1, weights="", vae="", counts=counts, files=(), **made))
