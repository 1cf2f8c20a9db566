"""Judge runs against each other, and lay them side by side: what came out, of what, and in which settings they differ.

    latentline compare runs/demo runs/wide                 is wide better than demo? then every stage that both have
    latentline compare runs/demo                           its metrics, with the luck of sampling and of its seeds
    latentline compare runs/*/unet                         one stage of many pipelines
    latentline compare runs/demo/unet mlflow:8f0c2d         with a run that only an MLflow store has

The first run is the baseline that each other is judged against, at the guidance that is best for each by its Frechet
distance. Replicates of a run (``launch/replicate.sh``) are found beside it, and then the intervals hold the luck of the
seed, too; see ``pipelines.evaluation.verdict``. Metrics that two contracts make incomparable are named and not judged.
Reads the stages' folders alone, so that it works without a server; ``mlflow:ID`` asks the store of MLFLOW_TRACKING_URI.
Equal stages are one line. Of the others those facts and settings are shown that differ and that change a result: no
paths, names or cadences; metrics are the last values logged.
"""

import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data.files import read_json
from data.manifest import read_manifest
from pipelines.evaluation.contract import contract_digest, drawn_differently, not_comparable
from pipelines.evaluation.replicates import Side, read_side
from pipelines.evaluation.verdict import CHOOSING, JUDGED, LEVEL, MOST_SEEDS, Difference, Luck, difference
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.dotted_keys import flattened_texts
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.renamed_keys import with_new_names
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, CommandConfig
from pipelines.runtime.stage.fingerprint import REQUEST_NAME
from pipelines.runtime.tracking.identity import RunIdentity
from pipelines.runtime.tracking.pages import SHORT_DIGEST
from pipelines.runtime.tracking.spool import METRICS, NOT_METRICS, read_spool_backwards

RECORDS_TO_READ = 20_000  # of metrics.jsonl, from the end; a metric that is rarer than this is not shown
ABSENT = "-"
MOST_TIMES = 100  # as many images, that are worth naming


@dataclass(frozen=True, kw_only=True)
class Report:
    """Facts, metrics and settings of one run of one stage; all texts are ready to be shown."""

    name: str
    stage: str
    facts: Mapping[str, str]
    metrics: Mapping[str, str]
    settings: Mapping[str, str]
    named: str = ""  # of a pipeline's stages: the name that this one was given


class CompareConfig(CommandConfig):
    """Runs to compare."""

    positional = "runs"

    runs: Annotated[tuple[str, ...], Field(min_length=1)]  # stages' folders, pipelines' folders, or mlflow:ID


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(CompareConfig, compared, table="compare", about=__doc__, argv=argv)


def compared(config: CompareConfig) -> Answer:
    """Read the runs, judge them against the first, and lay those of each stage side by side."""
    with config_error_at("compare.runs"):
        reports = [report for run in config.runs for report in reports_of(run)]
        sides, notes = sides_of(config.runs)
    verdicts = verdicts_of(sides)
    texts = [verdict.text for verdict in verdicts] + ["\n".join(notes)]
    texts += [luck_table(side) for side in sides if len(side.evaluations) > 1 or len(sides) == 1]
    texts += comparisons(reports)
    facts = {
        "verdicts": [each.as_json() for each in verdicts],
        "notes": notes,
        "runs": [vars(each) for each in reports],
    }
    return Answer(facts, "\n\n".join(filter(None, texts)))


def sides_of(runs: Sequence[str]) -> tuple[list[Side], list[str]]:
    """Return the evaluations of the runs, each with its replicates, and notes on those that cannot be judged."""
    sides, notes = [], []
    for run in runs:
        folder = Path(run)
        if not (folder / "run.json").exists():
            folder /= STAGE_FOLDERS["evaluate"]
        if not (folder / "run.json").exists() or RunIdentity.read(folder).stage != "evaluate":
            if folder != Path(run):
                notes.append(f"{run} has no {folder.name}/: there is nothing to judge.")
            continue
        try:
            side = read_side(os.path.normpath(run), folder)
        except FileNotFoundError:
            notes.append(f"The evaluation of {run} is unfinished: there is nothing to judge yet.")
        else:
            sides.append(side)
            notes += [f"Left out of {side.name}: {reason}." for reason in side.left_out]
    return sides, notes


