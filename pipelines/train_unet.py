"""From latent shards to a conditional latent U-Net, with per-sample condition dropout and averaged weights.

    accelerate launch -m pipelines.train_unet --config pipelines/configs/demo.toml

Reads: ``runs/NAME/latents/``, and ``runs/NAME/vae/`` to show samples. Writes: ``runs/NAME/unet/`` with
``unet.safetensors`` (averaged weights), ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and sample
grids in ``grids/``.

Shapes: b latents of a process's share, c channels, h and w latent size, k conditioners.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, Field, NonNegativeInt
from torch import Tensor, nn

from data.loading import LatentShards
from data.manifest import LatentShape, Parents, UNetManifest
from data.order.order import FullShuffleConfig, OrderConfig
from data.randomness import SampleDraws
from models.autoencoder.vae import Posterior
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.objective import check_sampling_start
from models.features import FeatureExtractorConfig
from models.features.scattering import ScatteringConfig
from models.latent_diffusion import Normalisation
from pipelines.model.batches import GlobalBatches
from pipelines.model.captions import CaptionFeatures, FeatureSourceConfig, StoredFeaturesConfig
from pipelines.model.device import device_of
from pipelines.model.experiment import check_later_stages
from pipelines.model.inputs import verify_shards
from pipelines.model.start import RandomStart, StartConfig, check_start, load_start
from pipelines.model.validation import MIN_COMPARED, GridConfig, UNetValidation
from pipelines.model.weights import check_same_vae, check_sampler_suits, publish
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.stage.launch import launched_world_size
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.training.config import BatchShare, TrainingConfig
from pipelines.runtime.training.ema import Averages
from pipelines.runtime.training.flops import flops_of
from pipelines.runtime.training.loop import Training
from pipelines.runtime.training.trainable import Trainable


class TrainUNetInputs(BaseModel, frozen=True, extra="forbid"):
    """Inputs of the U-Net's training."""

    latents: str  # folder of the latent shards
    vae: str  # folder of the autoencoder that made them; shows samples


class TrainUNetConfig(TrainingConfig):
    """Configuration of the denoiser and its training."""

    fingerprint_ignores = TrainingConfig.fingerprint_ignores | {"grid", "validate_samples", "extractor", "name"}
    revisions = (
        *TrainingConfig.revisions,
        "validation looks at a sample spread over its whole split, in the training's precision",
        "the strata of the times turn from batch to batch",
    )

    inputs: TrainUNetInputs  # where the stage reads
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""  # NAME writes unet-NAME/; empty unet/
    denoiser: DenoiserConfig = DenoiserConfig()  # network, conditions, process and objective
    start: StartConfig = RandomStart()  # weights to start from
    order: OrderConfig = FullShuffleConfig()  # order of the training latents
    captions: FeatureSourceConfig = StoredFeaturesConfig()  # where the features of captions come from
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.0  # of a mirrored image; needs encode_latents.flipped
    grid: GridConfig = GridConfig()  # sample grid during training
    validate_samples: NonNegativeInt = 0  # drawn at each validation, for val/frechet_distance; 0 draws none
    extractor: FeatureExtractorConfig = ScatteringConfig()  # features that these samples are compared by


@dataclass(frozen=True)
class LatentDraw:
    """This rank's share of a global batch, with all its randomness."""

    x0: Tensor  # normalised latents (b c h w)
    noise: Tensor  # standard normal (b c h w)
    times: Tensor  # (b,)
    conditions: dict[str, Tensor]  # fields (b ...)
    dropped: Tensor  # bool (b k)


def main() -> None:
    config = config_from_command_line(TrainUNetConfig, table="train_unet", about=__doc__)
    with running_stage(
        config,
        name="train_unet",
        precision=config.precision,
        tf32=config.tf32,
        check=lambda parents: check(config, parents),
        folder_name=f"unet-{config.name}" if config.name else None,
    ) as stage:
        train(config, stage)


