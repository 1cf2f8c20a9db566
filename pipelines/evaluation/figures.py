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
from models.metrics.estimate import Estimate
from models.metrics.neighbours import nearest
from models.metrics.probe import LinearProbe
from models.metrics.retrieval import RidgeMap
from pipelines.evaluation.error_budget import DECODED, REAL
from pipelines.evaluation.metrics import (
    PROBED,
    Metrics,
    Reference,
    as_metric,
    distribution_metrics,
    mean_metrics,
    retrieval_metrics,
)
from pipelines.evaluation.real_images import RealSet
from pipelines.evaluation.samples import ItemMaker

FIGURES = "figures"


class FigureMaker:
    """Work items that measure sets of images; a pure function of the features that ``maker`` made."""

    def __init__(self, maker: ItemMaker) -> None:
        self._maker, self._real = maker, maker.real
        #: Set of images -> the items that hold it; those of the real images themselves lie beside their corpus.
        self.sets = {kind: maker.batches[kind] for kind in (*maker.sampled, *maker.held_out.steps)}
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
            tensors["nearest.of_real"] = nearest(validation, self.training_features).distances
        contract: dict[str, Any] = {"probe": {"kind": "none"}}
        if not set(PROBED) & self._maker.absent.keys():
            num_classes, labels = len(self._maker.stage.parents.unet.classes), self._real.labels("train")
            features, labels = _labelled(self._real.features("train"), labels)
            probe = LinearProbe.fit(features, labels, num_classes=num_classes)
            tensors |= _tensors("probe", probe)
            accuracy = as_metric(probe.accuracy(*_labelled(validation, self._real.labels("val"))))
            contract["probe"] = {"kind": "linear", "num_images": len(labels), "validation_accuracy": accuracy}
        if self._retrieves:
            texts, captions = self._maker.texts("train")
            known = torch.tensor([bool(caption) for caption in captions])
            ridge = RidgeMap.fit(self._real.features("train")[known], texts[known].to(validation.device))
            tensors |= _tensors("ridge", ridge)
            found = retrieval_metrics(ridge, validation, *self._maker.texts("val"))
            of_validation = {metric: as_metric(estimate) for metric, estimate in found.items()}
            contract["retrieval"] = {"kind": "ridge", "num_images": int(known.sum()), "validation": of_validation}
        path = self._real.folder / f"{name}.safetensors"
        write_atomically(path, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))
        return contract

    def make(self, name: str) -> Metrics:
        """Measure one set of images; store its features, and the influence of each image on each metric."""
        maker, kind = self._maker, name.removeprefix(f"{FIGURES}-")
        if kind == REAL:
            features, labels = self._real.features("floor"), self._real.labels("floor")
        else:
            features, labels = (maker.read(self.sets[kind], key) for key in ("features", "labels"))
        # Training images are copies of themselves.
        absent = {*maker.absent, "copied"} if (kind, self._real.floor_split) == (REAL, "train") else maker.absent
        on_device = features.to(maker.model.device)
        found = distribution_metrics(on_device, labels, self.reference, absent=absent)
        if self._retrieves:
            found |= self._agreement(kind, on_device)
        stored = {"features": features, "labels": labels}
        if "copied" not in absent and len(features):
            near = nearest(on_device, self.training_features)
            found["copied"] = self.reference.copied(near.distances)
            places = np.concatenate([self._real.indices[name] for name in self._searched])
            stored["nearest.index"] = torch.from_numpy(places[near.indices.cpu().numpy()])
            stored["nearest.distance"] = self.reference.relative(near.distances)
        if kind != REAL:
            stored |= {
                f"influence.{metric}.{part}": influence.float()
                for metric, estimate in found.items()
                for part, influence in estimate.influences.items()
            }
            path = maker.stage.folder / features_name(kind)
            write_atomically(path, save(stored))
        metrics = {name: as_metric(estimate) for name, estimate in found.items()}
        if kind in DECODED and len(features) > 1:
            metrics |= mean_metrics({"psnr": maker.read(self.sets[kind], "psnr")})
        return metrics

    @property
    def _retrieves(self) -> bool:
        return bool(self._maker.text_batches) and "retrieval" not in self._maker.absent

    def _agreement(self, kind: str, features: Tensor) -> dict[str, Estimate]:
        """Agreement of a set of images with their captions."""
        if kind in self._maker.sampled:
            texts, captions = self._maker.texts("val")
            rows = torch.from_numpy(self._maker.prompted(range(len(features))))
        else:
            texts, captions = self._maker.texts("floor")
            rows = torch.arange(len(features)) if kind == REAL else self._maker.read(self.sets[kind], "rows")
        ridge = RidgeMap(**self._calibrated("ridge"))
        return retrieval_metrics(ridge, features, texts[rows], [captions[row] for row in rows.tolist()])

    def _calibrated(self, what: str) -> dict[str, Tensor]:
        tensors = load_file(self._real.folder / f"{self._maker.calibration}.safetensors")
        return {name.removeprefix(f"{what}."): part for name, part in tensors.items() if name.startswith(f"{what}.")}

    @cached_property
    def reference(self) -> Reference:
        """The real images, with the probe and the calibration of copies."""
        parts = self._calibrated("probe")
        return Reference(
            features=self._real.features(self._real.reference),
            probe=LinearProbe(**parts) if parts else None,
            nearest_of_real=self._calibrated("nearest").get("of_real", torch.empty(0)),
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
            multiples of that up to which a sample counts as a copy.
        """
        maker, size = self._maker, self._maker.config.batch_size
        stored = load_file(maker.stage.folder / features_name(kind))
        closest = stored["nearest.distance"].argsort(stable=True)[:count]
        samples = [maker.images(kind, index // size)[index % size] for index in closest.tolist()]
        training = self._real.shards["train"].read(stored["nearest.index"][closest].numpy()).images
        return np.stack(samples), training, stored["nearest.distance"][closest].tolist()

    @property
    def _searched(self) -> list[RealSet]:
        return ["train", "floor"] if self._real.floor_split == "train" else ["train"]


def features_name(kind: str) -> str:
    """Return the file of a set's features, beside the samples."""
    return f"features-{kind}.safetensors"


def _tensors(name: str, fitted: LinearProbe | RidgeMap) -> dict[str, Tensor]:
    return {f"{name}.{field.name}": getattr(fitted, field.name) for field in fields(fitted)}


def _labelled(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    known = labels >= 0
    return features[known.to(features.device)], labels[known]
