"""Metrics of an evaluation as the tracker gets them: ``eval/...`` with errors, the sweep, and the best of it."""

from collections.abc import Mapping
from typing import Any

from pipelines.runtime.tracking.tracker import SilentTracker, Tracker

GROUPS = ("real", "floor", "vae", "likelihood")  # of metrics.json, besides those of the samples
BEST_BY = "frechet_distance"  # lowest


def log_scores(tracker: Tracker | SilentTracker, scores: Mapping[str, Any]) -> None:
    """Log the metrics of ``metrics.json``: at the default guidance, at the best, and over all.

    The sweep is logged at 100 times its guidance, which is a metric beside the others: charts take it as their x axis.
    """
    sweep = list(scores["sweep"])
    [default] = [entry for entry in sweep if entry["guidance"] == scores["default_guidance"]]
    best = min(sweep, key=lambda entry: entry[BEST_BY]["value"] if BEST_BY in entry else 0.0)
    groups = {"eval": default, "eval/best": best, **{f"eval/{name}": scores.get(name, {}) for name in GROUPS}}
    tracker.log_metrics(
        {name: value for group, metrics in groups.items() for name, value in _named(group, metrics).items()}, step=0
    )
    for entry in sweep:
        tracker.log_metrics(_named("eval/sweep", entry), step=round(100 * entry["guidance"]))


def _named(group: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return values and errors of metrics, and their guidance, by their names below ``group``."""
    named = {f"{group}/guidance": float(metrics["guidance"])} if "guidance" in metrics else {}
    for name, metric in metrics.items():
        if name != "guidance":
            named |= {f"{group}/{name}": metric["value"], f"{group}/{name}_error": metric["error"]}
    return named
