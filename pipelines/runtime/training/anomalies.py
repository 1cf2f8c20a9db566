"""Which updates count: one whose loss or gradient is not finite, or whose loss jumps, is refused on the device.

All ranks judge the same reduced numbers, so they agree without asking; a wish to stop travels along with them. The
verdict stays on the device: from the first bad update on, weights, moments and averages stand still there, until the
host, which looks one update later on a GPU and at once on a CPU, goes back to the update before and answers. So nothing
waits, and nothing bad is ever seen.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import AfterValidator, BaseModel, NonNegativeFloat, PositiveInt
from torch import Tensor

from pipelines.runtime.training.checkpoint import Stateful


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
    """An update whose verdict the host has not read yet. Metrics are of this rank alone."""

    update: int
    batch: int
    metrics: Mapping[str, Tensor]
    said: Tensor  # whether it is refused, and whether a rank wants to stop (2,); readable once `ready` is reached
    ready: Any  # CUDA event, or None when it is ready

    def read(self) -> tuple[bool, bool]:
        """Return whether it is refused and whether a rank wants to stop, waiting until the device has come to it."""
        if self.ready is not None:
            self.ready.synchronize()
        refused, stops = self.said.tolist()
        return bool(refused), bool(stops)


class AnomalyDetector:
    """Judges updates; a part of the checkpoint, since the running mean of the loss goes on over restarts."""

    def __init__(self, config: BadUpdateConfig, *, device: torch.device, world_size: int) -> None:
        self.config, self.device, self.world_size = config, device, world_size
        #: 1 where the present update does not count; scalar float32 on the device.
        self.refused = torch.zeros((), device=device)
        self._frozen = torch.zeros((), device=device)
        self._mean = torch.zeros((), device=device)
        self._count = torch.zeros((), device=device)
        self._stops = torch.zeros((), device=device)
        self._unread: deque[CheckedUpdate] = deque()
        #: Whether a rank wanted to stop in an update that the host has looked at; the same on every rank.
        self.stop_agreed = False

    @torch.no_grad()
    def check(
        self, metrics: Mapping[str, Tensor], norms: Mapping[str, Tensor], *, scaler: Any = None, stops: bool = False
    ) -> None:
        """Judge an update before it is applied. A collective, the only one beside the gradients': four numbers.

        Args:
            metrics: This rank's means, ``train/loss`` among them.
            norms: Of the gradients, which are reduced already.
            scaler: The fp16 loss scaler; with it a gradient may overflow, which is refused but no fault.
            stops: Whether this rank was asked to stop.
        """
        loss = metrics["train/loss"].float()
        measured, gradients = (torch.stack([value.float() for value in group.values()]) for group in (metrics, norms))
        overflow = (~torch.isfinite(gradients)).any()
        bad = (~torch.isfinite(measured)).any()
        if scaler is None:
            bad = bad | overflow
        else:  # A scale below 1 helps no longer: the gradients themselves are beyond fp16.
            bad = bad | (overflow & (scaler._scale < 1.0).squeeze())
        wish = torch.full((), float(stops), device=self.device)
        shared = torch.stack([loss / self.world_size, bad.float(), overflow.float(), wish])
        if self.world_size > 1:
            dist.all_reduce(shared)
        loss, wrong = shared[0], shared[1] > 0
        if self.config.spike_factor:
            wrong = wrong | ((self._count >= self.config.spike_span) & (loss > self.config.spike_factor * self._mean))
        self._frozen = torch.maximum(self._frozen, wrong.float())
        counts = self._frozen == 0
        pace = 1.0 / (self._count + 1).clamp(max=self.config.spike_span)
        self._mean = torch.where(counts, self._mean + pace * (loss.abs() - self._mean), self._mean)
        self._count = self._count + counts.float()
        self.refused = torch.maximum(self._frozen, (shared[2] > 0).float())
        self._stops = shared[3]

    def remember(self, *, update: int, batch: int, metrics: Mapping[str, Tensor]) -> None:
        """Send the verdict on the update just made on its way to the host."""
        said, ready = torch.stack([self._frozen, self._stops]), None
        if self.device.type == "cuda":
            said = torch.empty(2, pin_memory=True).copy_(said, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unread.append(CheckedUpdate(update=update, batch=batch, metrics=metrics, said=said, ready=ready))

    def first_bad(self, *, wait: bool) -> CheckedUpdate | None:
        """Return the first bad update that the host has not answered; the same on every rank.

        Args:
            wait: Also look at the newest update, which a GPU may still be working on.
        """
        newest_waits = 0 if wait or self.device.type != "cuda" else 1
        while len(self._unread) > newest_waits:
            judged = self._unread.popleft()
            refused, stops = judged.read()
            self.stop_agreed = self.stop_agreed or stops
            if refused:
                self._unread.clear()
                return judged
        return None

    def present_is_refused(self) -> bool:
        """Return whether the present update does not count; waits for the device."""
        return bool(self.refused)

    def freeze(self) -> None:
        """Let no update count until ``unfreeze``."""
        self._frozen = torch.ones_like(self._frozen)
        self.refused = torch.ones_like(self.refused)

    def unfreeze(self) -> None:
        """Let updates count again."""
        self._frozen = torch.zeros_like(self._frozen)
        self.refused = torch.zeros_like(self.refused)
        self._unread.clear()

    def tensors(self) -> dict[str, Tensor]:
        """Return the running mean of the loss, for a checkpoint."""
        return {"mean": self._mean, "count": self._count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` returned."""
        if tensors:
            self._mean, self._count = (tensors[name].to(self.device) for name in ("mean", "count"))


def first_not_finite(parts: Mapping[str, Stateful]) -> str:
    """Return "PART, TENSOR" of the first tensor of a checkpoint's parts that holds NaN or infinity, or ""."""
    for name, part in parts.items():
        for key, tensor in part.tensors().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{name}, {key}"
    return ""
