"""Estimates: a value with its standard error, from checked inputs, with the same bits on any machine load."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class _ValueAndError(NamedTuple):
    value: float
    error: float


class Estimate(_ValueAndError):
    """A figure and its one-sigma standard error over the samples it was measured on.

    ``influences`` says of each independent part of the data how much each of its elements moves the figure: the images
    that are measured (``samples``), those that they are compared with (``reference``), and ``groups`` of images where
    single ones do not tell. The variance is the sum of `variance_of` over the parts. So the error of a difference of
    two figures that share images follows from the differences of their influences. Empty where the error is known in
    another way.
    """

    influences: Mapping[str, Tensor] = {}

    @classmethod
    def of_influences(cls, value: float, **influences: Tensor) -> "Estimate":
        """Return ``value`` with the error that the influences tell."""
        on_cpu = {part: influence.detach().to("cpu", torch.float64) for part, influence in influences.items()}
        estimate = cls(float(value), math.sqrt(sum(variance_of(influence) for influence in on_cpu.values())))
        estimate.influences = on_cpu
        return estimate


def variance_of(influence: Tensor) -> float:
    """Variance of a figure by one part of the data.

    Args:
        influence: Of each element on the figure, at least 2; (n,). Or of each of g groups of elements on what every
            image adds to the figure, a mean over n images; (g n). Then without what groups do to one image and not to
            another, which the images' own influence holds.
    """
    if influence.ndim == 1:
        return float(influence.var()) / len(influence)
    num_groups, num_images = influence.shape
    of_single = float(influence.var(dim=0).sum()) / num_images**2
    return max(0.0, float(influence.mean(dim=1).var()) - of_single) / num_groups


def on_one_thread(metric: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Make ``metric`` give the same bits under any thread count, and leave the thread count as it was.

    BLAS splits a sum over its threads, so a matrix product has other last bits on two threads than on one; an
    evaluation on one process and on two (which have different thread counts) must not differ by that.
    """

    @functools.wraps(metric)
    def single_threaded(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return metric(*arguments, **named)
        finally:
            torch.set_num_threads(num_threads)

    return single_threaded


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of independent ``values`` (n,) and its standard error, the sample deviation over the root of n.

    Raises:
        ValueError: There are fewer than two values, so the error is unknown.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"A mean with its standard error needs at least 2 values in one dimension, not shape "
            f"{tuple(values.shape)}. Measure more samples."
        )
    values = values.detach().to("cpu", torch.float64)
    return Estimate.of_influences(float(values.mean()), samples=values - values.mean())


def worst_fraction(successes: Sequence[int], totals: Sequence[int], *, draws: int = 4_000) -> Estimate:
    """The least of several fractions, each ``successes`` of ``totals``, and its error.

    The error is that of the least fraction as an estimate of the least rate: the root mean square of their difference
    over repetitions with rates from a posterior. So it holds that the least of many is low by chance, and is not zero
    where all of few succeed. The posterior is the beta-binomial one, whose prior has the pooled rate and the weight of
    so many trials as explain the fractions' spread (Kleinman 1973), drawn by its likelihood; at least one trial.
    """
    from scipy.special import betaln  # half a second, which every stage would pay

    right, total = (np.asarray(values, dtype=np.float64) for values in (successes, totals))
    generator = np.random.Generator(np.random.Philox(key=0))
    pooled, grid = (right.sum() + 0.5) / (total.sum() + 1), np.geomspace(1, 1e4, 30)
    prior = grid[:, None] * [pooled, 1 - pooled]  # (trials, 2)
    counts = np.stack([right, total - right], axis=-1)  # (fractions, 2)
    together = counts + prior[:, None]  # (trials, fractions, 2)
    gained = betaln(together[..., 0], together[..., 1]).sum(axis=1) - len(total) * betaln(prior[:, 0], prior[:, 1])
    likelihood = np.exp(gained - gained.max())
    drawn = generator.choice(len(grid), size=draws, p=likelihood / likelihood.sum())
    alpha, beta = prior[drawn].T[:, :, None]
    rates = generator.beta(right + alpha, total - right + beta)  # (draws, fractions)
    least = (generator.binomial(total.astype(np.int64), rates) / total).min(axis=1)
    return Estimate(float((right / total).min()), float(np.sqrt(np.square(least - rates.min(axis=1)).mean())))


def checked_features(features: Tensor, *, name: str, min_samples: int = 2) -> Tensor:
    """``features`` as float64, (n d), on their device, after checking what every metric on features assumes.

    Args:
        features: One row a sample; (n d), any floating dtype and device.
        name: How an error message calls them.
        min_samples: The fewest rows that the metric is defined for.

    Raises:
        ValueError: The shape is not (n d), there are too few rows, or a value is NaN or infinite.
    """
    if features.ndim != 2:
        raise ValueError(f"{name} must be a table (samples, features), not of shape {tuple(features.shape)}.")
    if len(features) < min_samples:
        raise ValueError(f"{name}: {len(features)} samples are too few, this metric needs at least {min_samples}.")
    features = features.detach().double()
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{name}: {int((~finite).sum())} of {len(features)} rows hold NaN or infinite values, the first is row "
            f"{int(finite.int().argmin())}. Look at the image behind that row: the model has probably diverged."
        )
    return features


def checked_pair(features: Tensor, reference: Tensor, *, min_samples: int = 2) -> tuple[Tensor, Tensor]:
    """Both feature tables through :func:`checked_features`, and of one dimension.

    Raises:
        ValueError: As :func:`checked_features`, or when the number of features differs.
    """
    features = checked_features(features, name="features", min_samples=min_samples)
    reference = checked_features(reference, name="reference features", min_samples=min_samples)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features have dimension {features.shape[1]}, but reference features have {reference.shape[1]}. "
            "Compute both with the same extractor."
        )
    return features, reference
