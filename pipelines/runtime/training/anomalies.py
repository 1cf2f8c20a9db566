"""Anomalies: an update whose loss or gradient is not finite, or whose loss jumps, is refused on the device.

All ranks check the same reduced numbers, so they agree without further messages; a request to stop travels along with
them. The result stays on the device: from the first anomaly on, weights, moments and averages are frozen there, until
the host, which reads it one update later on a GPU and at once on a CPU, goes back to the update before. So nothing
waits, and nothing bad is ever applied.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import AfterValidator, BaseModel, NonNegativeFloat, PositiveInt
from torch import Tensor

from data.files import write_json
from pipelines.runtime.stage.launch import gathered
from pipelines.runtime.stage.stage import Stage


def _above_one(factor: float) -> float:
    if 0 < factor <= 1:
        raise ValueError(f"a factor of {factor} would call every loss a spike; use one above 1, or 0 for none")
    return factor


class BadUpdateConfig(BaseModel, frozen=True, extra="forbid"):
    """What is bad besides a loss or gradient that is not finite, and what happens then."""

    policy: Literal["stop", "skip", "rewind"] = "stop"  # end; leave the batch out; last checkpoint, then past the batch
    spike_factor: Annotated[NonNegativeFloat, AfterValidator(_above_one)] = 0.0  # of the loss's running mean; 0 is off
    spike_span: PositiveInt = 100  # updates the running mean looks back, and how many there must be first
    limit: PositiveInt = 100  # bad batches of one training, after which it ends whatever the policy


@dataclass(frozen=True, kw_only=True)
class CheckedUpdate:
    """An update whose check the host has not read yet."""

    update: int
    batch: int
    metrics: Mapping[str, Tensor]  # of this rank alone
    flags: Tensor  # whether it is refused, and whether a rank is to stop (2,); readable once ``ready`` is reached
    ready: torch.cuda.Event | None  # None when the flags are on the host already


class AnomalyDetector:
    """Checks of every update; a part of the checkpoint, since the loss's running mean goes on over restarts."""

    def __init__(self, config: BadUpdateConfig, accelerator: Accelerator) -> None:
        self.config, self.device, self.world_size = config, accelerator.device, accelerator.num_processes
        self._scaler = accelerator.scaler
        #: 1 where the current update does not count; scalar float32 on the device.
        self.refused = torch.zeros((), device=self.device)
        self._frozen = torch.zeros((), device=self.device)
        self._mean = torch.zeros((), device=self.device)
        self._count = torch.zeros((), device=self.device)
        self._stops = torch.zeros((), device=self.device)
        self._unread: deque[CheckedUpdate] = deque()
        #: Whether a rank was asked to stop by an update that the host has read; the same on every rank.
        self.stop_agreed = False

    @torch.no_grad()
    def check(self, metrics: Mapping[str, Tensor], norms: Mapping[str, Tensor], *, stops: bool = False) -> None:
        """Check an update before it is applied. A collective, the only one beside the gradients': four numbers.

        Args:
            metrics: This rank's means, ``train/loss`` among them.
            norms: Of the gradients, which are reduced already.
            stops: Whether this rank was asked to stop.
        """
        # Look at this rank's numbers. With fp16's loss scale a gradient may overflow, which is refused but no fault.
        loss = metrics["train/loss"].float()
        values, gradients = (torch.stack([value.float() for value in group.values()]) for group in (metrics, norms))
        overflow = (~torch.isfinite(gradients)).any()
        bad = (~torch.isfinite(values)).any()
        if self._scaler is None:
            bad = bad | overflow
        else:  # A scale below 1 helps no longer: the gradients themselves are beyond fp16.
            bad = bad | (overflow & (self._scaler._scale < 1.0).squeeze())

        # Agree with the other ranks.
        stop = torch.full((), float(stops), device=self.device)
        shared = torch.stack([loss / self.world_size, bad.float(), overflow.float(), stop])
        if self.world_size > 1:
            dist.all_reduce(shared)
        loss, wrong = shared[0], shared[1] > 0
        if self.config.spike_factor:
            wrong = wrong | ((self._count >= self.config.spike_span) & (loss > self.config.spike_factor * self._mean))

        # Freeze from the first anomaly on; the running mean moves with updates that count only.
        self._frozen = torch.maximum(self._frozen, wrong.float())
        counts = self._frozen == 0
        step = 1.0 / (self._count + 1).clamp(max=self.config.spike_span)
        self._mean = torch.where(counts, self._mean + step * (loss.abs() - self._mean), self._mean)
        self._count = self._count + counts.float()
        self.refused = torch.maximum(self._frozen, (shared[2] > 0).float())
        self._stops = shared[3]

    def send_to_host(self, *, update: int, batch: int, metrics: Mapping[str, Tensor]) -> None:
        """Start the copy of the current update's check to the host, without waiting for it."""
        flags, ready = torch.stack([self._frozen, self._stops]), None
        if self.device.type == "cuda":
            flags = torch.empty(2, pin_memory=True).copy_(flags, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unread.append(CheckedUpdate(update=update, batch=batch, metrics=metrics, flags=flags, ready=ready))

    def first_bad(self, *, wait: bool) -> CheckedUpdate | None:
        """Return the first bad update that the host has not read yet; the same on every rank.

        Args:
            wait: Read the newest update too, which a GPU may still be working on.
        """
        left = 0 if wait or self.device.type != "cuda" else 1
        while len(self._unread) > left:
            checked = self._unread.popleft()
            if checked.ready is not None:
                checked.ready.synchronize()
            refused, stops = checked.flags.tolist()
            self.stop_agreed = self.stop_agreed or bool(stops)
            if refused:
                self._unread.clear()
                return checked
        return None

    def freeze(self) -> None:
        """Refuse all updates until ``unfreeze``."""
        self._frozen, self.refused = torch.ones_like(self._frozen), torch.ones_like(self.refused)

    def unfreeze(self) -> None:
        """Let updates count again."""
        self._frozen, self.refused = torch.zeros_like(self._frozen), torch.zeros_like(self.refused)
        self._unread.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return the running mean of the loss, for a checkpoint."""
        return {"mean": self._mean, "count": self._count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``tensors`` returned."""
        self._mean, self._count = (tensors[name].to(self.device) for name in ("mean", "count"))


def write_report(
    bad: CheckedUpdate, stage: Stage, *, attempt: int, global_batch: int, keys: Callable[[int, range], list[str]]
) -> tuple[Path, str]:
    """Write ``bad_updates/update-U-batch-B.json`` and return its path and what was wrong. A collective.

    Args:
        bad: The update.
        stage: The running stage.
        attempt: Counts rewinds, from 1.
        global_batch: Samples an update, an equal share of them for each rank.
        keys: Names the samples at given positions of a batch.
    """
    # Find the ranks whose own numbers are bad. Gradient norms are computed after the all-reduce, so they name no rank.
    metrics = {name: float(value) for name, value in bad.metrics.items()}
    finite = all(math.isfinite(value) for name, value in metrics.items() if not name.endswith("grad_norm"))
    by_rank = gathered(torch.tensor([metrics["train/loss"], float(not finite)]), stage.accelerator)
    losses, faults = by_rank.T.tolist()
    ranks = [rank for rank, fault in enumerate(faults) if fault]

    # Say what was wrong.
    if ranks:
        what = f"its loss is not finite on rank {', '.join(map(str, ranks))}"
    elif not all(map(math.isfinite, metrics.values())):
        what = "its gradient is not finite"
    else:
        what = f"its loss has jumped to {sum(losses) / len(losses):.4g}"

    # Write it down, with the samples of every rank.
    path = stage.folder / "bad_updates" / f"update-{bad.update:08}-batch-{bad.batch:08}.json"
    if stage.is_main:
        share = global_batch // len(losses)
        report = {
            "update": bad.update,
            "batch": bad.batch,
            "attempt": attempt,
            "what": what,
            "ranks": ranks,
            "loss_by_rank": [_json_number(value) for value in losses],
            "metrics_of_rank_0": {name: _json_number(value) for name, value in metrics.items()},
            "keys_by_rank": [keys(bad.batch, range(n * share, (n + 1) * share)) for n in range(len(losses))],
        }
        path.parent.mkdir(exist_ok=True)
        write_json(path, report)
    return path, what


def _json_number(value: float) -> Any:
    return value if math.isfinite(value) else str(value)
