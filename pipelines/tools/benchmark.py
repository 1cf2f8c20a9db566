"""Speed of this machine: data, training, encoding and sampling, next to what others would use, and to the limit.

    python -m pipelines.tools.benchmark train encode sample data [--sizes demo,small] [--modes bf16] [--goals true]
    python -m pipelines.tools.benchmark all --output FILE [--minutes 8]

Reads nothing and downloads nothing: it makes its own shards and weights in a temporary folder. Each of our stages is
compared with the bare network in a plain loop and with diffusers' network of the same weights in its own loop, the data
plane with webdataset; all sides are checked to give the same before they are timed. Prints a table in Markdown, row by
row, of how many times as fast ours is: models by wall time on a GPU, else by processor seconds; in the JSON are both.
With ``--goals true`` the exit code is 1 when the interval of a figure reaches below its goal, or its control does not
hold 1.

Under ``accelerate launch`` (``--num_processes 2 -m pipelines.tools.benchmark train``) the trainings are compared with
the plain loop under DistributedDataParallel.

A row is a piece. ``--output`` keeps each, and the same command goes on with those that the file lacks. ``--minutes``
starts none that would take longer: the exit code is then 75. A piece that fails is named and costs the others nothing.
"""

import gc
import importlib.util
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from accelerate.state import AcceleratorState
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from data.files import write_atomically
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.logs import print_answer
from pipelines.runtime.config.outcome import EXIT_CODES
from pipelines.runtime.config.stage_config import CommandConfig
from pipelines.runtime.stage.launch import cores_per_process, launched_world_size
from pipelines.runtime.stage.provenance import hardware
from pipelines.tools.benchmarks import data, models
from pipelines.tools.benchmarks.paired_timing import CONTROL, PEAK, Clock, Comparison, Ratio
from pipelines.tools.benchmarks.stages import SIZES, Setup

SizeName = Literal["demo", "small", "sd"]
Subject = Literal["all", "train", "encode", "sample", "data"]
ModeName = Literal["float32", "tf32", "bf16", "float32-compiled", "tf32-compiled", "bf16-compiled"]
CONTROL_SLACK = 0.05  # how far from 1 the control's median may lie when its interval misses 1

# Arithmetic that each size is measured in on a GPU, slowest to begin with first; a CPU has float32.
MODES: tuple[ModeName, ...] = ("bf16-compiled", "bf16", "tf32", "float32")
MODES_OF = {"demo": MODES, "small": MODES, "sd": MODES[:2]}

# Columns of the table, and the sides of a comparison that they show: a comparison has at most one of each.
LIMIT, OTHERS = ("plain loop", "bare network"), ("diffusers", "theirs")
COLUMNS = {"limit": LIMIT, "others": OTHERS, models.EAGER: (models.EAGER,), PEAK: (PEAK,), "control": (CONTROL,)}
HEAD = ("what", "size, mode", "ours a second", *COLUMNS, "by", "goals")

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
    Goal("unet", "sd", "bf16-compiled", models.EAGER, "wall", 1.6),
    Goal("unet", "sd", "bf16-compiled", "diffusers", "wall", 1.05),
    Goal("unet", "sd", "bf16-compiled", PEAK, "wall", 0.31),
    Goal("encoding", "sd", "bf16", "diffusers", "wall", 8.0),
    Goal("encoding", "sd", "bf16", "bare network", "wall", 0.3),
    Goal("sampling", "sd", "bf16-compiled", models.EAGER, "wall", 1.9),
    Goal("sampling", "sd", "bf16-compiled", "diffusers", "wall", 1.25),
    Goal("latents", "", "", "theirs", "processor", 10.0),
    Goal("copying", "", "", "theirs", "processor", 0.4),
    Goal("jpegs", "", "", "theirs", "processor", 1.3),
    Goal("threads", "", "", "theirs", "wall", 0.9),
)


Piece = tuple[str, str, str]
"""A measure, a size and a mode; those of the data plane have neither size nor mode."""


