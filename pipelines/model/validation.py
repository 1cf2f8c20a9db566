"""Validation of averaged weights during training: a metric on validation data and a grid of pictures.

A VAE is validated by the PSNR of reconstructions and, after its last update, by two distances to the real images: that
of the reconstructions, and that of what it decodes half-way between latents (iFID; Xu et al. 2026, arXiv:2603.05630,
found it to forecast the distance of a diffusion model's samples). A U-Net is validated by its loss with fixed noise, by
samples and, where asked for, by the distance of a few hundred of them to real images; all on a fixed sample that is
spread over the whole validation split, in the precision of the training.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from pydantic import BaseModel, PositiveInt
from torch import Tensor, nn

from data.files import write_atomically
from data.loading import ImageBatch, ImageShards, LatentBatch, LatentShards
from data.order.order import spread_sample
from data.samples import Split
from data.transforms import to_unit_range
from models.autoencoder.health import high_frequency_share, midpoints
from models.autoencoder.vae import AutoencoderKL, Posterior
from models.denoiser import Denoiser
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig, SamplerConfig
from models.features import FeatureExtractorConfig
from models.latent_diffusion import LatentDiffusion, Normalisation
from models.metrics.fidelity import psnr
from models.metrics.frechet import frechet_distance
from models.metrics.kernel import kernel_distance
from pipelines.model.captions import CaptionFeatures
from pipelines.model.decoded import finite_levels
from pipelines.model.device import Device
from pipelines.model.grids import grid_png, heading
from pipelines.model.noise import noise_of
from pipelines.model.weights import load_vae
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.training.config import TrainingConfig

NUM_VALIDATION_SAMPLES = 256
NUM_RECONSTRUCTIONS = 10  # columns of the grid
NUM_VALIDATION_TIMES = 8
MIN_COMPARED = 3  # images on either side of a distance


def show_grid(stage: Stage, name: str, grid: bytes, *, update: int, shown: str) -> None:
    """Write a PNG as ``grids/NAME-UPDATE.png``, track it, and log it with the metrics ``shown``.

    It is tracked at multiples of ``validate_every``, which trainings of any length share, and the last one under a key
    of its own at step 0. A disk that does not take it costs the picture alone.
    """
    path = stage.folder / "grids" / f"{name}-{update:08}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, grid)
    except OSError as error:  # the next checkpoint, which may have time to spare, decides whether the disk is too full
        stage.log.info(f"update {update}: {shown}; warning: the grid is not written: {error}")
        return
    assert isinstance(stage.config, TrainingConfig)
    if update % stage.config.validate_every == 0:
        stage.tracker.log_image(f"val/{name}", path, step=update)
    if update == stage.config.updates:
        stage.tracker.log_image(f"final/{name}", path, step=0)
    stage.log.info(f"update {update}: {shown}, {path}")


class VAEValidation:
    """Validation of an averaged VAE, on the main process: PSNR on validation images, and a grid of some of them.

    Args:
        stage: The running training.
        corpus_folder: Images that it trains on; those of the validation split are reconstructed.
        images_per_pass: Images that are encoded and decoded at once.
        extractor: Features that distances are measured by.

    Raises:
        ValueError: The folder does not hold the files of its manifest.
    """

    def __init__(
        self, stage: Stage, *, corpus_folder: str, images_per_pass: int, extractor: FeatureExtractorConfig
    ) -> None:
        self.stage, self.images_per_pass, self.extractor = stage, images_per_pass, extractor
        self.corpus = stage.parents.corpus
        self.images: ImageBatch | None = None
        if stage.is_main and self.corpus.splits["val"]:
            shards = ImageShards(corpus_folder, split="val", manifest=self.corpus, scattered=True)
            self.images = shards.read(spread_sample(len(shards), NUM_VALIDATION_SAMPLES))

    @torch.no_grad()
    def validate(self, network: nn.Module, *, update: int) -> dict[str, float]:
        """Return PSNR, scale and spectrum of the latents, and draw the grid; nothing without a validation split.

        After the last update also the distances to the real images.
        """
        if self.images is None:
            return {}
        assert isinstance(network, AutoencoderKL)
        assert isinstance(self.stage.config, TrainingConfig)

        # Reconstruct the posteriors' modes, and compare them as stored pixels.
        stored = torch.from_numpy(self.images.images)
        with self.stage.accelerator.autocast():
            inputs = (
                to_unit_range(part).to(self.stage.accelerator.device) for part in stored.split(self.images_per_pass)
            )
            means = torch.cat([network.encode(part).mode().float() for part in inputs])
        restored = self._decoded(network, means)
        levels, restored_levels = (each.movedim(-1, 1).contiguous() for each in (stored, torch.from_numpy(restored)))
        metrics = {
            "val/psnr": float(psnr(restored_levels, levels).mean()),
            "val/latent_std": float(means.std()),
            "val/high_frequency_share": high_frequency_share(means),
        }

        # Forecast what a diffusion model can make of the latents.
        if update == self.stage.config.updates and len(means) >= MIN_COMPARED:
            extractor = self.extractor.build().to(self.stage.accelerator.device)
            between = torch.from_numpy(self._decoded(network, midpoints(means))).movedim(-1, 1).contiguous()
            real = extractor(levels)
            for name, images in (("reconstruction", restored_levels), ("interpolation", between)):
                distance = frechet_distance(extractor(images), real)
                metrics |= {f"val/{name}_distance": distance.value, f"val/{name}_distance_error": distance.error}

        # Draw some below their originals.
        shown = spread_sample(len(restored), NUM_RECONSTRUCTIONS)
        classes = self.corpus.classes
        grid = grid_png(
            np.stack([self.images.images[shown], restored[shown]]),
            column_labels=[heading(classes[label], label) if label >= 0 else "" for label in self.images.labels[shown]],
            row_labels=("image", "reconstruction"),
            title=f"update {update}: {metrics['val/psnr']:.2f} dB on {len(restored)} validation images",
            folds=True,
        )
        found = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        show_grid(self.stage, "reconstructions", grid, update=update, shown=found)
        return metrics

    def _decoded(self, network: AutoencoderKL, latents: Tensor) -> np.ndarray:
        """Decode the latents of the sample, or between them, to stored pixels."""
        assert self.images is not None
        with self.stage.accelerator.autocast():
            images = torch.cat([network.decode(part).float().cpu() for part in latents.split(self.images_per_pass)])
        precision = self.stage.accelerator.mixed_precision
        return finite_levels(images, names=self.images.keys, stage=self.stage.name, precision=precision)


class GridConfig(BaseModel, frozen=True, extra="forbid"):
    """The sample grid that is drawn during training: one column a class or caption, the same noise in every run."""

    rows: PositiveInt = 4  # samples of each class or caption
    max_columns: PositiveInt = 12  # classes or captions shown
    sampler: SamplerConfig = DDIMConfig(num_steps=25)  # sampler of the grid
    guidance: GuidanceConfig = GuidanceConfig(scale=2.0)  # weight of the condition


class UNetValidation:
    """Validation of an averaged U-Net: loss on validation latents, a grid of samples, and their distance to real ones.

    The distance is that of ``num_samples`` samples to as many decoded validation latents, and sample i has the
    conditions of validation latent i. So what the VAE loses is no part of it. All ranks share this work, the main
    process does the rest.

    Args:
        stage: The running training.
        grid: The grid.
        num_samples: Samples whose distance is measured; 0 measures none.
        extractor: Features that they are compared by.
        latents_folder: Latents that it trains on; those of the validation split are measured.
        vae_folder: Folder of the autoencoder.
        images_per_pass: Latents that are denoised, and images that are drawn, at once.
        device: Device of the networks.
        captions: Features of their captions.

    Raises:
        ValueError: A folder does not hold the files of its manifest.
    """

    def __init__(
        self,
        stage: Stage,
        grid: GridConfig,
        *,
        num_samples: int,
        extractor: FeatureExtractorConfig,
        latents_folder: str,
        vae_folder: str,
        images_per_pass: int,
        device: Device,
        captions: CaptionFeatures,
    ) -> None:
        self.stage, self.grid, self.captions = stage, grid, captions
        self.images_per_pass = images_per_pass
        self.device = device.torch
        self.manifest = stage.parents.latents
        statistics = self.manifest.statistics
        self.normalisation = Normalisation(statistics.mean, statistics.std).to(self.device)
        self.vae = load_vae(vae_folder, stage.parents.vae, device=device)
        has_validation = bool(self.manifest.splits["val"])
        split: Split = "val" if has_validation else "train"
        shards = LatentShards(
            latents_folder,
            split=split,
            manifest=self.manifest,
            features=captions.stored,
            captions=captions.are_read,
        )
        stored = shards.read(spread_sample(len(shards), NUM_VALIDATION_SAMPLES))
        self.validation: tuple[Tensor, dict[str, Tensor]] | None = None
        if has_validation:
            posterior = Posterior(*torch.from_numpy(stored.moments).float().to(self.device).unbind(dim=1))
            self.validation = self.normalisation.draw_normalised(posterior), self._conditions(stored)
        self.heads, self.conditions = self._columns(stored)

        # Real images for the distances, as a perfect U-Net would draw them: from the posteriors.
        self.num_samples = num_samples
        if num_samples:
            self.extractor = extractor.build().to(self.device)
            stored = shards.read(spread_sample(len(shards), num_samples))
            self.sampled_conditions = self._conditions(stored)
            posterior = Posterior(*torch.from_numpy(stored.moments).float().to(self.device).unbind(dim=1))
            rows = range(len(posterior.mean))
            noise = noise_of(0, rows, shape=posterior.mean.shape[1:], device=self.device)("validation posterior")
            latents = posterior.sample(noise)
            self.reference = self._features(len(rows), lambda part: self.vae.decode(latents[part.start : part.stop]))

    def validate(self, network: nn.Module, *, update: int) -> dict[str, float]:
        """Return the validation loss and the samples' distances and draw the grid, on the main process. A collective.

        Other ranks return nothing.
        """
        assert isinstance(network, Denoiser)
        distances = self._distances(network) if self.num_samples else {}
        if not self.stage.is_main:
            return {}
        metrics = self._metrics(network) | distances
        grid = self._picture(network, title=f"update {update}, guidance {self.grid.guidance.scale:g}")
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        show_grid(self.stage, "samples", grid, update=update, shown=shown)
        return metrics

    def _conditions(self, stored: LatentBatch) -> dict[str, Tensor]:
        fields = {"labels": torch.from_numpy(stored.labels), **self.captions.of(stored)}
        return {name: field.to(self.device) for name, field in fields.items()}

    def _columns(self, stored: LatentBatch) -> tuple[list[str], dict[str, Tensor]]:
        """Return the columns of the grid, and their conditions: the classes or, with captions, different captions."""
        if not stored.captions:
            classes = list(self.manifest.classes[: self.grid.max_columns])
            return classes, {"labels": torch.arange(max(len(classes), 1), device=self.device)}
        first_of = {caption: row for row, caption in reversed(list(enumerate(stored.captions)))}
        rows = sorted(first_of.values())
        # Spread over what there is: neighbours in a corpus are often alike.
        chosen = [rows[len(rows) * column // self.grid.max_columns] for column in range(self.grid.max_columns)]
        chosen = sorted(set(chosen))
        conditions = {name: field[chosen] for name, field in self._conditions(stored).items()}
        return [stored.captions[row] for row in chosen], conditions

    @torch.no_grad()
    def _metrics(self, network: Denoiser) -> dict[str, float]:
        """Return the loss on validation latents with fixed noise, at stratified times, and the conditions' effect."""
        if self.validation is None:
            return {}
        x0, conditions = self.validation
        noise = noise_of(0, range(len(x0)), shape=x0.shape[1:], device=self.device)("validation")
        strata = (torch.arange(len(x0)) % NUM_VALIDATION_TIMES + 0.5) / NUM_VALIDATION_TIMES
        times = network.process.time(strata.double()).to(self.device)
        losses, gaps = [], []
        with self.stage.accelerator.autocast():
            for part in torch.arange(len(x0), device=self.device).split(self.images_per_pass):
                given = {name: field[part] for name, field in conditions.items()}
                nothing_dropped = torch.zeros(
                    len(part), len(network.conditioners), dtype=torch.bool, device=self.device
                )
                losses.append(network(x0[part], noise[part], times[part], given, nothing_dropped).loss)
                if len(network.conditioners):
                    gaps.append(network.condition_gap(x0[part], noise[part], times[part], given))
        named = {"val/loss": losses, **({"val/condition_gap": gaps} if gaps else {})}
        return {name: float(torch.cat(values).mean()) for name, values in named.items()}

    def _distances(self, network: Denoiser) -> dict[str, float]:
        """Return the samples' distances to decoded validation latents, with standard errors, on the main process."""
        features = self._features(
            self.num_samples,
            lambda part: self._sampled(network, part, self.sampled_conditions, purpose="validation sample"),
        )
        if not self.stage.is_main:
            return {}
        frechet, kernel = (distance(features, self.reference) for distance in (frechet_distance, kernel_distance))
        return {
            "val/frechet_distance": frechet.value,
            "val/frechet_distance_error": frechet.error,
            "val/kernel_distance": kernel.value,
            "val/kernel_distance_error": kernel.error,
        }

    @torch.no_grad()
    def _features(self, num_images: int, drawn: Callable[[range], Tensor]) -> Tensor:
        """Return the features (n d) of images that are drawn by index, on every rank. A collective.

        Each rank draws whole batches, composed by index: their last bits depend on how many are drawn at once.
        """
        accelerator, size = self.stage.accelerator, self.images_per_pass
        features = torch.zeros(num_images, self.extractor.dimension, device=self.device)
        for first in range(accelerator.process_index * size, num_images, accelerator.num_processes * size):
            part = range(first, min(first + size, num_images))
            with accelerator.autocast():
                images = drawn(part).float().cpu()
            levels = finite_levels(images, names=part, stage=self.stage.name, precision=accelerator.mixed_precision)
            features[first : part.stop] = self.extractor(torch.from_numpy(levels).movedim(-1, 1).contiguous())
        if accelerator.num_processes > 1:
            dist.all_reduce(features)  # of one rank's rows and zeros: nothing is rounded
        return features

    @torch.no_grad()
    def _picture(self, network: Denoiser, *, title: str) -> bytes:
        """Draw samples of every column from the same noise in every run; PNG."""
        rows, columns = self.grid.rows, len(self.conditions["labels"])
        sampled = []
        for first in range(0, rows * columns, self.images_per_pass):
            cells = range(first, min(first + self.images_per_pass, rows * columns))
            with self.stage.accelerator.autocast():
                sampled.append(self._sampled(network, cells, self.conditions, purpose="grid").float().cpu())
        names = [f"row {cell // columns} of column {cell % columns}" for cell in range(rows * columns)]
        images = finite_levels(
            torch.cat(sampled), names=names, stage=self.stage.name, precision=self.stage.accelerator.mixed_precision
        )
        return grid_png(
            images.reshape(rows, columns, *images.shape[1:]), column_labels=self.heads, title=title, folds=True
        )

    def _sampled(self, network: Denoiser, indices: range, conditions: Mapping[str, Tensor], *, purpose: str) -> Tensor:
        """Draw samples by index, the conditions in turn; cells of the grid are numbered row by row."""
        model = LatentDiffusion(autoencoder=self.vae, denoiser=network, normalisation=self.normalisation)
        noise = noise_of(0, indices, shape=network.latent_shape, device=self.device)
        rows = [index % len(conditions["labels"]) for index in indices]
        return model.sample(
            noise(purpose),
            {name: field[rows] for name, field in conditions.items()},
            sampler=self.grid.sampler,
            guidance=self.grid.guidance,
            fresh_noise=lambda step: noise(f"{purpose}/{step}"),
        )
