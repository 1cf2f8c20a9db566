"""The training objective of a denoiser: its times, its target, and the weight of its errors.

The loss is the mean squared error of the prediction, in its own units, times a weight that depends on the noise level
only. A weighting is a function of the signal-to-noise ratio on the error of x0; ``loss_weights`` turns it
into the weight for any prediction, so that min-SNR, say, is one line and means the same for eps, x0 and v.

Sources: Ho et al. 2020 (arXiv:2006.11239); Nichol & Dhariwal 2021 (arXiv:2102.09672); Salimans & Ho 2022
(arXiv:2202.00512); Choi et al. 2022 (arXiv:2204.00227); Hang et al. 2023 (arXiv:2303.09556); Esser et al. 2024
(arXiv:2403.03206).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from models.diffusion.likelihood import NATS_PER_BIT, move_term, reconstruction_term
from models.diffusion.posterior import posterior_variance, reverse_log_variance, step_variance
from models.diffusion.prediction import Prediction, estimate_from_output, split_learned_variance, training_target
from models.diffusion.schedule import DiscreteDiffusion, FlowMatchingConfig, NoiseLevel, Process, ScheduleConfig

# ------------------------------------------------------------------------------------------------------------ times


class UniformTimes(BaseModel, frozen=True, extra="forbid"):
    """Every step is equally likely (Ho et al. 2020, algorithm 1)."""

    kind: Literal["uniform"] = "uniform"
    stratified: bool = True  # spread the times of a global batch evenly, instead of drawing each on its own

    def fraction(self, u: Tensor) -> Tensor:
        """The inverse distribution function."""
        return u


class LogitNormalTimes(BaseModel, frozen=True, extra="forbid"):
    """The logit of the time is normal: most effort goes to the middle of the path (Esser et al. 2024, section 3.1)."""

    kind: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0  # of the logit; above 0 favours noisy times
    std: PositiveFloat = 1.0  # of the logit
    stratified: bool = True  # spread the times of a global batch evenly, instead of drawing each on its own

    def fraction(self, u: Tensor) -> Tensor:
        """The inverse distribution function."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


TimesConfig = Annotated[UniformTimes | LogitNormalTimes, Field(discriminator="kind")]


def times_from_uniforms(
    u: Tensor, *, batch: int, positions: Tensor, global_batch: int, times: TimesConfig, process: Process
) -> Tensor:
    """Turn one uniform number a sample into its time.

    Args:
        u: One draw for each sample, in [0, 1); (b,) float64.
        batch: Index of the global batch.
        positions: Index of each sample in the global batch; (b,) int64.
        global_batch: Samples in the global batch, over all ranks.

    Returns:
        (b,): int64 steps of the chain, or float64 times of the flow.
    """
    u = u.double()
    if times.stratified:
        u = (strata(positions, batch=batch, global_batch=global_batch) + u) / global_batch
    return process.time(times.fraction(u))


def strata(positions: Tensor, *, batch: int, global_batch: int) -> Tensor:
    """Deal the equal parts of [0, 1) to the samples of a global batch, one each; (b,) int64 in [0, global_batch).

    Kingma et al. 2021 (arXiv:2107.00630), appendix I.1, lower the variance of the loss like this. The parts are dealt
    in strides of the golden ratio, so that every rank's share, and every micro-batch, covers all noise levels evenly.
    From batch to batch they turn, in strides of another irrational number: an order that keeps a shard to a few
    positions would otherwise show it a few noise levels only.
    """
    golden, silver = (math.sqrt(5) - 1) / 2, math.sqrt(2) - 1
    turn = batch * _stride(silver, global_batch) % global_batch
    return (positions * _stride(golden, global_batch) + turn) % global_batch


def _stride(fraction: float, parts: int) -> int:
    """Return a number near ``fraction`` of the parts, coprime to them, so that none is dealt twice."""
    stride = max(round(parts * fraction), 1)
    while math.gcd(stride, parts) != 1:
        stride += 1
    return stride


# ---------------------------------------------------------------------------------------------------------- weights


class UniformWeighting(BaseModel, frozen=True, extra="forbid"):
    """The plain error of the network's own prediction; with eps this is L_simple (Ho et al. 2020, eq. 14)."""

    kind: Literal["uniform"] = "uniform"


