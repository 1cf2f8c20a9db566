"""Metrics of an evaluation: distances to real images, accuracy of a class probe, and their plot over guidance."""

import io
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.metrics.distribution import frechet_distance, kernel_distance, precision_recall
from models.metrics.estimate import Estimate, mean_estimate
from models.metrics.probe import LinearProbe

Metrics = dict[str, dict[str, float]]


class Reference:
    """Real images by their features: validation features and labels, and a class probe with its contract.

    Args:
        train: Features (n d) and labels (n,) that the probe is fitted on.
        validation: Features and labels of the images to compare with; the probe is measured on them, too.
        num_classes: Of the corpus; one class needs no probe.
    """

    def __init__(self, *, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor], num_classes: int) -> None:
        self.features, self.labels = validation
        self.probe: LinearProbe | None = None
        #: How the probe was made and how far it can be trusted: its accuracy on real validation images.
        self.probe_contract: dict[str, Any] = {"kind": "none"}
        if num_classes > 1:
            self.probe = LinearProbe.fit(*train, num_classes=num_classes)
            accuracy = self.probe.accuracy(self.features, self.labels)
            self.probe_contract = {
                "kind": "linear",
                "num_images": len(train[1]),
                "validation_accuracy": _metric(accuracy),
            }


def distribution_metrics(features: Tensor, labels: Tensor, reference: Reference) -> Metrics:
    """Compare images with the reference's.

    Args:
        features: (n d).
        labels: The classes that the images should show; (n,).
        reference: Real images.
    """
    neighbours = precision_recall(features, reference.features)
    metrics = {
        "frechet_distance": _metric(frechet_distance(features, reference.features)),
        "kernel_distance": _metric(kernel_distance(features, reference.features)),
        "precision": _metric(neighbours.precision),
        "recall": _metric(neighbours.recall),
    }
    if reference.probe is not None:
        right = (reference.probe.predict(features) == labels).double()
        metrics["class_accuracy"] = _metric(mean_estimate(right))
        by_class = [mean_estimate(right[labels == label]) for label in labels.unique() if (labels == label).sum() > 1]
        if by_class:
            metrics["worst_class_accuracy"] = _metric(min(by_class))
    return metrics


def mean_metrics(values: Mapping[str, Tensor]) -> Metrics:
    """Average the values of single images, (n,) each, with standard errors."""
    return {name: _metric(mean_estimate(of_images)) for name, of_images in values.items()}


def sweep_plot(by_scale: Mapping[float, Mapping[str, Any]], floor: Mapping[str, Any]) -> bytes:
    """Plot every metric over guidance, with one standard error, and the VAE's floor; PNG."""
    from matplotlib.figure import Figure

    scales = sorted(by_scale)
    names = [name for name in by_scale[scales[0]] if name != "worst_class_accuracy"]
    figure = Figure(figsize=(3.2 * len(names), 3.0), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        values = [by_scale[scale][name] for scale in scales]
        axis.errorbar(scales, [v["value"] for v in values], yerr=[v["error"] for v in values], marker="o", capsize=3)
        axis.axhline(floor[name]["value"], color="grey", linestyle="--", linewidth=1)
        inwards = "bottom" if floor[name]["value"] < sum(axis.get_ylim()) / 2 else "top"
        axis.annotate("VAE reconstructions", (0.98, floor[name]["value"]), xycoords=("axes fraction", "data"),
                      ha="right", va=inwards, fontsize=8, color="grey")  # fmt: skip
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("guidance scale")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _metric(estimate: Estimate) -> dict[str, float]:
    return {"value": float(estimate.value), "error": float(estimate.error)}
