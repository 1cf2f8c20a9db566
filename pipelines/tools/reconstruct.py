"""Make a U-Net with averages of another width than it was trained with, out of its checkpoints.

    python -m pipelines.tools.reconstruct --config EXPERIMENT.toml --relative_std 0.08 --output runs/NAME/unet-0p08

Reads: ``runs/NAME/unet/`` with its ``checkpoints/``; the training must have had averages of kind ``power``, two of them
for a good match, and have kept checkpoints (``checkpoint.keep_every``). Writes: ``OUTPUT`` as a folder that
``inputs.unet`` takes. The width is worth a sweep: its best value depends on the model and on the guidance.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field, NonNegativeInt
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data.files import make_folder, sha256_of, write_atomically, write_json
from data.manifest import MANIFEST_NAME, FileEntry, Reconstruction, UNetManifest, write_manifest
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import Name, StageConfig
from pipelines.runtime.stage.fingerprint import read_parents
from pipelines.runtime.stage.provenance import code_version
from pipelines.runtime.training.checkpoint import PREFIX, verify
from pipelines.runtime.training.ema import Combination, Snapshot, combine_snapshots

PART = "unet_averages.safetensors"


class ReconstructInputs(BaseModel, frozen=True, extra="forbid"):
    """The training."""

    unet: str  # folder of the U-Net, with its checkpoints


class ReconstructConfig(StageConfig):
    """The wanted average: width, and update that it ends with."""

    inputs: ReconstructInputs  # where the checkpoints are
    relative_std: Annotated[float, Field(gt=0, lt=0.28)] = 0.1  # width of its profile, as a fraction of training
    update: NonNegativeInt = 0  # that it ends with; 0 is the last one
    output: Name  # folder to write to


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(ReconstructConfig, reconstruct, table="reconstruct", about=__doc__, argv=argv)


def reconstruct(config: ReconstructConfig) -> Answer:
    """Combine the averages in the checkpoints and publish the result."""
    unet = read_parents(config).unet
    source, output = Path(config.inputs.unet), Path(config.output)
    with config_error_at("reconstruct.output"):
        make_folder(output)
    if (output / MANIFEST_NAME).is_file() or output.resolve() == source.resolve():
        raise ConfigError(f"output = {config.output!r} holds something already. Give a new folder.")
    stored = snapshots_in(source, unet)
    last = max((snapshot.update for snapshot, _, _ in stored), default=0)
    wanted = Snapshot(config.update or last, config.relative_std)
    with config_error_at("inputs.unet"):
        combination = combine_snapshots([snapshot for snapshot, _, _ in stored], wanted)
        weights = combined_weights(source, stored, combination)

    path = output / "unet.safetensors"
    write_atomically(path, save(weights))
    write_json(output / "config.json", json.loads((source / "config.json").read_bytes()))
    changed = {
        "weights": sha256_of(path),
        "parents": {"unet": unet.digest},
        "files": (FileEntry.of(path), FileEntry.of(output / "config.json")),
        "reconstruction": Reconstruction(update=wanted.update, relative_std=wanted.relative_std),
        "provenance": {"code_version": code_version(), "residual": combination.residual},
    }
    write_manifest(output, unet.model_copy(update=changed))
    text = (
        f"reconstruct: {path}, a power average of width {wanted.relative_std:g} after update {wanted.update}, from "
        f"{len(stored)} averages; its profile is missed by {100 * combination.residual:.2g} %"
    )
    found = {"weights": str(path), **wanted._asdict(), "averages": len(stored), "residual": combination.residual}
    return Answer(found, text)


def snapshots_in(folder: Path, unet: UNetManifest) -> list[tuple[Snapshot, Path, int]]:
    """Return every power average in the folder's checkpoints: width and update, checkpoint, and number there.

    Raises:
        ConfigError: The training had none, or a checkpoint is damaged.
    """
    averages = unet.config["averages"]
    powers = [(number, each["relative_std"]) for number, each in enumerate(averages) if each["kind"] == "power"]
    if not powers:
        raise ConfigError(
            f"inputs.unet = {str(folder)!r} was trained without averages of kind 'power', which alone can be "
            "reconstructed. Train with train_unet.averages = "
            '[{ kind = "power", relative_std = 0.1 }, { kind = "power", relative_std = 0.05 }].'
        )
    found = []
    for path in sorted((folder / "checkpoints").glob(f"{PREFIX}*")):
        with config_error_at("inputs.unet"):
            verify(path)
        update = int(path.name.removeprefix(PREFIX))
        found += [(Snapshot(update, relative_std), path, number) for number, relative_std in powers]
    return found


def combined_weights(
    folder: Path, stored: list[tuple[Snapshot, Path, int]], combination: Combination
) -> dict[str, Tensor]:
    """Sum up the stored averages, one tensor at a time in float64."""
    published = load_file(folder / "unet.safetensors")
    files = [safe_open(path / PART, framework="pt") for _, path, _ in stored]
    combined = {}
    for name, tensor in published.items():
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for (_, _, number), file, weight in zip(stored, files, combination.weights.tolist(), strict=True):
            total += weight * file.get_tensor(f"{number}/{name}")
        combined[name] = total.to(tensor.dtype)
    return combined


if __name__ == "__main__":
    sys.exit(main())
