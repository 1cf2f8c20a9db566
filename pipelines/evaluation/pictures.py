"""Pictures of an evaluation as PNG: samples, nearest training images, plots; and charts of several as SVG for a report.

A chart has a line or a colour for each run; that of an evaluation has one run, and is its plot. Those of a report are
in the page's own colours.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data.files import write_atomically
from pipelines.evaluation.error_budget import REAL, STEPS
from pipelines.evaluation.figures import FigureMaker
from pipelines.evaluation.samples import ItemMaker, key_prefix
from pipelines.model.grids import grid_png, plot_png

GRID_ROWS = 8
MAX_GRID_COLUMNS = 12
NEAREST_SHOWN = 10
#: Figures of the error budget that are plotted, as far as they are there.
PLOTTED = ("frechet_distance", "kernel_distance", "psnr", "class_accuracy", "retrieval")
UNPLOTTED = ("worst_class_accuracy", "retrieval_in_five")  # over guidance: others show the same

ONE_ROW = 100  # panels
PANELS_IN_ROW = 4  # of a report
MARKERS = "osD^vP"
INK = "#123456"  # of axes and text in a report; the page's own colour takes its place
#: Style of its charts, in matplotlib's keys.
PAGE_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.titlecolor", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **{"axes.facecolor": "none", "axes.titlesize": 10, "xtick.labelsize": 8, "ytick.labelsize": 8},
    **{"errorbar.capsize": 2, "lines.markersize": 4},
    # Told apart by the colour-blind, too.
    "axes.prop_cycle": "cycler(color=['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9'])",
    **{"legend.fontsize": 8, "legend.labelcolor": INK, "legend.frameon": False},
    # Text as text, and the same bytes each time.
    **{"svg.fonttype": "none", "svg.hashsalt": "latentline"},
}


def draw_pictures(
    maker: ItemMaker, figures: FigureMaker, scores: Mapping[str, Any], steps: Mapping[str, Any]
) -> list[str]:
    """Draw and log all pictures; return the names of their files.

    Args:
        maker: Of the samples.
        figures: Of the nearest training images.
        scores: ``metrics.json``.
        steps: Its error budget, and the samples.
    """
    # A column a class, or a caption.
    config, folder = maker.config, maker.stage.folder
    in_turn = maker.stage.parents.unet.classes if maker.prompts is None else ()
    columns = min(len(in_turn) or 10, MAX_GRID_COLUMNS, config.num_samples)
    stride = len(in_turn) or columns
    heads = in_turn[:columns] if maker.prompts is None else maker.captions(range(columns))
    num_rows = max(1, min(GRID_ROWS, config.num_samples // stride))

    def grid(kind: str, rows: int) -> np.ndarray:
        needed = min(-(-rows * stride // config.batch_size), config.num_samples // config.batch_size)
        images = np.concatenate([maker.images(kind, number) for number in range(needed)])
        places = np.arange(rows)[:, None] * stride + np.arange(columns)
        return images[places % len(images)]

    def across(labels: Mapping[str, str]) -> bytes:
        images = np.concatenate([grid(kind, 1) for kind in labels])
        return grid_png(images, column_labels=heads, row_labels=list(labels.values()))

    # Many samples of the default guidance; a few, and the metrics, of every one.
    default, num_steps = config.guidance.scale, config.sampler.num_steps
    title = f"guidance {default:g}, {config.sampler.kind} with {num_steps} steps, seed {config.seed}"
    pictures = {
        "samples": grid_png(grid(key_prefix(default), num_rows), column_labels=in_turn[:columns], title=title),
        "guidance": across({key_prefix(scale): f"guidance {scale:g}" for scale in sorted(config.scales)}),
        "sweep": chart_png(sweep_chart, {"": scores["sweep"]}, scores["error_budget"].get("encoded", {})),
    }

    # The same at other points of the training.
    for over, name in (("update", "updates"), ("relative_std", "widths")):
        if points := {kind: point for kind, point in config.curve.points.items() if over in point}:
            said = over.replace("_", " ")
            pictures[name] = across({kind: f"{said} {point[over]:g}" for kind, point in points.items()})
            entries = sorted((point for point in scores["curve"] if over in point), key=lambda point: point[over])
            pictures[f"{name}_curve"] = chart_png(sweep_chart, {"": entries}, {}, over)

    # What each step costs, and the samples that are closest to a training image, above it.
    pictures["error_budget"] = chart_png(error_budget_chart, {"": steps})
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


def curves_chart(curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Any:
    """Draw metrics over updates, a panel a metric that any run has and a line a run."""
    curves = {name: of_runs for name, of_runs in curves.items() if any(updates for updates, _ in of_runs.values())}
    figure, axes = _panels(list(curves), in_row=PANELS_IN_ROW)
    for axis, (name, of_runs) in zip(axes, curves.items(), strict=True):
        for label, (updates, values) in of_runs.items():
            axis.plot(updates, values, label=label)
        axis.set_xlabel("update")
        if "loss" in name:
            axis.set_yscale("log")
    return figure


def sweep_chart(
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]],
    floor: Mapping[str, Any],
    over: str = "guidance",
    *,
    in_row: int = PANELS_IN_ROW,
) -> Any:
    """Draw every metric over guidance or another quantity, with one standard error: a line a run, and a VAE's floor."""
    first = next(iter(sweeps.values()))[0]
    names = [name for name in first if isinstance(first[name], Mapping) and name not in UNPLOTTED]
    figure, axes = _panels(names, in_row=in_row)
    for axis, name in zip(axes, names, strict=True):
        for number, (label, entries) in enumerate(sweeps.items()):
            points = [(each[over], each[name]["value"], each[name]["error"]) for each in entries if name in each]
            if points:
                places, values, errors = zip(*points, strict=True)
                axis.errorbar(places, values, yerr=errors, label=label, **_style(number))
        # Reconstructions of training images are copies by right.
        if name in floor and name != "copied":
            axis.axhline(floor[name]["value"], color="grey", linestyle="--", linewidth=1)
            inwards = "bottom" if floor[name]["value"] < sum(axis.get_ylim()) / 2 else "top"
            axis.annotate("VAE reconstructions", (0.98, floor[name]["value"]), xycoords=("axes fraction", "data"),
                          ha="right", va=inwards, fontsize=8, color="grey")  # fmt: skip
        axis.set_xlabel("guidance scale" if over == "guidance" else over.replace("_", " "))
    return figure


