"""Replicates: the evaluations of trainings that differ in their seed alone, as ``launch/replicate.sh`` makes them.

``unet-seed_N`` and ``evaluation-seed_N`` lie beside ``unet`` and ``evaluation``; they belong together when the same
latents were trained on in the same way, and the contracts are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from data.files import read_json
from data.manifest import MANIFEST_NAME, read_manifest
from pipelines.evaluation.contract import contract_digest
from pipelines.evaluation.figures import features_name
from pipelines.evaluation.samples import key_prefix
from pipelines.evaluation.verdict import CHOOSING, JUDGED, Measured


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation of one training."""

    folder: Path
    figures: Mapping[str, Any]  # metrics.json

    @classmethod
    def read(cls, folder: Path) -> "Evaluation":
        """Read the evaluation in a folder.

        Raises:
            FileNotFoundError: It is unfinished.
            ValueError: It is damaged.
        """
        mend = f"Remove {folder / MANIFEST_NAME} and evaluate again."
        if not (folder / MANIFEST_NAME).exists():
            raise FileNotFoundError(folder / MANIFEST_NAME)
        return cls(folder=folder, figures=read_json(folder / "metrics.json", mend=mend))

    @cached_property
    def sweep(self) -> dict[float, Mapping[str, Any]]:
        """Metrics by guidance scale, each with value and error."""
        return {entry["guidance"]: entry for entry in self.figures["sweep"]}

    def measured(self, metric: str, guidance: float) -> Measured:
        """Return one metric, with its influences where they are stored."""
        found, influences = self.sweep[guidance][metric], {}
        path = self.folder / features_name(key_prefix(guidance))
        if path.exists():  # else of an older version
            with safe_open(path, framework="pt") as stored:
                keys = [key for key in stored.keys() if key.startswith(f"influence.{metric}.")]  # noqa: SIM118 (no dict)
                influences = {key.rpartition(".")[2]: stored.get_tensor(key).double() for key in keys}
        return Measured(value=found["value"], error=found["error"], influences=influences)


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison: the trainings of one experiment that differ in their seed."""

    name: str
    evaluations: tuple[Evaluation, ...]
    left_out: tuple[str, ...]  # folders that look like replicates, each with the reason why they are none

    @cached_property
    def guidance(self) -> float:
        """The guidance of the best mean Frechet distance, at which all metrics are compared; else the default."""
        means = {scale: self.mean(CHOOSING, scale) for scale in self.evaluations[0].sweep}
        known = {scale: -JUDGED[CHOOSING] * mean for scale, mean in means.items() if mean is not None}
        default: float = self.evaluations[0].figures["default_guidance"]
        return min(known, key=known.__getitem__, default=default)

    def mean(self, metric: str, guidance: float | None = None) -> float | None:
        """Return the mean of a metric over the trainings; None where it was not measured."""
        scale = self.guidance if guidance is None else guidance
        found = [each.sweep[scale][metric]["value"] for each in self.evaluations if metric in each.sweep[scale]]
        return float(np.mean(found)) if len(found) == len(self.evaluations) else None

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return [name for name in self.evaluations[0].sweep[self.guidance] if name != "guidance"]

    def measured(self, metric: str) -> list[Measured]:
        """Return one metric of every training, at the side's guidance."""
        return [each.measured(metric, self.guidance) for each in self.evaluations]


def read_side(name: str, folder: Path) -> Side:
    """Read an evaluation and those of its replicates.

    Raises:
        FileNotFoundError: The evaluation is unfinished.
        ValueError: A file is damaged.
    """
    own, found, left_out = Evaluation.read(folder), [], []
    trainings = [_training_of(folder)]
    for place in sorted(folder.parent.glob(f"{folder.name}-seed_*")):
        try:
            replicate, training = Evaluation.read(place), _training_of(place)
        except FileNotFoundError:
            left_out.append(f"{place.name} is unfinished")
            continue
        if len({contract_digest(each.figures["contract"]) for each in (own, replicate)}) > 1:
            left_out.append(f"{place.name} was measured under another contract")
        elif training is None or trainings[0] is None or training.request != trainings[0].request:
            left_out.append(f"{place.name} is of a training that differs in more than its seed")
        elif training in trainings:
            left_out.append(f"{place.name} is of a training with the seed of another one")
        else:
            found.append(replicate)
            trainings.append(training)
    return Side(name=name, evaluations=(own, *found), left_out=tuple(left_out))


class _Training(NamedTuple):
    """What a U-Net was trained with."""

    request: tuple[Any, ...]  # configuration but for the seed, and digests of the inputs
    seed: int


def _training_of(evaluation: Path) -> _Training | None:
    """Read how the U-Net of an evaluation was trained; None where that U-Net is not there any more."""
    try:
        unet = read_manifest(read_manifest(evaluation).provenance["inputs"]["unet"])
        config = dict(unet.config)
        return _Training(request=(config, dict(unet.parents)), seed=config.pop("seed"))
    except (FileNotFoundError, KeyError):
        return None