class Figure(BaseModel, frozen=True):
    """A piece that was measured."""

    piece: Piece
    title: str
    seconds: float  # that it took
    processes: int = 1
    faster: Mapping[str, Mapping[Clock, Ratio]]  # as in the comparison
    per_second: Mapping[str, Mapping[Clock, float]]

    @property
    def goals(self) -> dict[Goal, bool]:
        """The goals of the piece, and whether each is reached."""
        mine = [goal for goal in GOALS if goal[:3] == self.piece]
        if self.processes > 1:  # which are compared with the plain loop alone
            mine = [goal for goal in mine if goal.against in self.faster]
        return {goal: reached(goal, self.faster) for goal in mine}


class Figures(BaseModel):
    """Figures of one machine."""

    about: str  # hardware, version of torch, rounds: what must be the same in all
    figures: list[Figure] = []


class BenchmarkConfig(CommandConfig):
    """Measurements to make."""

    positional = "subjects"

    subjects: Annotated[tuple[Subject, ...], Field(min_length=1)]  # what is measured; all of it in all sizes
    sizes: tuple[SizeName, ...] = ()  # of models: demo, small (20 M), sd; empty: demo, or with all those fast enough
    modes: tuple[ModeName, ...] = ()  # arithmetic of the networks; empty: float32 on a CPU, several on a GPU
    rounds: PositiveInt = 11  # rounds of each comparison
    threads: NonNegativeInt = 0  # CPU threads of the networks; 0 is all cores
    goals: bool = False  # say which goals are reached, by the exit code too
    output: str = ""  # JSON file of the figures; what it holds is not measured again; empty for none
    minutes: NonNegativeFloat = 0.0  # start nothing that would end later, by what was measured so far; 0 is no limit


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(BenchmarkConfig, measure_all, table="benchmark", about=__doc__, argv=argv)


def measure_all(config: BenchmarkConfig) -> Answer:
    """Measure piece by piece, and show and keep each at once.

    Raises:
        ConfigError: An output file of other figures, or no diffusers to compare with.
    """
    # What is known, and what is left.
    if set(config.subjects) != {"data"} and importlib.util.find_spec("diffusers") is None:
        raise ConfigError("benchmark: models are compared with diffusers; install it with `pip install -e '.[test]'`.")
    if launched_world_size() > 1 and (set(config.subjects) != {"train"} or config.minutes):
        raise ConfigError("benchmark: several processes can be compared at `train` alone, and without `minutes`.")
    with config_error_at("benchmark.output"):
        known = known_figures(config)
    left = [piece for piece in pieces_of(config) if piece not in {figure.piece for figure in known.figures}]
    logging.getLogger("latentline").setLevel(logging.ERROR)  # what the stages say of themselves
    print_answer("benchmark", f"| {' | '.join(HEAD)} |\n{'|---' * len(HEAD)}|")
    for figure in known.figures:
        print_answer("benchmark", as_row(figure, goals=config.goals))

    # Measure that.
    began, failed, limit = time.monotonic(), 0, 60 * config.minutes or math.inf
    while left:
        # As long as the longest of its size and mode, else of all so far.
        piece, seconds = left[0], {figure.piece: figure.seconds for figure in known.figures}
        alike = [value for other, value in seconds.items() if other[1:] == piece[1:]]
        if time.monotonic() - began + max(alike or seconds.values(), default=0.0) > limit:
            break
        left.pop(0)
        try:
            figure = measured(piece, config)
        except Exception as error:  # whatever it is, the other pieces are worth having
            logging.getLogger("latentline").error("%s failed", " ".join(piece), exc_info=error)
            failed += 1
            continue
        known.figures.append(figure)
        print_answer("benchmark", as_row(figure, goals=config.goals))
        if config.output and os.environ.get("RANK", "0") == "0":
            write_atomically(config.output, known.model_dump_json(indent=2).encode())

    # Judge where asked to.
    goals = [goal for figure in known.figures for goal in figure.goals.items()] if config.goals else []
    found = known.model_dump(mode="json") | {"goals": [goal._asdict() | {"reached": is_so} for goal, is_so in goals]}
    text = f"{len(left)} pieces are left; the same command goes on with them." if left else ""
    code = int(failed > 0 or not all(is_so for _, is_so in goals))
    return Answer(found, text, EXIT_CODES["stopped"] if left else code)


