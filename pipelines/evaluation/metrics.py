"""Metrics of an evaluation: distances to real images, shares of copies, and accuracy of a class probe; and how
the tracker gets them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.metrics.estimate import Estimate, mean_estimate, worst_fraction
from models.metrics.frechet import frechet_at_infinity, frechet_distance
from models.metrics.kernel import kernel_distance
from models.metrics.neighbours import precision_recall
from models.metrics.probe import LinearProbe
from models.metrics.retrieval import RidgeMap
from pipelines.runtime.tracking.tracker import SilentTracker, Tracker

Metrics = dict[str, dict[str, float]]

DISTANCES = {
    "frechet_distance": frechet_distance,
    "frechet_at_infinity": frechet_at_infinity,
    "kernel_distance": kernel_distance,
}
# Images on each side that a figure is defined for.
MIN_IMAGES = {"frechet_distance": 2, "kernel_distance": 3, "precision": 4, "recall": 4, "copied": 1}
COPY_QUANTILE = 0.005  # of the distances of real images to training images, below which an image counts as a copy
RETRIEVED = ("retrieval", "retrieval_in_five")
PROBED = ("class_accuracy", "worst_class_accuracy")

GROUPS = ("floor", "vae", "likelihood")  # of metrics.json, besides those of the samples
BEST_BY = "frechet_distance"  # lowest


def absent_figures(
    *,
    samples: Tensor,
    reference: Tensor,
    validation: Tensor,
    probed: Tensor,
    classes: Sequence[str],
    dimension: int,
    num_held_out: int,
    num_bounds: int,
) -> dict[str, str]:
    """Return the figures that these images do not allow, each with its reason; known before any work.

    Args:
        samples: Labels of the samples of one guidance, -1 for none; (n,).
        reference: Labels of the images to compare with; (m,).
        validation: Labels of the validation images; (v,).
        probed: Labels of the training images that the class probe is fitted on; (p,).
        classes: Names of the classes.
        dimension: Features of an image.
        num_held_out: Real images that are not in the reference.
        num_bounds: Validation images whose likelihood is measured.
    """
    absent = _too_few(min(len(samples), len(reference)), dimension=dimension)
    if not len(probed) and not num_held_out:
        absent["copied"] = "no training images are read (evaluate.probe_images)"

    # The probe: it must know every class, and be measured itself.
    given, missing = probed[probed >= 0], sorted(set(range(len(classes))) - set(probed.tolist()))
    labelled = min(int((samples >= 0).sum()), int((validation >= 0).sum()))
    if len(classes) < 2:
        reason = f"the corpus has {'one class' if classes else 'no classes'}"
    elif not len(probed):
        reason = "no training images are probed (evaluate.probe_images)"
    elif missing:
        named = ", ".join(repr(classes[label]) for label in missing[:5])
        reason = f"none of the {len(given)} labelled training images that are probed shows {named}"
    else:
        reason = f"{labelled} samples or validation images have a class, and 2 are needed" if labelled < 2 else ""
    if reason:
        absent |= dict.fromkeys(PROBED, reason)

    # The VAE's figures, and the likelihood.
    if not num_held_out:
        absent["floor"] = f"it takes {len(samples)} real images, and leaves fewer than as many"
    if len(validation) < 2:
        absent |= dict.fromkeys(("psnr", "ssim"), "one validation image gives no error")
    if num_bounds == 1:
        absent["likelihood"] = "one validation image gives no error"
    return absent


def _too_few(fewest: int, *, dimension: int) -> dict[str, str]:
    """Return the figures that need more than ``fewest`` images on each side, each with the reason."""
    absent = {
        name: f"it needs {least} samples and {least} images to compare with"
        for name, least in MIN_IMAGES.items()
        if fewest < least
    }
    if fewest < 2 * dimension:
        absent["frechet_at_infinity"] = f"half of {fewest} images are fewer than {dimension} features"
    return absent


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images by their features, and what they calibrate."""

    features: Tensor  # of the images to compare with; (m d)
    nearest_of_real: Tensor  # distance of each validation image to its nearest training image; (v,)
    probe: LinearProbe | None = None  # fitted on training images

    @property
    def copy_distance(self) -> float:
        """Distance to a training image up to which an image counts as a copy."""
        return float(torch.quantile(self.nearest_of_real, COPY_QUANTILE))

    def relative(self, distances: Tensor) -> Tensor:
        """Return distances to training images (n,) as multiples of that of a copy; where that is 0, 0 or infinity."""
        return (distances.cpu() / self.copy_distance).nan_to_num(nan=0.0, posinf=math.inf)

    def copied(self, distances: Tensor) -> Estimate:
        """Return the share of images that are closer to a training image than all but a few real ones are.

        Args:
            distances: Of each image to its nearest training image; (n,).
        """
        share = float((distances.cpu() <= self.copy_distance).double().mean())
        # Of the images, and of the real ones that the threshold was taken from.
        variance = share * (1 - share) / len(distances) + COPY_QUANTILE * (1 - COPY_QUANTILE) / len(
            self.nearest_of_real
        )
        return Estimate(share, math.sqrt(variance))


