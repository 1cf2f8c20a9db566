"""Metrics of updates, kept on the device until they are flushed as records; throughput, and the slowest rank."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from pipelines.runtime.stage.launch import gathered
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.flops import known_peak_flops

STRAGGLER_FACTOR = 1.5  # own time beyond this many times the median's is worth a line
STRAGGLER_SECONDS = 0.02  # an update; less is noise
MOST_RANKS_IN_FULL = 16


class MetricBuffer:
    """Metrics of the current update, and of updates that are not written out yet."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.current: dict[str, Tensor] = {}
        self._device, self._world_size = accelerator.device, accelerator.num_processes
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def add(self, metrics: Mapping[str, Tensor], *, share: float) -> None:
        """Add a micro-batch's scalars to the current update, weighted by its ``share`` of the update."""
        for name, value in metrics.items():
            mean = value.detach() * share
            self.current[name] = self.current[name] + mean if name in self.current else mean

    def close_update(self, *, update: int, batch: int, attempt: int) -> dict[str, Tensor]:
        """End the current update and return its metrics."""
        record = {"update": update, "batch": batch, "time": time.time()}
        metrics, self.current = self.current, {}
        self._pending.append((record | ({"attempt": attempt} if attempt > 1 else {}), metrics))
        return metrics

    def forget_from(self, update: int) -> None:
        """Drop ``update`` and what came after it: it does not count."""
        self._pending = [entry for entry in self._pending if entry[0]["update"] < update]

    def records(self) -> list[dict[str, Any]]:
        """Return and forget the pending updates' metrics averaged over the ranks, one record each. A collective."""
        if not self._pending:
            return []

        # One table (update, name). Terms come and go: where an update has none, NaN fills its place.
        names = list(dict.fromkeys(name for _, metrics in self._pending for name in metrics))
        wide = torch.float64 if self._device.type != "mps" else torch.float32
        absent = torch.full((), math.nan, dtype=wide, device=self._device)
        table = torch.stack(
            [torch.stack([metrics.get(name, absent).to(wide) for name in names]) for _, metrics in self._pending]
        )

        # Averaged by one all-reduce; NaN is left out again.
        if self._world_size > 1:
            dist.all_reduce(table)
            table /= self._world_size
        records = [
            {**record, **{name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}}
            for (record, _), values in zip(self._pending, table.tolist(), strict=True)
        ]
        self._pending.clear()
        return records


class Throughput:
    """Times of the updates since the last flush.

    A rank's own time is from the start of an update to the all-reduce of its gradients: what comes after is as long
    for all, since the fast wait for the slow there.

    Args:
        accelerator: Of this process.
        config: Of the training.
        flops_per_image: Of one training step, or 0 when not known.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig, *, flops_per_image: float) -> None:
        self._accelerator, self._device = accelerator, accelerator.device
        self._global_batch, self._flops = config.global_batch, flops_per_image
        self._peak = known_peak_flops(str(self._device), config.precision, tf32=config.tf32)
        self._own_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._updates, self._waited, self._own = time.monotonic(), 0, 0.0, 0.0
        self._own_events.clear()
        self._is_own = False

    def begin_update(self, *, waited: float) -> None:
        """Begin the time of an update, whose batch was waited for so many seconds."""
        self._updates, self._waited = self._updates + 1, self._waited + waited
        self._update_began, self._is_own = time.monotonic(), True
        if self._device.type == "cuda":
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def before_all_reduce(self) -> None:
        """End this rank's own time, before the first all-reduce of gradients in an update; later ones do not count."""
        if not self._is_own:
            return
        self._is_own = False
        if self._device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._own_events.append((self._begin, end))
        else:
            self._own += time.monotonic() - self._update_began

    def metrics(self) -> dict[str, float]:
        """Return the interval's metrics, the same on every rank, and begin a new one. A collective."""
        seconds, updates = max(time.monotonic() - self._began, 1e-9), max(self._updates, 1)
        images_per_s, world_size = self._updates * self._global_batch / seconds, self._accelerator.num_processes
        if self._own_events:
            self._own_events[-1][1].synchronize()
            self._own = sum(begin.elapsed_time(end) for begin, end in self._own_events) / 1e3

        # Of all ranks together.
        metrics = {
            "perf/images_per_s": images_per_s,
            "perf/data_wait_fraction": self._waited / seconds,
            "perf/flops_per_image": float(self._flops),
        }
        if self._peak < math.inf:
            metrics["perf/mfu"] = images_per_s * self._flops / (world_size * self._peak)

        # Of each rank.
        if world_size > 1:
            own, waited = self._own / updates, self._waited / updates
            times, waits = gathered(torch.tensor([own + waited, waited]), self._accelerator).T.tolist()
            slowest = max(range(world_size), key=times.__getitem__)
            metrics |= {
                "perf/slowest_rank": float(slowest),
                "perf/slowest_rank_seconds": times[slowest],
                "perf/slowest_rank_data_wait_seconds": waits[slowest],
                "perf/median_rank_seconds": sorted(times)[(world_size - 1) // 2],
            }
            for rank in range(world_size) if world_size <= MOST_RANKS_IN_FULL else ():
                metrics[f"perf/own_seconds/rank_{rank}"] = times[rank]
                metrics[f"perf/data_wait_seconds/rank_{rank}"] = waits[rank]
        self.restart()
        return metrics


def straggler(metrics: dict[str, float]) -> tuple[int, str] | None:
    """Return the rank that delays the others, and a sentence on how much; None when none does."""
    slowest, median = metrics.get("perf/slowest_rank_seconds", 0.0), metrics.get("perf/median_rank_seconds", 0.0)
    if not median or slowest <= STRAGGLER_FACTOR * median or slowest - median <= STRAGGLER_SECONDS:
        return None
    return int(metrics["perf/slowest_rank"]), (
        f"delays the others: {slowest:.3g} s an update before its gradients are reduced (of that "
        f"{metrics['perf/slowest_rank_data_wait_seconds']:.3g} s waiting for data), the median rank {median:.3g} s"
    )
