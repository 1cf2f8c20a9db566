"""How probable a model finds validation latents: the variational bound, in bits per latent dimension.

The latents are those that the U-Net trains on, drawn from the VAE's posterior and normalised; so the figure is of a
density, may be negative, and compares models of one VAE and one normalisation only.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from data.randomness import SampleDraws
from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.likelihood import NATS_PER_BIT, VariationalBound, variational_bound
from models.diffusion.posterior import Variance
from models.diffusion.samplers import DDPMConfig
from models.diffusion.spacing import sampling_moments
from models.metrics import Estimate, mean_estimate
from pipelines.model.weights import Normalisation, check_sampler_suits

TERMS = ("bits_per_dimension", "prior", "moves", "reconstruction")


class NoBoundConfig(BaseModel, frozen=True, extra="forbid"):
    """No likelihood is measured."""

    kind: Literal["none"] = "none"


class VariationalBoundConfig(BaseModel, frozen=True, extra="forbid"):
    """The variational bound of validation latents with their conditions, without guidance (Ho et al. 2020, eq. 5)."""

    kind: Literal["variational_bound"] = "variational_bound"
    num_images: PositiveInt = 100  # validation images, at most
    num_steps: Annotated[int, Field(ge=2)] = (
        250  # moves of the chain, a network call each; all of training's: its bound
    )
    variance: Variance = "posterior"  # of a move: posterior (beta-tilde), step (beta), or learned

    @property
    def sampler(self) -> DDPMConfig:
        """The chain whose bound it is."""
        return DDPMConfig(num_steps=self.num_steps, variance=self.variance)


BoundConfig = Annotated[NoBoundConfig | VariationalBoundConfig, Field(discriminator="kind")]


def check_bound(config: NoBoundConfig | VariationalBoundConfig, denoiser: DenoiserConfig) -> None:
    """Refuse a chain that the denoiser's process does not have.

    Raises:
        ValueError: Saying why, and what would do.
    """
    if isinstance(config, VariationalBoundConfig):
        check_sampler_suits(config.sampler, denoiser)


class BoundMeter:
    """Measures images that all have one batch size.

    Args:
        config: The chain.
        network: The model.
        normalisation: Of its latents.
        vae: Encodes the images.
        seed: Draws of image i depend on (seed, i) only.
    """

    def __init__(
        self,
        config: VariationalBoundConfig,
        *,
        network: Denoiser,
        normalisation: Normalisation,
        vae: AutoencoderKL,
        seed: int,
    ) -> None:
        self.config, self.network, self.normalisation, self.vae = config, network, normalisation, vae
        self.seed, self.device = seed, vae.last_layer.device

    @torch.no_grad()
    def measure(
        self,
        indices: Sequence[int],
        images: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        autocast: AbstractContextManager[None],
    ) -> dict[str, Tensor]:
        """Return each term of the bound for each image; float64 (n,), in bits per latent dimension.

        Args:
            indices: Which images; they fix the draws.
            images: In [-1, 1]; (n C H W).
            conditions: Fields (n ...), as the denoiser's conditioners read them.
            autocast: Precision of the networks.
        """
        config, process = self.config, self.network.process
        draws = SampleDraws(self.seed, 0, indices)
        with autocast:
            posterior = self.vae.encode(images.to(self.device))

            def normals(purpose: str) -> Tensor:
                return torch.from_numpy(draws.normals(purpose, tuple(posterior.mean.shape[1:]))).to(self.device)

            x0 = self.normalisation.normalise(posterior.sample(normals("bound/posterior")).float())
            bound = variational_bound(
                self.network.denoise(
                    {name: field.to(self.device) for name, field in conditions.items()}, GuidanceConfig(scale=1.0)
                ),
                x0,
                sampling_moments(process, num_steps=config.num_steps, spacing=config.sampler.spacing),
                variance=config.variance,
                fresh_noise=lambda index: normals(f"bound/{index}"),
            )
        return terms_in_bits(bound)


def terms_in_bits(bound: VariationalBound) -> dict[str, Tensor]:
    """Return the bound and its three terms; (n,) each, bits per dimension."""
    values = {
        "bits_per_dimension": bound.bits_per_dimension,
        "prior": bound.prior / NATS_PER_BIT,
        "moves": bound.moves.sum(dim=1) / NATS_PER_BIT,
        "reconstruction": bound.reconstruction / NATS_PER_BIT,
    }
    return {name: values[name].double().cpu() for name in TERMS}


def bound_metrics(terms: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Average the terms over images, with standard errors."""
    estimates: dict[str, Estimate] = {name: mean_estimate(values) for name, values in terms.items()}
    return {name: {"value": float(e.value), "error": float(e.error)} for name, e in estimates.items()}
