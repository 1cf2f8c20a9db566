"""Verdict: the difference of a metric between two experiments, its interval, and the seeds that it takes to decide.

Each side is a group of evaluations: of one training, or of several that differ in their seed (replicates). A
difference has two kinds of luck. *Training luck* is the spread s^2 of the replicates, s^2 / k on each side. *Sampling
luck* is that of the images. All evaluations of one contract share noise, labels and reference, so what an image does to
both sides cancels: it is the variance of the difference of the sides' mean influences (``models.metrics.estimate``).
What an image does in one training alone is in the spread of the replicates already, and is taken off. The degrees of
freedom are those of Welch and Satterthwaite; where one side has two replicates and the other many, the interval can be
too short by a tenth. Without replicates sampling luck is all that is known.
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from models.metrics.estimate import variance_of

# Metrics that a verdict is made of, each with the direction that is better; few, so that each keeps its power.
JUDGED = {"frechet_distance": -1, "precision": 1, "recall": 1, "class_accuracy": 1, "retrieval": 1}
CHOOSING = "frechet_distance"  # chooses the guidance at which all metrics are compared
LEVEL = 0.95  # of all intervals together
POWER = 0.8  # of finding a difference with the seeds that are named
MOST_SEEDS = 100  # on each side, that are worth naming


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric of one evaluation."""

    value: float
    error: float  # of sampling
    influences: Mapping[str, Tensor] = field(default_factory=dict)  # as of an Estimate; empty where they are unknown


@dataclass(frozen=True, kw_only=True)
class Luck:
    """Variances of the metric of one training."""

    count: int  # trainings that it is known from
    sampling: float  # by all images
    own: float = 0.0  # by what images do in one training alone; known from replicates
    training: float | None = None  # by the seed, ``own`` included; None for a single training

    @property
    def seed_deviation(self) -> float | None:
        """Standard deviation by the seed alone; None for a single training."""
        return None if self.training is None else math.sqrt(max(self.training - self.own, 0))

    @classmethod
    def of(cls, side: Sequence[Measured]) -> "Luck":
        """Measure it on the trainings of one side."""
        sampling = float(np.mean([each.error**2 for each in side]))
        if len(side) == 1:
            return cls(count=1, sampling=sampling)
        of_parts = [torch.stack([each.influences[part] for each in side]) for part in _known_parts(side)]
        alone = [influence for part in of_parts for influence in part - part.mean(dim=0)]
        own = sum(map(variance_of, alone)) / (len(side) - 1)
        spread = float(np.var([each.value for each in side], ddof=1))
        # Few replicates can agree by chance, but not by more than their images let them.
        return cls(count=len(side), sampling=sampling, own=own, training=max(spread, own))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of a metric, the second side's minus the first's."""

    value: float
    low: float
    high: float
    lucks: tuple[Luck, Luck]
    more_seeds: int | None  # on each side, that would decide if this is the difference; None for no reasonable number
    more_samples: float | None  # times as many images that would decide without training luck; None for equal values

    @property
    def decided(self) -> bool:
        """Whether the interval tells the sign."""
        return self.low > 0 or self.high < 0

    def word(self, direction: int) -> str:
        """Return the verdict on the second side; ``direction`` is 1 where more is better, else -1."""
        if not self.decided:
            return "cannot tell"
        return "better" if self.value * direction > 0 else "worse"


def difference(first: Sequence[Measured], second: Sequence[Measured], *, tests: int = 1) -> Difference:
    """Compare a metric of the trainings of two sides, with an interval for one of ``tests`` metrics that are compared.

    The intervals of all of them together cover with probability ``LEVEL`` (Bonferroni). A side of one training has the
    training luck of the other, where that is known.
    """
    # The difference, and its variance by the images that all trainings share.
    value = float(np.mean([each.value for each in second]) - np.mean([each.value for each in first]))
    lucks = (Luck.of(first), Luck.of(second))
    shared = _shared_variance(first, second, lucks)
    covered = 1 - (1 - LEVEL) / (2 * tests)

    def bound(more_seeds: int, probability: float) -> float:
        variance, freedom = _welch(lucks, [luck.count + more_seeds for luck in lucks], shared)
        return float(stdtrit(freedom, probability)) * math.sqrt(variance)

    # What it would take to decide, if the difference is as large as it looks.
    replicated = any(luck.training is not None for luck in lucks)
    more = bisect(range(MOST_SEEDS + 1), 0, key=lambda n: bound(n, covered) + bound(n, POWER) <= abs(value))
    needed = math.sqrt(shared) * float(stdtrit(math.inf, covered) + stdtrit(math.inf, POWER))
    return Difference(
        value=value,
        low=value - bound(0, covered),
        high=value + bound(0, covered),
        lucks=lucks,
        more_seeds=more if replicated and value and more <= MOST_SEEDS else None,
        more_samples=(needed / value) ** 2 if value else None,
    )


def _known_parts(measured: Sequence[Measured]) -> list[str]:
    """Parts of the data whose influences are known of all."""
    return sorted(set.intersection(*(set(each.influences) for each in measured)))


def _shared_variance(first: Sequence[Measured], second: Sequence[Measured], lucks: Sequence[Luck]) -> float:
    """Variance of the difference of two sides' means by the images, without what images do in one training alone."""
    parts = _known_parts([*first, *second])
    if not parts:
        return sum(luck.sampling for luck in lucks)
    variance = 0.0
    for part in parts:
        means = [torch.stack([each.influences[part] for each in side]).mean(dim=0) for side in (first, second)]
        if means[0].shape == means[1].shape:
            means = [means[1] - means[0]]
        variance += sum(map(variance_of, means))
    replicated = [luck for luck in lucks if luck.training is not None]
    own = sum((luck if luck.training is not None else replicated[0]).own / luck.count for luck in lucks if replicated)
    return max(variance - own, 0.0)


def _welch(lucks: Sequence[Luck], counts: Sequence[int], shared: float) -> tuple[float, float]:
    """Variance of the difference with so many trainings on each side, and its degrees of freedom."""
    known = [luck.training for luck in lucks if luck.training is not None]
    if not known:
        return shared, math.inf
    training = [known[0] if luck.training is None else luck.training for luck in lucks]
    of_sides = [each / count for each, count in zip(training, counts, strict=True)]
    if min(counts) > 1:
        terms = [(variance, count - 1) for variance, count in zip(of_sides, counts, strict=True)]
    else:
        terms = [(sum(of_sides), max(counts) - 1)]
    variance = shared + sum(term for term, _ in terms)
    spread = sum(term**2 / freedom for term, freedom in terms)
    return variance, variance**2 / spread if spread else math.inf
