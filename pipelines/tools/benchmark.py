"""Speed of this machine: data, training, encoding and sampling, next to what others would use, and to the limit.

    python -m pipelines.tools.benchmark train encode sample data [--sizes demo,small] [--modes bf16] [--goals true]

Reads nothing and downloads nothing: it makes its own shards and weights in a temporary folder. Each of our stages is
compared with the bare network in a plain loop and with diffusers' network of the same weights in its own loop, the data
plane with webdataset; all sides are checked to give the same before they are timed. Prints how many times as fast ours
is, by processor seconds and by wall time. With ``--goals true`` the exit code is 1 when the interval of a figure
reaches below its goal, or its control does not hold 1.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.logs import print_line
from pipelines.runtime.config.stage_config import CommandConfig
from pipelines.runtime.stage.launch import cores_per_process
from pipelines.runtime.stage.provenance import hardware
from pipelines.tools.benchmarks import data, models
from pipelines.tools.benchmarks.paired_timing import CONTROL, Clock, Comparison
from pipelines.tools.benchmarks.stages import SIZES, Setup

SizeName = Literal["demo", "small", "sd"]
Subject = Literal["train", "encode", "sample", "data"]
ModeName = Literal["float32", "tf32", "bf16", "float32-compiled", "tf32-compiled", "bf16-compiled"]
ON_GPU: tuple[ModeName, ...] = ("float32", "tf32", "bf16", "float32-compiled", "tf32-compiled", "bf16-compiled")
CONTROL_SLACK = 0.05  # how far from 1 the control's median may lie when its interval misses 1

MEASURES: dict[Subject, tuple[Callable[[Setup], Comparison], ...]] = {
    "train": (models.unet, models.vae),
    "encode": (models.encoding,),
    "sample": (models.sampling,),
    "data": (data.latents, data.copying, data.jpegs, data.threads),
}


class Goal(NamedTuple):
    """The least that the interval of a figure must hold."""

    measure: str
    size: str
    mode: str
    against: str
    clock: Clock
    least: float


GOALS = (
    *(Goal(name, "demo", "float32", "plain loop", "processor", 1 / 1.05) for name in ("unet", "vae")),
    *(Goal(name, "demo", "float32", "plain loop", "wall", 1 / 1.08) for name in ("unet", "vae")),
    *(Goal(name, "small", "float32", "plain loop", "processor", 1 / 1.03) for name in ("unet", "vae")),
    *(Goal(name, "small", "float32", "plain loop", "wall", 1 / 1.03) for name in ("unet", "vae")),
    *(Goal("unet", size, "float32", "diffusers", "processor", 1 / 0.75) for size in ("demo", "small")),
    *(Goal("vae", size, "float32", "diffusers", "processor", 1 / 0.8) for size in ("demo", "small")),
    *(Goal("encoding", size, "float32", "bare network", "wall", 0.9) for size in ("demo", "small")),
    *(Goal("sampling", size, "float32", "bare network", "processor", 1 / 1.03) for size in ("demo", "small")),
    Goal("unet", "sd", "bf16", "diffusers", "wall", 1.6),
    Goal("unet", "sd", "bf16-compiled", "diffusers", "wall", 1.05),
    Goal("encoding", "sd", "bf16", "diffusers", "wall", 8.0),
    Goal("sampling", "sd", "bf16", "diffusers", "wall", 1.9),
    Goal("sampling", "sd", "bf16-compiled", "diffusers", "wall", 1.25),
    Goal("latents", "", "", "theirs", "processor", 10.0),
    Goal("copying", "", "", "theirs", "processor", 0.4),
    Goal("jpegs", "", "", "theirs", "processor", 1.3),
    Goal("threads", "", "", "theirs", "wall", 0.9),
)


class BenchmarkConfig(CommandConfig):
    """Measurements to make."""

    positional = "subjects"

    subjects: Annotated[tuple[Subject, ...], Field(min_length=1)]  # what is measured
    sizes: Annotated[tuple[SizeName, ...], Field(min_length=1)] = ("demo",)  # of the models: demo, small (20 M) or sd
    modes: tuple[ModeName, ...] = ()  # arithmetic of the networks; empty: float32 on a CPU, all on a GPU
    rounds: PositiveInt = 11  # rounds of each comparison
    threads: NonNegativeInt = 0  # CPU threads of the networks; 0 is all cores
    goals: bool = False  # say which goals are reached, by the exit code too
    output: str = ""  # file that takes the figures as JSON, too; empty for none


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(BenchmarkConfig, measure_all, table="benchmark", about=__doc__, argv=argv)


def measure_all(config: BenchmarkConfig) -> Answer:
    """Time every comparison and show it at once."""
    with config_error_at("benchmark.output"):
        if config.output:
            with open(config.output, "a"):
                pass
    logging.getLogger("latentline").setLevel(logging.ERROR)  # what the stages say of themselves
    modes = config.modes or (ON_GPU if torch.cuda.is_available() else ON_GPU[:1])
    cases = [
        (subject, measure, size, mode)
        for subject in config.subjects
        for size, mode in (
            [(size, mode) for size in config.sizes for mode in modes] if subject != "data" else [("", "")]
        )
        for measure in MEASURES[subject]
    ]
    rows = []
    for subject, measure, size, mode in cases:
        # Networks have all cores; the data plane is compared by the processor seconds of one.
        threads = config.threads or cores_per_process() if size else 1
        torch.set_num_threads(threads)
        kind, _, compiled = mode.partition("-")
        with tempfile.TemporaryDirectory() as folder, config_error_at("benchmark"):
            found = measure(
                Setup(
                    folder=Path(folder),
                    rounds=config.rounds,
                    experiment=SIZES[size or "demo"],
                    precision="bf16" if kind == "bf16" else "float32",
                    tf32=kind in ("tf32", "bf16"),
                    compiled=bool(compiled),
                    threads=threads,
                )
            )
        title = (measure.__doc__ or "").partition(".\n")[0].rstrip(".")
        row: dict[str, Any] = {"subject": subject, "title": title, "size": size, "mode": mode, **asdict(found)}
        goals = [goal for goal in GOALS if goal[:3] == (measure.__name__, size, mode)] if config.goals else []
        row["goals"] = [goal._asdict() | {"reached": reached(goal, found)} for goal in goals]
        print_line(as_text(row, found))
        rows.append(row)
    figures = {"hardware": hardware(), "rounds": config.rounds, "figures": rows}
    if config.output:
        Path(config.output).write_text(json.dumps(figures, indent=2))
    return Answer(figures, code=int(not all(goal["reached"] for row in rows for goal in row["goals"])))


def reached(goal: Goal, found: Comparison) -> bool:
    """Return whether the whole interval is at or above the goal, and the control holds 1."""
    control = found.faster[CONTROL][goal.clock]
    steady = control.low <= 1 <= control.high or abs(control.median - 1) <= CONTROL_SLACK
    return steady and found.faster[goal.against][goal.clock].low >= goal.least


def as_text(row: dict[str, Any], found: Comparison) -> str:
    """Return a figure for people."""
    lines = [f"{row['title']} {row['size']} {row['mode']}".rstrip()]
    for name, rates in found.per_second.items():
        ratios = found.faster.get(name, {})
        shown = (
            f"{rate:,.4g}/{clock} s" + (f" (ours {ratios[clock]} times)" if ratios else "")
            for clock, rate in rates.items()
        )
        lines.append(f"    {name:<12} {', '.join(shown)}")
    for goal in row["goals"]:
        answer = "reached" if goal["reached"] else "MISSED"
        lines.append(f"    {answer}: {goal['least']:.3g} times {goal['against']} by {goal['clock']} seconds")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
