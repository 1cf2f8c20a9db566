"""Pictures of an evaluation as PNG: samples, nearest training images, plots; and charts of several as SVG for a report.

The charts are in the page's own colours.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.files import write_atomically
from pipelines.evaluation.error_budget import REAL, STEPS
from pipelines.evaluation.figures import FigureMaker
from pipelines.evaluation.metrics import Metrics
from pipelines.evaluation.samples import ItemMaker, key_prefix
from pipelines.model.grids import grid_png, plot_png

GRID_ROWS = 8
MAX_GRID_COLUMNS = 12
NEAREST_SHOWN = 10
#: Figures of the error budget that are plotted, as far as they are there.
PLOTTED = ("frechet_distance", "kernel_distance", "psnr", "class_accuracy", "retrieval")
UNPLOTTED = ("worst_class_accuracy", "retrieval_in_five")  # over guidance: others show the same

INK = "#123456"  # of axes and text; the page's own colour takes its place
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by the colour-blind, too
MARKERS = "osD^vP"


def draw_pictures(
    maker: ItemMaker,
    figures: FigureMaker,
    by_scale: Mapping[float, Metrics],
    error_budget: Mapping[str, Metrics],
    curve: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Draw and log all pictures; return the names of their files."""
    # A column a class, or a caption.
    config, folder = maker.config, maker.stage.folder
    in_turn = maker.stage.parents.unet.classes if maker.prompts is None else ()
    columns = min(len(in_turn), MAX_GRID_COLUMNS) if in_turn else min(10, config.num_samples)
    stride = len(in_turn) or columns
    heads = in_turn[:columns] if maker.prompts is None else maker.captions(range(columns))
    rows = max(1, min(GRID_ROWS, config.num_samples // stride))

    def grid(kind: str, num_rows: int) -> np.ndarray:
        needed = min(-(-num_rows * stride // config.batch_size), config.num_samples // config.batch_size)
        images = np.concatenate([maker.images(kind, number) for number in range(needed)])
        places = [[row * stride + column for column in range(columns)] for row in range(num_rows)]
        return images[np.array(places) % len(images)]

    # Many samples of the default guidance.
    default, steps = config.guidance.scale, config.sampler.num_steps
    title = f"guidance {default:g}, {config.sampler.kind} with {steps} steps, seed {config.seed}"
    pictures = {"samples": grid_png(grid(key_prefix(default), rows), column_labels=in_turn[:columns], title=title)}

    # A few samples, and the metrics, of every guidance.
    scales = sorted(by_scale)
    across = np.concatenate([grid(key_prefix(scale), 1) for scale in scales])
    labels = [f"guidance {scale:g}" for scale in scales]
    pictures["guidance"] = grid_png(across, column_labels=heads, row_labels=labels)
    pictures["sweep"] = sweep_plot(by_scale, error_budget.get("encoded", {}))

    # The same at other points of the training.
    for axis, name in (("update", "updates"), ("relative_std", "widths")):
        if points := {kind: point for kind, point in config.curve.points.items() if axis in point}:
            across = np.concatenate([grid(kind, 1) for kind in points])
            labels = [f"{axis.replace('_', ' ')} {point[axis]:g}" for point in points.values()]
            pictures[name] = grid_png(across, column_labels=heads, row_labels=labels)
            values = {
                point[axis]: {k: v for k, v in point.items() if isinstance(v, Mapping)}
                for point in curve
                if axis in point
            }
            pictures[f"{name}_curve"] = sweep_plot(values, {}, axis_label=axis.replace("_", " "))

    # What each step costs, and the samples that are closest to a training image, above it.
    pictures["error_budget"] = error_budget_plot(error_budget)
    if "copied" not in maker.absent:
        samples, training, distances = figures.nearest_pairs(key_prefix(default), count=NEAREST_SHOWN)
        pictures["copies"] = grid_png(
            np.stack([samples, training]),
            column_labels=[f"{distance:.2f}" for distance in distances],
            row_labels=["sample", "training image"],
            title="samples nearest to training images, by distance: at most 1 counts as a copy",
        )
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture)
        maker.stage.tracker.log_image(f"eval/{name}", folder / f"{name}.png", step=0)
    return [f"{name}.png" for name in pictures]


def sweep_plot(
    by_value: Mapping[float, Mapping[str, Any]], floor: Mapping[str, Any], *, axis_label: str = "guidance scale"
) -> bytes:
    """Plot every metric over guidance or another quantity, with one standard error, and the VAE's floor; PNG."""
    values_along = sorted(by_value)
    names = [name for name in by_value[values_along[0]] if name not in UNPLOTTED]
    figure, axes = _panels(names)
    for axis, name in zip(axes, names, strict=True):
        values = [by_value[value][name] for value in values_along]
        axis.errorbar(
            values_along, [v["value"] for v in values], yerr=[v["error"] for v in values], marker="o", capsize=3
        )
        # Reconstructions of training images are copies by right.
        if name in floor and name != "copied":
            axis.axhline(floor[name]["value"], color="grey", linestyle="--", linewidth=1)
            inwards = "bottom" if floor[name]["value"] < sum(axis.get_ylim()) / 2 else "top"
            axis.annotate("VAE reconstructions", (0.98, floor[name]["value"]), xycoords=("axes fraction", "data"),
                          ha="right", va=inwards, fontsize=8, color="grey")  # fmt: skip
        axis.set_xlabel(axis_label)
    return plot_png(figure)


def error_budget_plot(error_budget: Mapping[str, Metrics]) -> bytes:
    """Plot figures after each step, from real images (top) to samples (bottom), with one standard error; PNG."""
    names = [name for name in PLOTTED if any(name in metrics for metrics in error_budget.values())]
    figure, axes = _panels(names, height=1.2 + 0.3 * len(error_budget))
    for number, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for place, metrics in enumerate(error_budget.values()):
            if name in metrics:
                value, error = metrics[name]["value"], metrics[name]["error"]
                axis.errorbar(value, place, xerr=error, marker="o", capsize=3, color="tab:blue")
        axis.set_yticks(range(len(error_budget)), labels=list(error_budget) if not number else [])
        axis.set_ylim(len(error_budget) - 0.5, -0.5)
    return plot_png(figure)


def _panels(names: Sequence[str], *, height: float = 3.0) -> tuple[Any, Sequence[Any]]:
    """Return a figure of matplotlib with a panel of each name in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * max(len(names), 1), height), layout="constrained")
    if not names:
        figure.text(0.5, 0.5, "no figure: see metrics.json", ha="center")
        return figure, []
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        axis.set_title("PSNR, dB" if name == "psnr" else name.replace("_", " "))
        axis.grid(alpha=0.3)
    return figure, axes


def curves_svg(curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> str:
    """Draw metrics over updates, a panel a metric that any run has and a line a run."""
    curves = {name: of_runs for name, of_runs in curves.items() if any(updates for updates, _ in of_runs.values())}
    figure, axes = _figure(list(curves))
    for axis, (name, of_runs) in zip(axes, curves.items(), strict=True):
        for number, (label, (updates, values)) in enumerate(of_runs.items()):
            shown = label if axis is axes[0] else None
            axis.plot(updates, values, color=COLOURS[number % len(COLOURS)], label=shown, linewidth=1.5)
        axis.set_xlabel("update")
        if "loss" in name:
            axis.set_yscale("log")
            axis.tick_params(which="both", colors=INK, labelsize=8)
    return _svg(figure)


def sweep_svg(sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Draw every figure over guidance, with one standard error, a line a run."""
    names = [name for name in next(iter(sweeps.values()))[0] if name not in ("guidance", *UNPLOTTED)]
    figure, axes = _figure(names)
    for axis, name in zip(axes, names, strict=True):
        for number, (label, entries) in enumerate(sweeps.items()):
            points = [(each["guidance"], each[name]["value"], each[name]["error"]) for each in entries if name in each]
            if points:
                scales, values, errors = zip(*points, strict=True)
                style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                shown = label if axis is axes[0] else None
                axis.errorbar(scales, values, yerr=errors, label=shown, capsize=2, markersize=4, **style)
        axis.set_xlabel("guidance scale")
    return _svg(figure)


def error_budget_svg(budgets: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Draw figures after each step from real images to samples, with one standard error, a colour a run."""
    found = {step for budget in budgets.values() for step in budget}
    steps = [step for step in (REAL, *STEPS) if step in found] + sorted(found - {REAL, *STEPS})
    names = [name for name in PLOTTED if any(name in each for budget in budgets.values() for each in budget.values())]
    figure, axes = _figure(names, height=1.2 + 0.35 * len(steps))
    for column, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for number, (label, budget) in enumerate(budgets.items()):
            places = [(steps.index(step) + 0.15 * number, each[name]) for step, each in budget.items() if name in each]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            for place, metric in places:
                axis.errorbar(metric["value"], place, xerr=metric["error"], capsize=2, markersize=4, **style)
            if not column:
                axis.plot([], [], label=label, linestyle="none", **style)
        axis.set_yticks(range(len(steps)), labels=steps if not column else [])
        axis.set_ylim(len(steps) - 0.5, -0.5)
    return _svg(figure)


def _figure(names: Sequence[str], *, height: float = 2.8) -> tuple[Any, Sequence[Any]]:
    """Return a figure with a panel of each name, four in a row."""
    from matplotlib.figure import Figure

    columns = min(max(len(names), 1), 4)
    rows = max(-(-len(names) // columns), 1)
    figure = Figure(figsize=(3.4 * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        axis.set_title("PSNR, dB" if name == "psnr" else name.replace("_", " "), color=INK, fontsize=10)
        axis.set_facecolor("none")
        axis.grid(alpha=0.25)
        axis.tick_params(colors=INK, labelsize=8)
        axis.xaxis.label.set_color(INK)
        for spine in axis.spines.values():
            spine.set_color(INK)
    return figure, list(axes[: len(names)])


def _svg(figure: Any) -> str:
    """Return a figure as SVG: text as text, the same bytes each time, axes in the colour of the page's text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    if any(axis.get_legend_handles_labels()[0] for axis in figure.axes):
        figure.legend(loc="outside upper left", ncols=3, fontsize=8, labelcolor=INK, frameon=False)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "latentline"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Several charts stand in one page: names of groups would not be unique, and the page decides their size.
    return re.sub(r'(width|height)="[\d.]+pt"', "", text.replace("<g id=", "<g data-part="), count=2)
