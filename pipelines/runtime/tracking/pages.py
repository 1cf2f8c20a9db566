"""Pages of MLflow: the parameters and descriptions by which runs explain themselves, declared in ``pages.toml``.

A description is a pure function of what the store has of the run, so that a store that is filled again gets it again.
MLflow keeps tags that begin with ``mlflow.`` out of its tables: there lie the command and the picture of a description.
"""

import hashlib
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

NOTE = "mlflow.note.content"
NOTE_WRITTEN = "mlflow.latentline.note"  # digest of the description written last: one that a user changed is left alone
COMMAND = "mlflow.latentline.command"
PICTURE = "mlflow.latentline.picture"
MODEL_TRAINING = "workflowType=machine_learning"  # opens MLflow's pages for model training, not those for agents
SHORT_DIGEST = 12  # characters shown


@cache
def pages() -> dict[str, Any]:
    """Return the tables of ``pages.toml``."""
    return tomllib.loads(Path(__file__).with_name("pages.toml").read_text(encoding="utf-8"))


def page_of(stage: str) -> dict[str, Any]:
    """Return the page of a stage's runs; a bare one for a stage that has none."""
    found: dict[str, Any] = pages()["stages"].get(stage, {})
    return {"sentence": f"A run of {stage}.", "results": [], "pictures": [], **found}


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """A run as the store has it."""

    run_id: str
    experiment: str  # its id
    name: str
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    hours: float = 0.0  # from the first start to the end; 0 before that
    inputs: Mapping[str, str] = field(default_factory=dict)  # digest by name, PIPELINE/STAGE

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.tags.get("stage", "")

    @property
    def link(self) -> str:
        """Address of its page on any server."""
        return f"#/experiments/{self.experiment}/runs/{self.run_id}?{MODEL_TRAINING}"

    @property
    def result(self) -> str:
        """The result line: the stage's metrics with their errors."""
        found = [name for name in page_of(self.stage)["results"] if name in self.metrics]
        return " · ".join(_shown(name, self.metrics) for name in found)

    @property
    def device_hours(self) -> float:
        """Hours of all its processes, each of which has a device; pauses count."""
        return self.hours * int(self.tags.get("world_size", 1))

    @property
    def picture(self) -> str:
        """The picture of the description, as Markdown; empty without one."""
        path = self.tags.get(PICTURE)
        return f"![{self.name}](get-artifact?path={path}&run_uuid={self.run_id})" if path else ""


def shown_params(params: Iterable[str], *, at_default: Collection[str]) -> list[str]:
    """Return the parameters that pages show: headlines and what differs from its default; no place and no period."""
    return [
        key
        for key in params
        if (key in pages()["headlines"] or key not in at_default)
        and not key.startswith(("run.", "inputs."))
        and not key.endswith(("_every", "every_updates"))
    ]


def run_note(run: RunPage) -> str:
    """Return the description of a stage's run; Markdown."""
    state = "" if run.status == "FINISHED" else f" **{run.status.lower()}** ({run.tags.get('outcome', 'at work')})"
    contract = f" · contract {run.tags['contract']}" if "contract" in run.tags else ""
    given = " · ".join(f"{place} {digest}" for place, digest in run.inputs.items())
    cost = f" {_hours(run.device_hours)} device-hours." if run.hours else ""
    made = _filled(page_of(run.stage)["sentence"], run.params) + (f" From {given}." if given else "")
    lines = [made + cost + state]
    lines += [f"**{run.result}**{contract}"] if run.result else []
    lines += [run.picture] if run.picture else []
    if command := run.tags.get(COMMAND):
        repeat = f"python -m pipelines.{run.stage} --config config.toml --run.root runs/AGAIN"
        code = run.tags.get("code_version", "")[:SHORT_DIGEST]
        lines += [f"continue: `{command}`", f"repeat, with the artifact config.toml and code {code}: `{repeat}`"]
    return "\n\n".join(lines)


def pipeline_note(runs: Sequence[RunPage]) -> str:
    """Return the description of a pipeline's run: the table of its stages and the picture of the last that has one."""
    # MLflow's tables have no space between columns, and its pages show the first rows: the result comes first.
    rows = [
        f"| [{run.name}]({run.link}) | \u00a0{run.status.lower()}\u00a0 | {run.result} | {_hours(run.device_hours)} |"
        for run in reversed(runs)
    ]
    spent = _hours(sum(run.device_hours for run in runs))
    pictures = [run.picture for run in runs if run.picture]
    table = "\n".join([f"| stage | state | result | {spent} device-hours |", "|---|---|---|---|", *rows])
    return "\n\n".join([table, *pictures[-1:]])


def pipeline_status(runs: Sequence[RunPage]) -> str:
    """Return the state of a pipeline: the worst of its stages', each that of the best of the runs that shared it."""
    order = ("RUNNING", "FINISHED", "KILLED", "FAILED")
    states: dict[str, str] = {}
    for run in runs:
        stage = run.name.partition("/runs/")[0]
        states[stage] = min(states.get(stage, run.status), run.status, key=order.index)
    return "RUNNING" if "RUNNING" in states.values() else max(states.values(), key=order.index)


def changed_note(tags: Mapping[str, str], note: str) -> dict[str, str]:
    """Return the tags by which a run or an experiment with ``tags`` gets a description; none where a user wrote one."""
    before = tags.get(NOTE, "")
    ours = tags.get(NOTE_WRITTEN) == _digest(before) or not before
    return {NOTE: note, NOTE_WRITTEN: _digest(note)} if ours and note != before else {}


def _digest(note: str) -> str:
    return hashlib.sha256(note.encode()).hexdigest()[:SHORT_DIGEST]


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def _filled(sentence: str, params: Mapping[str, str]) -> str:
    for key, text in params.items():
        sentence = sentence.replace("{" + key + "}", text)
    return sentence


def _shown(name: str, metrics: Mapping[str, float]) -> str:
    value, error = metrics[name], metrics.get(f"{name}_error")
    label = name.partition("/")[2].removeprefix("best/").replace("_", " ").replace("/", " ")
    if error is not None:
        return f"{label} {value:.3g} ± {error:.2g}"
    return f"{label} {value:,.0f}" if value == round(value) else f"{label} {value:.4g}"
