"""The pairs of ``python -m pipelines.tools.benchmark data``: each makes its shards, checks that both sides agree,
and times them."""

import functools
import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from data.files import FolderLock
from data.loading import COLD_READS, ImageShards, LatentShards
from data.manifest import (
    CorpusManifest,
    ImageShape,
    LatentShape,
    LatentsManifest,
    LatentStatistics,
    Parents,
    samples_by_split,
    write_manifest,
)
from data.order.order import FullShuffleConfig, Order
from data.prefetch import Prefetch
from data.samples import image_members, latent_members
from data.shards.writer import ShardWriter
from data.transforms import DEFAULT_MAX_PIXELS, ImageViewConfig, to_unit_range
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from pipelines.encode_latents import SHARDS_AT_ONCE, EncodeLatentsConfig, EncodeLatentsInputs, encode_shard
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.launch import StopSignal, start_accelerator
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.stage.work_items import make_items
from pipelines.runtime.tracking.tracker import SilentTracker
from pipelines.tools.paired_timing import Comparison, compare

BATCH = 256
DECODE_BATCH = 8
NUM_SHARDS = 4


def latents(folder: Path, rounds: int) -> Comparison:
    """Moments of 16 KB in shuffled batches of 256, against plain webdataset, which reads them in order."""
    reader, order = _latents_in_order(folder, side=32)
    total, passes = len(reader), 8  # many passes: ours alone would be over too soon

    def theirs() -> dict[str, np.ndarray]:
        stream = webdataset.WebDataset(_paths_in(folder), shardshuffle=False).decode()
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
    return compare(ours, theirs, units=(passes * total, total), rounds=rounds, clock="cpu")


def copying(folder: Path, rounds: int) -> Comparison:
    """Moments of 64 KB in shuffled batches, against one copy of as many bytes from array to array; GB/s."""
    reader, order = _latents_in_order(folder, side=64)
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
    return compare(ours, theirs, units=(gigabytes, gigabytes), rounds=rounds, clock="cpu")


def jpegs(folder: Path, rounds: int) -> Comparison:
    """JPEGs of 512 pixels as squares of 256, against webdataset's decoder and Pillow's resize."""
    _write_jpegs(folder)
    reader = _jpeg_reader(folder)
    total = len(reader)
    order = Order(FullShuffleConfig(), num_samples=total, seed=0)

    def square(image: Image.Image) -> np.ndarray:
        short = min(image.size)
        left, top = (image.width - short) / 2, (image.height - short) / 2
        box = (left, top, left + short, top + short)
        return np.asarray(image.resize((256, 256), Image.Resampling.LANCZOS, box=box))

    def theirs() -> dict[str, np.ndarray]:
        stream = webdataset.WebDataset(_paths_in(folder), shardshuffle=False).decode("pil").to_tuple("__key__", "jpg")
        return {key: square(image) for key, image in stream}

    def ours() -> dict[str, np.ndarray]:
        batch = reader.read(order.indices(0, total))
        return dict(zip(batch.keys, batch.images, strict=True))

    # Scaled decoding averages in the frequency domain: near to Lanczos in every image, not equal.
    check_same(ours(), theirs(), within=4.0)
    return compare(ours, theirs, units=(total, total), rounds=rounds, clock="cpu")


def threads(folder: Path, rounds: int) -> Comparison:
    """JPEGs of 512 pixels as squares of 256 in two threads, as training has it, against two processes.

    Nothing is held against the processes: they have been started, and write their pixels to shared memory.
    """
    _write_jpegs(folder)
    reader = _jpeg_reader(folder)
    total, num_batches = len(reader), len(reader) // DECODE_BATCH
    shape = (total, 256, 256, 3)

    def ours() -> dict[str, np.ndarray]:
        with Prefetch(lambda number: _decoded(reader, number), depth=4, threads=2, pin=False) as batches:
            found = [next(batches).batch for _ in range(num_batches)]
        return {str(number): batch for number, batch in enumerate(found)}

    shared = SharedMemory(create=True, size=int(np.prod(shape)))
    workers = multiprocessing.get_context("spawn").Pool(2, _start_worker, (folder, shared.name, shape))
    try:
        pixels = np.ndarray(shape, dtype=np.uint8, buffer=shared.buf)

        def theirs() -> dict[str, np.ndarray]:
            workers.map(_decode_in_worker, range(num_batches), chunksize=1)
            return {str(number): pixels[_rows(number)] for number in range(num_batches)}

        check_same(ours(), theirs())
        return compare(ours, theirs, units=(total, total), rounds=rounds, clock="wall")
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


