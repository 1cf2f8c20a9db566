"""Replicates: the evaluations of trainings that differ in their seed alone, as ``launch/replicate.sh`` makes them.

``unet-seed_N`` and ``evaluation-seed_N`` lie beside ``unet`` and ``evaluation``; they belong together when the same
latents were trained on in the same way, and the contracts are equal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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

    @property
    def own(self) -> Evaluation:
        """The evaluation that the others are replicates of."""
        return self.evaluations[0]

    @cached_property
    def guidance(self) -> float:
        """The guidance of the best mean Frechet distance, at which all metrics are compared; else the default.

        Of the scales that all trainings were evaluated at.
        """
        shared = set.intersection(*(set(each.sweep) for each in self.evaluations))
        means = {scale: self._mean(CHOOSING, scale) for scale in self.own.sweep if scale in shared}
        known = {scale: -JUDGED[CHOOSING] * mean for scale, mean in means.items() if mean is not None}
        default: float = self.own.figures["default_guidance"]
        return min(known, key=known.__getitem__, default=default if default in shared else min(shared))

    @cached_property
    def means(self) -> dict[str, float | None]:
        """Mean of each metric over the trainings, at the side's guidance; None where not all have it."""
        return {name: self._mean(name, self.guidance) for name in self.own.sweep[self.guidance] if name != "guidance"}

    def _mean(self, metric: str, guidance: float) -> float | None:
        sweeps = [each.sweep[guidance] for each in self.evaluations]
        known = all(metric in sweep for sweep in sweeps)
        return float(np.mean([sweep[metric]["value"] for sweep in sweeps])) if known else None

    def measured(self, metric: str) -> list[Measured]:
        """Return one metric of every training, at the side's guidance."""
        return [each.measured(metric, self.guidance) for each in self.evaluations]


def read_side(name: str, folder: Path) -> Side:
    """Read an evaluation and those of its replicates.

    Raises:
        FileNotFoundError: The evaluation is unfinished.
        ValueError: A file is damaged.
    """
    found, left_out = [Evaluation.read(folder)], []
    request, seed = _training_of(folder)
    seeds = {seed}
    for place in sorted(folder.parent.glob(f"{folder.name}-seed_*")):
        try:
            replicate, (its_request, seed) = Evaluation.read(place), _training_of(place)
        except FileNotFoundError:
            left_out.append(f"{place.name} is unfinished")
            continue
        shared = set.intersection(*(set(each.sweep) for each in (*found, replicate)))
        if len({contract_digest(each.figures["contract"]) for each in (found[0], replicate)}) > 1:
            left_out.append(f"{place.name} was measured under another contract")
        elif not request or its_request != request:
            left_out.append(f"{place.name} is of a training that differs in more than its seed")
        elif seed in seeds:
            left_out.append(f"{place.name} is of a training with the seed of another one")
        elif not shared:
            left_out.append(f"{place.name} has no guidance scale in common with the others")
        else:
            found.append(replicate)
            seeds.add(seed)
    return Side(name=name, evaluations=tuple(found), left_out=tuple(left_out))


def _training_of(evaluation: Path) -> tuple[dict[str, Any], int]:
    """Read how the U-Net of an evaluation was trained, and its seed; an empty request where that U-Net has gone."""
    try:
        unet = read_manifest(read_manifest(evaluation).provenance["inputs"]["unet"])
        return {**unet.config, "seed": None, "parents": unet.parents}, unet.config["seed"]
    except (FileNotFoundError, KeyError):
        return {}, 0
