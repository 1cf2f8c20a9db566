"""A training so small that faults can be tried on it by the dozen: two networks, real runtime, no images.

As a module for one process; as a program (``python tests/tiny_training.py FOLDER RECIPE...``) one rank of several,
which trains once per recipe and writes ``RECIPE NUMBER-rank-R.json``.
"""

import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.files import FolderLock
from data.manifest import Parents
from data.prefetch import Loaded
from data.randomness import SampleDraws
from pipelines.runtime.config.logs import set_up_logging
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.launch import StopSignal, start_accelerator
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.tracking.tracker import SilentTracker
from pipelines.runtime.training.config import BatchShare, TrainingConfig
from pipelines.runtime.training.ema import Averages
from pipelines.runtime.training.loop import Training
from pipelines.runtime.training.replica_check import ReplicaError
from pipelines.runtime.training.trainable import Trainable

BASE: dict[str, Any] = {
    "updates": 40,
    "global_batch": 8,
    "images_per_device": 2,
    "log_every": 7,
    "validate_every": 10,
    "checkpoint": {"every_updates": 10},
    "optim": {"peak_lr": 1e-2, "warmup_updates": 0},
    "averages": [{"kind": "exponential", "decay": 0.9}],
}


class Rows(SilentTracker):
    """Keeps the rows in memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log_records(self, rows: Any) -> None:
        self.rows += [dict(row) for row in rows]


@dataclass(kw_only=True)
class Recipe:
    """What goes wrong, by batch: one of data, loss, gradient, second, weights, spike; each once unless ``lasting``."""

    faults: Mapping[int, str] = field(default_factory=dict)
    on_rank: int = 0  # where it goes wrong
    leave_out: tuple[int, ...] = ()  # batches that the stream does not have
    flip_after: int = 0  # one bit of one weight of on_rank flips after this update
    same_samples: bool = False  # every rank reads the first share
    dropout: float = 0.1  # makes gradients differ even then
    silent_term: bool = False  # a loss term that is detached on on_rank
    still_average: bool = False  # averages are not updated
    hang_in: int = 0  # on_rank sleeps in this update
    natively: bool = False  # in native code, with the interpreter's lock
    slow_seconds: float = 0.0  # on_rank takes so much longer for each update
    raise_after: int = 0  # end with an error of the stage's own after this update
    config: Mapping[str, Any] = field(default_factory=dict)


class Tiny:
    """One training by a recipe."""

    def __init__(
        self, folder: Path, recipe: Recipe, *, accelerator: Any = None, tracker: SilentTracker | None = None
    ) -> None:
        self.recipe = recipe
        self.accelerator = accelerator or start_accelerator(RunConfig(threads=1))
        config = TrainingConfig.model_validate_json(json.dumps({**BASE, **recipe.config}))
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        folder.mkdir(parents=True, exist_ok=True)
        self.tracker = Rows()
        self.stage = Stage(
            name="tiny",
            folder=folder,
            config=config,
            parents=Parents(),
            accelerator=self.accelerator,
            tracker=tracker or self.tracker,
            stop=StopSignal(folder, self.accelerator),
            lock=FolderLock(folder),
        )
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(recipe.dropout), nn.Linear(8, 4))
        self.second = nn.Linear(4, 1)
        trained = [Trainable(net, config, self.accelerator) for net in (self.first, self.second)]
        self.optimizers, self.wrapped = [each.optimizer for each in trained], [each.wrapped for each in trained]
        self.averages = Averages(self.first, config.averages)
        self.share = BatchShare.of(config, table="tiny", rank=rank, world_size=world_size)
        self.parts = {
            **trained[0].parts("first"),
            **trained[1].parts("second"),
            "first_averages": self.averages,
        }
        self.training = Training(
            self.stage, config, share=self.share, keys=self.keys, parts=self.parts, flops_per_image=1.0
        )
        self.spent: set[int] = set()
        self.after_update: Callable[[int], None] = lambda update: None

    def keys(self, batch: int, positions: range) -> list[str]:
        return [f"sample-{batch}-{position}" for position in positions]

    def stream(self, start: int) -> Iterator[Loaded[Tensor]]:
        positions = range(len(self.share.positions)) if self.recipe.same_samples else self.share.positions
        index = start
        while True:
            if index not in self.recipe.leave_out:
                x = SampleDraws(0, index, positions).normals("x", (4,))
                yield Loaded(index, torch.from_numpy(x), 0.0)
            index += 1

    def fault(self, kind: str) -> bool:
        batch = self.training.next_batch - 1
        here = self.accelerator.process_index == self.recipe.on_rank
        if not here or self.recipe.faults.get(batch) != kind or (kind == "weights" and batch in self.spent):
            return False
        self.spent.add(batch)
        return True

    def run(self) -> "Tiny":
        self.training.resume()
        self.training.rehearse(self.one_update, lambda index: next(self.stream(index)).batch)
        for x in self.training.updates(self.stream):
            self.one_update(x)
            if not self.recipe.still_average:
                self.averages.update(self.first, update=self.training.update, refused=self.training.refused)
            if self.training.validation_is_due():
                self.training.report({"val/loss": (self.training.update - 20.0) ** 2})
            self.disturb()
        return self

    def disturb(self) -> None:
        self.after_update(self.training.update)
        recipe, here = self.recipe, self.accelerator.process_index == self.recipe.on_rank
        if here and recipe.flip_after == self.training.update:
            with torch.no_grad():
                self.first[0].weight.view(torch.int32)[3, 2] ^= 1
        if recipe.raise_after == self.training.update:
            raise InterruptedError("the stage's own")

    def one_update(self, x: Tensor) -> None:
        training, seen = self.training, []
        x = x.to(self.accelerator.device)
        if self.fault("data"):
            x[0, 0] = math.nan
        if self.fault("weights"):
            with torch.no_grad():
                self.first[0].weight[0, 0] = math.inf
        if self.recipe.on_rank == self.accelerator.process_index:
            time.sleep(self.recipe.slow_seconds)
            if training.update == self.recipe.hang_in:
                (ctypes.PyDLL(None).sleep if self.recipe.natively else time.sleep)(600)
        for part in training.micro_batches(self.wrapped[0]):
            out = self.wrapped[0](x[part])
            if self.fault("gradient"):
                out.register_hook(lambda gradient: gradient * math.nan)
            loss = (out - x[part]).square().mean()
            silent = self.recipe.silent_term and self.recipe.on_rank == self.accelerator.process_index
            terms = {"square": loss, "size": out.abs().mean().detach() if silent else out.abs().mean()}
            loss = loss + 0.1 * terms["size"]
            loss = loss * (math.nan if self.fault("loss") else 1e4 if self.fault("spike") else 1.0)
            training.backward(loss, terms=terms)
            training.log({"train/loss": loss})
            seen.append((x[part], out.detach()))
        for _, (real, fake) in zip(training.micro_batches(self.wrapped[1]), seen, strict=True):
            gap = (1 - self.wrapped[1](real)).relu().mean() + (1 + self.wrapped[1](fake)).relu().mean()
            gap = gap * (math.inf if self.fault("second") else 1.0)
            training.backward(gap)
            training.log({"train/second_loss": gap})
        training.step({"train/grad_norm": self.optimizers[0], "train/second_grad_norm": self.optimizers[1]})

    def tensors(self) -> dict[str, Tensor]:
        """All that a training is, as copies."""
        return {f"{part}/{k}": v.clone() for part, held in self.parts.items() for k, v in held.tensors().items()}


def main() -> None:
    folder = Path(sys.argv[1])
    set_up_logging("tiny")
    accelerator = start_accelerator(RunConfig(threads=1))
    rank = accelerator.process_index
    for number, text in enumerate(sys.argv[2:]):
        words = json.loads(text)
        words["faults"] = {int(batch): kind for batch, kind in words.get("faults", {}).items()}
        tiny, ended = Tiny(folder / str(number), Recipe(**words), accelerator=accelerator), "done"
        try:
            tiny.run()
        except (ReplicaError, FloatingPointError, InterruptedError) as error:
            ended = f"{type(error).__name__}: {error}"
        total = sum(float(tensor.double().sum()) for tensor in tiny.tensors().values())
        moments = sum(tensor.nbytes for optimizer in tiny.optimizers for tensor in optimizer.tensors().values())
        found = {"ended": ended, "update": tiny.training.update, "sum": total, "moments": moments}
        found["rows"] = tiny.tracker.rows
        (folder / f"{number}-rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