class MinSNRWeighting(BaseModel, frozen=True, extra="forbid"):
    """min(SNR, gamma) on the error of x0 (Hang et al. 2023, section 3.4)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0  # SNR above which steps count no more

    def of_x0(self, snr: Tensor) -> Tensor:
        """Weight of the squared error of x0."""
        return snr.clamp(max=self.gamma)


class TruncatedSNRWeighting(BaseModel, frozen=True, extra="forbid"):
    """max(SNR, 1) on the error of x0: the larger of the errors of x0 and eps (Salimans & Ho 2022, section 4)."""

    kind: Literal["truncated_snr"] = "truncated_snr"

    def of_x0(self, snr: Tensor) -> Tensor:
        """Weight of the squared error of x0."""
        return snr.clamp(min=1)


class P2Weighting(BaseModel, frozen=True, extra="forbid"):
    """1 / (k + SNR)^gamma on the error of eps (Choi et al. 2022, eq. 8); with gamma 1 a sigmoid of the log-SNR."""

    kind: Literal["p2"] = "p2"
    k: PositiveFloat = 1.0  # bounds the weight at pure noise
    gamma: NonNegativeFloat = 1.0  # 0 is L_simple

    def of_x0(self, snr: Tensor) -> Tensor:
        """Weight of the squared error of x0."""
        return snr / (self.k + snr) ** self.gamma


WeightingConfig = Annotated[
    UniformWeighting | MinSNRWeighting | TruncatedSNRWeighting | P2Weighting,
    Field(discriminator="kind"),
]


def loss_weights(weighting: WeightingConfig, level: NoiseLevel, prediction: Prediction) -> Tensor:
    """Weight of the squared error of ``prediction``; shaped as the level.

    At pure noise and at clean data the weights are the limits, as far as these are finite: the SNR is held within
    1e-30 and 1e30 on its way.
    """
    if isinstance(weighting, UniformWeighting):
        return torch.ones_like(level.alpha)
    snr = level.snr.clamp(1e-30, 1e30)
    return weighting.of_x0(snr) * x0_error_per_error(level, snr, prediction)


def x0_error_per_error(level: NoiseLevel, snr: Tensor, prediction: Prediction) -> Tensor:
    """By how much a squared error of ``prediction`` is multiplied when it is read as one of x0."""
    match prediction:
        case "x0":
            return torch.ones_like(snr)
        case "eps":
            return 1 / snr
        case "v":
            return 1 / ((1 + snr) * (level.alpha**2 + level.sigma**2))
        case "velocity":
            return 1 / (1 + snr.sqrt()) ** 2
        case "score":
            return level.sigma**2 / snr


# -------------------------------------------------------------------------------------------------------- objective

LEAST_STARTING_WEIGHT = 1e-3  # of the step where sampling starts, in medians over all steps; below it is warned about
LARGEST_EPS_RATIO = 1e3  # sigma / alpha where sampling starts; above it is warned about eps


class ObjectiveConfig(BaseModel, frozen=True, extra="forbid"):
    """Target of the network, its training times, and the weight of its errors."""

    prediction: Prediction = "v"  # what the network's output means: eps, x0, v, velocity or score
    weighting: WeightingConfig = UniformWeighting()  # of the noise levels
    times: TimesConfig = UniformTimes()  # distribution of the training times
    variance: Literal["fixed", "learned"] = (
        "fixed"  # of the reverse step; learned doubles the network's output channels
    )
    bound_weight: PositiveFloat = (
        1e-3  # of the variational bound (bits per dimension, whole chain) if variance is learned
    )


def check_objective(objective: ObjectiveConfig, schedule: ScheduleConfig) -> None:
    """Stop combinations that cannot train.

    Raises:
        ValueError: Saying what, why and what to do.
    """
    flow = isinstance(schedule, FlowMatchingConfig)
    ends_in_noise = isinstance(schedule, FlowMatchingConfig) or schedule.zero_terminal_snr
    if ends_in_noise and objective.prediction in ("eps", "score"):
        raise ValueError(
            f'objective.prediction = "{objective.prediction}" cannot be used with a schedule that ends in pure noise '
            f"({'flow_matching' if flow else 'zero_terminal_snr = true'}): there the network could copy its input and "
            f'would learn nothing about the data (Lin et al. 2024, section 3.3). Use "v", "velocity" or "x0".'
        )
    if flow and objective.variance == "learned":
        raise ValueError(
            'objective.variance = "learned" belongs to the reverse steps of a chain, but schedule.kind = '
            '"flow_matching" has none. Use variance = "fixed", or a linear, scaled_linear or cosine schedule.'
        )


def check_sampling_start(objective: ObjectiveConfig, process: Process) -> str:
    """Return a warning if the step where sampling starts has hardly any weight, or tells eps nothing of x0, else "".

    min(SNR, gamma) / (SNR + 1), as Hang et al. 2023 weigh v, vanishes with the SNR; Lin et al. 2024 train their last
    step, which is pure noise, with the plain error of v.

    Raises:
        ValueError: It has none at all, and no other time of the chain is near it.
    """
    levels = [process.moment(step).level for step in range(process.num_steps)]
    if objective.prediction in ("eps", "score") and (ratio := float(levels[-1].ratio)) > LARGEST_EPS_RATIO:
        return (
            f'objective.prediction = "{objective.prediction}" with a schedule that ends at {ratio:.0f} times as much '
            "noise as data: samplers of few steps start there and multiply the network's errors by up to as much. Use "
            '"v" or "velocity", schedule.kind = "scaled_linear" or "linear", or sampler.spacing = "leading".'
        )
    weights = torch.stack([loss_weights(objective.weighting, level, objective.prediction) for level in levels])
    share = float(weights[-1] / weights.median())
    if share > LEAST_STARTING_WEIGHT:
        return ""
    fault = (
        f'objective.weighting.kind = "{objective.weighting.kind}" with prediction = "{objective.prediction}" gives the '
        f"step where sampling starts {share:.1g} of the median weight, so that it is"
    )
    remedy = 'Use weighting.kind = "uniform" or "truncated_snr".'
    if share < 1e-20 and isinstance(process, DiscreteDiffusion):
        raise ValueError(f"{fault} never trained: with zero_terminal_snr = true it is pure noise. {remedy}")
    return f"{fault} hardly trained. {remedy}"


@dataclass(frozen=True)
class DenoisingLoss:
    """The loss of each sample; all (b,), means over the sample's elements."""

    loss: Tensor  # what is minimised
    error: Tensor  # unweighted squared error of the prediction
    bound: Tensor | None  # this step's term of the variational bound, bits per dimension; only with a learned variance


