"""Samplers, from noise to data: DDPM, DDIM and its inversion, Euler, Heun and DPM-Solver++(2M).

A sampler is a generator: it is given a denoiser, initial noise and a list of moments from noisy to clean, and yields a
``SamplerStep`` after each move. It knows no network and draws no randomness: fresh noise comes from a callable, so that
an image can depend on its own seed only. The last move always ends on clean data.

    for step in sample_steps(config, process, denoise, noise, fresh_noise=draw): ...
    images = sample(config, process, denoise, noise, fresh_noise=draw)

``now`` is the level of the latents and ``then`` the cleaner one that a step moves them to. All formulas are finite when
``now`` is pure noise, so schedules with zero terminal SNR and flow matching need no special case, provided that the
network's prediction is informative there (v, velocity, x0; not eps).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from models.diffusion.posterior import (
    Variance,
    posterior_variance,
    reverse_log_variance,
    step_variance,
    x0_to_posterior_mean,
)
from models.diffusion.prediction import Denoise, Estimate, eps_to_x0
from models.diffusion.schedule import CLEAN, Moment, NoiseLevel, NoiseSource, Process
from models.diffusion.spacing import Spacing, sampling_moments

DATA = Moment(time=0.0, level=CLEAN)  # where every sampler ends; the network is never called there
LARGEST_HEUN_RATIO = 200.0  # sigma / alpha; a cosine schedule ends at 20,000, where the trapezoidal rule diverges


@dataclass(frozen=True)
class SamplerStep:
    """State of a sampler after a move."""

    index: int  # of the move, from 0
    x: Tensor  # latents after it; (b c h w)
    level: NoiseLevel  # their noise level
    estimate: Estimate  # the estimate that the move followed; ``estimate.x0`` is the preview worth showing


# ------------------------------------------------------------------------------------------------------- single steps


def ddim_step(estimate: Estimate, *, then: NoiseLevel) -> Tensor:
    """Mix the estimated data and noise anew, at the cleaner level ``then``.

    Song et al. 2021 (arXiv:2010.02502), eq. 12 with sigma_t = 0. Exact when the estimate is exact. It is also the Euler
    step of the probability-flow ODE in (x / alpha, sigma / alpha), their eq. 14, and of the flow ODE on the straight
    path, and the first-order DPM-Solver++.
    """
    return then.alpha * estimate.x0 + then.sigma * estimate.eps


def stochastic_ddim_step(estimate: Estimate, z: Tensor, *, now: NoiseLevel, then: NoiseLevel, eta: float) -> Tensor:
    """Replace a share of the estimated noise by the fresh noise ``z``. Song et al. 2021, eqs. 12 and 16.

    Their sigma_t(eta)^2 is that share of the variance at ``then``: eta^2 beta-tilde.
    """
    share = eta**2 * step_variance(now=now, then=then) / now.sigma**2  # in [0, 1]
    return then.alpha * estimate.x0 + then.sigma * ((1 - share).sqrt() * estimate.eps + share.sqrt() * z)


def heun_correction(here: Estimate, there: Estimate, *, now: NoiseLevel, then: NoiseLevel, straight: bool) -> Tensor:
    """Correction by the trapezoidal rule to an Euler step from ``now`` to ``then``. Karras et al. 2022, algorithm 1.

    On the chain it integrates in (x / alpha, sigma / alpha), where the slope is eps; on the straight path in (x, t),
    where the slope is eps - x0. A chain's step from near pure noise covers almost all of sigma / alpha, where the rule
    is worse than Euler's: there, and from pure noise itself, the step stays an Euler step.
    """
    if straight:
        return (then.sigma - now.sigma) / 2 * ((there.eps - there.x0) - (here.eps - here.x0))
    if now.ratio > LARGEST_HEUN_RATIO:
        return torch.zeros_like(here.eps)
    return (then.sigma - then.alpha * now.ratio) / 2 * (there.eps - here.eps)


def dpm_solver_step(x: Tensor, x0: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Pull ``x`` towards ``x0``, from ``now`` to ``then``. Lu et al. 2022 (arXiv:2211.01095), section 4, first order.

    Their alpha_t (1 - e^-h) is written as alpha_t - sigma_t alpha_s / sigma_s: finite at pure noise and clean data.
    """
    shrink = then.sigma / now.sigma
    return shrink * x + (then.alpha - shrink * now.alpha) * x0


# ----------------------------------------------------------------------------------------------------------- samplers


def _moves(moments: Sequence[Moment]) -> Iterator[tuple[int, Moment, Moment]]:
    for index, (now, then) in enumerate(pairwise([*moments, DATA])):
        yield index, now, then


