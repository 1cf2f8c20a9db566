"""When the autoencoder starts to hear of its discriminator: at a set update, or when reconstruction stops improving.

A discriminator that speaks too early drowns a reconstruction that still has much to learn from pixels alone. Both kinds
are pure functions of what they were shown, which is the same on every rank, so that all ranks start together.
"""

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor


class StartAtUpdate(BaseModel, frozen=True, extra="forbid"):
    """Start after a number of updates."""

    kind: Literal["update"] = "update"  # at a time that is known
    update: NonNegativeInt = 50_000  # updates without the discriminator


class StartOnPlateau(BaseModel, frozen=True, extra="forbid"):
    """Start when the reconstruction loss has stopped improving."""

    kind: Literal["plateau"] = "plateau"  # when pixels have no more to teach
    window: PositiveInt = 20  # looks at the loss that are averaged, to see through its noise
    min_improvement: PositiveFloat = 0.01  # share of the loss that a window must gain on the one before it
    latest_update: PositiveInt = 100_000  # start then in any case


AdversaryStartConfig = Annotated[StartAtUpdate | StartOnPlateau, Field(discriminator="kind")]


class AdversaryStart:
    """Whether the discriminator speaks; a part of the checkpoint."""

    def __init__(self, config: AdversaryStartConfig) -> None:
        self.config = config
        self._losses: list[float] = []  # of the present and the last window, oldest first
        self._started = False

    def has_started(self, update: int) -> bool:
        """Whether the autoencoder hears of the discriminator in ``update``, counted from 1."""
        match self.config:
            case StartAtUpdate(update=first):
                return update > first
            case StartOnPlateau(latest_update=latest):
                return self._started or update > latest

    def look(self, loss: float) -> None:
        """Take note of the reconstruction loss, averaged over ranks and over the updates since the last look."""
        if not isinstance(self.config, StartOnPlateau) or self._started:
            return
        window = self.config.window
        self._losses = [*self._losses, loss][-2 * window :]
        if len(self._losses) == 2 * window:
            before, now = sum(self._losses[:window]) / window, sum(self._losses[window:]) / window
            self._started = now > (1 - self.config.min_improvement) * before

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        return {"started": torch.tensor(self._started), "losses": torch.tensor(self._losses, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state where it was left."""
        self._started = bool(tensors["started"])
        self._losses = tensors["losses"].tolist()