def denoising_loss(
    output: Tensor,
    *,
    x: Tensor,
    x0: Tensor,
    eps: Tensor,
    times: Tensor,
    process: Process,
    objective: ObjectiveConfig,
) -> DenoisingLoss:
    """Judge the network's ``output`` for latents ``x`` = alpha x0 + sigma eps.

    Args:
        output: (b c h w), or (b 2c h w) when the variance is learned.
        x: Noisy latents; (b c h w).
        x0: The data in them; (b c h w).
        eps: The noise in them; (b c h w).
        times: (b,), as from ``times_from_uniforms``.
    """
    level = process.level(times, like=x)
    value, _ = split_learned_variance(output, num_channels=x.shape[1])
    target = training_target(x0, eps, level, objective.prediction)
    error = (value - target).square().flatten(1).mean(dim=1)  # (b,)
    loss = loss_weights(objective.weighting, level, objective.prediction).flatten() * error
    if objective.variance == "fixed":
        return DenoisingLoss(loss=loss, error=error, bound=None)

    assert isinstance(process, DiscreteDiffusion), "check_objective lets only chains learn a variance"
    bound = learned_variance_bound(output, x=x, x0=x0, times=times, process=process, prediction=objective.prediction)
    return DenoisingLoss(loss=loss + objective.bound_weight * process.num_steps * bound, error=error, bound=bound)


def learned_variance_bound(
    output: Tensor, *, x: Tensor, x0: Tensor, times: Tensor, process: DiscreteDiffusion, prediction: Prediction
) -> Tensor:
    """The bound's term of each sample's step, which teaches the variance only; (b,) bits per dimension.

    Nichol & Dhariwal 2021, eq. 16: the mean is held constant. T times the average over uniform times is the bound
    less L_T. Computed in float64: beta is the difference of two numbers near 1.
    """
    dtype = x.dtype
    output, x, x0 = output.double(), x.double(), x0.double()
    value, variance = output.split(x.shape[1], dim=1)
    now = process.level(times, like=x)
    then = process.level_before(times, like=x)
    estimate = estimate_from_output(torch.cat([value.detach(), variance], dim=1), x, now, prediction)
    # The last move has a posterior variance of zero; the authors give it that of the move before.
    second = times.clamp(min=1)
    smallest = posterior_variance(now=process.level(second, like=x), then=process.level_before(second, like=x))
    largest = step_variance(now=now, then=then)
    log_variance = reverse_log_variance(estimate, smallest=smallest, largest=largest, variance="learned")
    move = move_term(estimate, x0, log_variance=log_variance, now=now, then=then)
    last = reconstruction_term(estimate, x0, log_variance=log_variance)
    return (torch.where(times == 0, last, move) / NATS_PER_BIT).to(dtype)
