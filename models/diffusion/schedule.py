"""Noise schedules: the noise level of the latents at each time, and the process that each schedule defines.

Everything in this folder shares one picture. Noisy latents are a mixture of data and standard normal noise,

    x_t = alpha_t x0 + sigma_t eps,

and a *process* maps each time to its ``NoiseLevel(alpha, sigma)``. There are two: the Markov chain of DDPM
with T discrete steps, which keeps alpha^2 + sigma^2 = 1, and flow matching on the straight path, alpha + sigma = 1.

Steps are numbered 0 (nearly clean) to T - 1 (noisiest), as in the code of Ho et al.; their paper says 1 to T. Clean
data is not a step: it is the level ``CLEAN``. Tables are float64; levels take the dtype of the latents that they meet.

Sources: Ho et al. 2020 (arXiv:2006.11239); Nichol & Dhariwal 2021 (arXiv:2102.09672); Rombach et al. 2022
(arXiv:2112.10752); Lin et al. 2024 (arXiv:2305.08891); Lipman et al. 2023 (arXiv:2210.02747); Liu et al. 2023
(arXiv:2209.03003).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

# ---------------------------------------------------------------------------------------------------- noise levels


@dataclass(frozen=True)
class NoiseLevel:
    """Shares of data and noise: ``x = alpha x0 + sigma eps``.

    In training one level a sample, shaped to broadcast over the latents, (b 1 1 1). In a sampler one level for the
    whole batch: float64 scalars on the CPU, which take the dtype of the latents and cost no wait for a GPU.
    """

    alpha: Tensor  # weight of the data, in [0, 1]
    sigma: Tensor  # standard deviation of the noise, in [0, 1]

    @property
    def ratio(self) -> Tensor:
        """Noise-to-data ratio sigma / alpha, the "sigma" of Karras et al. 2022; infinite for pure noise."""
        return self.sigma / self.alpha

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2, from 0 (pure noise) to infinity (clean)."""
        return (self.alpha / self.sigma) ** 2

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2); twice the lambda of DPM-Solver."""
        return 2 * (self.alpha.log() - self.sigma.log())


@dataclass(frozen=True)
class Moment:
    """A point on a sampler's way: the network's input (``time``) and the noise level of the latents (``level``)."""

    time: float
    level: NoiseLevel


def scalar_level(*, alpha: float, sigma: float) -> NoiseLevel:
    """A level for a whole batch."""
    return NoiseLevel(*torch.tensor([alpha, sigma], dtype=torch.float64, device="cpu"))


CLEAN = scalar_level(alpha=1.0, sigma=0.0)

NoiseSource = Callable[[int], Tensor]
"""Standard normal noise, given the index of a step: shaped and typed as the latents that it is added to."""


def add_noise(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """The forward jump: draw ``x_t`` from q(x_t | x_0), given standard normal ``eps``. Ho et al. 2020, eq. 4."""
    return level.alpha * x0 + level.sigma * eps


# ------------------------------------------------------------------------------------------------------- processes


class DiscreteDiffusion:
    """The Markov chain q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I). Ho et al. 2020, eq. 2.

    Args:
        betas: Variance added by each step; (T,) float64, each in (0, 1]. Only the last may be 1 (zero terminal SNR).
    """

    straight = False  # the path from data to noise is curved: alpha^2 + sigma^2 = 1

    def __init__(self, betas: Tensor) -> None:
        self.betas = betas.double().cpu()
        self.alpha_bars = torch.cumprod(1 - self.betas, dim=0)  # Ho et al. 2020, below eq. 4
        self.num_steps = len(betas)
        self._tables = {torch.device("cpu"): (self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt())}

    def time(self, fraction: Tensor) -> Tensor:
        """The step that holds ``fraction`` (b,) of the way from clean (0) to noise (1); (b,) int64."""
        return (fraction * self.num_steps).long().clamp(0, self.num_steps - 1)

    def level(self, times: Tensor, *, like: Tensor) -> NoiseLevel:
        """The level of each sample.

        Args:
            times: Steps; (b,) int64 on the device of ``like``, each in [0, num_steps).
            like: Latents (b c h w), which give the dtype and the number of dimensions to broadcast over.
        """
        if times.device not in self._tables:
            alpha, sigma = self._tables[torch.device("cpu")]
            self._tables[times.device] = (alpha.to(times.device), sigma.to(times.device))
        alpha, sigma = self._tables[times.device]
        return NoiseLevel(_per_sample(alpha[times], like), _per_sample(sigma[times], like))

    def level_before(self, times: Tensor, *, like: Tensor) -> NoiseLevel:
        """The level of each sample's step t - 1, clean data for step 0; arguments as for ``level``."""
        before = self.level(times.clamp(min=1) - 1, like=like)
        from_data = _per_sample(times == 0, like).bool()
        return NoiseLevel(torch.where(from_data, 1.0, before.alpha), torch.where(from_data, 0.0, before.sigma))

    def moment(self, step: int) -> Moment:
        """The moment of one step, for a sampler."""
        alpha, sigma = self._tables[torch.device("cpu")]
        return Moment(float(step), NoiseLevel(alpha[step], sigma[step]))

    def moment_at_ratio(self, ratio: float) -> Moment:
        """The moment at which sigma / alpha is ``ratio``; between two steps its time is interpolated in log(ratio).

        The level is exact. A ratio beyond the ends of the schedule gets the time of that end.
        """
        alpha, sigma = self._tables[torch.device("cpu")]
        log_ratios = (sigma / alpha).log()
        above = int(torch.searchsorted(log_ratios, math.log(ratio)).clamp(1, self.num_steps - 1))
        low, high = float(log_ratios[above - 1]), float(log_ratios[above])
        part = min(max((math.log(ratio) - low) / (high - low), 0.0), 1.0)
        norm = math.hypot(1.0, ratio)
        return Moment(above - 1 + part, scalar_level(alpha=1 / norm, sigma=ratio / norm))


