"""The data plane: latents and images from shards, against webdataset, a plain copy and processes."""

import multiprocessing
from dataclasses import replace
from io import BytesIO
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from data.loading import COLD_READS, ImageShards, LatentShards
from data.manifest import CorpusManifest, ImageShape, write_manifest
from data.order.order import FullShuffleConfig, Order
from data.prefetch import Prefetch
from data.transforms import DEFAULT_MAX_PIXELS, ImageViewConfig
from pipelines.tools.benchmarks.paired_timing import Comparison, Job, compare
from pipelines.tools.benchmarks.shards import picture, write_latents, write_shards
from pipelines.tools.benchmarks.stages import Setup

BATCH = 256
DECODE_BATCH = 8


def latents(setup: Setup) -> Comparison:
    """Moments of 16 KB in shuffled batches of 256, against plain webdataset, which reads them in order."""
    reader, order = _latents_in_order(setup.folder, side=32)
    total, passes = len(reader), 8  # many passes: ours alone would be over too soon

    def theirs() -> dict[str, np.ndarray]:
        stream = webdataset.WebDataset(_paths_in(setup.folder), shardshuffle=False).decode()
        batches = stream.to_tuple("__key__", "latent.npy", "cls").batched(BATCH)
        return {key: row for keys, rows, _ in batches for key, row in zip(keys, rows, strict=True)}

    def ours(num_passes: int = passes) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for first in range(0, num_passes * total, BATCH):
            batch = reader.read(order.indices(first, BATCH))
            found = {} if num_passes > 1 else found
            found.update(zip(batch.keys, batch.moments, strict=True))
        return found

    check_same(ours(1), theirs())
    return compare({"ours": Job(ours, passes * total), "theirs": Job(theirs, total)}, rounds=setup.rounds)


