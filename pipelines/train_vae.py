"""From image shards to a KL autoencoder: L1 + KL, with optional perceptual and adversarial terms; averaged weights.

Latents may be transformed or made noisy before they are decoded (``models/autoencoder/augmentation.py``).

    accelerate launch -m pipelines.train_vae --config pipelines/configs/demo.toml

Reads: ``runs/NAME/corpus/``. Writes: ``runs/NAME/vae/`` with ``vae.safetensors`` (averaged weights), ``config.json``,
``metrics.jsonl``, ``checkpoints/`` and reconstruction grids in ``grids/``.

Shapes: b images of a process's micro-batch, C channels, H and W pixels; c channels, h and w size of a latent.
"""

from dataclasses import dataclass
from typing import Annotated, Self

import torch
from pydantic import BaseModel, Field, PositiveInt, model_validator
from torch import Tensor, nn

from data.loading import ImageShards
from data.manifest import Parents, VAEManifest
from data.order.order import FullShuffleConfig, OrderConfig
from data.transforms import VIEW_REVISIONS, to_unit_range
from models.autoencoder.augmentation import LatentAugmentation, Transformation
from models.autoencoder.discriminator import Discriminator
from models.autoencoder.discriminator_start import AdversaryStart
from models.autoencoder.health import gradient_norms, latent_metrics
from models.autoencoder.objective import PatchAdversary, VAELoss, VAEObjective, VAEObjectiveConfig, discriminator_loss
from models.autoencoder.vae import AutoencoderKL, Posterior, VAEConfig
from models.features import FeatureExtractorConfig
from models.features.scattering import ScatteringConfig
from pipelines.model.batches import GlobalBatches
from pipelines.model.device import device_of
from pipelines.model.experiment import CorpusFacts, check_later_stages, check_levels
from pipelines.model.inputs import verify_shards
from pipelines.model.start import RandomStart, StartConfig, check_start, encoder_at, load_start
from pipelines.model.validation import VAEValidation
from pipelines.model.weights import publish
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.stage.launch import launched_world_size
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.training.checkpoint import Stateful
from pipelines.runtime.training.config import BatchShare, TrainingConfig
from pipelines.runtime.training.ema import Averages
from pipelines.runtime.training.flops import flops_of
from pipelines.runtime.training.loop import Training
from pipelines.runtime.training.trainable import Trainable


class TrainVAEInputs(BaseModel, frozen=True, extra="forbid"):
    """Inputs of the VAE's training."""

    corpus: str  # folder of the image shards


class TrainVAEConfig(TrainingConfig):
    """Configuration of the autoencoder, its objective and its training."""

    fingerprint_ignores = TrainingConfig.fingerprint_ignores | {"decode_threads", "extractor"}
    revisions = (
        *TrainingConfig.revisions,
        *VIEW_REVISIONS,  # shards in place are viewed as they are read
        "validation looks at a sample spread over its whole split, in the training's precision",
    )

    inputs: TrainVAEInputs  # where the stage reads
    network: VAEConfig = VAEConfig()  # the autoencoder
    start: StartConfig = RandomStart()  # weights to start from; those of a discriminator are random
    freeze_encoder: bool = False  # train the decoder alone; latents of the VAE that it starts from stay valid
    objective: VAEObjectiveConfig = VAEObjectiveConfig()  # what it minimises
    order: OrderConfig = FullShuffleConfig()  # order of the training images
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5  # of mirroring a training image
    compile: bool = False  # slow start, faster updates; no CUDA graphs, whose images the discriminator sees too late
    decode_threads: PositiveInt = 2  # batches decoded at once, each in a thread; images are decoded without a lock
    extractor: FeatureExtractorConfig = ScatteringConfig()  # features of the distances that end it

    @model_validator(mode="after")
    def _frozen_encoder_is_trained(self) -> Self:
        if self.freeze_encoder and isinstance(self.start, RandomStart):
            raise ValueError("freeze_encoder = true needs an encoder that is trained: give its VAE as train_vae.start")
        return self


@dataclass(frozen=True)
class VAEBatch:
    """This rank's share of a global batch."""

    images: Tensor  # (b C H W), in [-1, 1]
    noise: Tensor  # of the posterior draw; (b c h w)
    transformation: Transformation | None = None  # of the whole global batch
    latent_noise: tuple[Tensor, ...] = ()  # its level (b 1 1 1) and itself (b c h w), where latents are decoded noisy


@dataclass(kw_only=True)
class Adversary:
    """The discriminator in training, and the time from which on the autoencoder's loss includes it."""

    discriminator: Trainable[Discriminator]
    start: AdversaryStart


def main() -> None:
    config = config_from_command_line(TrainVAEConfig, table="train_vae", about=__doc__)
    with running_stage(
        config,
        name="train_vae",
        precision=config.precision,
        tf32=config.tf32,
        check=lambda parents: check(config, parents),
    ) as stage:
        train(config, stage)


