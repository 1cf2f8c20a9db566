"""Metrics of updates, kept on the device until somebody looks."""

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class MetricBuffer:
    """The metrics of the present update, and those of updates that are not written out yet.

    Args:
        device: Where metrics lie.
        world_size: Number of processes.
    """

    def __init__(self, *, device: torch.device, world_size: int) -> None:
        self.present: dict[str, Tensor] = {}
        self._device, self._world_size = device, world_size
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def add(self, metrics: Mapping[str, Tensor], *, share: float) -> None:
        """Add a micro-batch's scalars to the present update, weighted by its ``share`` of the update."""
        for name, value in metrics.items():
            mean = value.detach() * share
            self.present[name] = self.present[name] + mean if name in self.present else mean

    def close_update(self, *, update: int, batch: int, attempt: int) -> dict[str, Tensor]:
        """End the present update and return its metrics."""
        row = {"update": update, "batch": batch, "time": time.time()}
        metrics, self.present = self.present, {}
        self._pending.append((row | ({"attempt": attempt} if attempt > 1 else {}), metrics))
        return metrics

    def forget_from(self, update: int) -> None:
        """Drop ``update`` and what came after it: it does not count."""
        self._pending = [entry for entry in self._pending if entry[0]["update"] < update]

    def rows(self) -> list[dict[str, Any]]:
        """Return the pending updates' metrics averaged over the ranks, one row each, and forget them. A collective."""
        if not self._pending:
            return []
        names = list(dict.fromkeys(name for _, metrics in self._pending for name in metrics))
        wide = torch.float64 if self._device.type != "mps" else torch.float32
        # Terms come and go: where an update has none, NaN stands for it and is left out again.
        absent = torch.full((), math.nan, dtype=wide, device=self._device)
        table = torch.stack(
            [torch.stack([metrics.get(name, absent).to(wide) for name in names]) for _, metrics in self._pending]
        )
        if self._world_size > 1:
            dist.all_reduce(table)
            table /= self._world_size
        rows = [
            {**row, **{name: value for name, value in zip(names, values, strict=True) if math.isfinite(value)}}
            for (row, _), values in zip(self._pending, table.tolist(), strict=True)
        ]
        self._pending.clear()
        return rows
