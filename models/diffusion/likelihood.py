"""The variational bound on -log p(x_0), term by term, in nats per dimension (bits: divide by ln 2).

    L_T       KL( q(x_T | x_0) || N(0, I) )                              the prior: nothing to learn
    L_{t-1}   KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) )            one for every move but the last
    L_0       -log p(x_0 | x_1)                                          the last move, onto clean data

Ho et al. 2020 (arXiv:2006.11239), eq. 5. The bound belongs to the chain that visits the given moments: with all T steps
it is the training bound, with fewer it is the (looser, also valid) bound of the respaced sampler. Latents are
continuous, so L_0 is the logarithm of a density and the bound may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from models.diffusion.posterior import (
    Variance,
    posterior_mean_weights,
    posterior_variance,
    reverse_log_variance,
    step_variance,
)
from models.diffusion.prediction import Denoise, Estimate
from models.diffusion.samplers import DDPMConfig
from models.diffusion.schedule import CLEAN, Moment, NoiseLevel, NoiseSource, add_noise

NATS_PER_BIT = math.log(2)
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


# ------------------------------------------------------------------------------------- Gaussians, element by element


def gaussian_kl(*, mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL( N(mean1, e^log_variance1) || N(mean2, e^log_variance2) ) of each element, in nats."""
    spread = log_variance1 - log_variance2
    return 0.5 * (spread.exp() - 1 - spread + (mean1 - mean2).square() * (-log_variance2).exp())


def gaussian_nll(x: Tensor, *, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(x; mean, e^log_variance) of each element, in nats."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + (x - mean).square() * (-log_variance).exp())


# -------------------------------------------------------------------------------------- the terms, per sample (b,)


def prior_term(x0: Tensor, *, level: NoiseLevel) -> Tensor:
    """L_T for data ``x0`` (b c h w) at the noisiest level; (b,). Zero when that level is pure noise."""
    variance = level.sigma.to(x0) ** 2
    return per_sample(0.5 * (variance + (level.alpha * x0).square() - 1 - variance.log()))


def move_term(estimate: Estimate, x0: Tensor, *, log_variance: Tensor, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """L_{t-1} of the move from ``now`` to ``then``, which is not yet clean; (b,).

    Args:
        estimate: The denoiser's estimate from the latents at ``now``; gives the mean of p(x_{t-1} | x_t).
        x0: The data in them; (b c h w).
        log_variance: Of p(x_{t-1} | x_t); broadcasts over x0.
    """
    # Both means hold the same share of x_t. It is left out: in float32 it would drown their difference.
    _, of_x0 = posterior_mean_weights(now=now, then=then)
    return per_sample(
        gaussian_kl(
            mean1=of_x0 * x0,
            log_variance1=posterior_variance(now=now, then=then).log(),
            mean2=of_x0 * estimate.x0,
            log_variance2=log_variance,
        )
    )


def reconstruction_term(estimate: Estimate, x0: Tensor, *, log_variance: Tensor) -> Tensor:
    """L_0 for continuous data ``x0`` (b c h w); (b,). The mean of the move onto clean data is the estimated data."""
    return per_sample(gaussian_nll(x0, mean=estimate.x0, log_variance=log_variance))


# --------------------------------------------------------------------------------------------------- the whole bound


@dataclass(frozen=True)
class VariationalBound:
    """A bound on -log p(x_0) of each sample, in nats per dimension."""

    prior: Tensor  # L_T; (b,)
    moves: Tensor  # L_{t-1}, noisiest first; (b n-1)
    reconstruction: Tensor  # L_0; (b,)

    @property
    def total(self) -> Tensor:
        """The bound; (b,) nats per dimension."""
        return self.prior + self.moves.sum(dim=1) + self.reconstruction

    @property
    def bits_per_dimension(self) -> Tensor:
        """The bound; (b,) bits per dimension, the figure that papers report."""
        return self.total / NATS_PER_BIT

    @property
    def in_bits(self) -> dict[str, Tensor]:
        """The bound and its terms, as ``TERMS`` names them; (b,) bits per dimension."""
        terms = (self.prior, self.moves.sum(dim=1), self.reconstruction)
        return dict(zip(TERMS, (self.bits_per_dimension, *(nats / NATS_PER_BIT for nats in terms)), strict=True))


def variational_bound(
    denoise: Denoise, x0: Tensor, moments: Sequence[Moment], *, variance: Variance, fresh_noise: NoiseSource
) -> VariationalBound:
    """Estimate the bound for data ``x0`` (b c h w), with one noise sample for each of the moments.

    Args:
        moments: At least two, noisiest first, as a sampler visits them.
        variance: Of p(x_{t-1} | x_t), as in the DDPM sampler.
        fresh_noise: Standard normal noise for the moment of an index, shaped and typed as ``x0``.

    Raises:
        ValueError: With fewer than two moments, or when a learned variance is asked for and the network has none.
    """
    if len(moments) < 2:
        raise ValueError(f"a variational bound needs at least 2 moments, not {len(moments)}: give it more steps.")
    terms = []
    smallest = torch.empty(0)
    for index, moment in enumerate(moments):
        now = moment.level
        then = moments[index + 1].level if index + 1 < len(moments) else CLEAN
        estimate = denoise(add_noise(x0, fresh_noise(index), now), moment)
        if then.sigma > 0:
            smallest = posterior_variance(now=now, then=then)  # stays for the last move, whose own is zero
        largest = step_variance(now=now, then=then)
        log_variance = reverse_log_variance(estimate, smallest=smallest, largest=largest, variance=variance)
        if then.sigma > 0:
            terms.append(move_term(estimate, x0, log_variance=log_variance, now=now, then=then))
        else:
            terms.append(reconstruction_term(estimate, x0, log_variance=log_variance))
    *moves, reconstruction = terms
    return VariationalBound(
        prior=prior_term(x0, level=moments[0].level), moves=torch.stack(moves, dim=1), reconstruction=reconstruction
    )


def per_sample(values: Tensor) -> Tensor:
    """Mean over all elements of each sample: (b c h w) -> (b,)."""
    return values.flatten(1).mean(dim=1)
