"""Measure this machine: how fast the data plane is, next to what others would use.

    python -m pipelines.tools.benchmark data [--rounds 11] [--output FILE]

Reads nothing and downloads nothing: it makes its own shards in a temporary folder. Every pair is checked to read the
same samples before it is timed. The exit code is 1 when a figure misses its goal or its control does not hold 1.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt

from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.logs import print_line
from pipelines.runtime.config.stage_config import CommandConfig
from pipelines.runtime.stage.provenance import hardware
from pipelines.tools import benchmark_data
from pipelines.tools.paired_timing import Comparison

CONTROL_SLACK = 0.05  # how far from 1 the control's median may lie when its interval misses 1


@dataclass(frozen=True)
class Goal:
    """A comparison and the least it must reach."""

    title: str
    measure: Callable[[Path, int], Comparison]
    least: float
    unit: str


GOALS = {
    "data": (
        Goal("latents of 16 KB, shuffled, against webdataset", benchmark_data.latents, 10.0, "samples/CPU-s"),
        Goal("latents of 64 KB, shuffled, against a plain copy", benchmark_data.copying, 0.4, "GB/CPU-s"),
        Goal("JPEG 512 to 256, against webdataset + Pillow", benchmark_data.jpegs, 1.3, "images/CPU-s"),
        Goal("JPEG 512 to 256 in two threads, against two processes", benchmark_data.threads, 0.9, "images/s"),
        Goal("encoding to shards, against the bare network", benchmark_data.encoding, 0.85, "images/s"),
    ),
}


class BenchmarkConfig(CommandConfig):
    """Measurements to make."""

    positional = "subjects"

    subjects: Annotated[tuple[Literal["data"], ...], Field(min_length=1)]  # what is measured
    rounds: PositiveInt = 11  # rounds of each pair
    output: str = ""  # file that takes the figures as JSON, too; empty for none


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(BenchmarkConfig, measure, table="benchmark", about=__doc__, argv=argv)


def measure(config: BenchmarkConfig) -> Answer:
    """Time every pair and show it at once."""
    with config_error_at("benchmark.output"):
        if config.output:
            with open(config.output, "a"):
                pass
    torch.set_num_threads(1)  # CPU seconds of one core are compared
    rows = []
    for goal in (goal for subject in config.subjects for goal in GOALS[subject]):
        with tempfile.TemporaryDirectory() as folder:
            found = goal.measure(Path(folder), config.rounds)
        steady = found.control.low <= 1 <= found.control.high or abs(found.control.median - 1) <= CONTROL_SLACK
        reached = steady and found.faster.median >= goal.least
        rows.append({"title": goal.title, "least": goal.least, "unit": goal.unit, "reached": reached} | asdict(found))
        print_line(
            f"{'reached' if reached else 'MISSED ' if steady else 'unsteady'}  {goal.title}: {found.faster} times "
            f"(goal {goal.least:g}), control {found.control}; "
            f"{found.ours_per_second:,.4g} and {found.theirs_per_second:,.4g} {goal.unit}"
        )
    figures = {"hardware": hardware(), "rounds": config.rounds, "figures": rows}
    if config.output:
        Path(config.output).write_text(json.dumps(figures, indent=2))
    return Answer(figures, code=int(not all(row["reached"] for row in rows)))


if __name__ == "__main__":
    sys.exit(main())
