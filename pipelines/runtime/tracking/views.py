"""Saved views of an experiment in MLflow: charts chosen for one question each, listed under "Views" from 3.15 on.

A view is an experiment tag ``mlflow.sharedViewState.ID`` with the state of MLflow's page for runs, compressed. Ids come
from names, so that writing a view again changes nothing, and views that users save are never touched.
"""

import base64
import json
import uuid
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.runtime.tracking.pages import MODEL_TRAINING, pages

VIEW_TAG = "mlflow.sharedViewState."
FIRST_VERSION = (3, 15)  # of MLflow, that lists views; a link to one that was saved otherwise breaks older pages
MOST_VIEWS = 40  # of an experiment, in MLflow
HEIGHT = 320  # pixels of a chart


def views_of(contracts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the states of an experiment's views by name: of evaluations one for each contract, which alone compare."""
    states: dict[str, dict[str, Any]] = {}
    for view in pages()["views"]:
        for contract in sorted(contracts) if "{contract}" in view["name"] else [""]:
            name = view["name"].replace("{contract}", contract)
            states[name] = _state_of(name, view, contract=contract)
    return states


def is_view(key: str) -> bool:
    """Return whether an experiment's tag is a saved view."""
    return key.startswith(VIEW_TAG)


def id_of(name: str) -> str:
    """Return the id of our view of this name."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"latentline/{name}"))


def tag_of(name: str, state: Mapping[str, Any], *, milliseconds: int) -> str:
    """Return the value of the tag of a view that is dated ``milliseconds`` (Unix time)."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()
    envelope = {"name": name, "createdAt": milliseconds, "updatedAt": milliseconds, "state": f"deflate;{packed}"}
    return json.dumps(envelope)


def experiment_note(tags: Mapping[str, str], *, experiment: str) -> str:
    """Return the description of an experiment: a line of links to those of its views that are ours."""
    names = sorted(json.loads(text)["name"] for key, text in tags.items() if is_view(key))
    first = list(views_of([]))
    ours = [name for name in names if f"{VIEW_TAG}{id_of(name)}" in tags]
    ours.sort(key=lambda name: first.index(name) if name in first else 1.5)
    runs = f"#/experiments/{experiment}/runs?compareRunsMode=CHART&{MODEL_TRAINING}&viewStateShareKey="
    return " · ".join(f"[{name}]({runs}{id_of(name)})" for name in ours)


def _state_of(name: str, view: Mapping[str, Any], *, contract: str) -> dict[str, Any]:
    """Return the state of MLflow's page for runs."""
    conditions = {"stage": view.get("stage"), "contract": contract}
    filters = [f"tags.`{key}` = '{text}'" for key, text in conditions.items() if text]
    best = view["best"].removeprefix("-")
    shared, charts = pages()["section"], []
    sections = [
        {**shared, "name": each["name"], "columns": each["columns"], "cardHeight": each.get("height", HEIGHT)}
        for each in view["sections"]
    ]
    sections += [{**shared, "name": prefix, "display": False} for prefix in view["folded"]]
    for section in sections:
        section["uuid"] = id_of(f"{name}/{section['name']}")
    for section, declared in zip(sections, view["sections"], strict=False):
        charts += [_chart(chart, section=section["uuid"]) for chart in declared["charts"]]
    return {
        **pages()["state"],
        "searchFilter": " and ".join(filters) or "tags.`stage` != 'pipeline'",
        "orderByKey": f"metrics.`{best}`",
        "orderByAsc": best == view["best"],
        "selectedColumns": [f"metrics.`{best}`"],
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "runListHidden": view.get("wide", False),
    }


def _chart(chart: str, *, section: str) -> dict[str, Any]:
    """Return a chart as MLflow saves it."""
    kind, key, _, x = (*chart.split(" "), "", "", "")[:4]
    metrics = {"metricKey": key, "selectedMetricKeys": [key]}
    if kind == "line":
        axis = {"": "step", "time": "time-relative"}.get(x, "metric")
        metrics |= {"xAxisKey": axis, "selectedXAxisMetricKey": x if axis == "metric" else ""}
    keys = {"difference": {}, "image": {"imageKeys": [key]}}.get(kind, metrics)
    place = {"uuid": id_of(f"{section}/{chart}"), "type": kind.upper(), "metricSectionId": section}
    return {**pages()["chart"], **pages()["charts"].get(kind, {}), **place, **keys}
