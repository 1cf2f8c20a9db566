"""Predictions of a network, and the conversion of each into every other.

Noisy latents are ``x = alpha x0 + sigma eps``. Given ``x`` and its noise level, each of these gives all the others:

    x0         the data
    eps        the noise                                        Ho et al. 2020 (arXiv:2006.11239), eq. 14
    v          alpha eps - sigma x0                             Salimans & Ho 2022 (arXiv:2202.00512), section 4
    velocity   eps - x0, the direction of the straight path     Lipman et al. 2023 (arXiv:2210.02747), eq. 23
    score      grad_x log q(x | x0) = -eps / sigma              Song et al. 2021 (arXiv:2011.13456), section 3

The fourth thing a network may predict, the mean of the posterior q(x_{t-1} | x_t, x_0), depends on two levels: see
``posterior.py``.

Every ``<from>_to_<to>(value, x, level)`` is written for any alpha and sigma, so the chain (alpha^2 + sigma^2 = 1) and
flow matching (alpha + sigma = 1) share it. At the ends of a schedule some questions have no answer; those conversions
divide by zero, and the result is infinite or nan, as in the mathematics:

    pure noise, alpha = 0      x holds nothing of x0: from eps or score, only eps and score follow
    clean data, sigma = 0      x holds nothing of eps: from x0, only x0 follows; no score exists

From v and from velocity, everything but the score is finite everywhere, which is why they suit schedules that end in
pure noise. All tensors are (b c h w) of one dtype; levels broadcast over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from models.diffusion.schedule import Moment, NoiseLevel

Prediction = Literal["eps", "x0", "v", "velocity", "score"]


@dataclass(frozen=True)
class Estimate:
    """Estimate of a denoiser: the data and the noise in noisy latents, (b c h w) each.

    ``log_variance_weight`` is the learned variance of Nichol & Dhariwal 2021, eq. 15, where a network has one: the
    weight of log beta against log beta-tilde, in [0, 1] when well trained; (b c h w).
    """

    x0: Tensor
    eps: Tensor
    log_variance_weight: Tensor | None = None


Denoise = Callable[[Tensor, Moment], Estimate]
"""A network with its conditions and guidance, as samplers call it: its estimate from latents x (b c h w)."""


# ------------------------------------------------------------------------------------------------------- from eps


def eps_to_x0(eps: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Ho et al. 2020, eq. 15. Undefined at alpha = 0."""
    return (x - level.sigma * eps) / level.alpha