def distribution_metrics(
    features: Tensor, labels: Tensor, reference: Reference, *, absent: Collection[str] = ()
) -> dict[str, Estimate]:
    """Compare images with the reference's, by the figures that so many images, and so many with a class, allow.

    Args:
        features: (n d).
        labels: The classes that the images should show, -1 for none; (n,).
        reference: Real images.
        absent: Figures that are left out.
    """
    # Fewer than the samples may be held out, have latents, or have a class.
    absent = {*absent, *_too_few(min(len(features), len(reference.features)), dimension=features.shape[1])}
    metrics = {name: of(features, reference.features) for name, of in DISTANCES.items() if name not in absent}
    if "precision" not in absent:
        neighbours = precision_recall(features, reference.features)
        metrics |= {"precision": neighbours.precision, "recall": neighbours.recall}
    if reference.probe is not None and (labels >= 0).sum() > 1:
        features, labels = features[(labels >= 0).to(features.device)], labels[labels >= 0]
        right = reference.probe.predict(features) == labels
        metrics["class_accuracy"] = mean_estimate(right.double())
        totals = [int((labels == label).sum()) for label in labels.unique()]
        successes = [int(right[labels == label].sum()) for label in labels.unique()]
        metrics["worst_class_accuracy"] = worst_fraction(successes, totals)
    return metrics


def retrieval_metrics(ridge: RidgeMap, features: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, Estimate]:
    """Measure how many images find their own caption among those of all; nothing where fewer than 2 captions differ.

    Args:
        ridge: Map from image features to text features.
        features: (n d).
        texts: Text features of the captions; (n k).
        captions: Of each image, "" for none.
    """
    named = [caption for caption in captions if caption]
    if len(set(named)) < 2:
        return {}
    known = torch.tensor([bool(caption) for caption in captions], device=features.device)
    found = ridge.retrieve(features[known], torch.arange(len(named)), texts.to(features.device)[known], named)
    return dict(zip(RETRIEVED, (found.first, found.in_five), strict=True))


def metrics_of_samples(sweep: Mapping[float, Any], guidance: float) -> dict[str, Any]:
    """Return the metrics of samples without guidance and with it, by the names that they have in an error budget."""
    return {f"guidance {scale:g}": sweep[scale] for scale in sorted({1.0, guidance} & sweep.keys())}


def mean_metrics(values: Mapping[str, Tensor]) -> Metrics:
    """Average the values of single images, (n,) each, with standard errors."""
    return {name: as_metric(mean_estimate(of_images)) for name, of_images in values.items()}


def as_metric(estimate: Estimate) -> dict[str, float]:
    return {"value": float(estimate.value), "error": float(estimate.error)}


def log_scores(tracker: Tracker | SilentTracker, scores: Mapping[str, Any]) -> None:
    """Log ``metrics.json``: at the default guidance, at the best, over all, and over checkpoints or widths.

    Of the error budget the distances alone. The sweep is logged at 100 times its guidance, which is a metric beside the
    others: charts take it as their x axis.
    """
    sweep = list(scores["sweep"])
    default = next(entry for entry in sweep if entry["guidance"] == scores["default_guidance"])
    best = min(sweep, key=lambda entry: entry[BEST_BY]["value"] if BEST_BY in entry else 0.0)
    groups = {"eval": default, "eval/best": best, **{f"eval/{name}": scores.get(name, {}) for name in GROUPS}}
    named = {name: value for group, metrics in groups.items() for name, value in _named(group, metrics).items()}
    budget = scores.get("error_budget", {})
    named |= {f"eval/error_budget/{step}": each[BEST_BY]["value"] for step, each in budget.items() if BEST_BY in each}
    tracker.log_metrics(named, step=0)
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
