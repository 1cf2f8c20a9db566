"""Shards to measure with: latents and pictures from a generator of random numbers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.manifest import (
    CorpusManifest,
    ImageShape,
    LatentShape,
    LatentsManifest,
    samples_by_split,
    write_manifest,
)
from data.samples import image_members, latent_members
from data.shards.writer import ShardWriter

NUM_SHARDS = 4
CLASSES = tuple(map(str, range(10)))


def write_latents(
    folder: Path, *, shape: tuple[int, int, int], per_shard: int, features: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Write latents (c h w), with ``features`` of captions of these shapes."""
    rng = np.random.default_rng(0)

    def members(number: int) -> dict[str, bytes]:
        drawn = {name: rng.standard_normal(each, dtype=np.float32) for name, each in (features or {}).items()}
        moments = rng.standard_normal((2, *shape), dtype=np.float32)
        return latent_members(f"k{number}", moments, features=drawn, carried={"cls": b"%d" % (number % len(CLASSES))})

    fields = write_shards(folder, per_shard=per_shard, members=members)
    if features:
        (tokens, width), _ = features.values()
        fields["text"] = {"kind": "pretrained", "encoder": "", "tokens": tokens, "width": width}
    each = {"mean": 0, "std": 1, "min": -5, "max": 5, "active": 1}
    fields["statistics"] = {name: (value,) * shape[0] for name, value in each.items()}
    fields |= {"stage": "encode_latents", "vae": "", "config": {"flipped": False, "dtype": "float16"}}
    fields["latent"] = LatentShape(channels=shape[0], size=shape[1])
    write_manifest(folder, LatentsManifest.model_validate(fields))


def write_images(folder: Path, shape: ImageShape, *, per_shard: int) -> None:
    """Write pictures, losslessly."""

    def members(number: int) -> dict[str, bytes]:
        image = picture(number, shape.resolution)[..., : shape.channels]
        return image_members(f"k{number}", image, label=number % len(CLASSES), caption="a picture", metadata={})

    fields = write_shards(folder, per_shard=per_shard, members=members)
    fields |= {"stage": "prepare_corpus", "config": {"view": None}, "value_range": (0, 255), "image": shape}
    write_manifest(folder, CorpusManifest.model_validate(fields))


def write_shards(folder: Path, *, per_shard: int, members: Callable[[int], dict[str, bytes]]) -> dict[str, Any]:
    """Write the shards and return what the manifest of any shards holds."""
    folder.mkdir(exist_ok=True)
    files = []
    for shard in range(NUM_SHARDS):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                writer.add(f"k{number}", members(number))
        assert writer.entry is not None
        files.append(writer.entry)
    counts = dict.fromkeys(("in", "out"), NUM_SHARDS * per_shard)
    return {
        "format_version": 1,
        "counts": counts,
        "splits": samples_by_split(files),
        "files": tuple(files),
        "classes": CLASSES,
    }


def picture(number: int, side: int) -> np.ndarray:
    """Smooth colours with some noise, about as compressible as a photograph; uint8 (side side 3)."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