def verdicts_of(sides: Sequence[Side]) -> list["Verdict"]:
    """Judge each side against the first."""
    return [Verdict(sides[0], side, num_rivals=len(sides) - 1) for side in sides[1:]]


class Verdict:
    """One run against the baseline, metric by metric.

    Args:
        baseline: Side that it is judged against.
        side: The run.
        num_rivals: Runs that are judged against this baseline; the intervals hold over the metrics of all together.
    """

    def __init__(self, baseline: Side, side: Side, *, num_rivals: int) -> None:
        self.baseline, self.side = baseline, side
        contracts = (baseline.own.figures["contract"], side.own.figures["contract"])
        #: Metric, or "all" -> why the contracts do not let it be compared.
        self.incomparable = not_comparable(*contracts)
        #: Parts of the contracts by which their samples differ besides.
        self.drawn_differently = drawn_differently(*contracts)
        measured = [name for name in JUDGED if None not in (baseline.means.get(name), side.means.get(name))]
        judged = [name for name in measured if not {name, "all"} & self.incomparable.keys()]
        #: Of each metric that is judged, and the word for it.
        self.differences = {
            name: difference(baseline.measured(name), side.measured(name), tests=len(judged) * num_rivals)
            for name in judged
        }
        self.words = {name: found.word(JUDGED[name]) for name, found in self.differences.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the facts of the text."""
        first, second = self.baseline, self.side
        return {
            "baseline": first.name,
            "run": second.name,
            "guidance": {"baseline": first.guidance, "run": second.guidance},
            "trainings": {"baseline": len(first.evaluations), "run": len(second.evaluations)},
            "metrics": {name: {"verdict": self.words[name], **asdict(each)} for name, each in self.differences.items()},
            "incomparable": self.incomparable,
            "drawn_differently": self.drawn_differently,
        }

    @property
    def text(self) -> str:
        """Return the sentences and the table."""
        return "\n".join([*self.sentences, "", *_aligned(self.rows)])

    @property
    def sentences(self) -> list[str]:
        """Return the verdict in a sentence, then what it stands on."""
        first, second = self.baseline, self.side
        said: dict[str, list[str]] = {"better": [], "worse": [], "cannot tell": []}
        for name, found in self.differences.items():
            low, high = sorted((abs(found.low), abs(found.high)))
            amount = f"by {abs(found.value):.3g} [{low:.3g}, {high:.3g}]" if found.decided else f"({_remedy(found)})"
            said[self.words[name]].append(f"{name} {amount}")
        clauses = [f"{word} in {', '.join(names)}" for word, names in said.items() if names]
        lines = [f"{second.name} against {first.name}: {'; '.join(clauses) or 'no metric can be judged'}."]
        for why in dict.fromkeys(self.incomparable.values()):
            names = [name for name, reason in self.incomparable.items() if reason == why]
            lines.append(f"Not compared, {', '.join(names)}: {why}.")
        if self.drawn_differently:
            lines.append(f"Their samples were drawn differently, too: {', '.join(self.drawn_differently)}.")
        if self.differences:
            guidance = f"{second.guidance:g} against {first.guidance:g}, each side's best by {CHOOSING}"
            lines.append(f"Guidance {guidance}. {self._trust}")
        return lines

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Return the table: its head, then a row a metric, the judged ones first."""
        first, second = self.baseline, self.side
        rows: list[tuple[str, ...]] = [("metric", "", first.name, second.name, "difference", "interval", "verdict")]
        for name in self.differences | first.means | second.means:
            values = [_shown(side.means.get(name)) for side in (first, second)]
            direction = {1: "higher is better", -1: "lower is better", 0: ""}[JUDGED.get(name, 0)]
            last: tuple[str, ...] = (ABSENT,) * 3
            if found := self.differences.get(name):
                last = (f"{found.value:+.3g}", f"[{found.low:+.3g}, {found.high:+.3g}]", self.words[name])
            rows.append((name, direction, *values, *last))
        return rows

    @property
    def _trust(self) -> str:
        first, second = self.baseline, self.side
        counts = len(second.evaluations), len(first.evaluations)
        together = f"Intervals of {LEVEL:.0%} over all judged metrics together"
        if max(counts) == 1:
            advice = "one training a side does not tell what another seed does (bash launch/replicate.sh)"
            return f"{together}, for sampling luck only: {advice}."
        borrowed = f", with the training luck of the other for the single one of {(first, second)[counts[0] == 1].name}"
        return f"{together}, from {counts[0]} and {counts[1]} trainings{borrowed * (1 in counts)}."


def _remedy(found: Difference) -> str:
    """What would decide a difference, if it is as large as it looks."""
    if found.more_samples is None:
        return "the values are equal"
    many = found.more_samples > MOST_TIMES
    times = f"{f'more than {MOST_TIMES}' if many else f'about {found.more_samples:.2g}'} times as many images"
    if all(luck.training is None for luck in found.lucks):
        return f"{times} would decide"
    if found.more_seeds is not None:
        return f"about {found.more_seeds} more seed{'s' * (found.more_seeds > 1)} a side would decide"
    images = found.more_samples > 1  # are too few, however many seeds there are
    return f"{times if images else f'more than {MOST_SEEDS} more seeds a side'} would decide"


def luck_table(side: Side) -> str:
    """Return the metrics of one side with the luck of one training: of its images, and of its seed."""
    count = len(side.evaluations)
    rows = [(f"{side.name}, {count} training{'s' * (count > 1)}", "mean", "sampling luck", "training luck", "ratio")]
    for name, mean in side.means.items():
        if mean is None:  # not all trainings have it
            rows.append((name, *(ABSENT,) * 4))
            continue
        luck = Luck.of(side.measured(name))
        sampling, by_seed = math.sqrt(luck.sampling), luck.seed_deviation
        ratio = f"{by_seed / sampling:.2g}" if by_seed is not None and sampling else ABSENT
        luck_by_seed = ABSENT if by_seed is None else f"{by_seed:.2g}"
        rows.append((name, _shown(mean), f"{sampling:.2g}", luck_by_seed, ratio))
    return "\n".join([f"At guidance {side.guidance:g}, standard deviations of one training:", *_aligned(rows)])


def reports_of(run: str) -> list[Report]:
    """Return the reports of a stage's folder, of all stages of a pipeline's folder, or of an MLflow run.

    Raises:
        ValueError: There is no run.
    """
    if run.startswith("mlflow:"):
        return [report_of_mlflow_run(run.removeprefix("mlflow:"))]
    folder = Path(run)
    folders = [folder]
    if not (folder / "run.json").exists():  # a pipeline's, whose replicates are judged with it
        stages = sorted(file.parent for file in folder.glob("*/run.json"))
        folders = [stage for stage in stages if not re.search(r"-seed_\d+$", stage.name)]
    if not folders:
        raise ValueError(f"{run} is neither a stage's folder nor a pipeline's: no run.json in it or one level below.")
    if folders == [folder]:
        return [report_of_folder(folder)]
    found = [(report_of_folder(each), each.name) for each in folders]
    return [replace(report, named=name.partition("-")[2]) for report, name in found]


def report_of_folder(folder: Path) -> Report:
    """Read what a stage left in its folder; whatever is not there yet is not shown."""
    identity = RunIdentity.read(folder)
    # The outcome is that of the last command, which may have been refused in a finished folder.
    finished = (folder / "manifest.json").exists()
    facts = {"state": "done" if finished else _json_of(folder / "outcome.json").get("state", "unfinished")}
    if finished:
        manifest = read_manifest(folder)
        settings: Mapping[str, Any] = manifest.config
        facts["digest"] = manifest.digest[:SHORT_DIGEST]
        facts |= {f"upstream.{key}": str(text)[:SHORT_DIGEST] for key, text in manifest.parents.items()}
    else:
        settings = _json_of(folder / REQUEST_NAME).get("config", {})
    settings = _that_matter(flattened_texts(with_new_names(identity.stage, settings)))
    metrics = last_values(folder / METRICS)
    scores = _json_of(folder / "metrics.json")
    if scores:
        facts["contract"] = contract_digest(scores["contract"])[:SHORT_DIGEST]
        samples = next(each for each in scores["sweep"] if each["guidance"] == scores["default_guidance"])
        parts = {"samples": samples, "vae": scores.get("vae", {}), "floor": scores.get("floor", {})}
        metrics = {f"{part}.{name}": _shown(value) for part in parts for name, value in parts[part].items()}
    if update := metrics.pop("update", ""):
        facts["updates"] = update
    return Report(name=identity.name, stage=identity.stage, facts=facts, metrics=metrics, settings=settings)


def last_values(path: Path) -> dict[str, str]:
    """Return the last value of each metric of a ``metrics.jsonl``, and ``update``, the last update."""
    values: dict[str, str] = {}
    for record in islice(read_spool_backwards(path), RECORDS_TO_READ):
        for key, value in record.items():
            if key == "update" or key not in NOT_METRICS:
                values.setdefault(key, _shown(value))
    return values


def report_of_mlflow_run(run_id: str) -> Report:
    """Ask the store of MLFLOW_TRACKING_URI for a run.

    Raises:
        ValueError: No store is named, or it does not have the run.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(f"mlflow:{run_id} needs MLFLOW_TRACKING_URI to say in which store the run is.")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    try:
        run = MlflowClient().get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"mlflow:{run_id}: {error}") from None
    tags = run.data.tags
    named = ("upstream.", "digest.", "contract")
    digests = {key: text[:SHORT_DIGEST] for key, text in tags.items() if key.startswith(named)}
    return Report(
        name=run.info.run_name,
        stage=tags.get("stage", ""),
        facts={"state": run.info.status.lower(), **digests},
        metrics={key: _shown(value) for key, value in run.data.metrics.items() if not key.startswith("system/")},
        settings=_that_matter(run.data.params),
    )


def comparisons(reports: Sequence[Report]) -> list[str]:
    """Return a table for each stage, and for each name that one was given, in the order of the stages."""
    order = [*STAGE_FOLDERS, *sorted({report.stage for report in reports} - STAGE_FOLDERS.keys())]
    found = sorted({(order.index(report.stage), report.named) for report in reports})
    return [
        _comparison([report for report in reports if (report.stage, report.named) == (order[stage], named)])
        for stage, named in found
    ]


def _comparison(reports: Sequence[Report]) -> str:
    """Return a table of reports of one stage: a column a run, a row a metric, or a fact or setting that differs."""
    stage, facts = " --name ".join(filter(None, (reports[0].stage, reports[0].named))), [each.facts for each in reports]
    digests = {fact.get("digest") for fact in facts}  # of finished stages
    if len(reports) > 1 and len(digests) == 1 and (digest := digests.pop()):
        return f"{stage}: equal, digest {digest}"
    rows = [(stage, *(report.name for report in reports))]
    rows += _rows(facts, differing=len(reports) > 1)
    rows += _rows([report.metrics for report in reports])
    settings = _rows([report.settings for report in reports], differing=True)
    lines = _aligned([*rows, *settings])
    if settings:
        lines.insert(len(lines) - len(settings), "settings that differ:")
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, with a rule below its first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _rows(columns: Sequence[Mapping[str, str]], *, differing: bool = False) -> list[tuple[str, ...]]:
    """Return a row for every key that any of the columns has, in the order in which they have them."""
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, *(column.get(key, ABSENT) for column in columns)) for key in keys]
    return [row for row in rows if not differing or len(set(row[1:])) > 1]


def _that_matter(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that change a result: no paths, names or cadences."""
    return {key: text for key, text in settings.items() if not re.search(r"^(run|inputs)\.|(^|_)(every|name)$", key)}


def _shown(value: Any) -> str:
    """Return a value, or a metric with its error, as text."""
    if isinstance(value, Mapping):
        return _shown(value["value"]) + (f" ± {_shown(value['error'])}" if value.get("error") else "")
    return ABSENT if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, mend="Restore it, or remove it.")
    except FileNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(main())