def known_figures(config: BenchmarkConfig) -> Figures:
    """Return the figures of the output file, or none yet.

    Raises:
        ValueError: They are of another machine or version of torch, or of another number of threads or rounds.
    """
    threads = f"{launched_world_size()} processes, {config.threads or cores_per_process()} threads"
    about = f"{hardware()}, {threads}, torch {torch.__version__}, {config.rounds} rounds"
    here = Figures(about=about)
    if not config.output:
        return here
    with open(config.output, "a+") as file:
        file.seek(0)
        known = Figures.model_validate_json(text) if (text := file.read()) else here
    if known.about != here.about:
        raise ValueError(f"{config.output} has figures of {known.about}, not of {here.about}: give another file")
    return known


def pieces_of(config: BenchmarkConfig) -> list[Piece]:
    """Return what is asked for; of all, what has a goal comes first, then what takes long."""
    whole, on_gpu, found = "all" in config.subjects, torch.cuda.is_available(), []
    fast = ("sd", "small", "demo") if on_gpu else ("small", "demo")
    for size in (*(config.sizes or (fast if whole else ("demo",))), ""):
        for mode in (config.modes or (MODES_OF[size] if on_gpu else ("float32",))) if size else ("",):
            for subject, measures in MEASURES.items():
                if (whole or subject in config.subjects) and (subject == "data") == (size == ""):
                    found += [(measure.__name__, size, mode) for measure in measures]
    return sorted(found, key=lambda piece: not any(goal[:3] == piece for goal in GOALS)) if whole else found


def measured(piece: Piece, config: BenchmarkConfig) -> Figure:
    """Measure a piece."""
    # Nothing of the piece before may be left: its arithmetic, which accelerate keeps, its graphs, its memory.
    began, (name, size, mode) = time.monotonic(), piece
    precision, _, compiled = mode.partition("-")
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.cuda.is_available() or compiled:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    # Networks have all cores; the data plane is compared by the processor seconds of one.
    threads = config.threads or cores_per_process() if size else 1
    torch.set_num_threads(threads)
    measure: Callable[[Setup], Comparison] = getattr(models if size else data, name)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Setup(
                folder=Path(folder),
                rounds=config.rounds,
                experiment=SIZES[size or "demo"],
                precision="bf16" if precision == "bf16" else "float32",
                tf32=precision in ("tf32", "bf16"),
                compiled=bool(compiled),
                threads=threads,
                # Enough for a second or more: an update of 20 M weights takes longer on a processor.
                updates=5 if size == "sd" else 2 if size == "small" and not torch.cuda.is_available() else 25,
            )
        )
    title = (measure.__doc__ or "").partition(".\n")[0].rstrip(".")
    return Figure(
        piece=piece, title=title, seconds=time.monotonic() - began, processes=launched_world_size(), **vars(found)
    )


def reached(goal: Goal, faster: Mapping[str, Mapping[Clock, Ratio]]) -> bool:
    """Return whether the whole interval is at or above the goal, and the control holds 1."""
    control = faster[CONTROL][goal.clock]
    steady = control.low <= 1 <= control.high or abs(control.median - 1) <= CONTROL_SLACK
    return steady and goal.against in faster and faster[goal.against][goal.clock].low >= goal.least


def as_row(figure: Figure, *, goals: bool) -> str:
    """Return a figure as a row of the table."""
    (_, size, mode), faster, clocks = figure.piece, figure.faster, [goal.clock for goal in figure.goals]
    clock: Clock = "wall" if size and torch.cuda.is_available() else (clocks or ["processor"])[0]
    answers, cells = [], [figure.title, f"{size} {mode}".strip(), f"{figure.per_second['ours'][clock]:,.4g}"]
    cells += [" ".join(str(faster[side][clock]) for side in sides if side in faster) for sides in COLUMNS.values()]
    for goal, is_reached in (figure.goals if goals else {}).items():
        answers.append(f"{'reached' if is_reached else 'MISSED'}: {goal.least:.3g} of {goal.against} ({goal.clock})")
    return f"| {' | '.join([*cells, clock, ', '.join(answers)])} |"


if __name__ == "__main__":
    sys.exit(main())
