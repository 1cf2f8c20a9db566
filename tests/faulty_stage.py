"""A real training stage in which numbers go bad: ``python -m faulty_stage PLAN.json STAGE --config ...``.

The plan is ``{"faults": {BATCH: [KIND, RANK]}, "leave_out": [BATCH, ...], "records": FOLDER}``; kinds are data, loss,
gradient, second (the discriminator's loss) and weights. After every update each rank looks whether anything of a bad
one is in what a checkpoint holds, and writes down in ``records/rank-R.jsonl`` which updates it took for bad.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.prefetch import Loaded, Prefetch
from pipelines import train_unet, train_vae
from pipelines.runtime.training.anomalies import CheckedUpdate
from pipelines.runtime.training.loop import Training
from pipelines.runtime.training.replica_check import fingerprint

JUDGING = ("anomalies", "loss_scale")  # parts of a checkpoint that a refused update may change


class FaultyTraining(Training):
    """A training with faults by a plan, on the stage's own networks and data."""

    plan: dict[str, Any]
    poisoned: set[int]
    healthy: dict[str, Tensor]

    def fault(self, kind: str) -> bool:
        """Return whether such a fault strikes this rank in the present batch."""
        planned, rank = self.plan["faults"].get(str(self.next_batch - 1), ("", 0))
        return planned == kind and rank == self.stage.accelerator.process_index

    def updates(self, batches: Callable[[int], Prefetch[Any]]) -> Iterator[Any]:  # type: ignore[override]
        self.poisoned, self.healthy = set(), {}

        def thinned(start: int) -> Iterator[Loaded[Any]]:
            with batches(start) as stream:
                yield from (loaded for loaded in stream if loaded.index not in self.plan["leave_out"])

        for batch in super().updates(thinned):
            if self.fault("data"):
                next(field for field in vars(batch).values() if isinstance(field, Tensor))[0, 0] = math.nan
            if self.fault("weights") and self.next_batch not in self.poisoned:
                self.poisoned.add(self.next_batch)
                with torch.no_grad():
                    network = next(iter(self.parts.values())).network  # type: ignore[attr-defined]
                    next(network.parameters())[0] = math.inf
            yield batch

    def backward(self, loss: Tensor, **more: Any) -> None:
        if self.fault("gradient"):
            loss.register_hook(lambda gradient: gradient * math.nan)
        super().backward(loss * (math.nan if self.fault("loss") else 1.0), **more)

    def log(self, metrics: Any) -> None:
        if self.fault("loss"):
            metrics = {name: value * math.nan for name, value in metrics.items()}
        super().log(metrics)

    def _close_update(self) -> CheckedUpdate | None:
        held = {
            f"{part}, {name}": tensor
            for part, holder in self.parts.items()
            if part not in JUDGING
            for name, tensor in holder.tensors().items()
        }
        prints = {name: fingerprint(tensor) for name, tensor in held.items()}
        refused = bool(self._anomalies.refused)
        if not self.fault("weights"):
            assert all(torch.isfinite(tensor).all() for tensor in held.values()), "something bad was taken up"
            assert not refused or all(prints[name].equal(before) for name, before in self.healthy.items())
        if not refused:
            self.healthy = prints
        return super()._close_update()

    def _recover_from(self, bad: CheckedUpdate) -> None:
        with open(Path(self.plan["records"]) / f"rank-{self.stage.accelerator.process_index}.jsonl", "a") as file:
            file.write(json.dumps([bad.update, bad.batch]) + "\n")
        self.healthy = {}  # it may go back to a checkpoint
        super()._recover_from(bad)


class FaultyPlayers(FaultyTraining):
    """The VAE's, whose discriminator can go bad alone."""

    def __init__(self, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        hinge = train_vae.discriminator_loss

        def faulty_hinge(*given: Any) -> tuple[Tensor, Tensor]:
            loss, gap = hinge(*given)
            return loss * (math.inf if self.fault("second") else 1.0), gap

        train_vae.discriminator_loss = faulty_hinge


def main() -> None:
    FaultyTraining.plan = json.loads(Path(sys.argv[1]).read_bytes())
    stage = {"train_unet": train_unet, "train_vae": train_vae}[sys.argv[2]]
    stage.Training = FaultyPlayers if stage is train_vae else FaultyTraining  # type: ignore[attr-defined]
    sys.argv[1:] = sys.argv[3:]
    stage.main()


if __name__ == "__main__":
    main()
