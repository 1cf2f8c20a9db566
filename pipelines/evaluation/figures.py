"""Figures of an evaluation: each set of images against the real ones, by features.

Every set (the samples of one guidance, reconstructions, real images) is a work item that any rank can measure on its
own. What the real images alone decide, the class probe and the distances at which a sample is a copy, is one item of
the corpus, beside its features, and serves all evaluations.
"""

from collections.abc import Mapping
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
from pipelines.evaluation.metrics import COPY_QUANTILE, PROBED, Metrics, Reference, distribution_metrics
from pipelines.evaluation.samples import ItemMaker, key_prefix
from pipelines.model.grids import grid_png

CALIBRATION = "calibration"
FIGURES = "figures"


class FigureMaker:
    """Work items that measure sets of images; a pure function of the features that ``maker`` made."""

    def __init__(self, maker: ItemMaker) -> None:
        self._maker = maker
        #: Item -> the images that it measures.
        self.names = {f"{FIGURES}-{key_prefix(scale)}": of_scale for scale, of_scale in maker.names.samples.items()}
        if "floor" not in maker.absent:
            self.names |= {f"{FIGURES}-real": [], f"{FIGURES}-floor": maker.names.floor}

    def make_calibration(self, name: str) -> dict[str, Any]:
        """Fit the class probe, and measure how close validation images come to training images."""
        tensors: dict[str, Tensor] = {}
        if "copied" not in self._maker.absent:
            tensors["nearest"] = nearest(self._of_real("val", "features"), self.training_features).distances
        if not set(PROBED) & self._maker.absent.keys():
            features, labels = (self._of_real("train", key) for key in ("features", "labels"))
            known = labels >= 0
            num_classes = len(self._maker.stage.parents.unet.classes)
            probe = LinearProbe.fit(features[known], labels[known], num_classes=num_classes)
            tensors |= {f"probe.{field.name}": getattr(probe, field.name) for field in fields(probe)}
        path = self._maker.reference_folder / f"{name}.safetensors"
        write_atomically(path, save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}))
        return {}

    def make(self, name: str) -> Metrics:
        """Measure one set of images."""
        maker, kind = self._maker, name.removeprefix(f"{FIGURES}-")
        if kind == "real":
            features, labels = (self._of_real("floor", key) for key in ("features", "labels"))
        else:
            features = self._placed(maker.read(self.names[name], "features"))
            in_floor = kind == "floor"
            labels = maker.read(self.names[name], "labels") if in_floor else maker.labels(range(len(features)))
        absent = {*maker.absent, "copied"} if kind == "real" else maker.absent  # real training images are their own
        return distribution_metrics(features, labels, self.reference, absent=absent)

    @cached_property
    def reference(self) -> Reference:
        """The real images, with the probe and the calibration of copies."""
        tensors = load_file(self._maker.reference_folder / f"{CALIBRATION}.safetensors")
        parts = {key.removeprefix("probe."): part for key, part in tensors.items() if key.startswith("probe.")}
        labels = self._of_real("val", "labels")
        return Reference(
            features=self._of_real("val", "features"),
            labels=labels,
            probe=LinearProbe(**parts) if parts else None,
            num_probed=int((self._of_real("train", "labels") >= 0).sum()) if parts else 0,
            training_features=self.training_features,
            nearest_of_real=tensors.get("nearest", torch.empty(0)),
        )

    @cached_property
    def training_features(self) -> Tensor:
        """Features of all training images that were read; (t d)."""
        found = [self._of_real(split, "features") for split in self.searched]
        return torch.cat(found) if found else torch.empty(0, self._maker.extractor.dimension)

    def copies_picture(self, scale: float, *, count: int = 10) -> bytes:
        """Return the samples of ``scale`` that are closest to a training image, each above that image; PNG."""
        maker, size = self._maker, self._maker.config.batch_size
        names = maker.names.samples[scale]
        found = nearest(self._placed(maker.read(names, "features")), self.training_features)
        closest = found.distances.argsort()[:count].tolist()
        samples = [maker.read([names[index // size]], "images")[index % size].numpy() for index in closest]

        places = np.concatenate([maker.real_indices[split] for split in self.searched])
        training = maker.images["train"].read(places[found.indices[closest].cpu().numpy()]).images
        threshold = float(torch.quantile(self.reference.nearest_of_real, COPY_QUANTILE)) or 1.0
        return grid_png(
            np.stack([np.stack(samples), training]),
            column_labels=[f"{float(found.distances[index]) / threshold:.2f}" for index in closest],
            row_labels=["sample", "training image"],
            title="samples nearest to training images, by distance: at most 1 counts as a copy",
        )

    @property
    def searched(self) -> Mapping[str, int]:
        """Sets of training images among which copies are searched, in order, with their sizes."""
        sizes = {split: len(indices) for split, indices in self._maker.real_indices.items() if split != "val"}
        return {split: size for split, size in sizes.items() if size}

    def _of_real(self, split: str, key: str) -> Tensor:
        found = self._maker.read_real(split, key)
        return self._placed(found) if key == "features" else found

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._maker.model.device)
