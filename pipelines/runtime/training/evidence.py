"""What is written down about an update that does not count: which samples, on which rank, with which metrics."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import write_json
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.training.anomalies import CheckedUpdate


def write_evidence(
    bad: CheckedUpdate, stage: Stage, *, attempt: int, global_batch: int, keys: Callable[[int, range], list[str]]
) -> tuple[Path, str]:
    """Write ``bad_updates/update-U-batch-B.json`` and return its path and what was wrong. A collective.

    Args:
        bad: The update.
        stage: The running stage.
        attempt: Counts rewinds, from 1.
        global_batch: Samples an update, an equal share of them for each rank.
        keys: Names the samples at given positions of a batch.
    """
    world_size, rank = stage.accelerator.num_processes, stage.accelerator.process_index
    metrics = {name: float(value) for name, value in bad.metrics.items()}
    # Norms are of gradients that have met those of the other ranks: they accuse nobody.
    own = [value for name, value in metrics.items() if not name.endswith("grad_norm")]
    norms = [value for name, value in metrics.items() if name.endswith("grad_norm")]
    table = torch.zeros(world_size, 2, device=stage.accelerator.device)
    table[rank] = torch.tensor([metrics["train/loss"], float(not all(map(math.isfinite, own)))])
    if world_size > 1:
        dist.all_reduce(table)
    losses, guilty = table.T.tolist()
    ranks = [number for number in range(world_size) if guilty[number]]
    if ranks:
        what = f"its loss is not finite on rank {', '.join(map(str, ranks))}"
    elif not all(map(math.isfinite, norms)):
        what = "its gradient is not finite"
    else:
        what = f"its loss has jumped to {sum(losses) / world_size:.4g}"
    path = stage.folder / "bad_updates" / f"update-{bad.update:08}-batch-{bad.batch:08}.json"
    if stage.is_main:
        path.parent.mkdir(exist_ok=True)
        share = global_batch // world_size
        found = {
            "update": bad.update,
            "batch": bad.batch,
            "attempt": attempt,
            "what": what,
            "ranks": ranks,
            "loss_by_rank": [_json_number(value) for value in losses],
            "figures_of_rank_0": {name: _json_number(value) for name, value in metrics.items()},
            "keys_by_rank": [keys(bad.batch, range(n * share, (n + 1) * share)) for n in range(world_size)],
        }
        write_json(path, found)
    return path, what


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
