"""Whether this machine, or a whole job, can run an experiment: checked before it costs anything.

    python -m pipelines.tools.doctor --config pipelines/configs/demo.toml [--json]
    accelerate launch [launcher flags] -m pipelines.tools.doctor --config pipelines/configs/demo.toml

Reads: the experiment. Writes: nothing that stays. Under ``accelerate launch`` every rank checks its own machine, and
all together check the job: the same experiment, code and packages everywhere, one shared folder, the speed of an
all-reduce. Exit code 0: nothing stands in the way (warnings may). 2: the experiment is wrong. 1: something failed.
"""

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import NonNegativeFloat

from pipelines.runtime.config.command_line import config_from_command_line, exit_on_config_error
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import launched_world_size, start_accelerator, threads_per_process
from pipelines.tools.doctor_checks import (
    attention,
    experiment_digests,
    file_operations,
    free_space,
    limits,
    mlflow_store,
    shards,
    software,
    workers,
)
from pipelines.tools.plan import experiment_path, stage_configs

Level = Literal["ok", "warning", "failed"]
REDUCE_BYTES = 64 * 2**20


class DoctorConfig(StageConfig):
    """What is asked of the job."""

    min_gigabytes_per_s: NonNegativeFloat = 0.0  # of an all-reduce, below which the job is refused; 0 only shows it


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at on one rank."""

    check: str
    level: Level
    text: str
    rank: int = 0


def main() -> None:
    argv = [word for word in sys.argv[1:] if word != "--json"]
    config = config_from_command_line(DoctorConfig, table="doctor", about=__doc__, argv=argv)
    with exit_on_config_error("doctor"):
        stages = stage_configs(experiment_path(argv), root=config.run.root)
        accelerator = start_accelerator(config.run)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    mine = list(own_findings(config, stages, device=accelerator.device, rank=rank))
    if world_size > 1:
        mine += job_findings(config, stages, device=accelerator.device, rank=rank, world_size=world_size)
    everyone = gathered(mine, rank=rank, world_size=world_size, device=accelerator.device)
    failed = any(finding.level == "failed" for finding in everyone)
    if rank == 0:
        show(everyone, world_size=world_size, as_json="--json" in sys.argv)
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(1 if failed else 0)


def own_findings(
    config: DoctorConfig, stages: dict[str, StageConfig], *, device: torch.device, rank: int
) -> Iterator[Finding]:
    """Look at this rank's machine."""
    root = Path(config.run.root)
    world_size = launched_world_size()
    checks: dict[str, Callable[[], Iterator[tuple[Level, str]]]] = {
        "software": lambda: software(device),
        "attention": lambda: attention(device),
        "limits": limits,
        "workers": lambda: workers(threads_per_process(config.run)),
        "file operations": lambda: file_operations(root),
    }
    if rank == 0:  # the folder is one for all, which is looked at as well
        checks |= {
            "free space": lambda: free_space(stages, root),
            "MLflow": lambda: mlflow_store(config.run.tracking_uri, root, experiment=config.run.experiment),
            "shards": lambda: shards(stages, world_size=world_size),
        }
    for name, check in checks.items():
        try:
            for level, text in check():
                yield Finding(check=name, level=level, text=text, rank=rank)
        except Exception as error:
            yield Finding(check=name, level="failed", text=f"{type(error).__name__}: {error}", rank=rank)


def job_findings(
    config: DoctorConfig, stages: dict[str, StageConfig], *, device: torch.device, rank: int, world_size: int
) -> list[Finding]:
    """Look at what the ranks must have in common. A collective."""
    found: list[Finding] = []

    def tell(check: str, level: Level, text: str) -> None:
        found.append(Finding(check=check, level=level, text=text, rank=rank))

    for name, digest in experiment_digests(stages).items():
        mine = torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8).long().to(device)
        first = mine.clone()
        dist.broadcast(first, src=0)
        if not mine.equal(first):
            tell(name, "failed", f"rank {rank} on {socket.gethostname()} has another {name} than rank 0")
        elif rank == 0:
            tell(name, "ok", f"{digest[:12]} on rank 0")
    seen = shared_folder(Path(config.run.root), rank=rank, device=device)
    tell(
        "shared folder", "ok" if seen else "failed", f"rank {rank} {'sees' if seen else 'does not see'} a renamed file"
    )
    speed = all_reduce_speed(device, world_size=world_size)
    if rank == 0:
        slow = speed < config.min_gigabytes_per_s
        wanted = f", less than doctor.min_gigabytes_per_s = {config.min_gigabytes_per_s}" if slow else ""
        tell("all-reduce", "failed" if slow else "ok", f"{speed:.2f} GB/s a rank over {world_size} ranks{wanted}")
    return found


def shared_folder(root: Path, *, rank: int, device: torch.device) -> bool:
    """Let rank 0 write and rename a file, and return whether this rank sees it whole. A collective."""
    mark = torch.randint(1 << 62, (1,)).to(device)
    dist.broadcast(mark, src=0)
    path = root / f".doctor-{int(mark)}"
    if rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(str(int(mark)))
        path.with_suffix(".tmp").rename(path)
    dist.barrier()
    try:
        return path.read_text() == str(int(mark))
    except OSError:
        return False
    finally:
        dist.barrier()
        if rank == 0:
            path.unlink(missing_ok=True)


def all_reduce_speed(device: torch.device, *, world_size: int) -> float:
    """Return the bus bandwidth of an all-reduce of 64 MiB: GB a second that each rank sends. A collective."""
    numbers = torch.ones(REDUCE_BYTES // 4, device=device)
    best = float("inf")
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        float(numbers[0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * (world_size - 1) / world_size * REDUCE_BYTES / best / 1e9


def gathered(mine: list[Finding], *, rank: int, world_size: int, device: torch.device) -> list[Finding]:
    """Return all ranks' findings on every rank; sent as bytes of JSON, so nothing is unpickled. A collective."""
    if world_size == 1:
        return mine
    payload = json.dumps([asdict(finding) for finding in mine]).encode()
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
    sizes[rank] = len(payload)
    dist.all_reduce(sizes)
    table = torch.zeros(world_size, int(sizes.max()), dtype=torch.int32, device=device)
    table[rank, : len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(table)
    dist.all_reduce(table)
    texts = [bytes(row[:size].cpu().to(torch.uint8).tolist()) for row, size in zip(table, sizes.tolist(), strict=True)]
    return [Finding(**words) for text in texts for words in json.loads(text)]


def show(findings: list[Finding], *, world_size: int, as_json: bool) -> None:
    """Print what was found: every failure and warning, and what is well once."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warning", "failed")}
    if as_json:
        print(json.dumps({"world_size": world_size, **counts, "findings": [asdict(f) for f in findings]}, indent=2))
        return
    for finding in findings:
        if finding.level != "ok" or finding.rank == 0:
            print(f"{finding.level:>8}  {finding.check}, rank {finding.rank}: {finding.text}")
    print(f"doctor: {counts['failed']} failed, {counts['warning']} warnings on {world_size} rank(s)")


if __name__ == "__main__":
    main()
