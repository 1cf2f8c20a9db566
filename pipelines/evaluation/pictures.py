"""Pictures of an evaluation: samples, the same at every guidance, nearest training images, and plots of its figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.files import write_atomically
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
