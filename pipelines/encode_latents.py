"""Latent shards from image shards and a VAE: the posterior's moments of every image, and statistics of the whole.

    accelerate launch -m pipelines.encode_latents --config pipelines/configs/demo.toml

Reads: ``runs/NAME/corpus/``, ``runs/NAME/vae/``. Writes: ``runs/NAME/latents/``, one latent shard per image shard, with
``manifest.json``, which holds the VAE's digest and each channel's mean and standard deviation, over mirrored latents
too where they are stored. With a text encoder (``captions``) the features of each caption lie beside its latent, and
the manifest holds the encoder's digest.

Resuming: a killed encoding leaves finished shards, each with its result in ``parts/``, temporary files and leases. The
next start sweeps the last two and encodes the shards without a result.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from data.files import write_atomically
from data.loading import ImageBatch, ImageShards
from data.manifest import (
    AnyVAEManifest,
    CorpusManifest,
    DiffusersVAEManifest,
    FileEntry,
    LatentsManifest,
    samples_by_split,
)
from data.prefetch import Prefetch
from data.samples import BadSample, Split, latent_members
from data.shards.index import ShardIndex
from data.shards.keys import check_unique
from data.shards.split import ShardRange
from data.shards.writer import ShardWriter
from data.statistics import ChannelSums
from data.transforms import VIEW_REVISIONS, to_unit_range
from models.autoencoder.vae import AutoencoderKL
from pipelines.model.captions import CaptionEncoders, CaptionFeaturesConfig, NoTextConfig, encoders_of
from pipelines.model.device import device_of
from pipelines.model.experiment import CorpusFacts, check_later_stages
from pipelines.model.inputs import verify_shards
from pipelines.model.latent_statistics import alarms, statistics_plot
from pipelines.model.weights import encoder_of, load_vae
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import Precision, cores_per_process
from pipelines.runtime.stage.progress import PLAIN_LINE_EVERY_SECONDS, ProgressLine, progress_line
from pipelines.runtime.stage.quarantine import REPORTED, BadSamplePolicy, files_and_counts, settle_quarantine
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.stage.work_items import Result, finished_items, make_items, results_of

SHARDS_AT_ONCE = 2


class EncodeLatentsInputs(BaseModel, frozen=True, extra="forbid"):
    """Images, and the autoencoder that encodes them."""

    corpus: str  # folder of the image shards
    vae: str  # folder of the autoencoder, or of an AutoencoderKL in the format of diffusers


class EncodeLatentsConfig(StageConfig):
    """Encoding of images to stored moments, and of captions to features."""

    fingerprint_ignores = frozenset({"bad_samples", "max_bad_fraction", "decode_threads"})
    # Shards in place are viewed as they are read.
    revisions = (
        *VIEW_REVISIONS,
        "mirrored latents are in the statistics",
        "a byte order mark is no part of a caption",
    )

    inputs: EncodeLatentsInputs  # where the stage reads
    batch_size: PositiveInt = 64  # images of one forward pass; batches never cross a shard's border
    flipped: bool = False  # also store the moments of the mirrored image, for flips during training
    captions: CaptionFeaturesConfig = NoTextConfig()  # what computes the features of captions, for text conditions
    dtype: Literal["float16", "float32"] = "float16"  # of the stored moments and features
    precision: Precision = "float32"  # what the encoder computes in
    tf32: bool = False  # float32 products and convolutions by TF32 on GPUs that have it: faster, 10 bits of fraction
    decode_threads: NonNegativeInt = 0  # images decoded at once by each process; 0 is its share of the cores
    bad_samples: BadSamplePolicy = "strict"  # stop at the first bad sample, or count it and go on
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001  # of all samples, but at least 5; more stop the stage


def main() -> None:
    config = config_from_command_line(EncodeLatentsConfig, table="encode_latents", about=__doc__)
    with running_stage(
        config,
        name="encode_latents",
        precision=config.precision,
        tf32=config.tf32,
        check=lambda parents: check_later_stages(config, stage="encode_latents", corpus=CorpusFacts.of(parents.corpus)),
        joinable=True,
    ) as stage:
        encode(config, stage)


def encode(config: EncodeLatentsConfig, stage: Stage) -> None:
    """Encode every shard that is missing, then account for every sample and measure the whole."""
    # What to encode, and by what.
    device = device_of(stage)
    verify_shards(stage, "corpus")
    with config_error_at("inputs.vae"):
        vae = load_vae(config.inputs.vae, stage.parents.vae, device=device)
    captions: CaptionEncoders | None = None
    if not isinstance(config.captions, NoTextConfig):
        with config_error_at("encode_latents.captions"):
            captions = CaptionEncoders(encoders_of(config.captions), device=device.torch)
    corpus = stage.parents.corpus
    shards = shards_of(config, corpus)
    check_images(corpus, vae)

    # Encode the shards that are missing; while one is read or committed, the other's batches keep the network busy.
    sizes = {name: part.entry.samples for name, (_, part) in shards.items()}
    num_images, turn = sum(sizes.values()), Lock()
    start = sum(sizes[name] for name in finished_items(stage, list(shards)))
    with progress_line("encode_latents", total=num_images, unit="images", start=start, is_main=stage.is_main) as line:
        progress = EncodingProgress(stage, line, num_shards=len(shards), done_before=start)
        make_items(
            stage,
            list(shards),
            lambda name: encode_shard(config, stage, vae, captions, *shards[name], turn),
            sizes=sizes,
            at_once=SHARDS_AT_ONCE,
            after_each=progress.show,
        )
        progress.finish()

    # Account for every sample, and measure the whole.
    results = results_of(stage, list(shards))
    bad = settle_quarantine(stage, results, num_in=num_images, max_bad_fraction=config.max_bad_fraction)
    files, counts = files_and_counts(results, bad, num_in=num_images)
    statistics = ChannelSums.merged(
        ChannelSums.from_json(result["sums"]) for result in results if result["entry"]["name"].startswith("train")
    )
    if stage.is_main:
        with config_error_at("inputs.corpus"):
            audit_keys(stage.folder, shards, results)
        write_atomically(stage.folder / "statistics.png", statistics_plot(statistics))
    stage.tracker.log_image("latents/statistics", stage.folder / "statistics.png", step=0)
    found = alarms(statistics, Path(config.inputs.vae))
    for alarm in found:
        stage.log.info(f"warning: {alarm}")
    stage.tracker.set_tags({"latents.alarms": "; ".join(found) or "none"})
    stage.tracker.log_metrics({"latents/samples": counts["out"], **statistics.metrics("latents")}, step=0)

    # Commit.
    stage.finish(
        LatentsManifest,
        files=files,
        counts=counts,
        splits=samples_by_split(files),
        classes=corpus.classes,
        vae=encoder_of(stage.parents.vae),
        latent={"channels": statistics.num_channels, "size": corpus.image.resolution // vae.factor},
        statistics=latent_statistics(statistics, stage.parents.vae),
        text=captions.about if captions else None,
        **({"alarms": found} if found else {}),
    )
    std = ", ".join(f"{value:.3g}" for value in statistics.std)
    stage.log.info(
        f"{counts['out']} latents in {len(files)} shards, {bad.total()} quarantined; std of the channels: {std}"
    )


class EncodingProgress:
    """Progress and throughput of encoding over all ranks and runs: on a line for people, and as metrics.

    Args:
        stage: The running stage.
        line: Of the images.
        num_shards: Of the corpus.
        done_before: Images that were encoded when this process began.
    """

    def __init__(self, stage: Stage, line: ProgressLine, *, num_shards: int, done_before: int) -> None:
        self._stage, self._line, self._num_shards, self._before = stage, line, num_shards, done_before
        self._began = time.monotonic()
        self._logged = self._began
        self._bytes = self._images = 0

    def show(self, shards: int, done: int, result: Result) -> None:
        """Count a shard that this process made, when ``done`` images in ``shards`` shards are encoded in all."""
        self._bytes += result["entry"]["bytes"]
        self._images += result["entry"]["samples"]
        metrics = self._metrics(shards, done)
        self._line.advance_to(done, {"shards": shards, "MB/s": metrics["progress/mb_per_s"]})
        if time.monotonic() - self._logged >= PLAIN_LINE_EVERY_SECONDS:
            self._logged = time.monotonic()
            self._stage.tracker.log_metrics(metrics, step=done)

    def finish(self) -> None:
        """Log the metrics of the whole."""
        self._stage.tracker.log_metrics(self._metrics(self._num_shards, self._line.total), step=self._line.total)

    def _metrics(self, shards: int, done: int) -> dict[str, float]:
        images_per_s = (done - self._before) / max(time.monotonic() - self._began, 1e-9)
        return {
            "progress/shards": float(shards),
            "progress/images": float(done),
            "progress/images_per_s": images_per_s,
            # Of the others' shards only the number of images is known, so their bytes are estimated from ours.
            "progress/mb_per_s": images_per_s * self._bytes / max(self._images, 1) / 1e6,
            "progress/eta_s": (self._line.total - done) / images_per_s if images_per_s else 0.0,
        }


def audit_keys(folder: Path, shards: Mapping[str, tuple[ImageShards, ShardRange]], results: Sequence[Result]) -> None:
    """Check that each latent shard holds the keys of its image shard, those of bad samples excepted, and each key once.

    Raises:
        ValueError: Naming the shard and a key that is missing or was never there, or two shards that share one.
    """
    # The keys of each image shard, those of bad samples excepted, and no others.
    for result in results:
        entry = FileEntry(**result["entry"])
        images, part = shards[entry.name]
        expected = set(images.index_of(part.entry).keys()) - {report["key"] for report in result["quarantined"]}
        found = set(ShardIndex.of(folder / entry.name, entry=entry).keys())
        if found != expected:
            key = min(found ^ expected)
            what = "is missing" if key in expected else "is new"
            raise ValueError(
                f"{folder / entry.name}: key {key!r} {what}; its latents are not those of its images. Delete "
                f"{folder} and encode again."
            )

    # No key in two shards.
    check_unique(folder, [FileEntry(**result["entry"]) for result in results])


def latent_statistics(statistics: ChannelSums, vae: AnyVAEManifest) -> dict[str, Any]:
    """Return the latents' statistics; a VAE with a scaling of its own, as published ones have, keeps that.

    ``mean`` and ``std`` are what latents are normalised by: a U-Net published with the VAE was trained on them so.
    """
    measured = statistics.summary()
    if not isinstance(vae, DiffusersVAEManifest):
        return measured
    return {
        **measured,
        **vae.normalisation.model_dump(),
        "measured_mean": measured["mean"],
        "measured_std": measured["std"],
    }


def shards_of(config: EncodeLatentsConfig, corpus: CorpusManifest) -> dict[str, tuple[ImageShards, ShardRange]]:
    """Return the shards of the corpus by file name, each with the split that it is read through."""
    threads = config.decode_threads or cores_per_process()
    with config_error_at("inputs.corpus"):
        splits = [
            ImageShards(config.inputs.corpus, split=split, manifest=corpus, cache_bytes=0, threads=threads)
            for split in get_args(Split)
            if corpus.splits[split]
        ]
    return {part.entry.name: (images, part) for images in splits for part in images.shards}


def check_images(corpus: CorpusManifest, vae: AutoencoderKL) -> None:
    """Refuse images that the VAE does not take, before the first is read.

    Raises:
        ConfigError: Channels or resolution do not fit.
    """
    image = corpus.image
    if image.channels != vae.image_channels or image.resolution % vae.factor:
        raise ConfigError(
            f"inputs.vae takes images of {vae.image_channels} channel(s) and sides that are multiples of {vae.factor}; "
            f"inputs.corpus has {image.channels} channel(s) and {image.resolution} pixels. Point inputs.vae at a "
            "VAE trained on such images, or prepare the corpus with another view."
        )


def encode_shard(
    config: EncodeLatentsConfig,
    stage: Stage,
    vae: AutoencoderKL,
    captions: CaptionEncoders | None,
    images: ImageShards,
    part: ShardRange,
    turn: Lock,
) -> dict[str, Any]:
    """Write the latents of one image shard, with its captions' features; return its entry, bad samples and sums.

    Batches have one size, the last one filled up by repetition: a convolution's bits may depend on the batch size.
    """
    # Read batches ahead.
    indices, size = part.indices, config.batch_size
    quarantined, sums = [], ChannelSums.empty(vae.config.latent_channels)
    num_batches = -(-len(indices) // size)

    def read(number: int) -> tuple[ImageBatch, list[BadSample]]:
        unreadable: list[BadSample] = []
        with config_error_at("inputs.corpus"):
            batch = images.read(indices[number * size : (number + 1) * size], bad=unreadable, carry=True)
        return batch, unreadable

    def set_aside(error: BadSample) -> None:
        error = error.at(shard=part.entry.name)
        if config.bad_samples == "strict":
            raise ConfigError(
                f"inputs.corpus: {error}. Mend the sample and prepare the corpus again, or set "
                'encode_latents.bad_samples = "quarantine" to count such samples and go on, up to max_bad_fraction.'
            ) from error
        quarantined.append({name: getattr(error, name) for name in REPORTED})

    # Encode and write batch by batch.
    if captions is not None:
        captions.forget()  # the shard's bytes depend on the shard alone
    with ShardWriter(stage.folder / part.entry.name) as writer, Prefetch(read, depth=2) as batches:
        for _ in range(num_batches):
            batch, unreadable = next(batches).batch
            for error in unreadable:
                set_aside(error)
            if not batch.keys:
                continue
            moments, mirrored = encode_batch(config, stage, vae, batch, turn)
            with turn:
                features = captions(batch.captions) if captions is not None else {}
            sound: list[int] = []
            for row, key in enumerate(batch.keys):
                try:
                    members = latent_members(
                        key,
                        moments[row],
                        flipped=mirrored[row] if mirrored is not None else None,
                        dtype=config.dtype,
                        features={name: values[row] for name, values in features.items()},
                        carried=batch.carried[row],
                    )
                except BadSample as error:
                    set_aside(error.at(key=key))
                    continue
                writer.add(key, members)
                sound.append(row)
            # Training draws mirrored latents, too, so the statistics are those of both.
            stored = moments if mirrored is None else np.stack([moments, mirrored], axis=1)
            sums.add(stored[sound].astype(config.dtype))
    assert writer.entry is not None
    entry = replace(writer.entry, corpus=part.entry.corpus)
    return {"entry": entry.as_json(), "quarantined": quarantined, "sums": sums.to_json()}


@torch.no_grad()
def encode_batch(
    config: EncodeLatentsConfig, stage: Stage, vae: AutoencoderKL, batch: ImageBatch, turn: Lock
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the moments of the images, and of the mirrored ones when wanted; float32 (n 2 c h w). One at a time."""
    count = len(batch.keys)
    images = to_unit_range(np.resize(batch.images, (config.batch_size, *batch.images.shape[1:])))
    images = images.to(stage.accelerator.device)

    def moments(x: Tensor) -> np.ndarray:
        with turn, stage.accelerator.autocast():
            posterior = vae.encode(x)
        return torch.stack([posterior.mean, posterior.log_variance], dim=1)[:count].float().cpu().numpy()

    return moments(images), moments(images.flip(-1)) if config.flipped else None


if __name__ == "__main__":
    main()