class FlowMatching:
    """The straight path x_t = (1 - t) x0 + t eps with t in [0, 1]. Lipman et al. 2023; Liu et al. 2023, eq. 1.

    The network's input is ``num_steps * t``, so that its time embedding has the same range as with a chain. Step i
    of a sampler is t = (i + 1) / num_steps; in training, t is continuous.
    """

    straight = True  # the path is a straight line: alpha + sigma = 1

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def time(self, fraction: Tensor) -> Tensor:
        """The time at ``fraction`` (b,) of the way from clean (0) to noise (1); (b,), in [0, num_steps]."""
        return fraction * self.num_steps

    def level(self, times: Tensor, *, like: Tensor) -> NoiseLevel:
        """The level of each sample at ``times`` (b,) in [0, num_steps], shaped and typed to meet ``like`` (b c h w)."""
        t = _per_sample(times.double() / self.num_steps, like)
        return NoiseLevel(1 - t, t)

    def moment(self, step: int) -> Moment:
        """The moment of one step, for a sampler."""
        t = (step + 1) / self.num_steps
        return Moment(float(step + 1), scalar_level(alpha=1 - t, sigma=t))

    def moment_at_ratio(self, ratio: float) -> Moment:
        """The moment at which sigma / alpha is ``ratio``."""
        t = ratio / (1 + ratio)
        return Moment(t * self.num_steps, scalar_level(alpha=1 - t, sigma=t))


Process = DiscreteDiffusion | FlowMatching


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))  # (b 1 1 1)


# ---------------------------------------------------------------------------------------------------------- betas


