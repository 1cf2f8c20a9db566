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

from pydantic import BaseModel, NonNegativeInt
from safetensors.torch import save

from data.files import make_folder, sha256_of, write_atomically, write_json
from data.manifest import MANIFEST_NAME, FileEntry, Reconstruction, write_manifest
from pipelines.evaluation.training_weights import RelativeStd, TrainingWeights
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import Name, StageConfig
from pipelines.runtime.stage.fingerprint import read_parents
from pipelines.runtime.stage.provenance import code_version


class ReconstructInputs(BaseModel, frozen=True, extra="forbid"):
    """The training."""

    unet: str  # folder of the U-Net, with its checkpoints


class ReconstructConfig(StageConfig):
    """The wanted average: width, and update that it ends with."""

    inputs: ReconstructInputs  # where the checkpoints are
    relative_std: RelativeStd = 0.1  # width of its profile, as a fraction of training
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
    training = TrainingWeights(source, unet)
    wanted, combination = training.power_average(config.relative_std, config.update)
    weights = training.combined(combination)

    path = output / "unet.safetensors"
    write_atomically(path, save(weights))
    write_json(output / "config.json", json.loads((source / "config.json").read_bytes()))
    changed = {
        "weights": sha256_of(path),
        "parents": {**unet.parents, "unet": unet.digest},
        "files": (FileEntry.of(path), FileEntry.of(output / "config.json")),
        "reconstruction": Reconstruction(update=wanted.update, relative_std=wanted.relative_std),
        "provenance": {"code_version": code_version(), "residual": combination.residual},
    }
    write_manifest(output, unet.model_copy(update=changed))
    text = (
        f"reconstruct: {path}, a power average of width {wanted.relative_std:g} after update {wanted.update}, from "
        f"{len(training.snapshots)} averages; its profile is missed by {100 * combination.residual:.2g} %"
    )
    found = {
        "weights": str(path),
        **wanted._asdict(),
        "averages": len(training.snapshots),
        "residual": combination.residual,
    }
    return Answer(found, text)


if __name__ == "__main__":
    sys.exit(main())