def ddim(
    denoise: Denoise, x: Tensor, moments: Sequence[Moment], *, eta: float, fresh_noise: NoiseSource
) -> Iterator[SamplerStep]:
    """Song et al. 2021 (arXiv:2010.02502). Deterministic at ``eta`` 0; DDPM with the posterior variance at 1."""
    for index, now, then in _moves(moments):
        estimate = denoise(x, now)
        if eta > 0 and then.level.sigma > 0:
            x = stochastic_ddim_step(estimate, fresh_noise(index), now=now.level, then=then.level, eta=eta)
        else:
            x = ddim_step(estimate, then=then.level)
        yield SamplerStep(index, x, then.level, estimate)


def ddpm(
    denoise: Denoise, x: Tensor, moments: Sequence[Moment], *, variance: Variance, fresh_noise: NoiseSource
) -> Iterator[SamplerStep]:
    """Ancestral sampling. Ho et al. 2020 (arXiv:2006.11239), algorithm 2; no noise is added by the last step."""
    for index, now, then in _moves(moments):
        estimate = denoise(x, now)
        x = x0_to_posterior_mean(estimate.x0, x, now=now.level, then=then.level)
        if then.level.sigma > 0:
            smallest = posterior_variance(now=now.level, then=then.level)
            largest = step_variance(now=now.level, then=then.level)
            log_variance = reverse_log_variance(estimate, smallest=smallest, largest=largest, variance=variance)
            x = x + (0.5 * log_variance).exp() * fresh_noise(index)
        yield SamplerStep(index, x, then.level, estimate)


def euler(denoise: Denoise, x: Tensor, moments: Sequence[Moment]) -> Iterator[SamplerStep]:
    """Euler's method on the probability-flow ODE; the same as deterministic DDIM, see ``ddim_step``."""
    for index, now, then in _moves(moments):
        estimate = denoise(x, now)
        x = ddim_step(estimate, then=then.level)
        yield SamplerStep(index, x, then.level, estimate)


def heun(denoise: Denoise, x: Tensor, moments: Sequence[Moment], *, straight: bool) -> Iterator[SamplerStep]:
    """Heun's second-order method, two calls a step but the last. Karras et al. 2022 (arXiv:2206.00364), algorithm 1."""
    for index, now, then in _moves(moments):
        estimate = denoise(x, now)
        x = ddim_step(estimate, then=then.level)
        if then.level.sigma > 0:
            x = x + heun_correction(estimate, denoise(x, then), now=now.level, then=then.level, straight=straight)
        yield SamplerStep(index, x, then.level, estimate)


def dpm_solver_pp(denoise: Denoise, x: Tensor, moments: Sequence[Moment]) -> Iterator[SamplerStep]:
    """DPM-Solver++(2M), second order with one call a step. Lu et al. 2022 (arXiv:2211.01095), algorithm 2.

    First order for the first step, which has no history; for the second if the first left pure noise, whose log-SNR is
    infinitely far; and for the last, onto clean data.
    """
    before: tuple[NoiseLevel, Estimate] | None = None
    for index, now, then in _moves(moments):
        estimate = denoise(x, now)
        x0 = estimate.x0
        if before is not None and then.level.sigma > 0:
            level_before, estimate_before = before
            h = then.level.log_snr - now.level.log_snr
            h_before = now.level.log_snr - level_before.log_snr  # infinite after pure noise: then no extrapolation
            x0 = x0 + h / (2 * h_before) * (x0 - estimate_before.x0)
        x = dpm_solver_step(x, x0, now=now.level, then=then.level)
        before = (now.level, estimate)
        yield SamplerStep(index, x, then.level, estimate)


def ddim_inversion(denoise: Denoise, x0: Tensor, moments: Sequence[Moment]) -> Iterator[SamplerStep]:
    """From data to the noise that deterministic DDIM turns back into it, along the same moments.

    Song et al. 2021, section 4.3; Dhariwal & Nichol 2021 (arXiv:2105.05233), appendix F. The network's input is the
    time of the level that the step leads to, since clean data has none. The round trip closes as steps become finer.

    Args:
        denoise: Must be able to tell the noise in clean data: a prediction of x0 cannot.
        x0: Clean latents; (b c h w).
        moments: As for sampling, noisiest first.

    Raises:
        ValueError: When the denoiser's noise in clean data is not finite.
    """
    x, level = x0, CLEAN
    for index, then in enumerate(reversed(moments)):
        estimate = denoise(x, Moment(time=then.time, level=level))
        if index == 0 and not estimate.eps.isfinite().all():
            raise ValueError(
                "DDIM inversion starts from clean data, but the denoiser's estimate of the noise in it is not finite. "
                "A network that predicts x0 cannot be inverted; use one that predicts eps, v or velocity."
            )
        x = ddim_step(Estimate(x0=eps_to_x0(estimate.eps, x, level), eps=estimate.eps), then=then.level)
        level = then.level
        yield SamplerStep(index, x, level, estimate)