def copying(setup: Setup) -> Comparison:
    """Moments of 64 KB in shuffled batches, against one copy of as many bytes from array to array; GB/s."""
    reader, order = _latents_in_order(setup.folder, side=64)
    total = len(reader)
    source = np.ones((total, *reader.moments_shape), dtype=np.float16)
    target = np.empty_like(source)

    def ours() -> None:
        for first in range(0, total, BATCH):
            reader.read(order.indices(first, BATCH))

    def theirs() -> None:
        np.copyto(target, source)

    for _ in range(COLD_READS * BATCH // total):  # until the reader knows that all is in memory
        ours()
    gigabytes = source.nbytes / 1e9
    return compare({"ours": Job(ours, gigabytes), "theirs": Job(theirs, gigabytes)}, rounds=setup.rounds)


def jpegs(setup: Setup) -> Comparison:
    """JPEGs of 512 pixels as squares of 256, against webdataset's decoder and Pillow's resize."""
    _write_jpegs(setup.folder)
    reader = _jpeg_reader(setup.folder)
    total = len(reader)
    order = Order(FullShuffleConfig(), num_samples=total, seed=0)

    def square(image: Image.Image) -> np.ndarray:
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        box = (left, top, left + short, top + short)
        return np.asarray(image.resize((256, 256), Image.Resampling.LANCZOS, box=box))

    def theirs() -> dict[str, np.ndarray]:
        stream = (
            webdataset.WebDataset(_paths_in(setup.folder), shardshuffle=False).decode("pil").to_tuple("__key__", "jpg")
        )
        return {key: square(image) for key, image in stream}

    def ours() -> dict[str, np.ndarray]:
        batch = reader.read(order.indices(0, total))
        return dict(zip(batch.keys, batch.images, strict=True))

    # Scaled decoding averages in the frequency domain: near to Lanczos in every image, not equal.
    check_same(ours(), theirs(), within=4.0)
    return compare({"ours": Job(ours, total), "theirs": Job(theirs, total)}, rounds=setup.rounds)


def threads(setup: Setup) -> Comparison:
    """JPEGs of 512 pixels as squares of 256 in two threads, as training has it, against two processes.

    Nothing is held against the processes: they have been started, and write their pixels to shared memory.
    """
    _write_jpegs(setup.folder)
    reader = _jpeg_reader(setup.folder)
    total, num_batches = len(reader), len(reader) // DECODE_BATCH
    shape = (total, 256, 256, 3)

    def ours() -> dict[str, np.ndarray]:
        with Prefetch(lambda number: _decoded(reader, number), depth=4, threads=2, pin=False) as batches:
            found = [next(batches).batch for _ in range(num_batches)]
        return {str(number): batch for number, batch in enumerate(found)}

    shared = SharedMemory(create=True, size=int(np.prod(shape)))
    workers = multiprocessing.get_context("spawn").Pool(2, _start_worker, (setup.folder, shared.name, shape))
    try:
        pixels = np.ndarray(shape, dtype=np.uint8, buffer=shared.buf)

        def theirs() -> dict[str, np.ndarray]:
            workers.map(_decode_in_worker, range(num_batches), chunksize=1)
            return {str(number): pixels[_rows(number)] for number in range(num_batches)}

        check_same(ours(), theirs())
        return compare({"ours": Job(ours, total), "theirs": Job(theirs, total)}, rounds=setup.rounds)
    finally:
        workers.terminate()
        workers.join()
        pixels = None  # type: ignore[assignment]  # the memory cannot be closed while an array looks at it
        shared.unlink()


def _jpeg_reader(folder: Path) -> ImageShards:
    return ImageShards(folder, split="train", cache_bytes=0)


def _rows(number: int) -> slice:
    return slice(number * DECODE_BATCH, (number + 1) * DECODE_BATCH)


def _decoded(reader: ImageShards, number: int) -> np.ndarray:
    return reader.read(np.arange(len(reader))[_rows(number)]).images


_worker: dict[str, Any] = {}  # what a worker process has opened


def _start_worker(folder: Path, name: str, shape: tuple[int, ...]) -> None:
    memory = SharedMemory(name)
    pixels = np.ndarray(shape, dtype=np.uint8, buffer=memory.buf)
    _worker.update(reader=_jpeg_reader(folder), memory=memory, pixels=pixels)


def _decode_in_worker(number: int) -> None:
    _worker["pixels"][_rows(number)] = _decoded(_worker["reader"], number)


def _latents_in_order(folder: Path, *, side: int) -> tuple[LatentShards, Order]:
    """Write latents of ``side`` pixels; return their reader and a shuffled order of them."""
    write_latents(folder, shape=(4, side, side), per_shard=512)
    reader = LatentShards(folder, split="train")
    return reader, Order(FullShuffleConfig(), num_samples=len(reader), seed=0)


def _write_jpegs(folder: Path) -> None:
    def members(number: int) -> dict[str, bytes]:
        buffer = BytesIO()
        Image.fromarray(picture(number, 512)).save(buffer, "JPEG", quality=90)
        return {"jpg": buffer.getvalue(), "cls": b"1"}

    # With an address, as shards of others have it: only these are brought to the size of the view.
    whole = write_shards(folder, per_shard=32, members=members)
    whole["files"] = tuple(replace(entry, url=str(folder / entry.name)) for entry in whole["files"])
    shape = ImageShape(resolution=256, channels=3)
    whole |= {"stage": "prepare_corpus", "view": ImageViewConfig(resolution=256), "max_pixels": DEFAULT_MAX_PIXELS}
    manifest = CorpusManifest(**whole, value_range=(0, 255), image=shape)
    write_manifest(folder, manifest)


def _paths_in(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def check_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], *, within: float = 0.0) -> None:
    """Refuse to time two sides that did not read the same; ``within`` is the mean difference allowed, in levels."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"The two sides read different samples: {len(ours)} and {len(theirs)}.")
    for key, value in ours.items():
        if value.shape != theirs[key].shape:
            raise ValueError(f"{key} differs: {value.shape} and {theirs[key].shape}.")
        apart = np.abs(value.astype(np.float32) - theirs[key].astype(np.float32)).mean()
        if apart > within:
            raise ValueError(f"{key} differs by {apart:.3g} on average, at most {within:g} is allowed.")
