"""Checkpoints: committed whole, verified before use, written while training goes on.

A checkpoint is a folder ``update-00000060`` with one safetensors file a part (model, optimizer, averages, ...),
``state.json`` and ``manifest.json`` with each file's size and sha256. It is written under a temporary name and renamed;
an older one is retired only after that. The step pays for one copy to host memory; a thread does the rest.
"""

import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.files import atomic_folder, sha256_of, sweep_temporaries, verify_file, write_json
from pipelines.runtime.config.errors import ConfigError

log = logging.getLogger("latentline.training")

PREFIX = "update-"
RETRIES = 8  # of a failed save, spread over grace_updates


class NoBest(BaseModel, frozen=True, extra="forbid"):
    """Checkpoints stay by age alone."""

    kind: Literal["none"] = "none"  # no metric is compared


class BestBy(BaseModel, frozen=True, extra="forbid"):
    """The checkpoint with the best value of a metric stays, besides those that stay by age."""

    kind: Literal["metric"] = "metric"  # compared every validate_every updates; a new best is saved at once
    metric: str = "val/loss"  # one of those logged with the grids
    better: Literal["lower", "higher"] = "lower"  # which value is better


class CheckpointConfig(BaseModel, frozen=True, extra="forbid"):
    """Times of checkpoints, and which ones stay."""

    every_updates: PositiveInt = 1_000  # updates from one checkpoint to the next
    keep_last: PositiveInt = 2  # newest ones that stay; a damaged newest one needs another behind it
    keep_every: NonNegativeInt = 0  # every so many updates one is written that stays for good; 0 keeps none of them
    best: NoBest | BestBy = Field(default=NoBest(), discriminator="kind")  # one more that stays
    grace_updates: NonNegativeInt = 0  # updates that training goes on while no checkpoint can be written


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what its manifest says; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as read: ``parts[name]`` are tensors on the CPU, ``state`` is JSON."""

    path: Path
    update: int
    parts: Mapping[str, dict[str, Tensor]]
    state: Mapping[str, Any]

    def load_into(self, parts: Mapping[str, "Stateful"], *, changed: bool) -> None:
        """Load every part.

        Args:
            parts: Of the training that continues.
            changed: Whether the configuration was changed on purpose: what it has dropped is left out then.

        Raises:
            ConfigError: The training has other parts than the checkpoint, and nothing is loaded; or one does not fit.
        """
        # What both must have.
        needed = [name for name, part in parts.items() if not getattr(part, "optional", False)]
        missing = [name for name in needed if name not in self.parts]
        unknown = [] if changed else self.parts.keys() - parts.keys()
        if missing or unknown:
            raise ConfigError(
                f"{self.path} holds {', '.join(sorted(self.parts))}, but this training consists of "
                f"{', '.join(sorted(parts))}: another version of the code began it. Finish it with that version, or "
                "begin anew with another run.root."
            )

        # Each part; what does not fit is of another configuration.
        for name, part in parts.items():
            if name in self.parts:
                try:
                    part.load(self.parts[name])
                except (ValueError, RuntimeError, KeyError) as error:
                    raise ConfigError(
                        f"{self.path}, {name}: {error} Take back what was changed, or begin anew with another run.root."
                    ) from error


class Stateful(Protocol):
    """A part of a checkpoint; one with ``optional = True`` may be absent from it, after a change of configuration."""

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: dict[str, Tensor]) -> None: ...


def first_not_finite(parts: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Return "PART, TENSOR" of the first tensor that holds NaN or infinity, or ""."""
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{part}, {name}"
    return ""


