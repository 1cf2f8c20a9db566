"""Networks that others published in the format of diffusers: an autoencoder as ``inputs.vae``, a U-Net to start from.

Only safetensors are read. A folder of diffusers has no manifest of ours, so one is made of what it holds: the sha256
of its weights ties latents to it as to a VAE of our own. Its scaling is taken over, since a published U-Net expects
latents that are scaled so.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from safetensors.torch import load_file

from data.files import sha256_of
from data.manifest import Manifest
from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import unet_config_from_diffusers, vae_config_from_diffusers
from models.diffusers.weights import denoiser_from_diffusers, vae_from_diffusers
from models.unet import UNetConfig

FOREIGN_STAGE = "diffusers"  # what stands in the manifest where ours name the stage
DEFAULT_SCALING_FACTOR = 0.18215  # of an AutoencoderKL whose config names none, as those of Stable Diffusion 1
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")


class RandomStart(BaseModel, frozen=True, extra="forbid"):
    """Train from random weights."""

    kind: Literal["random"] = "random"


class DiffusersStart(BaseModel, frozen=True, extra="forbid"):
    """Train on from a U-Net in the format of diffusers; denoiser.network must describe it."""

    kind: Literal["diffusers"] = "diffusers"
    folder: Path  # holds config.json and diffusion_pytorch_model.safetensors


StartConfig = Annotated[RandomStart | DiffusersStart, Field(discriminator="kind")]


# ------------------------------------------------------------------------------------------------------------ VAE


def foreign_vae(folder: Path) -> Manifest | None:
    """Return a manifest for a diffusers ``AutoencoderKL``, None where the folder holds none.

    Raises:
        ValueError: It is one, but its weights are not there as safetensors.
    """
    theirs = _config_of(folder)
    if theirs is None or theirs.get("_class_name") != "AutoencoderKL":
        return None
    content = {
        "stage": FOREIGN_STAGE,
        "weights": sha256_of(_weights_of(folder)),
        "network": {key: value for key, value in theirs.items() if not key.startswith("_")},
        "normalisation": _normalisation(theirs),
        "files": [],
    }
    return Manifest(content=content)


#: Which inputs may be a folder of another program, and what makes a manifest of it.
DIFFUSERS_READERS: Mapping[str, Callable[[Path], Manifest | None]] = {"vae": foreign_vae}


def _normalisation(theirs: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the mean and deviation that diffusers normalises latents by: (z - mean) / std, one number a channel."""
    channels = theirs["latent_channels"]
    factor = theirs.get("scaling_factor", DEFAULT_SCALING_FACTOR)
    mean = theirs.get("latents_mean") or [theirs.get("shift_factor") or 0.0] * channels
    std = theirs.get("latents_std") or [1.0] * channels
    return {"mean": [float(m) for m in mean], "std": [float(s) / factor for s in std]}


def read_foreign_vae(folder: Path, manifest: Manifest) -> AutoencoderKL:
    """Build the autoencoder of a folder that ``foreign_vae`` knows.

    Raises:
        ValueError: It has parts that ours lacks, or its weights have changed since.
    """
    path = _weights_of(folder)
    found = sha256_of(path)
    if found != manifest.content["weights"]:
        raise ValueError(f"{path} has sha256 {found[:12]}, not {manifest.content['weights'][:12]}: it was changed.")
    config, image_channels = vae_config_from_diffusers(_config_of(folder) or {})
    network = AutoencoderKL(config, image_channels=image_channels)
    network.load_state_dict(vae_from_diffusers(load_file(path), config))
    return network


# ---------------------------------------------------------------------------------------------------------- U-Net


def check_start(start: RandomStart | DiffusersStart, denoiser: DenoiserConfig, *, latent_channels: int) -> None:
    """Refuse a U-Net to start from that is not the one which ``denoiser`` describes.

    Raises:
        ValueError: With each difference, ours and theirs.
    """
    if isinstance(start, RandomStart):
        return
    theirs = _config_of(start.folder)
    if theirs is None:
        raise ValueError(f"{start.folder} holds no config.json: give the folder of a U-Net in the format of diffusers.")
    _weights_of(start.folder)
    read = unet_config_from_diffusers(theirs)
    asked = _comparable(denoiser.network, denoiser.token_width)
    found = _comparable(read.network, read.token_width)
    asked |= {"latent channels": latent_channels, "width of the tokens": denoiser.token_width}
    found |= {"latent channels": read.in_channels, "width of the tokens": read.token_width}
    if wrong := [
        f"{key} = {_shown(found[key])}, not {_shown(asked[key])}" for key in asked if asked[key] != found[key]
    ]:
        raise ValueError(
            f"the U-Net in {start.folder} has {'; '.join(wrong)}. Change denoiser.network and its conditioners to "
            "what is there, or start from random weights."
        )


def load_start(start: RandomStart | DiffusersStart, denoiser: Denoiser) -> str | None:
    """Put the weights to start from into ``denoiser``; return their sha256, None for random ones.

    What a U-Net of diffusers has no place for, such as a learned null caption, stays as it is.

    Raises:
        ValueError: They do not fit.
    """
    if isinstance(start, RandomStart):
        return None
    path = _weights_of(start.folder)
    weights = denoiser_from_diffusers(load_file(path), denoiser.config)
    try:
        missing, left_over = denoiser.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    assert not left_over
    if lost := [name for name in missing if not name.startswith("conditioners.")]:
        raise ValueError(f"{path} lacks {lost[:5]}.")
    return sha256_of(path)


def _comparable(network: UNetConfig, token_width: int) -> dict[str, Any]:
    """Return what decides the weights of a U-Net: heads only where there is attention, depth only with tokens."""
    last = len(network.channels) - 1
    attends = [on or (level == last and network.mid_attention) for level, on in enumerate(network.attention)]
    told = network.model_dump(exclude={"checkpointed_levels", "dropout", "heads", "transformer_depth"})
    for name in ("heads", "transformer_depth") if token_width else ("heads",):
        told[name] = [each if on else 0 for each, on in zip(getattr(network, name), attends, strict=True)]
    return told


def _shown(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# ----------------------------------------------------------------------------------------------- what both share


def _config_of(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    return config if isinstance(config, dict) else None


def _weights_of(folder: Path) -> Path:
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(
        f"{folder} holds no {WEIGHTS_NAMES[0]}. Weights are read from safetensors only, since a pickled file can run "
        "code; save them anew with diffusers' save_pretrained(..., safe_serialization=True)."
    )
