"""Folders that diffusers wrote: the network's configuration, its weights file and the scaling of its latents."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_SCALING_FACTOR = 0.18215  # of an AutoencoderKL whose config names none, as those of Stable Diffusion 1
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


def config_of(folder: Path) -> dict[str, Any] | None:
    """Return ``config.json`` of a folder; None where there is none.

    Raises:
        ValueError: It is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    return config if isinstance(config, dict) else None


def weights_of(folder: Path) -> Path:
    """Return the weights file of a folder.

    Raises:
        ValueError: There is none in safetensors.
    """
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} holds no {WEIGHTS_NAMES[0]}. Weights are read from safetensors only, since a pickled file can run "
        "code; save them anew with diffusers' save_pretrained(..., safe_serialization=True)."
    )


def latent_scaling_of(vae: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation by which diffusers normalises latents, (z - mean) / std; one number a channel."""
    channels = vae["latent_channels"]
    factor = vae.get("scaling_factor", DEFAULT_SCALING_FACTOR)
    mean = vae.get("latents_mean") or [vae.get("shift_factor") or 0.0] * channels
    std = vae.get("latents_std") or [1.0] * channels
    return tuple(float(m) for m in mean), tuple(float(s) / factor for s in std)
