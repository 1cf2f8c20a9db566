"""From image shards to a KL autoencoder: L1 + KL, with optional perceptual and adversarial terms; averaged weights.

    accelerate launch -m pipelines.train_vae --config pipelines/configs/demo.toml

Reads: ``runs/NAME/corpus/``. Writes: ``runs/NAME/vae/`` with ``vae.safetensors`` (averaged weights), ``config.json``,
``metrics.jsonl``, ``checkpoints/`` and reconstruction grids in ``grids/``.

Shapes: b images of a process's micro-batch, C channels, H and W pixels; c channels, h and w size of a latent.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from data.files import write_atomically
from data.loading import ImageShards, Prefetch, prefetch
from data.manifest import CorpusManifest, Parents, VAEManifest
from data.order.order import FullShuffleConfig, OrderConfig
from data.randomness import SampleDraws
from data.transforms import to_levels, to_unit_range
from models.autoencoder.discriminator import Discriminator
from models.autoencoder.discriminator_start import AdversaryStart
from models.autoencoder.health import gradient_norms, latent_metrics
from models.autoencoder.objective import PatchAdversary, VAELoss, VAEObjective, VAEObjectiveConfig, discriminator_loss
from models.autoencoder.vae import AutoencoderKL, Posterior, VAEConfig
from models.metrics import psnr
from pipelines.model.device import Device, device_of
from pipelines.model.grids import grid_png
from pipelines.model.inputs import verify_shards
from pipelines.model.weights import publish
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.stage.launch import joined, launched_world_size
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.training.checkpoint import Stateful, Weights
from pipelines.runtime.training.ema import Averages
from pipelines.runtime.training.flops import flops_of, known_peak_flops
from pipelines.runtime.training.loop import BatchShare, Training, TrainingConfig
from pipelines.runtime.training.optim import Optimizer

NUM_VALIDATION_IMAGES = 256
NUM_GRID_COLUMNS = 10


class TrainVAEInputs(BaseModel, frozen=True, extra="forbid"):
    """What the VAE learns from."""

    corpus: str  # folder of the image shards


class TrainVAEConfig(TrainingConfig):
    """The autoencoder, its objective and its training."""

    fingerprint_ignores = TrainingConfig.fingerprint_ignores | {"decode_threads"}

    inputs: TrainVAEInputs  # where the stage reads
    network: VAEConfig = VAEConfig()  # the autoencoder
    objective: VAEObjectiveConfig = VAEObjectiveConfig()  # what it minimises
    order: OrderConfig = FullShuffleConfig()  # order of the training images
    flip_probability: NonNegativeFloat = 0.5  # of mirroring a training image
    decode_threads: PositiveInt = 2  # batches decoded at once, each in a thread; images are decoded without a lock


@dataclass(frozen=True)
class VAEBatch:
    """This rank's share of a global batch."""

    images: Tensor  # (b C H W), in [-1, 1]
    noise: Tensor  # of the posterior draw; (b c h w)


Network = TypeVar("Network", bound=nn.Module)


@dataclass(kw_only=True)
class Trainable(Generic[Network]):
    """A network in training: bare, as wrapped for the ranks, and its optimizer."""

    network: Network
    wrapped: nn.Module
    optimizer: Optimizer

    @classmethod
    def join(cls, network: Network, config: TrainVAEConfig, stage: Stage, device: Device) -> "Trainable[Network]":
        """Move a network to the device and wrap it, so that its gradients are averaged over the ranks."""
        network = device.place(network)
        optimizer = Optimizer(network, config.optim, accelerator=stage.accelerator)
        wrapped = joined(network, stage.accelerator, compiles=config.compile)
        return cls(network=network, wrapped=wrapped, optimizer=optimizer)


def main() -> None:
    config = config_from_command_line(TrainVAEConfig, table="train_vae", about=__doc__)

    def check(parents: Parents) -> None:
        BatchShare.of(config, table="train_vae", rank=0, world_size=launched_world_size())
        check_images(config, parents.corpus)

    with running_stage(config, name="train_vae", precision=config.precision, check=check) as stage:
        train(config, stage)


