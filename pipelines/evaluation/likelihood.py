"""Likelihood of validation latents: the variational bound, in bits per latent dimension.

The latents are those that the U-Net trains on, drawn from the VAE's posterior and normalised; so the bound is of a
density, may be negative, and compares models of one VAE and one normalisation only.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from models.diffusion.guidance import GuidanceConfig
from models.diffusion.likelihood import NATS_PER_BIT, variational_bound
from models.diffusion.posterior import Variance
from models.diffusion.samplers import DDPMConfig
from models.diffusion.spacing import sampling_moments
from models.latent_diffusion import LatentDiffusion

TERMS = ("bits_per_dimension", "prior", "moves", "reconstruction")


class NoBoundConfig(BaseModel, frozen=True, extra="forbid"):
    """No likelihood is measured."""

    kind: Literal["none"] = "none"


class VariationalBoundConfig(BaseModel, frozen=True, extra="forbid"):
    """The variational bound of validation latents with their conditions, without guidance (Ho et al. 2020, eq. 5)."""

    kind: Literal["variational_bound"] = "variational_bound"
    num_images: PositiveInt = 100  # validation images, at most
    num_steps: Annotated[int, Field(ge=2)] = 250  # moves of the chain, a network call each; training's give its bound
    variance: Variance = "posterior"  # of a move: posterior (beta-tilde), step (beta), or learned

    @property
    def sampler(self) -> DDPMConfig:
        """The chain whose bound it is."""
        return DDPMConfig(num_steps=self.num_steps, variance=self.variance)


BoundConfig = Annotated[NoBoundConfig | VariationalBoundConfig, Field(discriminator="kind")]


@torch.no_grad()
def measure_bound(
    config: VariationalBoundConfig,
    model: LatentDiffusion,
    images: Tensor,
    conditions: Mapping[str, Tensor],
    *,
    noise: Callable[[str], Tensor],
) -> dict[str, Tensor]:
    """Return each term of the bound for each image; float64 (n,), in bits per latent dimension.

    Args:
        config: The chain.
        model: The model.
        images: In [-1, 1]; (n C H W).
        conditions: Fields (n ...), as the denoiser's conditioners read them.
        noise: Standard normal noise (n c h w) by purpose.
    """
    denoiser, sampler = model.denoiser, config.sampler
    x0 = model.encode(images, noise("bound/posterior"))
    bound = variational_bound(
        denoiser.denoise(
            {name: field.to(model.device) for name, field in conditions.items()}, GuidanceConfig(scale=1.0)
        ),
        x0,
        sampling_moments(denoiser.process, num_steps=sampler.num_steps, spacing=sampler.spacing),
        variance=config.variance,
        fresh_noise=lambda index: noise(f"bound/{index}"),
    )
    values = {
        "bits_per_dimension": bound.bits_per_dimension,
        "prior": bound.prior / NATS_PER_BIT,
        "moves": bound.moves.sum(dim=1) / NATS_PER_BIT,
        "reconstruction": bound.reconstruction / NATS_PER_BIT,
    }
    return {name: value.double().cpu() for name, value in values.items()}
