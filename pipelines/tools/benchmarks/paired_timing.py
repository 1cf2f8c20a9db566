"""Paired timing: several ways to do one piece of work, run in turns, so that what the machine does meanwhile hits all.

Each round runs every side once and ours once more, in an order that changes from round to round. The figure is the
median over the rounds of the ratio within a round, with a bootstrap interval (Efron 1979). Ours against ours is the
control: its interval must hold 1, else the machine was too restless and the figure says nothing.

Several processes work in step: their processor seconds are added, and the slowest one's wall seconds count.

Both clocks run at once. Processor seconds, those of all threads together, are hardly disturbed by what else the machine
does; wall seconds show where one thread waits for another, and are what counts on a GPU.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psutil
import torch
import torch.distributed as dist

RESAMPLES = 2_000
CONTROL = "ours again"
PEAK = "peak"
Clock = Literal["processor", "wall"]


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
class Job:
    """One way to do a piece of work."""

    run: Callable[[], object]
    units: float  # of work that one call does
    has_children: bool = False  # it has child processes, whose processor seconds are its own whenever they fall


@dataclass(frozen=True)
class Comparison:
    """Times that ours is faster than each other side, and than itself, by clock; work units a second of each side."""

    faster: Mapping[str, Mapping[Clock, Ratio]]
    per_second: Mapping[str, Mapping[Clock, float]]


def compare(jobs: Mapping[str, Job], *, rounds: int, peak: float = math.inf) -> Comparison:
    """Time all jobs in turns, after one run of each that is not counted; the first is ours.

    ``peak`` is what the device can do at best, in units a second: a side of its own, so that the times that ours is
    faster than it are ours as a fraction of the peak.
    """
    ours = next(iter(jobs))
    for job in jobs.values():
        job.run()
    jobs = {**jobs, CONTROL: jobs[ours]}
    order, of_children = np.random.default_rng(0), children_seconds()
    limit = {PEAK: [peak] * rounds} if peak < math.inf else {}
    rates: dict[Clock, dict[str, list[float]]] = {"processor": {**limit}, "wall": {**limit}}
    for _ in range(rounds):
        for name in order.permutation(list(jobs)).tolist():
            job = jobs[name]
            if dist.is_initialized():
                dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            job.run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent: dict[Clock, float] = {
                "processor": time.process_time() - processor,
                "wall": time.perf_counter() - wall,
            }
            if job.has_children:
                before, of_children = of_children, children_seconds()
                spent["processor"] += of_children - before
            for clock, seconds in spent.items():
                seconds = of_all_processes(seconds, dist.ReduceOp.SUM if clock == "processor" else dist.ReduceOp.MAX)
                rates[clock].setdefault(name, []).append(job.units / max(seconds, 1e-9))

    def faster(name: str, clock: Clock) -> Ratio:
        return Ratio.of([a / b for a, b in zip(rates[clock][ours], rates[clock][name], strict=True)])

    return Comparison(
        {name: {clock: faster(name, clock) for clock in rates} for name in rates["wall"] if name != ours},
        {name: {clock: float(np.median(found[name])) for clock, found in rates.items()} for name in rates["wall"]},
    )


def of_all_processes(seconds: float, operation: Any) -> float:
    """Return the sum or the largest of the seconds of all processes."""
    if not dist.is_initialized():
        return seconds
    found = torch.tensor([seconds], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(found, operation)
    return found.item()


def children_seconds() -> float:
    """Return the processor seconds of all child processes so far: those that run, and those that have ended."""
    times = psutil.Process().cpu_times()
    seconds = times.children_user + times.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            seconds += sum(child.cpu_times()[:2])
        except psutil.NoSuchProcess:  # it has ended just now, and is among those that have from the next time on
            continue
    return float(seconds)
