"""Metrics of updates: kept on the device, averaged over the ranks and written out when they are flushed."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor


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
