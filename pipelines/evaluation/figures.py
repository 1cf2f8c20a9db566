"""Figures of an evaluation: each set of images against the real ones, by features.

Every set (the samples of one guidance, reconstructions, real images) is a work item that any rank can measure on its
own. What the real images alone decide, the class probe and the distances at which a sample is a copy, is one item of
the corpus, beside its features, and serves all evaluations.
"""

from dataclasses import fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from data.files import write_atomically
from models.metrics.neighbours import nearest
from models.metrics.probe import LinearProbe
from pipelines.evaluation.error_budget import DECODED, REAL
from pipelines.evaluation.metrics import (
    COPY_QUANTILE,
    PROBED,
    Metrics,
    Reference,
    as_metric,
    distribution_metrics,
    mean_metrics,
)
from pipelines.evaluation.real_images import RealSet
from pipelines.evaluation.samples import ItemMaker

CALIBRATION = "calibration"
FIGURES = "figures"


class FigureMaker:
    """Work items that measure sets of images; a pure function of the features that ``maker`` made."""

    def __init__(self, maker: ItemMaker) -> None:
        self._maker, self._real = maker, maker.real
        #: Set of images -> the items that hold it; those of the real images themselves lie beside their corpus.
        self.sets = maker.names.samples | maker.names.steps
        if REAL not in maker.absent:
            self.sets[REAL] = []

    @property
    def names(self) -> list[str]:
        """Names of all items."""
        return [f"{FIGURES}-{name}" for name in self.sets]

    def make_calibration(self, name: str) -> dict[str, Any]:
        """Fit the class probe, and measure how close validation images come to training images."""
        tensors: dict[str, Tensor] = {}
        validation = self._real.features("val")
        if "copied" not in self._maker.absent:
            tensors["nearest"] = nearest(validation, self.training_features).distances
        contract: dict[str, Any] = {"kind": "none"}
        if not set(PROBED) & self._maker.absent.keys():
            num_classes, labels = len(self._maker.stage.parents.unet.classes), self._real.labels("train")
            features, labels = _labelled(self._real.features("train"), labels)
            probe = LinearProbe.fit(features, labels, num_classes=num_classes)
            tensors |= {f"probe.{field.name}": getattr(probe, field.name) for field in fields(probe)}
            accuracy = as_metric(probe.accuracy(*_labelled(validation, self._real.labels("val"))))
            contract = {"kind": "linear", "num_images": len(labels), "validation_accuracy": accuracy}
        path = self._real.folder / f"{name}.safetensors"
        write_atomically(path, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))
        return {"probe": contract}

    def make(self, name: str) -> Metrics:
        """Measure one set of images, and store its features."""
        maker, kind = self._maker, name.removeprefix(f"{FIGURES}-")
        if kind == REAL:
            features, labels = self._real.features("floor"), self._real.labels("floor")
        else:
            features, labels = (maker.read(self.sets[kind], key) for key in ("features", "labels"))
            path = maker.stage.folder / features_name(kind)
            write_atomically(path, save({"features": features, "labels": labels}))
        # Training images are copies of themselves.
        absent = {*maker.absent, "copied"} if (kind, self._real.floor_split) == (REAL, "train") else maker.absent
        metrics = distribution_metrics(features.to(maker.model.device), labels, self.reference, absent=absent)
        if kind in DECODED:
            metrics |= mean_metrics({"psnr": maker.read(self.sets[kind], "psnr")})
        return metrics

    @cached_property
    def reference(self) -> Reference:
        """The real images, with the probe and the calibration of copies."""
        tensors = load_file(self._real.folder / f"{CALIBRATION}.safetensors")
        parts = {key.removeprefix("probe."): part for key, part in tensors.items() if key.startswith("probe.")}
        return Reference(
            features=self._real.features(self._real.reference),
            probe=LinearProbe(**parts) if parts else None,
            training_features=self.training_features,
            nearest_of_real=tensors.get("nearest", torch.empty(0)),
        )

    @cached_property
    def training_features(self) -> Tensor:
        """Features of all training images that were read; (t d)."""
        return torch.cat([self._real.features(name) for name in self._searched])

    @property
    def num_searched(self) -> int:
        """Training images among which copies are searched."""
        return sum(len(self._real.indices[name]) for name in self._searched)

    def nearest_pairs(self, kind: str, *, count: int) -> tuple[np.ndarray, np.ndarray, list[float]]:
        """Return the samples of one set that are closest to a training image.

        Returns:
            The samples and the training images, uint8 (count h w c) each, closest first, and their distances as
            multiples of that below which a sample counts as a copy.
        """
        maker, size = self._maker, self._maker.config.batch_size
        features = maker.read(maker.names.samples[kind], "features").to(maker.model.device)
        found = nearest(features, self.training_features)
        closest = found.distances.argsort()[:count].tolist()
        samples = [maker.images(kind, index // size)[index % size] for index in closest]
        places = np.concatenate([self._real.indices[name] for name in self._searched])
        training = self._real.shards["train"].read(places[found.indices[closest].cpu().numpy()]).images
        threshold = float(torch.quantile(self.reference.nearest_of_real, COPY_QUANTILE)) or 1.0
        return np.stack(samples), training, [float(found.distances[index]) / threshold for index in closest]

    @property
    def _searched(self) -> list[RealSet]:
        return ["train", "floor"] if self._real.floor_split == "train" else ["train"]


def features_name(kind: str) -> str:
    """Return the file of a set's features, beside the samples."""
    return f"features-{kind}.safetensors"


def _labelled(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    known = labels >= 0
    return features[known.to(features.device)], labels[known]
