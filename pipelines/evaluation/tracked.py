"""Metrics of an evaluation as the tracker gets them: ``eval/...`` with errors, the sweep with its best, the curve."""

from collections.abc import Mapping
from typing import Any

from pipelines.runtime.tracking.tracker import SilentTracker, Tracker

GROUPS = ("real", "floor", "vae", "likelihood")  # of metrics.json, besides those of the samples
BEST_BY = "frechet_distance"  # lowest


def log_scores(tracker: Tracker | SilentTracker, scores: Mapping[str, Any]) -> None:
    """Log ``metrics.json``: at the default guidance, at the best, over all, and over checkpoints or widths.

    The sweep is logged at 100 times its guidance, which is a metric beside the others: charts take it as their x axis.
    """
    sweep = list(scores["sweep"])
    default = next(entry for entry in sweep if entry["guidance"] == scores["default_guidance"])
    best = min(sweep, key=lambda entry: entry[BEST_BY]["value"] if BEST_BY in entry else 0.0)
    groups = {"eval": default, "eval/best": best, **{f"eval/{name}": scores.get(name, {}) for name in GROUPS}}
    groups |= {f"eval/error_budget/{step}": metrics for step, metrics in scores.get("error_budget", {}).items()}
    tracker.log_metrics(
        {name: value for group, metrics in groups.items() for name, value in _named(group, metrics).items()}, step=0
    )
    for entry in sweep:
        tracker.log_metrics(_named("eval/sweep", entry), step=round(100 * entry["guidance"]))
    for point in scores.get("curve", ()):
        of_updates = "update" in point
        step = point["update"] if of_updates else round(1e4 * point["relative_std"])
        tracker.log_metrics(_named("eval/updates" if of_updates else "eval/widths", point), step=step)


def _named(group: str, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return values and errors of metrics, and their guidance, by their names below ``group``."""
    named = {f"{group}/guidance": float(metrics["guidance"])} if "guidance" in metrics else {}
    for name, metric in metrics.items():
        if isinstance(metric, Mapping):
            errors = {f"{group}/{name}_error": metric["error"]} if metric.get("error") is not None else {}
            named |= {f"{group}/{name}": metric["value"], **errors}
    return named