class Weights:
    """The weights of a network as a part of a checkpoint."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.network.state_dict())

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.network.load_state_dict(tensors)


class Best:
    """The best value of a metric so far; ``found`` and ``measured`` are kept in the checkpoint's state."""

    def __init__(self, config: NoBest | BestBy) -> None:
        self.config = config
        self.found: dict[str, Any] = {}  # update, metric, better, value
        self.measured: list[str] = []  # what the last validation measured

    def check(self) -> None:
        """Refuse a metric that validation does not measure; also at a restart, whose next validation may be far.

        Raises:
            ConfigError: The message names those that are measured.
        """
        if isinstance(self.config, BestBy) and self.measured and self.config.metric not in self.measured:
            raise ConfigError(
                f"checkpoint.best.metric = {self.config.metric!r} is not measured here; measured are "
                f"{', '.join(self.measured)}."
            )

    def beaten_by(self, metrics: Mapping[str, float], *, update: int) -> bool:
        """Return whether ``metrics`` hold a new best, and remember it; those from before the first update hold none.

        Args:
            metrics: Empty on all ranks but one.
            update: The update they were measured after.

        Raises:
            ConfigError: As ``check``.
        """
        if metrics:
            self.measured = list(metrics)
            self.check()
        if not isinstance(self.config, BestBy) or not metrics:
            return False

        # Only an update's finite value counts.
        value, sign = metrics[self.config.metric], 1 if self.config.better == "higher" else -1
        wanted = self.config.model_dump(include={"metric", "better"})
        same = {**wanted, **self.found} == {**self.found, **wanted}  # else the value is of another metric
        beaten = not self.found or not same or sign * value > sign * self.found["value"]
        if not (update and math.isfinite(value) and beaten):
            return False
        self.found = {"update": update, "value": value, **wanted}
        return True


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: ``checkpoints`` in the stage's folder.
        config: When to write, what to keep.
        writes: True on the main process alone; the others only read.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, writes: bool) -> None:
        self.folder, self.config, self.writes = folder, config, writes
        self._writer: threading.Thread | None = None
        self.failure: BaseException | None = None
        self._failing_since: int | None = None
        self._retry_at = 0
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(folder)

    def updates(self) -> list[int]:
        """Return the updates of all committed checkpoints, oldest first."""
        found = (path.name.removeprefix(PREFIX) for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())
        return sorted(int(name) for name in found if name.isdecimal())  # not one that a user has set aside

    def newest_intact(self) -> int:
        """Return the update of the newest checkpoint that is what its manifest says; 0 when there is none.

        A damaged one is named by a warning, set aside under ``damaged-...``, and the one before it is taken.
        """
        for update in reversed(self.updates()):
            try:
                verify(self._path(update))
            except DamagedCheckpoint as error:
                log.warning(f"{error} The checkpoint before it is used.")
                if self.writes:
                    self._path(update).rename(self._unused_name(f"damaged-{self._path(update).name}"))
                continue
            return update
        return 0

    def read(self, update: int) -> Checkpoint:
        """Read a verified checkpoint."""
        path = self._path(update)
        parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(path=path, update=update, parts=parts, state=json.loads((path / "state.json").read_bytes()))

    def save(
        self,
        update: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        best: int | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy ``parts`` to host memory and commit them in the background. Called on every rank; only one writes.

        Args:
            update: The update that was just made.
            parts: Tensors by part and name.
            state: JSON.
            best: Update of the checkpoint that stays for its metric.
            after: Makes durable what must be so before the checkpoint is; called in the background, too.

        Raises:
            OSError: The save before this one failed, and ``grace_updates`` are over.
        """
        if not self.writes:
            return
        self.join()
        self.check(update)
        if self._path(update).exists():
            return
        copies = {name: {key: _host_copy(value) for key, value in tensors.items()} for name, tensors in parts.items()}
        state = dict(state)

        def commit() -> None:
            try:
                # Nothing is written that could not be continued from.
                after()
                if broken := first_not_finite(copies):
                    raise ValueError(f"{broken} is not finite, and such a checkpoint helps nobody")

                # One file a part; the manifest is last. Older ones go when this one is durable.
                with atomic_folder(self._path(update)) as folder:
                    for name, tensors in copies.items():
                        save_file(tensors, folder / f"{name}.safetensors")
                    write_json(folder / "state.json", state)
                    files = sorted(path for path in folder.iterdir())
                    listed = [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files]
                    write_json(folder / "manifest.json", {"update": update, "files": listed})
                self._retire(best)
            except BaseException as error:
                self.failure = error

        self._writer = threading.Thread(target=commit, name="checkpoint writer", daemon=False)
        self._writer.start()

    def check(self, update: int) -> None:
        """Warn when the last save has failed, or end the training when there is no more grace.

        Raises:
            OSError: It failed, and ``grace_updates`` are over.
        """
        if self._writer is not None and not self._writer.is_alive():
            self.join()
        failure, self.failure = self.failure, None
        if failure is None:
            return
        self._failing_since = update if self._failing_since is None else self._failing_since
        left = self._failing_since + self.config.grace_updates - update
        if left <= 0 or not isinstance(failure, (OSError, SafetensorError)):  # the latter wraps what the disk said
            raise self._unwritable(failure)
        self._retry_at = update + max(1, min(left, self.config.grace_updates // RETRIES))
        log.warning(f"{self._unwritable(failure)} Training goes on for {left} updates.")

    def retry_due(self, update: int) -> bool:
        """Return whether a save that failed is to be tried again after this update; on the writing process only."""
        return self._failing_since is not None and self._writer is None and update >= self._retry_at

    def wait(self) -> None:
        """Wait until the last save is durable.

        Raises:
            OSError: It failed; the checkpoints before it are untouched.
        """
        self.join()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise self._unwritable(failure)

    def join(self) -> None:
        """Wait until the last save has ended, well or not."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
            if self.failure is None:
                self._failing_since = None

    def _unwritable(self, failure: BaseException) -> OSError:
        newest = f"the newest is of update {self.updates()[-1]}" if self.updates() else "there is none yet"
        error = OSError(
            f"A checkpoint could not be written to {self.folder}: {failure}. Those before it are intact ({newest}): "
            "make room or mend the disk, then run the same command again."
        )
        error.__cause__ = failure
        return error

    def _retire(self, best: int | None) -> None:
        for update in self.updates()[: -self.config.keep_last]:
            if update == best or (self.config.keep_every and update % self.config.keep_every == 0):
                continue
            # Renamed first: a folder that is half removed must not look like a checkpoint.
            doomed = self._unused_name(f".{self._path(update).name}.retired.tmp")
            self._path(update).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _path(self, update: int) -> Path:
        return self.folder / f"{PREFIX}{update:08}"

    def _unused_name(self, name: str) -> Path:
        candidates = (self.folder / (name if index == 0 else f"{name}.{index}") for index in range(1_000_000))
        return next(path for path in candidates if not path.exists())


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        DamagedCheckpoint: A file is missing, or its size or sha256 differs.
    """
    try:
        listed = json.loads((path / "manifest.json").read_bytes())["files"]
        for entry in listed:
            verify_file(path / entry["name"], size=entry["bytes"], sha256=entry["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from error


def _host_copy(tensor: Tensor) -> Tensor:
    # safetensors wants contiguous tensors; channels_last comes back when the tensors are loaded into the network.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
