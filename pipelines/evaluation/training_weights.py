"""Weights that a training of a U-Net went through: the averages in its checkpoints, and power averages of any width."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from data.manifest import UNetManifest
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.training.checkpoint import PREFIX, verify
from pipelines.runtime.training.ema import Combination, Snapshot, combine_snapshots

PART = "unet_averages.safetensors"
RelativeStd = Annotated[float, Field(gt=0, lt=0.28)]


class CurveConfig(BaseModel, frozen=True, extra="forbid"):
    """Points of a training that are evaluated besides its published weights, at the default guidance."""

    updates: tuple[PositiveInt, ...] = ()  # checkpoints, which must have been kept (train_unet.checkpoint.keep_every)
    average: NonNegativeInt = 0  # which of train_unet.averages of these checkpoints; 0 is the published one
    relative_stds: tuple[RelativeStd, ...] = ()  # widths of power averages after the last update, reconstructed

    @property
    def points(self) -> dict[str, dict[str, Any]]:
        """All points by name, each as ``metrics.json`` describes it."""
        updates = {f"update_{update}": {"update": update, "average": self.average} for update in self.updates}
        widths = {f"width_{width!r}".replace(".", "p"): {"relative_std": width} for width in self.relative_stds}
        return updates | widths


class TrainingWeights:
    """Weights of a trained U-Net at points of its training.

    Args:
        folder: Of the U-Net, with its checkpoints.
        unet: Its manifest.
    """

    def __init__(self, folder: str | Path, unet: UNetManifest) -> None:
        self._folder, self._unet = Path(folder), unet
        self._checkpoints = {
            int(path.name.removeprefix(PREFIX)): path
            for path in sorted((self._folder / "checkpoints").glob(f"{PREFIX}*"))
        }

    def check(self, curve: CurveConfig) -> None:
        """Refuse points that this training did not keep.

        Raises:
            ConfigError: Saying which there are.
        """
        kept = ", ".join(map(str, self._checkpoints)) or "none"
        if missing := [update for update in curve.updates if update not in self._checkpoints]:
            raise ConfigError(
                f"evaluate.curve.updates: there is no checkpoint of update {missing[0]} in {self._folder}; kept are: "
                f"{kept}. Train with train_unet.checkpoint.keep_every to keep more."
            )
        if curve.updates and curve.average >= (count := len(self._unet.config["averages"])):
            raise ConfigError(f"evaluate.curve.average = {curve.average}, but the training has {count} average(s).")
        for width in curve.relative_stds:
            self.power_average(width)

    def published(self) -> dict[str, Tensor]:
        """Return the published weights."""
        return load_file(self._folder / "unet.safetensors")

    def at(self, point: dict[str, Any]) -> dict[str, Tensor]:
        """Return the weights of one of ``CurveConfig.points``.

        Raises:
            ConfigError: A checkpoint is damaged.
        """
        if "relative_std" in point:
            return self.combined(self.power_average(point["relative_std"])[1])
        path = self._checkpoints[point["update"]]
        with config_error_at("inputs.unet"):
            verify(path)
        with safe_open(path / PART, framework="pt") as file:
            return {name: file.get_tensor(f"{point['average']}/{name}") for name in self.published()}

    def power_average(self, relative_std: float, update: int = 0) -> tuple[Snapshot, Combination]:
        """Return the power average of a width after ``update``, 0 for the last, and how the checkpoints combine to it.

        Raises:
            ConfigError: The training had no power average, or none as late as that.
        """
        last = max((snapshot.update for snapshot, _ in self.snapshots), default=0)
        wanted = Snapshot(update or last, relative_std)
        with config_error_at("inputs.unet"):
            return wanted, combine_snapshots([snapshot for snapshot, _ in self.snapshots], wanted)

    @property
    def snapshots(self) -> list[tuple[Snapshot, int]]:
        """Every power average in the checkpoints: width and update, and its number there.

        Raises:
            ConfigError: The training had none.
        """
        averages = self._unet.config["averages"]
        powers = [(number, each["relative_std"]) for number, each in enumerate(averages) if each["kind"] == "power"]
        if not powers:
            raise ConfigError(
                f"inputs.unet = {str(self._folder)!r} was trained without averages of kind 'power', which alone can be "
                "reconstructed. Train with train_unet.averages = "
                '[{ kind = "power", relative_std = 0.1 }, { kind = "power", relative_std = 0.05 }].'
            )
        return [(Snapshot(update, width), number) for update in self._checkpoints for number, width in powers]

    def combined(self, combination: Combination) -> dict[str, Tensor]:
        """Sum up the stored averages, one tensor at a time in float64.

        Raises:
            ConfigError: A checkpoint is damaged.
        """
        with config_error_at("inputs.unet"):
            for path in self._checkpoints.values():
                verify(path)
        files = {update: safe_open(path / PART, framework="pt") for update, path in self._checkpoints.items()}
        combined = {}
        for name, tensor in self.published().items():
            total = torch.zeros_like(tensor, dtype=torch.float64)
            for (snapshot, number), weight in zip(self.snapshots, combination.weights.tolist(), strict=True):
                total += weight * files[snapshot.update].get_tensor(f"{number}/{name}")
            combined[name] = total.to(tensor.dtype)
        return combined
