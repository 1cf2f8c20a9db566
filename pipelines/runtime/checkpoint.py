"""Checkpoints: committed whole, verified before use, written while training goes on.

A checkpoint is a folder ``update-00000060`` with one safetensors file a part (model, optimizer, averages, ...),
``state.json`` and ``manifest.json`` with each file's size and sha256. It is written under a temporary name and renamed;
an older one is retired only after that. The step pays for one copy to host memory; a thread does the rest.
"""

import json
import shutil
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.commit import atomic_folder, sha256_of, sweep_temporaries, write_json

PREFIX = "update-"


class CheckpointConfig(BaseModel, frozen=True, extra="forbid"):
    """When checkpoints are written and which ones stay."""

    every_updates: PositiveInt = 1_000  # updates from one checkpoint to the next
    keep_last: PositiveInt = 2  # newest ones that stay; a damaged newest one needs another behind it
    keep_every: NonNegativeInt = 0  # of every so many updates one stays for good; 0 keeps none of them


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not what its manifest says; the message names the file."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint as read: ``parts[name]`` are tensors on the CPU, ``state`` is JSON."""

    update: int
    parts: Mapping[str, dict[str, Tensor]]
    state: Mapping[str, Any]


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
        self._failure: BaseException | None = None
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(folder)

    def due(self, update: int) -> bool:
        """Return whether a checkpoint is to be written after this update."""
        return update % self.config.every_updates == 0

    def updates(self) -> list[int]:
        """Return the updates of all committed checkpoints, oldest first."""
        return sorted(int(path.name.removeprefix(PREFIX)) for path in self.folder.glob(f"{PREFIX}*") if path.is_dir())

    def newest_intact(self) -> int:
        """Return the update of the newest checkpoint that is what its manifest says; 0 when there is none.

        A damaged one is named on standard error, set aside under ``damaged-...``, and the one before it is taken.
        """
        for update in reversed(self.updates()):
            try:
                verify(self._path(update))
            except DamagedCheckpoint as error:
                print(f"warning: {error} The checkpoint before it is used.", file=sys.stderr, flush=True)
                if self.writes:
                    self._path(update).rename(self._unused_name(f"damaged-{self._path(update).name}"))
                continue
            return update
        return 0

    def read(self, update: int) -> Checkpoint:
        """Read a verified checkpoint."""
        path = self._path(update)
        parts = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        return Checkpoint(update=update, parts=parts, state=json.loads((path / "state.json").read_bytes()))

    def save(self, update: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Copy ``parts`` to host memory and commit them in the background. Call on every rank; only one writes.

        Raises:
            OSError: The save before this one failed.
        """
        if not self.writes:
            return
        self.wait()
        if self._path(update).exists():
            return
        copies = {name: {key: _host_copy(value) for key, value in tensors.items()} for name, tensors in parts.items()}
        self._writer = threading.Thread(
            target=self._commit, args=(update, copies, dict(state)), name="checkpoint writer", daemon=False
        )
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last save is durable.

        Raises:
            OSError: It failed; the checkpoints before it are untouched.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise OSError(
                f"A checkpoint could not be written to {self.folder}: {failure}. Those before it are intact: make room "
                "or mend the disk, then run the same command again."
            ) from failure

    def _commit(self, update: int, parts: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        try:
            with atomic_folder(self._path(update)) as folder:
                for name, tensors in parts.items():
                    save_file(tensors, folder / f"{name}.safetensors")
                write_json(folder / "state.json", state)
                files = sorted(path for path in folder.iterdir())
                listed = [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in files]
                write_json(folder / "manifest.json", {"update": update, "files": listed})
            self._retire()
        except BaseException as error:
            self._failure = error

    def _retire(self) -> None:
        for update in self.updates()[: -self.config.keep_last]:
            if self.config.keep_every and update % self.config.keep_every == 0:
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
            file = path / entry["name"]
            if file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
                raise DamagedCheckpoint(f"{file} is damaged: its size or sha256 is not what its manifest says.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DamagedCheckpoint):
            raise
        raise DamagedCheckpoint(f"{path} is damaged: {error!r}.") from error


def _host_copy(tensor: Tensor) -> Tensor:
    # safetensors wants contiguous tensors; channels_last comes back when the tensors are loaded into the network.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