def train(config: TrainVAEConfig, stage: Stage) -> None:
    """Train to the last update and publish the averaged weights."""
    # What to learn, and from what.
    device = device_of(stage)
    verify_shards(stage, "corpus")
    corpus = stage.parents.corpus
    channels = corpus.image.channels
    torch.manual_seed(config.seed)
    vae = Trainable.join(AutoencoderKL(config.network, image_channels=channels), config, stage, device)
    adversary = config.objective.adversary
    discriminator: Trainable[Discriminator] | None = None
    start: AdversaryStart | None = None
    if isinstance(adversary, PatchAdversary):
        discriminator = Trainable.join(
            Discriminator(adversary.discriminator, image_channels=channels), config, stage, device
        )
        start = AdversaryStart(adversary.start, device=device.torch)
    batches = BatchMaker(config, stage)

    # How to learn it.
    with config_error_at("train_vae.objective"):
        objective = VAEObjective(config.objective).to(stage.accelerator.device)
    averages = Averages(vae.network, config.averages)
    parts: dict[str, Stateful] = {"vae": Weights(vae.network), "vae_optimizer": vae.optimizer, "vae_averages": averages}
    if discriminator is not None and start is not None:
        parts |= {"discriminator": Weights(discriminator.network), "discriminator_optimizer": discriminator.optimizer}
        parts |= {"discriminator_start": start}
    training = Training(
        stage,
        config,
        share=batches.share,
        keys=batches.keys,
        parts=parts,
        flops_per_image=flops_per_image(vae.network, resolution=corpus.image.resolution),
        peak_flops=known_peak_flops(str(stage.accelerator.device), config.precision),
    )

    # Where we stopped last time.
    training.resume()
    if training.update == 0:
        # What cannot be drawn fails now, not after hours.
        training.expect(validate(config, stage, averages.first, update=0))

    # The loop.
    for batch in training.updates(batches.from_index):
        is_main = start is not None and start.has_started(training.update)
        reconstruction_loss = one_update(training, objective, vae, discriminator, batch, adversarial=is_main)
        averages.update(vae.network, update=training.update, refused=training.refused)
        if start is not None and start.watch(reconstruction_loss, update=training.update, refused=training.refused):
            stage.say(f"update {training.update}: reconstruction has stopped improving; the discriminator joins in")
        if training.validation_is_due():
            training.report(validate(config, stage, averages.first, update=training.update))

    files, weights = publish(
        stage,
        name="vae",
        network=averages.first,
        config={"network": config.network.model_dump(mode="json"), "image_channels": channels},
    )
    stage.tracker.log_model("vae", stage.folder)
    stage.finish(
        VAEManifest,
        files=files,
        weights=weights,
        counts=corpus.counts,
        classes=corpus.classes,
        value_range=(-1, 1),
        factor=config.network.factor,
        latent_channels=config.network.latent_channels,
    )
    stage.say(f"{training.update} updates, weights {weights[:12]} in {stage.folder}")


def one_update(
    training: Training,
    objective: VAEObjective,
    vae: Trainable[AutoencoderKL],
    discriminator: Trainable[Discriminator] | None,
    batch: VAEBatch,
    *,
    adversarial: bool,
) -> Tensor:
    """Move the autoencoder and the discriminator by one global batch, both or none.

    Args:
        training: Counts, micro-batches and steps.
        objective: What the autoencoder minimises.
        vae: The autoencoder.
        discriminator: The discriminator, if there is one.
        batch: This rank's share.
        adversarial: Whether the autoencoder hears of the discriminator, which learns in any case.

    Returns:
        The mean reconstruction loss of this rank's share; a scalar.
    """
    device = training.stage.accelerator.device
    reconstructions: list[tuple[Tensor, Tensor]] = []
    losses: list[Tensor] = []
    if discriminator is not None:
        discriminator.network.requires_grad_(False)
    for part in training.micro_batches(vae.wrapped):
        images = batch.images[part].to(device, non_blocking=True, memory_format=torch.channels_last)
        noise = batch.noise[part].to(device, non_blocking=True, memory_format=torch.channels_last)
        reconstruction, posterior = vae.wrapped(images, noise)
        loss = objective(
            images,
            reconstruction,
            posterior,
            last_layer=vae.network.last_layer,
            discriminator=discriminator.network if discriminator is not None and adversarial else None,
        )
        if training.is_due(training.config.log_every) and not reconstructions:
            log_health(training, loss, posterior, last_layer=vae.network.last_layer)
        training.backward(loss.total, terms={k: v for k, v in loss.terms.items() if k != "adaptive_weight"})
        training.log({"train/loss": loss.total} | {f"train/{name}": value for name, value in loss.terms.items()})
        reconstructions.append((images, reconstruction.detach()))
        losses.append(loss.reconstruction.detach())
    mean_loss = torch.stack(losses).mean()

    if discriminator is None:
        training.step({"train/grad_norm": vae.optimizer})
        return mean_loss
    discriminator.network.requires_grad_(True)
    for _, (images, reconstruction) in zip(training.micro_batches(discriminator.wrapped), reconstructions, strict=True):
        hinge, gap = discriminator_loss(discriminator.wrapped, images, reconstruction)
        training.backward(hinge)
        training.log({"train/discriminator_loss": hinge, "train/logit_gap": gap})
    training.step({"train/grad_norm": vae.optimizer, "train/discriminator_grad_norm": discriminator.optimizer})
    return mean_loss


def log_health(training: Training, loss: VAELoss, posterior: Posterior, *, last_layer: Tensor) -> None:
    """Note which terms pull on the decoder and which latent channels carry something, by the first micro-batch."""
    pulls = gradient_norms(loss, last_layer=last_layer)
    metrics = {f"health/grad_norm_{name}": value for name, value in pulls.items()}
    metrics |= {f"health/{name}": value for name, value in latent_metrics(posterior).items()}
    training.log_once(metrics)