def eps_to_v(eps: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at alpha = 0."""
    return (_power(level) * eps - level.sigma * x) / level.alpha


def eps_to_velocity(eps: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at alpha = 0."""
    return ((level.alpha + level.sigma) * eps - x) / level.alpha


def eps_to_score(eps: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Song et al. 2021, eq. 9 with the Gaussian kernel. Undefined at sigma = 0."""
    return -eps / level.sigma


# -------------------------------------------------------------------------------------------------------- from x0


def x0_to_eps(x0: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Ho et al. 2020, eq. 15 solved for the noise. Undefined at sigma = 0."""
    return (x - level.alpha * x0) / level.sigma


def x0_to_v(x0: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at sigma = 0."""
    return (level.alpha * x - _power(level) * x0) / level.sigma


def x0_to_velocity(x0: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at sigma = 0."""
    return (x - (level.alpha + level.sigma) * x0) / level.sigma


def x0_to_score(x0: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at sigma = 0."""
    return (level.alpha * x0 - x) / level.sigma**2


# --------------------------------------------------------------------------------------------------------- from v


def v_to_x0(v: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Salimans & Ho 2022, appendix D. Finite everywhere."""
    return (level.alpha * x - level.sigma * v) / _power(level)


def v_to_eps(v: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Salimans & Ho 2022, appendix D. Finite everywhere."""
    return (level.sigma * x + level.alpha * v) / _power(level)


def v_to_velocity(v: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Finite everywhere."""
    return ((level.sigma - level.alpha) * x + (level.alpha + level.sigma) * v) / _power(level)


def v_to_score(v: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at sigma = 0."""
    return -v_to_eps(v, x, level) / level.sigma


# -------------------------------------------------------------------------------------------------- from velocity


def velocity_to_x0(velocity: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """On the straight path: x0 = x - t u. Finite everywhere."""
    return (x - level.sigma * velocity) / (level.alpha + level.sigma)


def velocity_to_eps(velocity: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """On the straight path: eps = x + (1 - t) u. Finite everywhere."""
    return (x + level.alpha * velocity) / (level.alpha + level.sigma)


def velocity_to_v(velocity: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Finite everywhere."""
    return ((level.alpha - level.sigma) * x + _power(level) * velocity) / (level.alpha + level.sigma)


def velocity_to_score(velocity: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at sigma = 0."""
    return -velocity_to_eps(velocity, x, level) / level.sigma


# ----------------------------------------------------------------------------------------------------- from score


def score_to_x0(score: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Tweedie's formula (Efron 2011). Undefined at alpha = 0."""
    return (x + level.sigma**2 * score) / level.alpha


def score_to_eps(score: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Finite everywhere."""
    return -level.sigma * score


def score_to_v(score: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at alpha = 0."""
    return -level.sigma * (x + _power(level) * score) / level.alpha


def score_to_velocity(score: Tensor, x: Tensor, level: NoiseLevel) -> Tensor:
    """Undefined at alpha = 0."""
    return -(x + (level.alpha + level.sigma) * level.sigma * score) / level.alpha


# ----------------------------------------------------------------------------------------------- by name of target

Conversion = Callable[[Tensor, Tensor, NoiseLevel], Tensor]

TO_X0: dict[Prediction, Conversion] = {
    "eps": eps_to_x0,
    "x0": lambda x0, x, level: x0,
    "v": v_to_x0,
    "velocity": velocity_to_x0,
    "score": score_to_x0,
}
TO_EPS: dict[Prediction, Conversion] = {
    "eps": lambda eps, x, level: eps,
    "x0": x0_to_eps,
    "v": v_to_eps,
    "velocity": velocity_to_eps,
    "score": score_to_eps,
}


def estimate_from_output(output: Tensor, x: Tensor, level: NoiseLevel, prediction: Prediction) -> Estimate:
    """Read the output of a network that predicts ``prediction`` from ``x``.

    Args:
        output: (b c h w), or (b 2c h w) when the variance is learned: the second half is then the weight of Nichol &
            Dhariwal 2021, eq. 15, as -1 (beta-tilde) to 1 (beta).
        x: Latents that the network saw; (b c h w).
    """
    value, variance = split_learned_variance(output, num_channels=x.shape[1])
    return Estimate(
        x0=TO_X0[prediction](value, x, level),
        eps=TO_EPS[prediction](value, x, level),
        log_variance_weight=variance,
    )


def split_learned_variance(output: Tensor, *, num_channels: int) -> tuple[Tensor, Tensor | None]:
    """The predicted value (b c h w), and the weight of log beta in [0, 1] (b c h w) if the output has 2c channels."""
    if output.shape[1] == num_channels:
        return output, None
    value, raw = output.split(num_channels, dim=1)
    return value, (raw + 1) / 2


def training_target(x0: Tensor, eps: Tensor, level: NoiseLevel, prediction: Prediction) -> Tensor:
    """The target of a network that predicts ``prediction``, for data ``x0`` and noise ``eps``."""
    match prediction:
        case "x0":
            return x0
        case "eps":
            return eps
        case "v":
            return level.alpha * eps - level.sigma * x0
        case "velocity":
            return eps - x0
        case "score":
            return -eps / level.sigma


def _power(level: NoiseLevel) -> Tensor:
    """Variance of ``x`` for data of unit variance: 1 on the chain, less in the middle of the straight path."""
    return level.alpha**2 + level.sigma**2
