"""Paired timing: two ways to do one piece of work, run in turns, so that what the machine does meanwhile hits both.

Each round runs ours, theirs and ours again, in an order that changes from round to round. The figure is the median over
the rounds of the ratio within a round, with a bootstrap interval (Efron 1979). Ours against ours is the control: its
interval must hold 1, else the machine was too restless and the figure says nothing.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 2_000
Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Ratio:
    """A median ratio with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> "Ratio":
        """Summarise the ratios of all rounds."""
        values = np.asarray(ratios)
        draws = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
        low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Comparison:
    """How many times faster ours is, what ours against itself gives, and the rate of each, work units a second."""

    faster: Ratio
    control: Ratio
    ours_per_second: float
    theirs_per_second: float


def compare(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    units: tuple[float, float],
    rounds: int,
    clock: Clock,
) -> Comparison:
    """Time both in turns, after one run of each that is not counted.

    Args:
        ours: One piece of work.
        theirs: The same in another way.
        units: Units of work that one call of ours and one of theirs does.
        rounds: How often each pair is run.
        clock: CPU seconds of this process, all its threads together, or wall seconds.
    """
    now = time.process_time if clock == "cpu" else time.perf_counter
    jobs = {"ours": (ours, units[0]), "theirs": (theirs, units[1]), "again": (ours, units[0])}
    ours(), theirs()
    rates: dict[str, list[float]] = {name: [] for name in jobs}
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for name in order.permutation(list(jobs)).tolist():
            job, amount = jobs[name]
            started = now()
            job()
            rates[name].append(amount / (now() - started))
    return Comparison(
        faster=Ratio.of([a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True)]),
        control=Ratio.of([a / b for a, b in zip(rates["ours"], rates["again"], strict=True)]),
        ours_per_second=float(np.median(rates["ours"])),
        theirs_per_second=float(np.median(rates["theirs"])),
    )