# ------------------------------------------------------------------------------------------------------ by config


class _SamplerConfig(BaseModel, frozen=True, extra="forbid"):
    num_steps: PositiveInt = 50  # moves from noise to data
    spacing: Spacing = "trailing"  # which noise levels: leading, trailing, linspace, quadratic or karras


class DDIMConfig(_SamplerConfig, frozen=True, extra="forbid"):
    """Denoising diffusion implicit models (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0  # fresh noise a step: 0 deterministic, 1 as DDPM


class DDPMConfig(_SamplerConfig, frozen=True, extra="forbid"):
    """Ancestral sampling (Ho et al. 2020)."""

    kind: Literal["ddpm"] = "ddpm"
    variance: Variance = "posterior"  # of a step: posterior (beta-tilde), step (beta), or learned


class EulerConfig(_SamplerConfig, frozen=True, extra="forbid"):
    """Euler's method on the probability-flow ODE (Karras et al. 2022)."""

    kind: Literal["euler"] = "euler"


class HeunConfig(_SamplerConfig, frozen=True, extra="forbid"):
    """Heun's method on the probability-flow ODE (Karras et al. 2022); 2 num_steps - 1 network calls."""

    kind: Literal["heun"] = "heun"


class DPMSolverConfig(_SamplerConfig, frozen=True, extra="forbid"):
    """DPM-Solver++(2M) (Lu et al. 2022)."""

    kind: Literal["dpm_solver_pp"] = "dpm_solver_pp"


SamplerConfig = Annotated[
    DDIMConfig | DDPMConfig | EulerConfig | HeunConfig | DPMSolverConfig,
    Field(discriminator="kind"),
]


def check_sampler(config: SamplerConfig, process: Process, *, variance_is_learned: bool) -> None:
    """Stop a sampler that cannot run on a process, before anything is computed.

    Raises:
        ValueError: Saying what, why and what to do.
    """
    sampling_moments(process, num_steps=config.num_steps, spacing=config.spacing)
    if isinstance(config, DDPMConfig) and config.variance == "learned" and not variance_is_learned:
        raise ValueError(
            'sampler.variance = "learned" needs a network that learned one, but this was trained with '
            'objective.variance = "fixed". Use sampler.variance = "posterior" or "step".'
        )


def sample_steps(
    config: SamplerConfig, process: Process, denoise: Denoise, noise: Tensor, *, fresh_noise: NoiseSource
) -> Iterator[SamplerStep]:
    """Turn ``noise`` into data, yielding every step.

    Args:
        noise: Standard normal; (b c h w), float32 or float64: all latents keep this dtype.
        fresh_noise: Noise of a step, given its index; only called by samplers that add noise.
    """
    moments = sampling_moments(process, num_steps=config.num_steps, spacing=config.spacing)
    match config:
        case DDIMConfig():
            return ddim(denoise, noise, moments, eta=config.eta, fresh_noise=fresh_noise)
        case DDPMConfig():
            return ddpm(denoise, noise, moments, variance=config.variance, fresh_noise=fresh_noise)
        case EulerConfig():
            return euler(denoise, noise, moments)
        case HeunConfig():
            return heun(denoise, noise, moments, straight=process.straight)
        case DPMSolverConfig():
            return dpm_solver_pp(denoise, noise, moments)


def sample(
    config: SamplerConfig, process: Process, denoise: Denoise, noise: Tensor, *, fresh_noise: NoiseSource
) -> Tensor:
    """Turn ``noise`` (b c h w) into data (b c h w); see ``sample_steps``."""
    *_, last = sample_steps(config, process, denoise, noise, fresh_noise=fresh_noise)
    return last.x


# --------------------------------------------------------------------------------------------------- interpolation


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The straight way from ``a`` (weight 0) to ``b`` (weight 1). Halfway between two noises its variance is a half."""
    return (1 - weight) * a + weight * b


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """The arc from ``a`` (weight 0) to ``b`` (weight 1), for each sample: it keeps noise as long as noise is.

    Shoemake 1985; for latents Song et al. 2021 (arXiv:2010.02502), appendix D.5. Parallel samples get the straight way.

    Args:
        a: Latents; (b c h w).
        b: Latents; (b c h w).
        weight: In [0, 1].
    """
    elements = tuple(range(1, a.dim()))
    cosine = (a * b).sum(elements, keepdim=True) / (
        a.square().sum(elements, keepdim=True) * b.square().sum(elements, keepdim=True)
    ).sqrt()
    angle = cosine.clamp(-1, 1).acos()
    along = (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()
    return torch.where(angle.sin() > 1e-6, along, lerp(a, b, weight))
