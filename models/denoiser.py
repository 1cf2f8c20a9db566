"""The denoiser: the U-Net, its conditions and the diffusion process together.

Shapes: b batch, c latent channels, h and w latent size, k number of conditioners. Latents are normalised: about zero
mean and unit variance in every channel.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from models.conditioning import ConditionerConfig
from models.conditioning.conditioning import Conditioning
from models.conditioning.text import TextConditionerConfig
from models.diffusion.guidance import GuidanceConfig, guided_output
from models.diffusion.objective import (
    DenoisingLoss,
    ObjectiveConfig,
    check_objective,
    denoising_loss,
    times_from_uniforms,
)
from models.diffusion.prediction import Estimate, estimate_from_output
from models.diffusion.samplers import Denoise, NoiseSource, SamplerConfig, sample
from models.diffusion.schedule import CosineScheduleConfig, Moment, ScheduleConfig, add_noise
from models.unet import UNet, UNetConfig


def _default_joint_drop(given: Mapping[str, Any]) -> float:
    """With one conditioner its own drop is the joint one."""
    return 0.1 if len(given.get("conditioners", ())) > 1 else 0.0


class DenoiserConfig(BaseModel, frozen=True, extra="forbid"):
    """A U-Net, what it is conditioned on, and the process that it reverses."""

    network: UNetConfig = UNetConfig()  # the U-Net
    conditioners: tuple[ConditionerConfig, ...] = ()  # inputs besides latents and time; none makes it unconditional
    joint_drop_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        default_factory=_default_joint_drop  # per sample: train without any condition, for guidance; 0.1 with several
    )
    schedule: ScheduleConfig = CosineScheduleConfig()  # how noise grows with time
    objective: ObjectiveConfig = ObjectiveConfig()  # what the U-Net learns to predict

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        check_objective(self.objective, self.schedule)
        encoder_of: dict[str, object] = {}
        for conditioner in self.conditioners:
            if not isinstance(conditioner, TextConditionerConfig):
                continue
            if encoder_of.setdefault(conditioner.name, conditioner.encoder) != conditioner.encoder:
                raise ValueError(
                    f"two conditioners of kind 'text' and different encoders have the name {conditioner.name!r}, by "
                    "which features are stored and read: give each encoder a name of its own"
                )
        return self

    @property
    def token_width(self) -> int:
        """Width of the tokens that the U-Net attends to, 0 if no conditioner gives any.

        Where several widths meet it is the largest, to which the other conditioners project theirs.
        """
        return max((conditioner.token_width for conditioner in self.conditioners), default=0)

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a batch that the conditioners read."""
        return tuple(dict.fromkeys(field for conditioner in self.conditioners for field in conditioner.fields))

    @property
    def drop_probabilities(self) -> tuple[float, ...]:
        """For each conditioner, how often a training sample goes without it, besides the joint drop."""
        return tuple(conditioner.drop_probability for conditioner in self.conditioners)


