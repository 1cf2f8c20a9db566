"""Start of the adversarial term: at a set update, or when reconstruction stops improving.

A discriminator that joins too early drowns a reconstruction that still has much to learn from pixels alone. Both kinds
are functions of the configuration and of losses that are averaged over the ranks, so that all ranks start together, any
number of them at the same update, and a restart changes nothing.
"""

from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor


class StartAtUpdate(BaseModel, frozen=True, extra="forbid"):
    """Start after a number of updates."""

    kind: Literal["update"] = "update"  # at a time that is known
    update: NonNegativeInt = 50_000  # updates without the adversarial term


class StartOnPlateau(BaseModel, frozen=True, extra="forbid"):
    """Start when the reconstruction loss has stopped improving."""

    kind: Literal["plateau"] = "plateau"  # when pixels have no more to teach
    every: PositiveInt = 100  # updates between two tests of the loss
    window: PositiveInt = 20  # tests that are averaged, against noise
    min_improvement: PositiveFloat = 0.01  # share of the loss that a window must gain on the one before it
    latest_update: PositiveInt = 100_000  # start after it in any case


AdversaryStartConfig = Annotated[StartAtUpdate | StartOnPlateau, Field(discriminator="kind")]


class AdversaryStart:
    """State of the adversarial term; a part of the checkpoint, the same on every rank.

    Args:
        config: What is waited for.
        device: Where losses lie.
    """

    def __init__(self, config: AdversaryStartConfig, *, device: torch.device) -> None:
        self.config = config
        self._started = False
        self._looks: list[float] = []  # of the present and the last window, oldest first
        wide = torch.float64 if device.type != "mps" else torch.float32
        self._sum = torch.zeros((), dtype=wide, device=device)  # of the losses since the last test
        self._count = torch.zeros((), dtype=wide, device=device)

    def may_start_before(self, last: int) -> bool:
        """Return whether a training whose last update is ``last`` can have the adversarial term."""
        return isinstance(self.config, StartOnPlateau) or self.config.update < last

    def has_started(self, update: int) -> bool:
        """Return whether ``update``, counted from 1, has the adversarial term."""
        match self.config:
            case StartAtUpdate(update=first):
                return update > first
            case StartOnPlateau(latest_update=latest):
                return self._started or update > latest

    @torch.no_grad()
    def watch(self, loss: Tensor, *, update: int, refused: Tensor) -> bool:
        """Take note of an update's reconstruction loss; return whether the reason to start came with it. A collective.

        It costs an all-reduce of one number an update, and waits for the device once a test.

        Args:
            loss: This rank's mean; a scalar on the device.
            update: Its number, from 1.
            refused: 1 where the update does not count, then its loss does not either; a scalar on the device.
        """
        if not isinstance(self.config, StartOnPlateau) or self.has_started(update):
            return False
        mean = loss.detach().to(self._sum.dtype)
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        counts = refused == 0
        self._sum += torch.where(counts, mean, 0.0)
        self._count += counts
        if update % self.config.every == 0 and bool(counts):
            # Compare the last window of averages with the one before it.
            window = self.config.window
            self._looks = [*self._looks, float(self._sum / self._count)][-2 * window :]
            if len(self._looks) == 2 * window:
                before, now = sum(self._looks[:window]) / window, sum(self._looks[window:]) / window
                self._started = now > (1 - self.config.min_improvement) * before
            self._sum.zero_()
            self._count.zero_()
        return self._started

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        return {
            "started": torch.tensor(self._started),
            "looks": torch.tensor(self._looks, dtype=torch.float64),
            "sum": self._sum,
            "count": self._count,
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state where it was left."""
        self._started = bool(tensors["started"])
        self._looks = tensors["looks"].tolist()
        self._sum, self._count = (tensors[name].to(self._sum.device) for name in ("sum", "count"))
