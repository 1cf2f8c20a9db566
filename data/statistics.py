"""Per-channel statistics of latents, by sums that merge: in float64, added in a fixed order."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

ACTIVE_FRACTION = 0.1  # a channel is active when its mean varies more than this share of its total spread


@dataclass(kw_only=True)
class ChannelSums:
    """Sums over elements of latents drawn from their posteriors; all arrays float64 (c,).

    The variance of such a draw is that of the means plus the mean of the variances (law of total variance).
    """

    count: int
    mean: np.ndarray
    mean_square: np.ndarray
    variance: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def empty(cls, num_channels: int) -> "ChannelSums":
        """Sums over nothing."""
        zero, infinite = np.zeros(num_channels), np.full(num_channels, np.inf)
        return cls(count=0, mean=zero, mean_square=zero, variance=zero, low=infinite, high=-infinite)

    def add(self, moments: np.ndarray) -> None:
        """Take in moments as stored, mean and log-variance (... 2 c h w), of one or more samples, one by one."""
        c, h, w = moments.shape[-3:]
        mean, log_variance = moments.astype(np.float64).reshape(-1, 2, c, h * w).swapaxes(0, 1)
        # Of each sample by itself, then over the samples in order: their grouping to batches leaves every bit as it is.
        self.count += len(mean) * h * w
        self.mean = reduce(np.add, mean.sum(axis=-1), self.mean)
        self.mean_square = reduce(np.add, np.square(mean).sum(axis=-1), self.mean_square)
        self.variance = reduce(np.add, np.exp(log_variance).sum(axis=-1), self.variance)
        self.low = reduce(np.minimum, mean.min(axis=-1), self.low)
        self.high = reduce(np.maximum, mean.max(axis=-1), self.high)

    @classmethod
    def merged(cls, parts: Iterable["ChannelSums"]) -> "ChannelSums":
        """Add up parts, in the order given: float addition is not associative, so the order is part of the result.

        Raises:
            ValueError: There are no parts.
        """
        parts = [part for part in parts if part.count]
        if not parts:
            raise ValueError("There is nothing to measure: no training shard was encoded.")
        total = cls.empty(len(parts[0].mean))
        for part in parts:
            total._merge(part)
        return total

    def _merge(self, part: "ChannelSums") -> None:
        self.count += part.count
        for name in ("mean", "mean_square", "variance"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.low, self.high = np.minimum(self.low, part.low), np.maximum(self.high, part.high)

    @property
    def num_channels(self) -> int:
        """Number of channels c."""
        return len(self.mean)

    @property
    def channel_mean(self) -> np.ndarray:
        """Mean of each channel; (c,)."""
        return self.mean / max(self.count, 1)

    @property
    def variance_of_means(self) -> np.ndarray:
        """Variance of the posteriors' means; (c,)."""
        return np.maximum(self.mean_square / max(self.count, 1) - np.square(self.channel_mean), 0.0)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel of a drawn latent; (c,)."""
        return np.sqrt(self.variance_of_means + self.variance / max(self.count, 1))

    @property
    def active(self) -> np.ndarray:
        """Whether each channel carries information: its mean varies, its posterior is not just the prior; bool (c,)."""
        return np.sqrt(self.variance_of_means) > ACTIVE_FRACTION * self.std

    def summary(self) -> dict[str, list[float]]:
        """Return what a manifest holds: one number a channel."""
        return {
            "mean": self.channel_mean.tolist(),
            "std": self.std.tolist(),
            "min": self.low.tolist(),
            "max": self.high.tolist(),
            "active": [float(value) for value in self.active],
        }

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the same as flat metrics."""
        return {
            f"{prefix}/active_channels": float(self.active.sum()),
            **{f"{prefix}/mean_{index}": float(value) for index, value in enumerate(self.channel_mean)},
            **{f"{prefix}/std_{index}": float(value) for index, value in enumerate(self.std)},
        }

    def to_json(self) -> dict[str, Any]:
        """Return the sums as JSON; Python's floats survive that without a change."""
        names = ("mean", "mean_square", "variance", "low", "high")
        # An empty shard has infinite bounds, which JSON has no word for.
        return {"count": self.count, **{name: getattr(self, name).tolist() for name in names if self.count}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ChannelSums":
        """Read what ``to_json`` returned."""
        if not value["count"]:
            return cls.empty(0)
        return cls(count=int(value["count"]), **{k: np.array(v) for k, v in value.items() if k != "count"})