def error_budget_chart(budgets: Mapping[str, Mapping[str, Mapping[str, Any]]], *, in_row: int = PANELS_IN_ROW) -> Any:
    """Draw figures after each step, from real images (top) to samples (bottom), with one standard error."""
    found = dict.fromkeys(step for budget in budgets.values() for step in budget)
    steps = [step for step in (REAL, *STEPS) if step in found]
    steps += [step for step in found if step not in steps]
    names = [name for name in PLOTTED if any(name in each for budget in budgets.values() for each in budget.values())]
    figure, axes = _panels(names, in_row=in_row, height=1.2 + 0.3 * len(steps))
    for column, (axis, name) in enumerate(zip(axes, names, strict=True)):
        for number, (label, budget) in enumerate(budgets.items()):
            metrics = {steps.index(step) + 0.15 * number: each[name] for step, each in budget.items() if name in each}
            values, errors = ([metric[part] for metric in metrics.values()] for part in ("value", "error"))
            axis.errorbar(values, list(metrics), xerr=errors, label=label, linestyle="none", **_style(number))
        axis.set_yticks(range(len(steps)), labels=steps if not column else [])
        axis.set_ylim(len(steps) - 0.5, -0.5)
    return figure


def _style(number: int) -> dict[str, Any]:
    """Return marker and colour of a run by its number."""
    return {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number}"}


def _panels(names: Sequence[str], *, in_row: int, height: float = 3.0) -> tuple[Any, Sequence[Any]]:
    """Return a figure of matplotlib with a panel of each name, so many in a row."""
    from matplotlib.figure import Figure

    columns = min(max(len(names), 1), in_row)
    rows = max(-(-len(names) // columns), 1)
    figure = Figure(figsize=(3.2 * columns, height * rows), layout="constrained")
    if not names:
        figure.text(0.5, 0.5, "no figure: see metrics.json", ha="center")
        return figure, []
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, names, strict=False):
        axis.set_title("PSNR, dB" if name == "psnr" else name.replace("_", " "))
        axis.grid(alpha=0.3)
    return figure, list(axes[: len(names)])


def chart_png(draw: Callable[..., Any], *data: Any) -> bytes:
    """Return a chart of one run as PNG, its panels in one row."""
    import matplotlib as mpl

    with mpl.rc_context({"errorbar.capsize": 3}):
        return plot_png(draw(*data, in_row=ONE_ROW))


def chart_svg(draw: Callable[..., Any], *data: Any) -> str:
    """Return a chart as SVG for a page, axes in the colour of the page's text."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(PAGE_STYLE):
        figure = draw(*data)
        handles = figure.axes[0].get_legend_handles_labels() if figure.axes else ([], [])
        if handles[0]:
            legend = figure.legend(*handles, loc="outside upper left", ncols=3)
            for text in legend.get_texts():
                text.set_parse_math(False)  # a folder's name may hold "$"
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    # Several charts stand in one page: names of groups would not be unique, and the page decides their size.
    return re.sub(r'(width|height)="[\d.]+pt"', "", text.replace("<g id=", "<g data-part="), count=2)
