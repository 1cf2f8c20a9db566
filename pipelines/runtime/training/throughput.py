"""How fast a training goes, and which rank holds up the others."""

import math
import time

import torch
import torch.distributed as dist

STRAGGLER_FACTOR = 1.5  # own time beyond this many times the median's is worth a line
STRAGGLER_SECONDS = 0.02  # an update; less is no news
MOST_RANKS_IN_FULL = 16


class Throughput:
    """Times of the updates between two looks.

    A rank's own time is from the start of an update to the moment when its gradients meet those of the others: what
    comes after is as long for all, since the fast wait for the slow there.

    Args:
        device: Where the network computes.
        rank: Of this process.
        world_size: Number of processes.
        global_batch: Images an update.
        flops_per_image: Of one training step, or 0 when not known.
        peak_flops: Of one device a second, infinite when it is not known.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        rank: int,
        world_size: int,
        global_batch: int,
        flops_per_image: float,
        peak_flops: float,
    ) -> None:
        self._device, self._rank, self._world_size = device, rank, world_size
        self._global_batch, self._flops, self._peak = global_batch, flops_per_image, peak_flops
        self._own_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._updates, self._waited, self._own = time.monotonic(), 0, 0.0, 0.0
        self._own_events.clear()

    def begin_update(self, *, waited: float) -> None:
        """Say that an update begins, and how long its batch was waited for, seconds."""
        self._updates, self._waited = self._updates + 1, self._waited + waited
        self._update_began, self._alone = time.monotonic(), True
        if self._device.type == "cuda":
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def meet_others(self) -> None:
        """Say that gradients of this rank are about to meet those of the others; the first time in an update counts."""
        if not self._alone:
            return
        self._alone = False
        if self._device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._own_events.append((self._begin, end))
        else:
            self._own += time.monotonic() - self._update_began

    def metrics(self) -> dict[str, float]:
        """Return the interval's metrics, the same on every rank, and begin a new one. A collective."""
        seconds, updates = max(time.monotonic() - self._began, 1e-9), max(self._updates, 1)
        images_per_s = self._updates * self._global_batch / seconds
        if self._own_events:
            self._own_events[-1][1].synchronize()
            self._own = sum(begin.elapsed_time(end) for begin, end in self._own_events) / 1e3
        metrics = {
            "perf/images_per_s": images_per_s,
            "perf/data_wait_fraction": self._waited / seconds,
            "perf/flops_per_image": float(self._flops),
        }
        if self._peak < math.inf:
            metrics["perf/mfu"] = images_per_s * self._flops / (self._world_size * self._peak)
        if self._world_size > 1:
            metrics |= self._by_rank(own=self._own / updates, waited=self._waited / updates)
        self.restart()
        return metrics

    def _by_rank(self, *, own: float, waited: float) -> dict[str, float]:
        table = torch.zeros(self._world_size, 2, device=self._device)
        table[self._rank] = torch.tensor([own + waited, waited])
        dist.all_reduce(table)
        times, waits = table.T.tolist()
        slowest = max(range(self._world_size), key=times.__getitem__)
        metrics = {
            "perf/slowest_rank": float(slowest),
            "perf/slowest_rank_seconds": times[slowest],
            "perf/slowest_rank_data_wait_seconds": waits[slowest],
            "perf/median_rank_seconds": sorted(times)[(self._world_size - 1) // 2],
        }
        if self._world_size <= MOST_RANKS_IN_FULL:
            for rank in range(self._world_size):
                metrics[f"perf/own_seconds/rank_{rank}"] = times[rank]
                metrics[f"perf/data_wait_seconds/rank_{rank}"] = waits[rank]
        return metrics


def straggler(metrics: dict[str, float]) -> int | None:
    """Return the rank that holds up the others, or None."""
    slowest, median = metrics.get("perf/slowest_rank_seconds", 0.0), metrics.get("perf/median_rank_seconds", 0.0)
    lags = slowest > STRAGGLER_FACTOR * median and slowest - median > STRAGGLER_SECONDS
    return int(metrics["perf/slowest_rank"]) if median and lags else None


def holding_up(metrics: dict[str, float]) -> str:
    """Say how far the slowest rank is behind."""
    return (
        f"holds up the others: {metrics['perf/slowest_rank_seconds']:.3g} s an update before it meets them (of that "
        f"{metrics['perf/slowest_rank_data_wait_seconds']:.3g} s waiting for data), the median rank "
        f"{metrics['perf/median_rank_seconds']:.3g} s"
    )
