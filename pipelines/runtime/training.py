"""A training run, seen from the border between two updates: counting, logging, checkpoints, stopping.

The stage keeps what it learns and how; this file keeps the promise that killing it anywhere changes nothing.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from data.randomness import key_of
from pipelines.config import ConfigError, StageConfig
from pipelines.runtime.checkpoint import CheckpointConfig, Checkpoints
from pipelines.runtime.ema import AverageConfig, ExponentialAverage
from pipelines.runtime.launch import Precision, agree_on
from pipelines.runtime.optim import OptimConfig, Optimizer
from pipelines.runtime.progress import progress_line
from pipelines.runtime.stage import Stage, Stopped

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class TrainingConfig(StageConfig):
    """What every training stage's configuration has. Counts are optimizer updates."""

    harmless: ClassVar[frozenset[str]] = frozenset({"log_every", "panel_every", "checkpoint", "prefetch_batches"})

    seed: NonNegativeInt = 0  # of order, noise, drops and initial weights
    updates: PositiveInt  # length of the training
    global_batch: PositiveInt  # images an update, over all processes
    images_per_device: NonNegativeInt = 0  # images of one forward pass; 0 takes a process's whole share at once
    precision: Precision = "float32"  # what the network computes in; weights stay float32
    optim: OptimConfig = OptimConfig()  # how the weights move
    averages: tuple[AverageConfig, ...] = Field(default=(ExponentialAverage(),), min_length=1)  # the first is published
    checkpoint: CheckpointConfig = CheckpointConfig()  # when and how many
    log_every: PositiveInt = 50  # updates between two looks at the losses; each look waits for the device
    panel_every: PositiveInt = 1_000  # updates between two pictures and validations
    prefetch_batches: PositiveInt = 4  # batches made ahead of the network


class Stateful(Protocol):
    """A part of a checkpoint."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


class Weights:
    """The weights of a network as a part of a checkpoint."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)


