"""Checks that this machine, or a whole job, can run an experiment, before it costs anything.

    python -m pipelines.tools.doctor --config pipelines/configs/demo.toml [--json]
    accelerate launch [launcher flags] -m pipelines.tools.doctor --config pipelines/configs/demo.toml

Reads: the experiment. Writes: nothing that stays. Under ``accelerate launch`` every rank checks its own machine, and
all together check the job: the same experiment, code and packages everywhere, one shared folder, the speed of an
all-reduce. Exit code 0: nothing stands in the way (warnings may). 2: the experiment is wrong. 1: something failed.
"""

import json
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import NonNegativeFloat

from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.experiment import experiment_path
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import from_main, gathered, start_accelerator, threads_per_process
from pipelines.tools.doctor_checks import (
    Findings,
    Level,
    attention,
    experiment,
    experiment_digests,
    file_operations,
    free_space,
    gpu_memory,
    limits,
    mlflow_store,
    shards,
    software,
    workers,
)
from pipelines.tools.plan import StageConfigs, stage_configs

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


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(
        DoctorConfig, lambda config: examine(config, experiment_path(argv)), table="doctor", about=__doc__, argv=argv
    )


def examine(config: DoctorConfig, path: str) -> Answer:
    """Look at this rank's machine and at what the ranks have in common. A collective."""
    stages = stage_configs(path, root=config.run.root)
    accelerator = start_accelerator(config.run)
    findings = list(own_findings(config, stages, accelerator))
    if accelerator.num_processes > 1:
        findings = of_all_ranks([*findings, *job_findings(config, stages, accelerator)], accelerator)
        dist.destroy_process_group()
    return answer(findings, world_size=accelerator.num_processes)


def own_findings(config: DoctorConfig, stages: StageConfigs, accelerator: Accelerator) -> Iterator[Finding]:
    """Look at this rank's machine."""
    root, rank = Path(config.run.root), accelerator.process_index
    checks: dict[str, Callable[[], Findings]] = {
        "software": lambda: software(accelerator.device),
        "attention": lambda: attention(accelerator.device),
        "limits": limits,
        "workers": lambda: workers(threads_per_process(config.run)),
        "file operations": lambda: file_operations(root),
    }
    if rank == 0:  # the folder is one for all, which is looked at as well
        checks |= {
            "experiment": lambda: experiment(stages),
            "free space": lambda: free_space(stages, root),
            "GPU memory": lambda: gpu_memory(stages, world_size=accelerator.num_processes),
            "MLflow": lambda: mlflow_store(config.run.tracking_uri, root, experiment=config.run.experiment),
            "shards": lambda: shards(stages, world_size=accelerator.num_processes),
        }
    for name, check in checks.items():
        try:
            for level, text in check():
                yield Finding(check=name, level=level, text=text, rank=rank)
        except Exception as error:
            yield Finding(check=name, level="failed", text=f"{type(error).__name__}: {error}", rank=rank)


def job_findings(config: DoctorConfig, stages: StageConfigs, accelerator: Accelerator) -> Iterator[Finding]:
    """Look at what the ranks must have in common. A collective."""
    rank = accelerator.process_index
    for name, digest in experiment_digests(stages).items():
        digests = gathered(torch.tensor(list(bytes.fromhex(digest)), device=accelerator.device), accelerator)
        if not digests[rank].equal(digests[0]):
            text = f"rank {rank} on {socket.gethostname()} has another {name} than rank 0"
            yield Finding(check=name, level="failed", text=text, rank=rank)
        elif rank == 0:
            yield Finding(check=name, level="ok", text=f"{digest[:12]} on rank 0")
    seen = shared_folder(Path(config.run.root), accelerator)
    text = f"rank {rank} {'sees' if seen else 'does not see'} a renamed file"
    yield Finding(check="shared folder", level="ok" if seen else "failed", text=text, rank=rank)
    speed = all_reduce_speed(accelerator)
    if rank == 0:
        slow = speed < config.min_gigabytes_per_s
        wanted = f", less than doctor.min_gigabytes_per_s = {config.min_gigabytes_per_s}" if slow else ""
        text = f"{speed:.2f} GB/s a rank over {accelerator.num_processes} ranks{wanted}"
        yield Finding(check="all-reduce", level="failed" if slow else "ok", text=text)


def shared_folder(root: Path, accelerator: Accelerator) -> bool:
    """Let rank 0 write and rename a file, and return whether this rank sees it whole. A collective."""
    mark = from_main(secrets.randbelow(1 << 62), accelerator)
    path = root / f".doctor-{mark}"
    if accelerator.is_main_process:
        root.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(str(mark))
        path.with_suffix(".tmp").rename(path)
    dist.barrier()
    try:
        return path.read_text() == str(mark)
    except OSError:
        return False
    finally:
        dist.barrier()
        if accelerator.is_main_process:
            path.unlink(missing_ok=True)


def all_reduce_speed(accelerator: Accelerator) -> float:
    """Return the bus bandwidth of an all-reduce of 64 MiB: GB a second that each rank sends. A collective."""
    numbers = torch.ones(REDUCE_BYTES // 4, device=accelerator.device)
    best = float("inf")
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        float(numbers[0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    ranks = accelerator.num_processes
    return 2 * (ranks - 1) / ranks * REDUCE_BYTES / best / 1e9


def of_all_ranks(mine: list[Finding], accelerator: Accelerator) -> list[Finding]:
    """Return all ranks' findings on every rank; sent as bytes of JSON, so nothing is unpickled. A collective."""
    payload = list(json.dumps([asdict(finding) for finding in mine]).encode())
    sizes = gathered(torch.tensor(len(payload), device=accelerator.device), accelerator).tolist()
    padded = torch.tensor(payload + [0] * (max(sizes) - len(payload)), device=accelerator.device)
    rows = gathered(padded, accelerator).tolist()
    texts = [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]
    return [Finding(**words) for text in texts for words in json.loads(text)]


def answer(findings: list[Finding], *, world_size: int) -> Answer:
    """Return what was found; as text every failure and warning, and what is well once."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warning", "failed")}
    lines = [
        f"{finding.level:>8}  {finding.check}, rank {finding.rank}: {finding.text}"
        for finding in findings
        if finding.level != "ok" or finding.rank == 0
    ]
    lines.append(f"doctor: {counts['failed']} failed, {counts['warning']} warnings on {world_size} rank(s)")
    found = {"world_size": world_size, **counts, "findings": [asdict(finding) for finding in findings]}
    return Answer(found, "\n".join(lines), code=1 if counts["failed"] else 0)


if __name__ == "__main__":
    sys.exit(main())
