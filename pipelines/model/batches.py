"""Global batches of a training: this rank's share of each, a pure function of the batch's index.

Order and draws depend on the stage's name, too: with one seed for both trainings, the denoiser would otherwise get each
sample where the autoencoder had it, mirrored alike and with the same noise of the posterior.
"""

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np

from data.order.order import OrderConfig
from data.prefetch import Prefetch
from data.randomness import SampleDraws, derived_seed
from data.shards.split import ShardSet
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.training.config import BatchShare, TrainingConfig

Batch = TypeVar("Batch")


class GlobalBatches(ABC, Generic[Batch]):
    """This rank's share of every global batch; ``make`` of a training defines a batch.

    Args:
        config: Of the training.
        stage: The running training.
        shards: Samples to take.
        order: Order of the samples.
        threads: Batches that are made at once, each in a thread.

    Raises:
        ConfigError: The global batch does not split, or the order does not suit the samples.
    """

    def __init__(
        self, config: TrainingConfig, stage: Stage, shards: ShardSet, *, order: OrderConfig, threads: int = 1
    ) -> None:
        rank, world_size = stage.accelerator.process_index, stage.accelerator.num_processes
        self.share = BatchShare.of(config, table=stage.name, rank=rank, world_size=world_size)
        self._seed = derived_seed(config.seed, stage.name)
        with config_error_at(f"{stage.name}.order"):
            self._order = shards.order(order, seed=self._seed, global_batch=config.global_batch)
        self._shards, self._threads = shards, threads
        self._global_batch, self._depth = config.global_batch, config.prefetch_batches

    @abstractmethod
    def make(self, index: int) -> Batch:
        """Make this rank's share of global batch ``index``, with all its randomness."""

    def samples(self, index: int, positions: range) -> np.ndarray:
        """Return the indices of the samples at ``positions`` of global batch ``index``; int64 (n,)."""
        return self._order.indices(index * self._global_batch + positions.start, len(positions))

    def draws(self, index: int) -> SampleDraws:
        """Return the random draws of this rank's share of global batch ``index``."""
        return SampleDraws(self._seed, index, self.share.positions)

    def shared_draws(self, index: int) -> SampleDraws:
        """Return random draws that all samples of global batch ``index`` share, on every rank."""
        return SampleDraws(self._seed, index, [0])

    def keys(self, index: int, positions: range) -> list[str]:
        """Return the keys of the samples at ``positions`` of global batch ``index``."""
        return self._shards.keys(self.samples(index, positions))

    def from_index(self, start: int) -> Prefetch[Batch]:
        """Make batches ahead, from ``start`` on."""
        return Prefetch(self.make, start=start, depth=self._depth, threads=self._threads)