class Denoiser(nn.Module):
    """A network with its conditioners and process: the training loss by ``forward``, latents by ``sample``.

    ``conditions`` holds fields of a batch, each (b ...), among them those that the conditioners read (see their
    docstrings); ``dropped`` marks the samples that go without a conditioner.
    """

    def __init__(self, config: DenoiserConfig, *, latent_channels: int, latent_size: int, num_classes: int) -> None:
        """
        Args:
            config: The model.
            latent_channels: Channels c of the latents.
            latent_size: Height and width of the latents that it is trained on.
            num_classes: Classes of the corpus, 0 if it has none.

        Raises:
            ValueError: The network does not suit the latents, or a conditioner the corpus.
        """
        super().__init__()
        if latent_size % config.network.factor:
            raise ValueError(
                f"Latents of {latent_size}x{latent_size} cannot be halved {len(config.network.channels) - 1} times "
                f"by the U-Net: give channels at most {_halvings(latent_size) + 1} entries, or change the resolution."
            )
        self.config = config
        self.latent_shape = (latent_channels, latent_size, latent_size)
        with torch.device("cpu"):  # tables on the host, also when the network is only sketched on the meta device
            self.process = config.schedule.build()
        self.conditioners = nn.ModuleList(
            conditioner.build(
                num_classes=num_classes,
                embedding_width=config.network.embedding_width,
                token_width=config.token_width,
            )
            for conditioner in config.conditioners
        )
        learned_variance = config.objective.variance == "learned"
        self.network = UNet(
            config.network,
            in_channels=latent_channels,
            out_channels=2 * latent_channels if learned_variance else latent_channels,
            token_width=config.token_width,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the process's tables with the weights: moved by the first forward pass, they would compile it twice."""
        moved = super()._apply(fn, recurse)
        self.process.level(torch.zeros(1, dtype=torch.int64, device=next(self.parameters()).device), like=torch.ones(1))
        return moved

    def forward(
        self, x0: Tensor, noise: Tensor, times: Tensor, conditions: Mapping[str, Tensor], dropped: Tensor
    ) -> DenoisingLoss:
        """The training loss of each sample.

        Args:
            x0: Normalised latents (b c h w), float32.
            noise: Standard normal, same shape.
            times: (b,), from ``times``.
            conditions: Fields of the batch.
            dropped: bool (b k).
        """
        x = add_noise(x0, noise, self.process.level(times, like=x0))
        output = self.output(x, times, conditions, dropped)
        return denoising_loss(
            output, x=x, x0=x0, eps=noise, times=times, process=self.process, objective=self.config.objective
        )

    def times(self, uniforms: Tensor, *, batch: int, positions: Tensor, global_batch: int) -> Tensor:
        """Training times (b,) from a uniform draw a sample (b,), given where each stands in global batch ``batch``."""
        return times_from_uniforms(
            uniforms,
            batch=batch,
            positions=positions,
            global_batch=global_batch,
            times=self.config.objective.times,
            process=self.process,
        )

    def output(self, x: Tensor, times: Tensor, conditions: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """The network's raw output for noisy latents x (b c h w) at times (b,).

        (b c h w), or (b 2c h w) with a learned variance; in the dtype of ``x``, whatever the network computes in.
        """
        condition = combine(
            [conditioner(conditions, dropped[:, index]) for index, conditioner in enumerate(self.conditioners)]
        )
        return self.network(x, times, condition.embedding, condition.tokens, condition.token_mask).to(x.dtype)

    def denoise(
        self,
        conditions: Mapping[str, Tensor],
        guidance: GuidanceConfig,
        uncond: Mapping[str, Tensor] | None = None,
        guide: Self | None = None,
    ) -> Denoise:
        """The model with its conditions and guidance, as the samplers and the variational bound take it.

        ``uncond`` holds fields (b ...) or (1 ...) of the unconditional branch, such as those of a negative prompt;
        conditioners that read none of them have their null there. ``guide`` is a weaker denoiser that stands for that
        branch, with the conditions (autoguidance).
        """
        uncond = uncond or {}
        reads = [any(field in uncond for field in conditioner.fields) for conditioner in self.config.conditioners]
        has_null = ~torch.tensor(reads, dtype=torch.bool)  # (k,)

        def predict(denoiser: Self, x: Tensor, moment: Moment, is_null: Tensor) -> Tensor:
            # Guidance in one call brings every sample twice.
            repeated, others = (
                {name: torch.cat([field] * (len(x) // len(field))) for name, field in fields.items()}
                for fields in (conditions, uncond)
            )
            for name, other in others.items():
                repeated[name] = torch.where(is_null.view(-1, *[1] * (other.dim() - 1)), other, repeated[name])
            times = torch.full((len(x),), moment.time, device=x.device)
            return denoiser.output(x, times, repeated, is_null[:, None] & has_null.to(x.device))

        weaker = partial(predict, guide) if guide is not None else None

        def denoise(x: Tensor, moment: Moment) -> Estimate:
            output = guided_output(partial(predict, self), x, moment, guidance, weaker=weaker)
            return estimate_from_output(output, x, moment.level, self.config.objective.prediction)

        return denoise

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        fresh_noise: NoiseSource,
        uncond: Mapping[str, Tensor] | None = None,
        guide: Self | None = None,
    ) -> Tensor:
        """Turn noise (b c h w), float32, into normalised latents of the same shape.

        ``fresh_noise`` gives the noise of a step by its index, (b c h w); deterministic samplers never call it.
        ``uncond`` and ``guide`` are as in ``denoise``.
        """
        denoise = self.denoise(conditions, guidance, uncond, guide)
        return sample(sampler, self.process, denoise, noise, fresh_noise=fresh_noise)

    @torch.no_grad()
    def condition_gap(self, x0: Tensor, noise: Tensor, times: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Relative change of the prediction by the conditions: (b,), 0 if they are ignored.

        Root mean square of the difference between the outputs with all conditions and with none, over that of the
        former. Arguments as in ``forward``.
        """
        x = add_noise(x0, noise, self.process.level(times, like=x0))
        nothing_dropped = torch.zeros(len(x), len(self.conditioners), dtype=torch.bool, device=x.device)
        cond = self.output(x, times, conditions, nothing_dropped).flatten(1)
        uncond = self.output(x, times, conditions, ~nothing_dropped).flatten(1)
        return torch.linalg.vector_norm(cond - uncond, dim=1) / torch.linalg.vector_norm(cond, dim=1).clamp(min=1e-12)


def _halvings(size: int) -> int:
    """Number of times that ``size`` can be halved."""
    return (size & -size).bit_length() - 1


def combine(parts: Sequence[Conditioning]) -> Conditioning:
    """Add the pooled embeddings and line up the tokens of several conditions."""
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    masks = [part.token_mask for part in parts if part.token_mask is not None]
    return Conditioning(
        embedding=sum(embeddings[1:], start=embeddings[0]) if embeddings else None,
        tokens=torch.cat(tokens, dim=1) if tokens else None,
        token_mask=torch.cat(masks, dim=1) if masks else None,
    )