class BatchMaker:
    """Makes this rank's share of any global batch: a pure function of the batch's index."""

    def __init__(self, config: TrainVAEConfig, stage: Stage) -> None:
        accelerator = stage.accelerator
        with config_error_at("inputs.corpus"):
            scattered = config.order.kind in ("full", "weighted")
            self.images = ImageShards(
                config.inputs.corpus, split="train", manifest=stage.parents.corpus, scattered=scattered
            )
        self.share = BatchShare.of(
            config, table="train_vae", rank=accelerator.process_index, world_size=accelerator.num_processes
        )
        with config_error_at("train_vae.order"):
            self.order = self.images.order(config.order, seed=config.seed, global_batch=config.global_batch)
        self.config = config
        height, width, _ = self.images.image_shape
        factor = config.network.factor
        self.latent_shape = (config.network.latent_channels, height // factor, width // factor)

    def make(self, index: int) -> VAEBatch:
        """Read, mirror, and draw the noise of this rank's share of global batch ``index``."""
        positions = self.share.positions
        samples = self.order.indices(index * self.config.global_batch + positions.start, len(positions))
        draws = SampleDraws(self.config.seed, index, positions)
        with config_error_at("inputs.corpus"):
            images = to_unit_range(self.images.read(samples).images)
        mirrored = torch.from_numpy(draws.uniforms("flip") < self.config.flip_probability)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return VAEBatch(images=images, noise=torch.from_numpy(draws.normals("posterior", self.latent_shape)))

    def keys(self, index: int, positions: range) -> list[str]:
        """Name the samples at ``positions`` of global batch ``index``."""
        samples = self.order.indices(index * self.config.global_batch + positions.start, len(positions))
        return self.images.keys(samples)

    def from_index(self, start: int) -> Prefetch[VAEBatch]:
        """Make batches ahead, from ``start`` on."""
        return prefetch(self.make, start=start, depth=self.config.prefetch_batches, threads=self.config.decode_threads)


@torch.no_grad()
def validate(config: TrainVAEConfig, stage: Stage, network: nn.Module, *, update: int) -> dict[str, float]:
    """Measure the averaged weights on validation images and draw the first ones; on the main process."""
    corpus = stage.parents.corpus
    if not stage.is_main or not corpus.splits["val"]:
        return {}
    assert isinstance(network, AutoencoderKL)
    images = ImageShards(config.inputs.corpus, split="val", manifest=corpus, scattered=True)
    batch = images.read(np.arange(min(NUM_VALIDATION_IMAGES, len(images))))
    outputs, scales = [], []
    for part in torch.from_numpy(batch.images).split(config.images_per_device or config.global_batch):
        posterior = network.encode(to_unit_range(part).to(stage.accelerator.device))
        outputs.append(to_levels(network.decode(posterior.mode())))
        scales.append(posterior.mean.std())
    restored = np.concatenate(outputs)
    decibels = psnr(torch.from_numpy(restored).movedim(-1, 1), torch.from_numpy(batch.images).movedim(-1, 1))
    metrics = {"val/psnr": float(decibels.mean()), "val/latent_std": float(torch.stack(scales).mean())}
    shown = slice(0, NUM_GRID_COLUMNS)
    grid = grid_png(
        np.stack([batch.images[shown], restored[shown]]),
        column_labels=[corpus.classes[label] if label >= 0 else "" for label in batch.labels[shown]],
        row_labels=("image", "reconstruction"),
        title=f"update {update}: {metrics['val/psnr']:.2f} dB on {len(restored)} validation images",
    )
    path = stage.folder / "grids" / f"reconstructions-{update:08}.png"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, grid)
    stage.tracker.log_image("val/reconstructions", path, step=update)
    stage.say(f"update {update}: PSNR {metrics['val/psnr']:.2f} dB, {path}")
    return metrics


def check_images(config: TrainVAEConfig, corpus: CorpusManifest) -> None:
    """Refuse images that the VAE cannot halve often enough.

    Raises:
        ConfigError: Naming the numbers that fit.
    """
    resolution, factor = corpus.image.resolution, config.network.factor
    if resolution % factor:
        raise ConfigError(
            f"train_vae.network.channels has {len(config.network.channels)} levels, so images shrink to 1/{factor}; "
            f"{resolution} pixels are no multiple of {factor}. Use fewer levels, or prepare the corpus at "
            f"{resolution // factor * factor or factor} or {-(-resolution // factor) * factor} pixels."
        )


def flops_per_image(network: nn.Module, *, resolution: int) -> float:
    """Count the FLOPs of the autoencoder's forward and backward pass for one image."""
    assert isinstance(network, AutoencoderKL)
    side = resolution // network.factor

    def call(shadow: nn.Module) -> Tensor:
        images = torch.zeros(1, network.image_channels, resolution, resolution, device="meta")
        noise = torch.zeros(1, network.config.latent_channels, side, side, device="meta")
        reconstruction, _ = shadow(images, noise)
        return reconstruction.sum()

    return float(flops_of(network, call))


if __name__ == "__main__":
    main()