def linear_betas(num_steps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """Evenly spaced betas; (T,) float64. Ho et al. 2020, section 4. The ends are for 1000 steps, scaled by 1000/T."""
    scale = 1000 / num_steps
    return torch.linspace(scale * beta_start, scale * beta_end, num_steps, dtype=torch.float64)


def scaled_linear_betas(num_steps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """Betas whose square roots are evenly spaced; (T,) float64. Latent diffusion's; the ends are not scaled with T."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2


def cosine_betas(num_steps: int, *, offset: float) -> Tensor:
    """Betas of a squared-cosine alpha_bar, at most 0.999; (T,) float64. Nichol & Dhariwal 2021, eq. 17."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps) for i in range(num_steps)]
    return (1 - torch.tensor(ratios, dtype=torch.float64)).clamp(max=0.999)


def with_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas (T,) moved so that the last step is pure noise and the first is unchanged. Lin et al. 2024, algorithm 1."""
    alphas = torch.cumprod(1 - betas, dim=0).sqrt()
    first, last = alphas[0].clone(), alphas[-1].clone()
    alpha_bars = ((alphas - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bars[:1], alpha_bars[1:] / alpha_bars[:-1]])


# -------------------------------------------------------------------------------------------------------- configs


class _ChainConfig(BaseModel, ABC, frozen=True, extra="forbid"):
    num_steps: Annotated[int, Field(ge=2)] = 1000  # T, steps of the chain
    zero_terminal_snr: bool = False  # make the last step pure noise; needs a prediction other than eps

    @abstractmethod
    def betas(self) -> Tensor:
        """The variance added by each step, before any rescaling; (T,) float64."""

    def build(self) -> DiscreteDiffusion:
        """The Markov chain with this schedule."""
        betas = self.betas()
        return DiscreteDiffusion(with_zero_terminal_snr(betas) if self.zero_terminal_snr else betas)


class LinearScheduleConfig(_ChainConfig, frozen=True, extra="forbid"):
    """Evenly spaced betas (Ho et al. 2020)."""

    kind: Literal["linear"] = "linear"
    beta_start: PositiveFloat = 1e-4  # first beta of a chain of 1000 steps; scaled by 1000/T
    beta_end: PositiveFloat = 2e-2  # last beta of a chain of 1000 steps; scaled by 1000/T

    @model_validator(mode="after")
    def _betas_are_probabilities(self) -> LinearScheduleConfig:
        if max(self.beta_start, self.beta_end) * 1000 / self.num_steps >= 1:
            raise ValueError(
                f"a linear schedule of num_steps = {self.num_steps} would end at beta = "
                f"{self.beta_end} * 1000 / {self.num_steps} = {self.beta_end * 1000 / self.num_steps:g}, but beta is a "
                f"variance below 1. Use more than {math.floor(max(self.beta_start, self.beta_end) * 1000)} steps, "
                f'or kind = "cosine".'
            )
        return self

    def betas(self) -> Tensor:
        """As ``linear_betas``; (T,) float64."""
        return linear_betas(self.num_steps, beta_start=self.beta_start, beta_end=self.beta_end)


class ScaledLinearScheduleConfig(_ChainConfig, frozen=True, extra="forbid"):
    """Betas with evenly spaced square roots (latent diffusion, Rombach et al. 2022)."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 0.00085  # first beta, not scaled with num_steps
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.012  # last beta, not scaled with num_steps

    def betas(self) -> Tensor:
        """As ``scaled_linear_betas``; (T,) float64."""
        return scaled_linear_betas(self.num_steps, beta_start=self.beta_start, beta_end=self.beta_end)


class CosineScheduleConfig(_ChainConfig, frozen=True, extra="forbid"):
    """Squared-cosine alpha_bar, betas capped at 0.999 (Nichol & Dhariwal 2021)."""

    kind: Literal["cosine"] = "cosine"
    offset: PositiveFloat = 0.008  # s of the paper: keeps the first betas from vanishing

    def betas(self) -> Tensor:
        """As ``cosine_betas``; (T,) float64."""
        return cosine_betas(self.num_steps, offset=self.offset)


class FlowMatchingConfig(BaseModel, frozen=True, extra="forbid"):
    """The straight path from data to noise (Lipman et al. 2023; Liu et al. 2023)."""

    kind: Literal["flow_matching"] = "flow_matching"
    num_steps: PositiveInt = 1000  # the network's input is t * num_steps; the finest grid of a sampler

    def build(self) -> FlowMatching:
        """The flow along this path."""
        return FlowMatching(self.num_steps)


ScheduleConfig = Annotated[
    LinearScheduleConfig | ScaledLinearScheduleConfig | CosineScheduleConfig | FlowMatchingConfig,
    Field(discriminator="kind"),
]
