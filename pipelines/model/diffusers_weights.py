"""Weights in the format of diffusers: a published autoencoder as ``inputs.vae``, a U-Net to start from.

Only safetensors are read. A folder of diffusers has no manifest of ours, so one is made of what it holds: the sha256
of its weights ties latents to it as to a VAE of our own. Its scaling is taken over, since a published U-Net expects
latents that are scaled so.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from safetensors.torch import load_file

from data.diffusers_folder import config_of, weights_of
from data.files import sha256_of, verify_file
from data.manifest import DiffusersVAEManifest
from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import unet_config_from_diffusers, vae_config_from_diffusers
from models.diffusers.weights import denoiser_from_diffusers, vae_from_diffusers
from models.unet import UNetConfig


class RandomStart(BaseModel, frozen=True, extra="forbid"):
    """Train from random weights."""

    kind: Literal["random"] = "random"


class DiffusersStart(BaseModel, frozen=True, extra="forbid"):
    """Train on from a U-Net in the format of diffusers; denoiser.network must describe it."""

    kind: Literal["diffusers"] = "diffusers"
    folder: Path  # holds config.json and diffusion_pytorch_model.safetensors


StartConfig = Annotated[RandomStart | DiffusersStart, Field(discriminator="kind")]


def read_diffusers_vae(folder: Path, manifest: DiffusersVAEManifest) -> AutoencoderKL:
    """Build the autoencoder of a diffusers folder.

    Raises:
        ValueError: It has parts that ours lacks, or its weights have changed since.
    """
    path = weights_of(folder)
    verify_file(path, sha256=manifest.weights)
    config, image_channels = vae_config_from_diffusers(config_of(folder) or {})
    network = AutoencoderKL(config, image_channels=image_channels)
    network.load_state_dict(vae_from_diffusers(load_file(path), config))
    return network


def check_start(start: RandomStart | DiffusersStart, denoiser: DenoiserConfig, *, latent_channels: int) -> None:
    """Refuse a U-Net to start from that is not the one which ``denoiser`` describes.

    Raises:
        ValueError: With each difference, ours and theirs.
    """
    if isinstance(start, RandomStart):
        return
    theirs = config_of(start.folder)
    if theirs is None:
        raise ValueError(f"{start.folder} holds no config.json: give the folder of a U-Net in the format of diffusers.")
    weights_of(start.folder)
    read = unet_config_from_diffusers(theirs)
    asked = _comparable(denoiser.network, denoiser.token_width, latent_channels)
    found = _comparable(read.network, read.token_width, read.in_channels)
    if wrong := [f"{key} = {found[key]}, not {asked[key]}" for key in asked if asked[key] != found[key]]:
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
    path = weights_of(start.folder)
    weights = denoiser_from_diffusers(load_file(path), denoiser.config)
    try:
        missing, left_over = denoiser.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    assert not left_over
    if lost := [name for name in missing if not name.startswith("conditioners.")]:
        raise ValueError(f"{path} lacks {lost[:5]}.")
    return sha256_of(path)


def _comparable(network: UNetConfig, token_width: int, latent_channels: int) -> dict[str, Any]:
    """Return the settings that decide the weights of a U-Net: heads only with attention, depth only with tokens."""
    found = network.model_dump(mode="json", exclude={"checkpointed_levels", "dropout", "heads", "transformer_depth"})
    for name in ("heads", "transformer_depth") if token_width else ("heads",):
        found[name] = [each if on else 0 for each, on in zip(getattr(network, name), network.attends, strict=True)]
    return {**found, "latent channels": latent_channels, "width of the tokens": token_width}