class Loaded(Protocol[T_co]):
    """A batch with its index and the time the loop waited for it."""

    @property
    def index(self) -> int: ...
    @property
    def batch(self) -> T_co: ...
    @property
    def wait_seconds(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class BatchShare:
    """The slice of every global batch that one rank trains on, cut into equal micro-batches."""

    start: int
    stop: int
    num_micro_batches: int

    @classmethod
    def of(cls, config: TrainingConfig, *, table: str, rank: int, world_size: int) -> "BatchShare":
        """Split ``config.global_batch``.

        Raises:
            ConfigError: It does not split into whole micro-batches; the message gives the nearest values that do.
        """
        per_device = config.images_per_device or 1
        unit = world_size * per_device
        if config.global_batch % unit:
            below, above = config.global_batch // unit * unit, math.ceil(config.global_batch / unit) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            images = f" x {per_device} images = {unit}" if config.images_per_device else ""
            raise ConfigError(
                f"{table}.global_batch = {config.global_batch} cannot be split into whole micro-batches: {world_size} "
                f"processes{images}. Use {nearest}, or change {table}.images_per_device or --num_processes."
            )
        share = config.global_batch // world_size
        return cls(
            start=rank * share,
            stop=(rank + 1) * share,
            num_micro_batches=share // config.images_per_device if config.images_per_device else 1,
        )

    @property
    def positions(self) -> range:
        """Positions in the global batch."""
        return range(self.start, self.stop)

    def micro_batches(self) -> list[slice]:
        """Slices of this rank's share, one a forward pass."""
        size = (self.stop - self.start) // self.num_micro_batches
        return [slice(index * size, (index + 1) * size) for index in range(self.num_micro_batches)]


class Training:
    """The counts, logs and checkpoints of one training stage.

    Args:
        stage: The running stage.
        config: Its configuration.
        share: This rank's slice of every global batch.
        parts: What a checkpoint holds, by name; the same on every rank.
        flops_per_image: Of one training step, or 0 when not known.
        peak_flops: Of one device a second, for model-FLOP utilisation.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrainingConfig,
        *,
        share: BatchShare,
        parts: Mapping[str, Stateful],
        flops_per_image: float = 0.0,
        peak_flops: float = math.inf,
    ) -> None:
        self.stage, self.config, self.share, self.parts = stage, config, share, parts
        self.update = 0
        self.next_batch = 0
        self._checkpoints = Checkpoints(stage.folder / "checkpoints", config.checkpoint, writes=stage.is_main)
        self._present: dict[str, Tensor] = {}
        self._pending: list[tuple[dict[str, Any], dict[str, Tensor]]] = []
        self._flops_per_image, self._peak_flops = flops_per_image, peak_flops
        self._interval_began, self._interval_waited, self._interval_first = time.monotonic(), 0.0, 0
        self._figures: dict[str, float] = {}

    def resume(self) -> None:
        """Continue after the newest intact checkpoint, on every rank the same one; do nothing when there is none."""
        stage = self.stage
        newest = agree_on(self._checkpoints.newest_intact() if stage.is_main else 0, stage.accelerator)
        if newest:
            checkpoint = self._checkpoints.read(newest)
            for name, part in self.parts.items():
                part.load(checkpoint.parts.get(name, {}))
            self.update, self.next_batch = checkpoint.update, int(checkpoint.state["next_batch"])
            before = {name: checkpoint.state[name] for name in ("world_size", "threads")}
            now = {"world_size": stage.accelerator.num_processes, "threads": torch.get_num_threads()}
            exact = "bit for bit" if before == now else f"to rounding, since {before} became {now}"
            stage.say(f"continuing after update {self.update}, {exact}")
        self.stage.tracker.resume_after(self.update)

    def updates(self, batches: Callable[[int], Iterator[Loaded[T]]]) -> Iterator[T]:
        """Yield one batch an update until the last update; what a border needs is done when the loop comes back.

        Args:
            batches: Gives the batches from a batch index on; closed at the end.

        Raises:
            Stopped: The ranks agreed to stop; everything up to the last update is committed.
        """
        config, stage = self.config, self.stage
        self._interval_began, self._interval_first = time.monotonic(), self.update
        stream = batches(self.next_batch)
        try:
            with progress_line(
                stage.name, total=config.updates, unit="updates", start=self.update, speaks=stage.is_main
            ) as line:
                while self.update < config.updates:
                    loaded = next(stream)
                    self._interval_waited += loaded.wait_seconds
                    self.update, self.next_batch = self.update + 1, loaded.index + 1
                    yield loaded.batch
                    self._record()
                    last = self.update == config.updates
                    stopping = stage.stop.agreed() and not last
                    due = self._checkpoints.due(self.update) or last or stopping
                    if due or self.update % config.log_every == 0:
                        self.flush()
                    line.advance_to(self.update, self._figures)
                    if due:
                        self._save()
                    if stopping:
                        self._checkpoints.wait()
                        raise Stopped(f"{stage.stop.reason or 'asked by another rank'}, after update {self.update}")
            self._checkpoints.wait()
        finally:
            close = getattr(stream, "close", None)
            if close is not None:
                close()

    def micro_batches(self, wrapped: nn.Module) -> Iterator[slice]:
        """Yield the slices of this rank's share, one a forward and backward pass.

        Gradients are averaged over the ranks on the last one only. Dropout is seeded anew for each: nothing carries
        over, so there is nothing to save.
        """
        accelerator, parts = self.stage.accelerator, self.share.micro_batches()
        for number, part in enumerate(parts):
            seed_dropout(
                self.config.seed, batch=self.next_batch - 1, rank=accelerator.process_index, micro_batch=number
            )
            with nullcontext() if number == len(parts) - 1 else accelerator.no_sync(wrapped):
                yield part

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients: ``loss`` is its mean over images."""
        self.stage.accelerator.backward(loss / self.share.num_micro_batches)

    def note(self, figures: Mapping[str, Tensor]) -> None:
        """Note a micro-batch's figures, means over its images: scalars that stay on the device until the next flush."""
        for name, value in figures.items():
            mean = value.detach() / self.share.num_micro_batches
            self._present[name] = self._present[name] + mean if name in self._present else mean

    def step(self, name: str, optimizer: Optimizer) -> None:
        """Apply the gradients and note their norm as ``name``."""
        self._present[name] = optimizer.step(update=self.update, total_updates=self.config.updates)

    def _record(self) -> None:
        row = {"update": self.update, "batch": self.next_batch - 1, "time": time.time()}
        self._pending.append((row, self._present))
        self._present = {}

    def is_due(self, period: int) -> bool:
        """Return whether something that happens every ``period`` updates, and after the last, is due now."""
        return self.update % period == 0 or self.update == self.config.updates

    def flush(self) -> None:
        """Average the pending figures over the ranks and write them out, one line an update. A collective."""
        if not self._pending:
            return
        names = list(self._pending[-1][1])
        wide = torch.float64 if self.stage.accelerator.device.type != "mps" else torch.float32
        table = torch.stack([torch.stack([row[1][name].to(wide) for name in names]) for row in self._pending])
        if self.stage.accelerator.num_processes > 1:
            dist.all_reduce(table)
            table /= self.stage.accelerator.num_processes
        values = table.tolist()
        rows = [
            {**row, **dict(zip(names, line, strict=True))} for (row, _), line in zip(self._pending, values, strict=True)
        ]
        rows[-1] |= self._performance()
        self._pending.clear()
        self.stage.tracker.log_rows(rows)
        loss = rows[-1]["train/loss"]
        self._figures = {"loss": loss, "images/s": rows[-1]["perf/images_per_s"]}
        broken = [row["update"] for row in rows if not math.isfinite(row["train/loss"] + row["train/grad_norm"])]
        if broken:
            raise FloatingPointError(
                f"The loss or its gradient was not finite in update {broken[0]} (from batch {rows[0]['batch']} on). "
                "No such update has reached the weights. Lower optim.peak_lr or look at the data, then run it again."
            )

    def _performance(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self._interval_began, 1e-9)
        images = (self.update - self._interval_first) * self.config.global_batch
        world_size = self.stage.accelerator.num_processes
        figures = {
            "perf/images_per_s": images / seconds,
            "perf/data_wait_fraction": self._interval_waited / seconds,
            "perf/flops_per_image": float(self._flops_per_image),
            "perf/mfu": images / seconds * self._flops_per_image / (world_size * self._peak_flops),
        }
        self._interval_began, self._interval_waited, self._interval_first = time.monotonic(), 0.0, self.update
        return figures

    def _save(self) -> None:
        state = {
            "update": self.update,
            "next_batch": self.next_batch,
            "images": self.update * self.config.global_batch,
            "world_size": self.stage.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "local_run_id": self.stage.tracker.run_id,
        }
        if self.stage.is_main:
            # Lines up to here are never written again: they must be on disk before the checkpoint is.
            self.stage.tracker.flush()
            self._checkpoints.save(self.update, {name: part.tensors() for name, part in self.parts.items()}, state)


def seed_dropout(seed: int, *, batch: int, rank: int, micro_batch: int) -> None:
    """Seed the network's own randomness (dropout) for one forward pass: nothing carries over, so nothing is saved."""
    torch.manual_seed(key_of(seed, f"dropout/{batch}/{rank}/{micro_batch}")[0] >> 1)