def check(config: TrainUNetConfig, parents: Parents) -> None:
    """Refuse what cannot work, before any work.

    Raises:
        ConfigError: A batch that does not split, latents of another VAE, flips that were not encoded, a misfit network,
            a step that would never be trained, what the evaluation would refuse.
    """
    # The batch and the latents.
    BatchShare.of(config, table="train_unet", rank=0, world_size=launched_world_size())
    latents = parents.latents
    with config_error_at("inputs.vae"):
        check_same_vae(
            latents.vae,
            given=parents.vae,
            given_at=config.inputs.vae,
            user=f"inputs.latents = {config.inputs.latents!r}",
        )
    if config.flip_probability and not latents.flipped:
        raise ConfigError(
            f"train_unet.flip_probability = {config.flip_probability}, but {config.inputs.latents} holds no mirrored "
            "latents. Encode with encode_latents.flipped = true, or set the probability to 0."
        )

    # The network, where it starts, and how it is sampled.
    with config_error_at("train_unet.denoiser"):
        CaptionFeatures(config.captions, config.denoiser, latents=latents, device=torch.device("cpu"))
        with torch.device("meta"):
            denoiser = build_denoiser(config, latents.latent, num_classes=len(latents.classes))
        check_sampling_start(config.denoiser.objective, denoiser.process)
    with config_error_at("train_unet.start"):
        check_start(config.start, denoiser)
    with config_error_at("train_unet.grid.sampler"):
        check_sampler_suits(config.grid.sampler, config.denoiser)

    # What its samples are compared with, and by.
    if config.validate_samples:
        if min(config.validate_samples, latents.splits["val"]) < MIN_COMPARED:
            raise ConfigError(
                f"train_unet.validate_samples = {config.validate_samples} and {latents.splits['val']} validation "
                f"images: a distance needs {MIN_COMPARED} of both. Give more, or set it to 0."
            )
        with config_error_at("train_unet.extractor"):
            config.extractor.check()
    check_later_stages(config, stage="train_unet", corpus=None)


def build_denoiser(config: TrainUNetConfig, latent: LatentShape, *, num_classes: int) -> Denoiser:
    """Build the untrained denoiser for latents of this shape."""
    return Denoiser(config.denoiser, latent_channels=latent.channels, latent_size=latent.size, num_classes=num_classes)


def train(config: TrainUNetConfig, stage: Stage) -> None:
    """Train to the last update and publish the averaged weights."""
    # What to learn, and from what.
    device = device_of(stage)
    verify_shards(stage, "latents")
    latents = stage.parents.latents
    torch.manual_seed(config.seed)
    denoiser = build_denoiser(config, latents.latent, num_classes=len(latents.classes))
    with config_error_at("train_unet.start"):
        start = load_start(config.start, denoiser)
    unet = Trainable(device.place(denoiser), config, stage.accelerator)
    with config_error_at("train_unet.captions"):
        captions = CaptionFeatures(config.captions, config.denoiser, latents=latents, device=device.torch)
    batches = BatchMaker(config, stage, denoiser, captions)
    if warning := check_sampling_start(config.denoiser.objective, denoiser.process):
        stage.log.info(f"warning: train_unet.denoiser.{warning}")

    # How to learn it.
    averages = Averages(denoiser, config.averages)
    training = Training(
        stage,
        config,
        share=batches.share,
        keys=batches.keys,
        parts={
            **unet.parts("unet"),
            "unet_averages": averages,
            **({"captions": captions} if captions.computes else {}),
        },
        flops_per_image=flops_per_image(denoiser, batches.make(0)),
    )
    with config_error_at("inputs"):
        validation = UNetValidation(
            stage,
            config.grid,
            num_samples=config.validate_samples,
            extractor=config.extractor,
            latents_folder=config.inputs.latents,
            vae_folder=config.inputs.vae,
            images_per_pass=config.images_per_device or config.global_batch,
            device=device,
            captions=captions,
        )

    # Where we stopped last time.
    training.resume()
    if training.update == 0:  # what cannot be validated fails now, not after hours
        training.report(validation.validate(averages.first, update=0))

    # The loop. DDP sums gradients in another order after its first backward pass: let it be one that changes nothing.
    training.rehearse(lambda batch: one_update(training, unet, batch), batches.make)
    for batch in training.updates(batches.from_index):
        one_update(training, unet, batch)
        averages.update(denoiser, update=training.update, refused=training.refused)
        if training.validation_is_due():
            training.report(validation.validate(averages.first, update=training.update))

    # What the other stages read.
    publish(
        stage,
        UNetManifest,
        averages.first,
        config={
            "denoiser": config.denoiser.model_dump(mode="json"),
            "latent_channels": latents.latent.channels,
            "latent_size": latents.latent.size,
            "num_classes": len(latents.classes),
            "statistics": latents.statistics.model_dump(mode="json", exclude_unset=True),
            "text": captions.about,
        },
        vae=latents.vae,
        start=start,
        counts=latents.counts,
        classes=latents.classes,
    )


