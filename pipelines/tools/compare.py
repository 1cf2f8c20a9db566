"""Lay runs side by side: what came out, of what, and in which settings they differ.

    python -m pipelines.tools.compare runs/demo runs/wide          every stage that both have
    python -m pipelines.tools.compare runs/*/unet                  one stage of many pipelines
    python -m pipelines.tools.compare runs/demo/unet mlflow:8f0c2d  with a run that only an MLflow store has

Reads the stages' folders alone, so that it works without a server; ``mlflow:ID`` asks the store of MLFLOW_TRACKING_URI.
Metrics are the last values logged; with an error, as ``value ± error``. Scores that were measured under different
contracts (samples, extractor, reference) are marked, since they do not compare. Only settings that differ are shown.
"""

import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data.files import read_json
from data.manifest import digest_of, read_manifest
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.dotted_keys import flattened_texts
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.renamed_keys import with_new_names
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, CommandConfig
from pipelines.runtime.tracking.identity import RunIdentity
from pipelines.runtime.tracking.spool import METRICS, NOT_METRICS, read_spool_backwards

RECORDS_TO_READ = 20_000  # of metrics.jsonl, from the end; a metric that is rarer than this is not shown
SHORT_DIGEST = 12
ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Facts, metrics and settings of one run of one stage; all texts are ready to be shown."""

    name: str
    stage: str
    facts: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


class CompareConfig(CommandConfig):
    """Runs to compare."""

    positional = "runs"

    runs: Annotated[tuple[str, ...], Field(min_length=1)]  # stages' folders, pipelines' folders, or mlflow:ID


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(CompareConfig, compared, table="compare", about=__doc__, argv=argv)


def compared(config: CompareConfig) -> Answer:
    """Read the runs, and lay those of each stage side by side."""
    with config_error_at("compare.runs"):
        reports = [report for run in config.runs for report in reports_of(run)]
    found = {report.stage for report in reports}
    stages = [*(stage for stage in STAGE_FOLDERS if stage in found), *sorted(found - STAGE_FOLDERS.keys())]
    tables = [comparison([report for report in reports if report.stage == stage]) for stage in stages]
    return Answer({"runs": [vars(report) for report in reports]}, "\n\n".join(tables))


def reports_of(run: str) -> list[Report]:
    """Return the reports of a stage's folder, of all stages of a pipeline's folder, or of an MLflow run.

    Raises:
        ValueError: There is no run.
    """
    if run.startswith("mlflow:"):
        return [report_of_mlflow_run(run.removeprefix("mlflow:"))]
    folder = Path(run)
    folders = [folder] if (folder / "run.json").exists() else sorted(file.parent for file in folder.glob("*/run.json"))
    if not folders:
        raise ValueError(f"{run} is neither a stage's folder nor a pipeline's: no run.json in it or one level below.")
    return [report_of_folder(folder) for folder in folders]


def report_of_folder(folder: Path) -> Report:
    """Read what a stage left in its folder; whatever is not there yet is not shown."""
    identity = RunIdentity.read(folder)
    # The outcome is that of the last command, which may have been refused in a finished folder.
    finished = (folder / "manifest.json").exists()
    facts = {"state": "done" if finished else _json_of(folder / "outcome.json").get("state", "unfinished")}
    settings: dict[str, str] = {}
    if finished:
        manifest = read_manifest(folder)
        facts["digest"] = manifest.digest[:SHORT_DIGEST]
        facts |= {f"upstream.{key}": str(text)[:SHORT_DIGEST] for key, text in manifest.parents.items()}
    if (folder / "config.toml").exists():
        tables = tomllib.loads((folder / "config.toml").read_text())
        settings = flattened_texts(with_new_names(identity.stage, tables.get(identity.stage, {})))
    metrics = last_values(folder / METRICS)
    scores = _json_of(folder / "metrics.json")
    if scores:
        facts["contract"] = digest_of(scores["contract"])[:SHORT_DIGEST]
        metrics = flattened_texts(_scores(scores))
    if update := metrics.pop("update", ""):
        facts["updates"] = update
    return Report(name=identity.name, stage=identity.stage, facts=facts, metrics=metrics, settings=settings)


def last_values(path: Path) -> dict[str, str]:
    """Return the last value of each metric of a ``metrics.jsonl``, and ``update``, the last update."""
    values: dict[str, str] = {}
    for count, record in enumerate(read_spool_backwards(path)):
        if count == RECORDS_TO_READ:
            break
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
    digests = {key: text[:SHORT_DIGEST] for key, text in tags.items() if key.startswith(("upstream.", "digest."))}
    return Report(
        name=run.info.run_name,
        stage=tags.get("stage", ""),
        facts={"state": run.info.status.lower(), **digests},
        metrics={key: _shown(value) for key, value in run.data.metrics.items() if not key.startswith("system/")},
        settings={key: text for key, text in run.data.params.items() if not key.startswith(("run.", "inputs."))},
    )


def comparison(reports: Sequence[Report]) -> str:
    """Return a table of reports of one stage: a column a run, a row a fact, a metric or a setting that differs."""
    rows = [(reports[0].stage, *(report.name for report in reports))]
    rows += _rows([report.facts for report in reports])
    rows += _rows([report.metrics for report in reports])
    settings = [row for row in _rows([report.settings for report in reports]) if len(set(row[1:])) > 1]
    rows += settings
    widths = [max(len(row[column]) for row in rows) for column in range(len(reports) + 1)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if settings:
        lines.insert(len(lines) - len(settings), "settings that differ:")
    if len({report.facts.get("contract") for report in reports}) > 1:
        lines.append("! The contracts differ: these scores were not measured in the same way and do not compare.")
    return "\n".join(lines)


def _rows(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Return a row for every key that any of the columns has, in the order in which they have them."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, *(column.get(key, ABSENT) for column in columns)) for key in keys]


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation's scores at the default guidance, of the VAE and of the floor, as shown texts."""
    chosen: Mapping[str, Any] = next(
        (entry for entry in scores["sweep"] if entry["guidance"] == scores["default_guidance"]), {}
    )
    whole = {"samples": chosen, "vae": scores.get("vae", {}), "floor": scores.get("floor", {})}
    return {name: _with_errors(part) for name, part in whole.items()}


def _with_errors(values: Mapping[str, Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "value" in value:
            error = value.get("error")
            texts[key] = _shown(value["value"]) + (f" ± {_shown(error)}" if error else "")
        elif isinstance(value, Mapping):
            texts[key] = _with_errors(value)
        else:
            texts[key] = _shown(value)
    return texts


def _shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _json_of(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, mend="Restore it, or remove it.")
    except FileNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(main())
