"""Configuration that both training stages share, and the split of a global batch over ranks and micro-batches."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import Precision
from pipelines.runtime.training.anomalies import BadUpdateConfig
from pipelines.runtime.training.checkpoint import CheckpointConfig
from pipelines.runtime.training.ema import AverageConfig, ExponentialAverage
from pipelines.runtime.training.optim import OptimConfig


class TrainingConfig(StageConfig):
    """Configuration that both training stages share. Counts are optimizer updates."""

    fingerprint_ignores: ClassVar[frozenset[str]] = frozenset(
        {
            *("log_every", "validate_every", "checkpoint", "prefetch_batches", "replica_check_every", "hang_seconds"),
            *("on_bad_update.policy", "on_bad_update.limit", "shard_optimizer"),
        }
    )

    revisions: ClassVar[tuple[str, ...]] = (
        "orders of fewer than 64 samples or shards, and of weighted classes, are others",
        "order and draws of the two trainings are unrelated",
        "the cosine rate falls one update later, so that the last update still learns",
    )

    seed: NonNegativeInt = 0  # of order, noise, drops and initial weights
    updates: PositiveInt  # length of the training
    global_batch: PositiveInt  # images an update, over all processes
    images_per_device: NonNegativeInt = 0  # images of one forward pass; 0 takes a process's whole share at once
    precision: Precision = "float32"  # what the network computes in; weights stay float32
    # As torch has always computed convolutions, at 8 times the speed; bf16, which most train in, has 3 bits less.
    tf32: bool = True  # float32 products and convolutions by TF32 on GPUs that have it: 10 bits of fraction, not 23
    # A CPU needs a C++ compiler. "reduce-overhead" replays CUDA graphs: a small network waits for launches of kernels.
    compile: bool | Literal["reduce-overhead"] = False  # slow start, faster updates; the latter for small ones on a GPU
    optim: OptimConfig = OptimConfig()  # how the weights move
    shard_optimizer: bool = False  # the optimizer's state dealt over the ranks (ZeRO 1): less memory, same bits
    averages: tuple[AverageConfig, ...] = Field(default=(ExponentialAverage(),), min_length=1)  # the first is published
    checkpoint: CheckpointConfig = CheckpointConfig()  # when and how many
    log_every: PositiveInt = 50  # updates between two flushes of metrics; each waits for the device
    validate_every: PositiveInt = 1_000  # updates between two validations
    prefetch_batches: PositiveInt = 4  # batches made ahead of the network
    on_bad_update: BadUpdateConfig = BadUpdateConfig()  # what happens to NaN, infinity and spikes
    replica_check_every: NonNegativeInt = 1_000  # updates between two comparisons of the ranks; 0 only when starting
    hang_seconds: Annotated[float, Field(gt=0, le=1e9)] = 1_200.0  # of an update and its validation, at most

    @model_validator(mode="after")
    def _graphs_keep_no_gradients(self) -> Self:
        if self.compile == "reduce-overhead" and self.images_per_device:
            raise ValueError('compile = "reduce-overhead" needs images_per_device = 0: passes overwrite gradients')
        return self


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """The slice of every global batch that one rank trains on, cut into equal micro-batches."""

    positions: range  # in the global batch
    micro_batches: tuple[slice, ...]  # of this slice, one a forward pass

    @classmethod
    def of(cls, config: TrainingConfig, *, table: str, rank: int, world_size: int) -> "BatchShare":
        """Split ``config.global_batch``.

        Raises:
            ConfigError: It does not split into whole micro-batches; the message gives the nearest values that do.
        """
        # Refuse a batch that does not split, with the nearest values that do.
        unit = world_size * (config.images_per_device or 1)
        if config.global_batch % unit:
            below, above = config.global_batch // unit * unit, math.ceil(config.global_batch / unit) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            images = f" x {config.images_per_device} images = {unit}" if config.images_per_device else ""
            raise ConfigError(
                f"{table}.global_batch = {config.global_batch} cannot be split into whole micro-batches: {world_size} "
                f"processes{images}. Use {nearest}, or change {table}.images_per_device or --num_processes."
            )

        # Each rank takes one slice, in micro-batches of what its device holds at once.
        share = config.global_batch // world_size
        size = config.images_per_device or share
        micro_batches = tuple(slice(start, start + size) for start in range(0, share, size))
        return cls(positions=range(rank * share, (rank + 1) * share), micro_batches=micro_batches)
