"""One step of the noising process and its reversal: q(x_t | x_s), and the posterior q(x_s | x_t, x_0).

``now`` is the noisier level t and ``then`` the cleaner level s; they need not be neighbours, so a respaced sampler uses
the same formulas. Written for any (alpha, sigma), Kingma et al. 2021 (arXiv:2107.00630), appendix A; on the chain with
s = t - 1, where the variance of a step is beta_t, they are Ho et al. 2020 (arXiv:2006.11239), eqs. 2, 6 and 7.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from models.diffusion.prediction import Estimate, v_to_x0, velocity_to_x0, x0_to_v, x0_to_velocity
from models.diffusion.schedule import NoiseLevel

Variance = Literal["posterior", "step", "learned"]  # of p(x_s | x_t): beta-tilde, beta, or between them


def step_scale(*, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """alpha_{t|s} of q(x_t | x_s) = N(alpha_{t|s} x_s, sigma^2_{t|s}); sqrt(1 - beta_t) on the chain."""
    return now.alpha / then.alpha


def step_variance(*, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """sigma^2_{t|s} of q(x_t | x_s); beta_t on the chain."""
    return now.sigma**2 - (step_scale(now=now, then=then) * then.sigma) ** 2


def forward_step(x: Tensor, eps: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Add noise to ``x`` (b c h w), given at the cleaner ``then``, up to ``now``. Ho et al. 2020, eq. 2."""
    return step_scale(now=now, then=then) * x + step_variance(now=now, then=then).sqrt() * eps


# ------------------------------------------------------------- the mean, from each prediction, and back to each of them


def posterior_mean_weights(*, now: NoiseLevel, then: NoiseLevel) -> tuple[Tensor, Tensor]:
    """Weights of x_t and of x_0 in the mean of q(x_s | x_t, x_0). Ho et al. 2020, eq. 7."""
    of_x = step_scale(now=now, then=then) * then.sigma**2 / now.sigma**2
    of_x0 = then.alpha * step_variance(now=now, then=then) / now.sigma**2
    return of_x, of_x0


def x0_to_posterior_mean(x0: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Ho et al. 2020, eq. 7. Finite everywhere, at pure noise and for the step onto clean data too."""
    of_x, of_x0 = posterior_mean_weights(now=now, then=then)
    return of_x * x + of_x0 * x0


def eps_to_posterior_mean(eps: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Ho et al. 2020, eq. 11. Undefined at alpha = 0."""
    return (x - step_variance(now=now, then=then) / now.sigma * eps) / step_scale(now=now, then=then)


def score_to_posterior_mean(score: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Song et al. 2021 (arXiv:2011.13456), eq. 4, with the score of x. Undefined at alpha = 0."""
    return (x + step_variance(now=now, then=then) * score) / step_scale(now=now, then=then)


def v_to_posterior_mean(v: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """By way of the data: Salimans & Ho 2022 (arXiv:2202.00512), appendix D. Finite everywhere."""
    return x0_to_posterior_mean(v_to_x0(v, x, now), x, now=now, then=then)


def velocity_to_posterior_mean(velocity: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """By way of the data. Finite everywhere."""
    return x0_to_posterior_mean(velocity_to_x0(velocity, x, now), x, now=now, then=then)


def posterior_mean_to_x0(mean: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Ho et al. 2020, eq. 7 solved for the data. Finite everywhere."""
    of_x, of_x0 = posterior_mean_weights(now=now, then=then)
    return (mean - of_x * x) / of_x0


def posterior_mean_to_eps(mean: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Ho et al. 2020, eq. 11 solved for the noise. Finite everywhere, but without the mean at alpha = 0."""
    return (x - step_scale(now=now, then=then) * mean) * now.sigma / step_variance(now=now, then=then)


def posterior_mean_to_score(mean: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """Song et al. 2021, eq. 4 solved for the score. Finite everywhere, but without the mean at alpha = 0."""
    return (step_scale(now=now, then=then) * mean - x) / step_variance(now=now, then=then)


def posterior_mean_to_v(mean: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """By way of the data, which leaves no doubt about v where there is noise. Finite everywhere."""
    return x0_to_v(posterior_mean_to_x0(mean, x, now=now, then=then), x, now)


def posterior_mean_to_velocity(mean: Tensor, x: Tensor, *, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """By way of the data. Finite everywhere."""
    return x0_to_velocity(posterior_mean_to_x0(mean, x, now=now, then=then), x, now)


# -------------------------------------------------------------------------------------------------------- the variance


def posterior_variance(*, now: NoiseLevel, then: NoiseLevel) -> Tensor:
    """beta-tilde, the variance of q(x_s | x_t, x_0): zero for the step onto clean data. Ho et al. 2020, eq. 7.

    Best for data that is a single point; ``step_variance`` (beta) is best for standard normal data (section 3.2).
    """
    return step_variance(now=now, then=then) * (then.sigma / now.sigma) ** 2


def learned_log_variance(weight: Tensor, *, smallest: Tensor, largest: Tensor) -> Tensor:
    """Interpolate the logarithms of the two extreme variances. Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 15.

    Args:
        weight: The network's v: 0 means ``smallest``, 1 means ``largest``; (b c h w), not confined to [0, 1].
        smallest: beta-tilde. Above zero: for the step onto clean data take the step before it, as the authors do.
        largest: beta.
    """
    return weight * largest.log() + (1 - weight) * smallest.log()


def reverse_log_variance(estimate: Estimate, *, smallest: Tensor, largest: Tensor, variance: Variance) -> Tensor:
    """Log-variance of the model's own step p(x_s | x_t), chosen between beta-tilde and beta.

    Raises:
        ValueError: When a learned variance is asked for and the network has none.
    """
    if variance == "posterior":
        return smallest.log()
    if variance == "step":
        return largest.log()
    if estimate.log_variance_weight is None:
        raise ValueError(
            'variance = "learned" was asked for, but the network predicts none: its output has as many channels as the '
            'latents. Use variance = "posterior" or "step", or train with objective.variance = "learned".'
        )
    return learned_log_variance(estimate.log_variance_weight, smallest=smallest, largest=largest)