def check(config: TrainVAEConfig, parents: Parents) -> None:
    """Refuse what cannot work, before any work.

    Raises:
        ConfigError: A batch that does not split, images that cannot be halved often enough, a start that does not fit,
            what a later stage would refuse.
    """
    BatchShare.of(config, table="train_vae", rank=0, world_size=launched_world_size())
    with config_error_at("train_vae.network.channels"):
        check_levels(config.network, resolution := parents.corpus.image.resolution)
    with config_error_at("train_vae.objective"):
        config.objective.check_sizes(resolution=resolution, latent_size=resolution // config.network.factor)
    with config_error_at("train_vae.extractor"):
        config.extractor.check()
    with config_error_at("train_vae.start"), torch.device("meta"):
        check_start(config.start, AutoencoderKL(config.network, image_channels=parents.corpus.image.channels))
    check_later_stages(config, stage="train_vae", corpus=CorpusFacts.of(parents.corpus))


def train(config: TrainVAEConfig, stage: Stage) -> None:
    """Train to the last update and publish the averaged weights."""
    # What to learn, and from what.
    device = device_of(stage)
    verify_shards(stage, "corpus")
    corpus = stage.parents.corpus
    channels = corpus.image.channels
    torch.manual_seed(config.seed)
    network = AutoencoderKL(config.network, image_channels=channels)
    with config_error_at("train_vae.start"):
        start = load_start(config.start, network)
        encoder = encoder_at(config.start) if config.freeze_encoder else None
    network = device.place(network)
    if encoder is not None:
        network.encoder.requires_grad_(False)
        network.quant_conv.requires_grad_(False)
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    before = [parameter.clone() for parameter in frozen]
    vae = Trainable(network, config, stage.accelerator)
    adversary: Adversary | None = None
    if isinstance(patchgan := config.objective.adversary, PatchAdversary):
        critic = device.place(Discriminator(patchgan.discriminator, image_channels=channels))
        adversary = Adversary(
            discriminator=Trainable(critic, config, stage.accelerator),
            start=AdversaryStart(patchgan.start, device=device.torch),
        )
        if not adversary.start.may_start_before(config.updates):
            stage.log.warning("objective.adversary starts after the last update: the discriminator trains for nothing")
    batches = BatchMaker(config, stage)

    # How to learn it.
    with config_error_at("train_vae.objective"):
        objective = VAEObjective(config.objective).to(device.torch)
    averages = Averages(network, config.averages)
    parts: dict[str, Stateful] = {**vae.parts("vae"), "vae_averages": averages}
    if adversary is not None:
        parts |= {**adversary.discriminator.parts("discriminator"), "discriminator_start": adversary.start}
    training = Training(
        stage,
        config,
        share=batches.share,
        keys=batches.keys,
        parts=parts,
        flops_per_image=flops_per_image(network, resolution=corpus.image.resolution),
    )
    with config_error_at("inputs"):
        validation = VAEValidation(
            stage,
            corpus_folder=config.inputs.corpus,
            images_per_pass=config.images_per_device or config.global_batch,
            extractor=config.extractor,
        )

    # Where we stopped last time.
    training.resume()
    if any(not found.equal(expected) for found, expected in zip(frozen, before, strict=True)):
        raise ConfigError(
            "train_vae.start holds another encoder than this training began with. Restore its folder, or train anew."
        )
    if training.update == 0:  # what cannot be validated fails now, not after hours
        training.report(validation.validate(averages.first, update=0))

    # The loop. DDP sums gradients in another order after its first backward pass: let it be one that changes nothing.
    training.rehearse(lambda batch: one_update(training, objective, vae, adversary, batch), batches.make)
    for batch in training.updates(batches.from_index):
        one_update(training, objective, vae, adversary, batch)
        averages.update(network, update=training.update, refused=training.refused)
        if training.validation_is_due():
            training.report(validation.validate(averages.first, update=training.update))

    # What the other stages read.
    publish(
        stage,
        VAEManifest,
        averages.first,
        config={"network": config.network.model_dump(mode="json"), "image_channels": channels},
        counts=corpus.counts,
        classes=corpus.classes,
        value_range=(-1, 1),
        factor=config.network.factor,
        latent_channels=config.network.latent_channels,
        view=corpus.config["view"],
        start=start,
        **({"encoder": encoder} if encoder is not None else {}),
    )


def one_update(
    training: Training,
    objective: VAEObjective,
    vae: Trainable[AutoencoderKL],
    adversary: Adversary | None,
    batch: VAEBatch,
) -> None:
    """Move the autoencoder and the discriminator, which learns before it is part of the loss, too; both or none."""
    device = training.stage.accelerator.device
    optimizers = {"train/grad_norm": vae.optimizer}
    reconstructions: list[tuple[Tensor, Tensor]] = []
    losses: list[Tensor] = []
    critic: Discriminator | None = None
    if adversary is not None:
        adversary.discriminator.network.requires_grad_(False)
        critic = adversary.discriminator.network if adversary.start.has_started(training.update) else None
    for part in training.micro_batches(vae.wrapped):
        # A micro-batch to the device.
        images, noise, *latent_noise = (
            field[part].to(device, non_blocking=True, memory_format=torch.channels_last)
            for field in (batch.images, batch.noise, *batch.latent_noise)
        )

        # Its loss and gradients; what is transformed is compared with images that are.
        last_layer = vae.network.last_layer
        reconstruction, posterior = vae.wrapped(images, noise, LatentAugmentation(batch.transformation, *latent_noise))
        if batch.transformation is not None:
            images = batch.transformation(images)
        loss = objective(
            images,
            reconstruction,
            posterior,
            elements=batch.images[0].numel(),
            last_layer=last_layer,
            discriminator=critic,
        )
        if training.is_due(training.config.log_every) and not reconstructions:
            log_health(training, loss, posterior, last_layer=last_layer)
        # Nothing is learned from the divergence of a frozen encoder.
        unlearned = {"adaptive_weight"} | (set() if posterior.mean.requires_grad else {"kl"})
        training.backward(loss.total, terms={k: v for k, v in loss.terms.items() if k not in unlearned})

        # Its metrics.
        training.log({"train/loss": loss.total} | {f"train/{name}": value for name, value in loss.terms.items()})
        reconstructions.append((images, reconstruction.detach()))
        losses.append(loss.reconstruction.detach())

    # The discriminator, on the same reconstructions.
    if adversary is not None:
        discriminator = adversary.discriminator
        discriminator.network.requires_grad_(True)
        optimizers["train/discriminator_grad_norm"] = discriminator.optimizer
        for _, pair in zip(training.micro_batches(discriminator.wrapped), reconstructions, strict=True):
            hinge, gap = discriminator_loss(discriminator.wrapped, *pair)
            training.backward(hinge, terms={})  # beyond both margins it has no gradient, and that is no error
            training.log({"train/discriminator_loss": hinge, "train/logit_gap": gap})
    training.step(optimizers)

    # Its start, by how well the autoencoder reconstructs.
    if adversary is not None:
        mean_loss, update = torch.stack(losses).mean(), training.update
        if adversary.start.watch(mean_loss, update=update, refused=training.refused):
            training.stage.log.info(
                f"update {update}: reconstruction has stopped improving; the discriminator joins in"
            )


def log_health(training: Training, loss: VAELoss, posterior: Posterior, *, last_layer: Tensor) -> None:
    """Log each term's gradient at the decoder and the information in each latent channel, of one micro-batch."""
    norms = gradient_norms(loss, last_layer=last_layer)
    metrics = {f"health/grad_norm_{name}": value for name, value in norms.items()}
    metrics |= {f"health/{name}": value for name, value in latent_metrics(posterior).items()}
    training.log_once(metrics)


class BatchMaker(GlobalBatches[VAEBatch]):
    """Maker of this rank's share of any global batch, with its noise: a pure function of the batch's index."""

    def __init__(self, config: TrainVAEConfig, stage: Stage) -> None:
        with config_error_at("inputs.corpus"):
            self.images = ImageShards(
                config.inputs.corpus,
                split="train",
                manifest=stage.parents.corpus,
                scattered=config.order.kind in ("full", "weighted"),
            )
        super().__init__(config, stage, self.images, order=config.order, threads=config.decode_threads)
        height, width, _ = self.images.image_shape
        factor = config.network.factor
        self.config, self.latent_shape = config, (config.network.latent_channels, height // factor, width // factor)

    def make(self, index: int) -> VAEBatch:
        """Read, mirror, and draw the noise of this rank's share of global batch ``index``."""
        draws = self.draws(index)
        with config_error_at("inputs.corpus"):
            images = to_unit_range(self.images.read(self.samples(index, self.share.positions)).images)
        mirrored = torch.from_numpy(draws.uniforms("flip") < self.config.flip_probability)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        noise = torch.from_numpy(draws.normals("posterior", self.latent_shape))

        # How latents are augmented: one transformation for all, noise for each.
        uniforms = self.shared_draws(index).uniforms("equivariance", (3,))[0]
        transformation = Transformation.drawn(self.config.objective.equivariance, uniforms)
        latent_noise: tuple[Tensor, ...] = ()
        if gamma := self.config.objective.latent_noise:
            level, eps = draws.uniforms("latent noise level", (1, 1, 1)), draws.normals("latent noise", noise.shape[1:])
            latent_noise = (torch.from_numpy(level).float(), gamma * torch.from_numpy(eps))
        return VAEBatch(images, noise, transformation, latent_noise)


def flops_per_image(network: nn.Module, *, resolution: int) -> float:
    """Count the FLOPs of the autoencoder's forward and backward pass for one image, whose latent is not downscaled."""
    assert isinstance(network, AutoencoderKL)
    side = resolution // network.factor

    def call(shadow: nn.Module) -> Tensor:
        images = torch.zeros(1, network.image_channels, resolution, resolution, device="meta")
        noise = torch.zeros(1, network.config.latent_channels, side, side, device="meta")
        reconstruction, _ = shadow(images, noise)
        return reconstruction.sum()

    return flops_of(network, call)


if __name__ == "__main__":
    main()
