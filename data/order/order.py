"""The order of training data: one endless stream of sample indices, any position of which is computed on its own.

The stream depends on the seed, the corpus and the configuration alone: not on ranks, workers or restarts. So resuming
at any step costs nothing, and a full shuffle of a hundred million samples needs no table (see
``data.order.permutation``).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field, PositiveFloat, PositiveInt

from data.order.blocked import BlockedStreams
from data.order.mixture import Mixture
from data.order.permutation import permute, round_keys
from data.randomness import generator


class FullShuffleConfig(BaseModel, frozen=True, extra="forbid"):
    """Any sample anywhere in the epoch."""

    kind: Literal["full"] = "full"  # every sample can follow every other


class BlockedShuffleConfig(BaseModel, frozen=True, extra="forbid"):
    """Shards in random order, samples shuffled within a window: for shards that lie far away."""

    kind: Literal["blocked"] = "blocked"  # each shard is needed once an epoch, for a short while
    canonical_nodes: PositiveInt = 64  # streams of shards; nodes that divide it fetch each shard about once in total
    window: PositiveInt = 16_384  # samples of a stream that are shuffled among each other


class WeightedConfig(BaseModel, frozen=True, extra="forbid"):
    """Classes or corpora in fixed shares, each gone through in epochs of its own."""

    kind: Literal["weighted"] = "weighted"  # class-balanced by default
    by: Literal["class", "corpus"] = "class"  # what is weighed: classes, or the corpora of a source of kind "union"
    weights: Mapping[str, PositiveFloat] = {}  # by name; a class or corpus that is not named weighs 1


class SequentialConfig(BaseModel, frozen=True, extra="forbid"):
    """Samples as they stand in the shards; for looking at data, not for training."""

    kind: Literal["sequential"] = "sequential"  # the order of the shards, each epoch alike


AnyOrderConfig = FullShuffleConfig | BlockedShuffleConfig | WeightedConfig | SequentialConfig
OrderConfig = Annotated[AnyOrderConfig, Field(discriminator="kind")]


def spread_sample(num_samples: int, count: int) -> np.ndarray:
    """Return ``count`` samples, or all, spread over ``num_samples``, ascending: a pure function; int64 (k,).

    One is drawn from each of ``count`` equal stretches. Stretches, since a corpus that keeps its classes together
    shows one of them in any single stretch; drawn, since equal steps through classes in turn meet one class only.
    """
    count = min(count, num_samples)
    borders = np.arange(count + 1, dtype=np.int64) * num_samples // max(count, 1)
    lengths = np.diff(borders)
    return borders[:-1] + (generator(0, "order/spread").random(count) * lengths).astype(np.int64)


class Order:
    """An endless stream of sample indices in which each epoch holds every index in [0, ``num_samples``) once.

    ``weighted`` has no epoch of its own: there each class or corpus holds each of its samples once per turn.

    Args:
        num_samples: Samples an epoch; at least 1.
        seed: Seed of the stage; two seeds give unrelated orders.
        global_batch: Samples of a global batch; ``blocked`` gives each of its parts to one stream.
        shard_sizes: Samples of each shard, in order; ``blocked`` needs them.
        labels: Class of each sample; ``weighted`` by class needs them.
        classes: Class names by label, for the weights.
        corpora: Number of samples of each corpus, in the order of the indices; ``weighted`` by corpus needs them.
    """

    def __init__(
        self,
        config: AnyOrderConfig,
        *,
        num_samples: int,
        seed: int,
        global_batch: int = 1,
        shard_sizes: Sequence[int] = (),
        labels: np.ndarray | None = None,
        classes: Sequence[str] = (),
        corpora: Mapping[str, int] | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError("An order needs at least one sample; the corpus is empty.")
        self.config, self.num_samples, self.seed = config, num_samples, seed
        self._blocked = self._mixture = None
        if isinstance(config, BlockedShuffleConfig):
            assert sum(shard_sizes) == num_samples, "the shards do not hold the samples"
            self._blocked = BlockedStreams(
                shard_sizes, seed=seed, batch=global_batch, streams=config.canonical_nodes, window=config.window
            )
        if isinstance(config, WeightedConfig) and config.by == "corpus":
            assert corpora is not None
            assert sum(corpora.values()) == num_samples
            self._mixture = Mixture.of_corpora(corpora, weights=config.weights, seed=seed)
        elif isinstance(config, WeightedConfig):
            assert labels is not None
            assert len(labels) == num_samples
            self._mixture = Mixture.of_labels(labels, classes=classes, weights=config.weights, seed=seed)

    def indices(self, first: int, count: int) -> np.ndarray:
        """Return the sample indices at stream positions [first, first + count); int64 (count,)."""
        positions = np.arange(first, first + count, dtype=np.int64)
        if self._mixture is not None:
            return self._mixture.at(positions)
        if self.config.kind == "sequential":
            return positions % self.num_samples
        out = np.empty_like(positions)
        for epoch in range(first // self.num_samples, (first + count - 1) // self.num_samples + 1):
            start = epoch * self.num_samples
            here = slice(max(start - first, 0), start + self.num_samples - first)
            if self._blocked is not None:
                out[here] = self._blocked.at(positions[here], epoch=epoch)
            else:
                out[here] = permute(positions[here] - start, self.num_samples, round_keys(self.seed, "order", epoch))
        return out