def one_update(training: Training, unet: Trainable[Denoiser], batch: LatentDraw) -> None:
    """Move the denoiser by one global batch."""
    device = training.stage.accelerator.device
    for part in training.micro_batches(unet.wrapped):
        # A micro-batch to the device.
        x0, noise = (
            field[part].to(device, non_blocking=True, memory_format=torch.channels_last)
            for field in (batch.x0, batch.noise)
        )
        times, dropped = (field[part].to(device, non_blocking=True) for field in (batch.times, batch.dropped))
        conditions = {name: field[part].to(device, non_blocking=True) for name, field in batch.conditions.items()}

        # Its loss and gradients.
        losses = unet.wrapped(x0, noise, times, conditions, dropped)
        training.backward(losses.loss.mean())

        # Its metrics.
        training.log({"train/loss": losses.loss.mean(), "train/error": losses.error.mean()})
        if losses.bound is not None:
            training.log({"train/bound": losses.bound.mean()})
        rates = dropped.float().mean(dim=0).unbind()  # of each conditioner
        training.log({f"train/dropped_fraction_{index}": rate for index, rate in enumerate(rates)})
    training.step({"train/grad_norm": unet.optimizer})


class BatchMaker(GlobalBatches[LatentDraw]):
    """Maker of this rank's share of any global batch, with its noise: a pure function of the batch's index."""

    def __init__(self, config: TrainUNetConfig, stage: Stage, denoiser: Denoiser, captions: CaptionFeatures) -> None:
        # The latents, with their captions or the features of these.
        manifest = stage.parents.latents
        with config_error_at("inputs.latents"):
            self.latents = LatentShards(
                config.inputs.latents,
                split="train",
                manifest=manifest,
                features=captions.stored,
                captions=captions.computes,
            )
            if captions.computes and not self.latents.has_captions():
                raise ConfigError(
                    f"train_unet.captions.kind = 'computed', but {config.inputs.latents} holds no captions (KEY.txt). "
                    "Prepare the corpus from a source with captions, or remove the conditioner of kind 'text'."
                )

        # What is drawn for each of them.
        super().__init__(config, stage, self.latents, order=config.order)
        self.normalisation = Normalisation(manifest.statistics.mean, manifest.statistics.std)
        self.config, self.times, self.captions = config, denoiser.times, captions

    def make(self, index: int) -> LatentDraw:
        """Read this rank's share of global batch ``index`` and make every random choice in it."""
        # Read the moments, of mirrored images where drawn.
        config, positions = self.config, self.share.positions
        draws = self.draws(index)
        mirrored = draws.uniforms("flip") < config.flip_probability if config.flip_probability else None
        with config_error_at("inputs.latents"):
            stored = self.latents.read(self.samples(index, positions), flipped=mirrored)

        # Draw latents from the posterior, then noise, times and the condition dropout, sample by sample.
        moments = torch.from_numpy(stored.moments).float()
        shape = tuple(moments.shape[2:])
        posterior = Posterior(mean=moments[:, 0], log_variance=moments[:, 1])
        return LatentDraw(
            x0=self.normalisation.draw_normalised(posterior, torch.from_numpy(draws.normals("posterior", shape))),
            noise=torch.from_numpy(draws.normals("noise", shape)),
            times=self.times(
                torch.from_numpy(draws.uniforms("time")),
                batch=index,
                positions=torch.tensor(positions),
                global_batch=config.global_batch,
            ),
            conditions={"labels": torch.from_numpy(stored.labels), **self.captions.of(stored)},
            dropped=torch.from_numpy(draw_dropped(draws, config.denoiser)),
        )


def draw_dropped(draws: SampleDraws, denoiser: DenoiserConfig) -> np.ndarray:
    """Draw which samples go without which conditioners, bool (b k): each on its own, and all at once.

    Guidance extrapolates from the prediction without any condition. Several independent drops alone would hardly ever
    teach it: 0.1 and 0.1 leave 1 % of the samples.
    """
    alone = draws.uniforms("drop", (len(denoiser.conditioners),)) < denoiser.drop_probabilities
    if not denoiser.joint_drop_probability:
        return alone
    return alone | (draws.uniforms("joint drop") < denoiser.joint_drop_probability)[:, None]


def flops_per_image(denoiser: Denoiser, batch: LatentDraw) -> float:
    """Count the FLOPs of the denoiser's forward and backward pass for one image."""
    one = slice(0, 1)

    def call(shadow: nn.Module) -> Tensor:
        conditions = {name: field[one].to("meta") for name, field in batch.conditions.items()}
        x0, dropped = batch.x0[one].to("meta"), batch.dropped[one].to("meta")
        times = batch.times[one].to("meta")
        assert isinstance(shadow, Denoiser)
        return shadow.output(x0, times, conditions, dropped).sum()

    return flops_of(denoiser, call)


if __name__ == "__main__":
    main()