def encoding(folder: Path, rounds: int) -> Comparison:
    """Image shards to latent shards on disk, against the encoder alone on the same batches in memory.

    The encoder runs in as many threads as the stage has, one at a time: in the main thread alone it takes longer.
    """
    corpus = folder / "corpus"
    corpus.mkdir()
    members = functools.partial(image_members, label=1, caption="a picture", metadata={})
    content = _write_shards(corpus, per_shard=32, members=lambda number: members(f"k{number}", _picture(number, 64)))
    shape = ImageShape(resolution=64, channels=3)
    write_manifest(corpus, CorpusManifest(stage="prepare_corpus", **content, value_range=(0, 255), image=shape))
    images = ImageShards(corpus, split="train", cache_bytes=0)
    vae = AutoencoderKL(VAEConfig(channels=(32, 64, 64), norm_groups=8), image_channels=3).eval()
    inputs = EncodeLatentsInputs(corpus=str(corpus), vae="")
    config = EncodeLatentsConfig(run=RunConfig(root=str(folder)), inputs=inputs, batch_size=32)
    stage = _stage(config, folder / "latents")
    total, size = len(images), config.batch_size
    batches = [images.read(np.arange(first, first + size)) for first in range(0, total, size)]
    tensors = [to_unit_range(batch.images) for batch in batches]

    shards, turn, runs = {part.entry.name: part for part in images.shards}, Lock(), itertools.count()

    @torch.no_grad()
    def encode(tensor: Tensor) -> None:
        with turn:
            vae.encode(tensor)

    def theirs() -> None:
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            list(pool.map(encode, tensors))

    def ours() -> None:
        make_items(
            stage,
            list(shards),
            lambda name: encode_shard(config, stage, vae, None, images, shards[name], turn),
            folder=folder / f"records-{next(runs)}",
            at_once=SHARDS_AT_ONCE,
        )

    return compare(ours, theirs, units=(total, total), rounds=rounds, clock="wall")


def _stage(config: EncodeLatentsConfig, folder: Path) -> Stage:
    folder.mkdir()
    run = config.run.model_copy(update={"threads": 1})
    accelerator = start_accelerator(run, precision=config.precision, tf32=config.tf32)
    return Stage(
        name="encode_latents",
        folder=folder,
        config=config,
        parents=Parents(),
        accelerator=accelerator,
        tracker=SilentTracker(),
        stop=StopSignal(folder, accelerator),
        lock=FolderLock(folder),
    )


def _latents_in_order(folder: Path, *, side: int) -> tuple[LatentShards, Order]:
    """Write latents of ``side`` pixels; return their reader and a shuffled order of them."""
    rng = np.random.default_rng(0)

    def members(number: int) -> dict[str, bytes]:
        moments = rng.standard_normal((2, 4, side, side), dtype=np.float32)
        return latent_members(f"k{number}", moments, carried={"cls": b"%d" % (number % 10)})

    shape = LatentShape(channels=4, size=side)
    scaling = LatentStatistics(mean=(0,) * 4, std=(1,) * 4, min=(-5,) * 4, max=(5,) * 4, active=(1,) * 4)
    content = _write_shards(folder, per_shard=512, members=members)
    write_manifest(folder, LatentsManifest(stage="encode_latents", **content, vae="", latent=shape, statistics=scaling))
    reader = LatentShards(folder, split="train")
    return reader, Order(FullShuffleConfig(), num_samples=len(reader), seed=0)


def _write_jpegs(folder: Path) -> None:
    def members(number: int) -> dict[str, bytes]:
        buffer = BytesIO()
        Image.fromarray(_picture(number, 512)).save(buffer, "JPEG", quality=90)
        return {"jpg": buffer.getvalue(), "cls": b"1"}

    # With an address, as shards of others have it: only these are brought to the size of the view.
    whole = _write_shards(folder, per_shard=32, members=members)
    whole["files"] = tuple(replace(entry, url=str(folder / entry.name)) for entry in whole["files"])
    shape = ImageShape(resolution=256, channels=3)
    whole |= {"stage": "prepare_corpus", "view": ImageViewConfig(resolution=256), "max_pixels": DEFAULT_MAX_PIXELS}
    manifest = CorpusManifest(**whole, value_range=(0, 255), image=shape)
    write_manifest(folder, manifest)


def _write_shards(folder: Path, *, per_shard: int, members: Callable[[int], dict[str, bytes]]) -> dict[str, Any]:
    """Write the shards and return what the manifest of any shards holds."""
    files = []
    for shard in range(NUM_SHARDS):
        with ShardWriter(folder / f"train-{shard:06d}.tar") as writer:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                writer.add(f"k{number}", members(number))
        assert writer.entry is not None
        files.append(writer.entry)
    counts = dict.fromkeys(("in", "out"), NUM_SHARDS * per_shard)
    return {"format_version": 1, "counts": counts, "splits": samples_by_split(files), "files": tuple(files)}


def _paths_in(folder: Path) -> list[str]:
    return sorted(map(str, folder.glob("*.tar")))


def _picture(number: int, side: int) -> np.ndarray:
    """Smooth colours with some noise, about as compressible as a photograph; uint8 (side side 3)."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


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
