"""Start of a training: random weights, those of a finished training of one's own, or those of a diffusers folder.

The network that is to be trained must be the one whose weights these are; it is compared by its settings and by the
shapes of its weights before any work. A start is named by the sha256 of its weights in the manifest.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from safetensors import safe_open
from safetensors.torch import load_file

from data.diffusers_folder import config_of, weights_of
from data.files import sha256_of, verify_file
from data.manifest import AnyVAEManifest, UNetManifest, VAEManifest, read_input, read_manifest
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import unet_config_from_diffusers, vae_config_from_diffusers
from models.diffusers.weights import denoiser_from_diffusers, vae_from_diffusers
from models.unet import UNetConfig
from pipelines.model.weights import encoder_of, network_config

MOST_NAMED = 5  # tensors in a message


class RandomStart(BaseModel, frozen=True, extra="forbid"):
    """Train from random weights."""

    kind: Literal["random"] = "random"


class RunStart(BaseModel, frozen=True, extra="forbid"):
    """Train on from the averaged weights of a finished training; the network must be the same."""

    kind: Literal["run"] = "run"
    folder: Path  # of that training, such as runs/demo/unet


class DiffusersStart(BaseModel, frozen=True, extra="forbid"):
    """Train on from a network in the format of diffusers; the network must be the same."""

    kind: Literal["diffusers"] = "diffusers"
    folder: Path  # holds config.json and diffusion_pytorch_model.safetensors


AnyStart = RandomStart | RunStart | DiffusersStart
StartConfig = Annotated[AnyStart, Field(discriminator="kind")]
Network = AutoencoderKL | Denoiser


def check_start(start: AnyStart, network: Network, *, shapes: bool = True) -> None:
    """Refuse weights to start from that are not those of such a ``network``, which may be on the meta device.

    Args:
        start: Of the training.
        network: The one that is to be trained.
        shapes: Compare also the shapes of the weights; they depend on the corpus, which may not be known yet.

    Raises:
        ValueError: With each difference, ours and theirs.
        OSError: The run has not finished.
    """
    if isinstance(start, RandomStart):
        return

    # The settings.
    if isinstance(start, RunStart):
        path = _weights_of_run(start.folder, network)[0]
        found = _settings_of_run(start.folder, network)
    else:
        path = weights_of(start.folder)
        found = _settings_of_diffusers(start.folder, network)
    asked = _settings_of(network)
    if wrong := [f"{key} = {found.get(key)}, not {asked[key]}" for key in asked if asked[key] != found.get(key)]:
        raise ValueError(
            f"the network in {start.folder} has {'; '.join(wrong)}. Change the network and its conditioners to what is "
            "there, or start from random weights."
        )

    # The shapes, where the names are ours.
    if isinstance(start, RunStart) and shapes:
        with safe_open(path, framework="pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if names:
            wrong = [f"{name} is {theirs.get(name, 'absent')}, not {ours.get(name, 'absent')}" for name in names]
            raise ValueError(
                f"the weights in {path} are of another network: {'; '.join(wrong[:MOST_NAMED])}. Number of classes, "
                "conditioners and variance must be those of that training, or start from random weights."
            )


def load_start(start: AnyStart, network: Network) -> str | None:
    """Put the weights to start from into ``network``; return their sha256, None for random ones.

    What a U-Net of diffusers has no place for, such as a learned null caption, stays as it is.

    Raises:
        ValueError: They do not fit, or are not those of their manifest.
    """
    # The weights by our names.
    if isinstance(start, RandomStart):
        return None
    if isinstance(start, RunStart):
        path, sha256 = _weights_of_run(start.folder, network)
        verify_file(path, sha256=sha256)
        weights = load_file(path)
    else:
        path = weights_of(start.folder)
        sha256, weights = sha256_of(path), load_file(path)
        if isinstance(network, Denoiser):
            weights = denoiser_from_diffusers(weights, network.config)
        else:
            weights = vae_from_diffusers(weights, network.config)

    # All of them have a place, and all but what diffusers lacks is among them.
    try:
        missing, left_over = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {error}") from error
    if left_over:
        raise ValueError(f"{path} holds {left_over[:MOST_NAMED]}, which the network lacks.")
    lacks = isinstance(start, DiffusersStart) and isinstance(network, Denoiser)
    if lost := [name for name in missing if not (lacks and name.startswith("conditioners."))]:
        raise ValueError(f"{path} lacks {lost[:MOST_NAMED]}.")
    return sha256


def encoder_at(start: AnyStart) -> str:
    """Return the sha256 of the weights that the encoder of a VAE to start from is from."""
    assert not isinstance(start, RandomStart)
    manifest = read_input("vae", start.folder)
    assert isinstance(manifest, AnyVAEManifest)
    return encoder_of(manifest)


def _weights_of_run(folder: Path, network: Network) -> tuple[Path, str]:
    """Return the weights file of a finished training, and its sha256 by the manifest."""
    kind, name = (UNetManifest, "unet") if isinstance(network, Denoiser) else (VAEManifest, "vae")
    manifest = read_manifest(folder)
    if not isinstance(manifest, kind):
        raise ValueError(f"{folder} is the folder of {manifest.stage}, not of train_{name}.")
    assert isinstance(manifest, UNetManifest | VAEManifest)
    return folder / f"{name}.safetensors", manifest.weights


def _settings_of_run(folder: Path, network: Network) -> dict[str, Any]:
    """Return the settings in ``config.json`` of a finished training."""
    config = network_config(folder, read_manifest(folder))
    if isinstance(network, AutoencoderKL):
        return _vae_settings(VAEConfig.model_validate(config["network"]), config["image_channels"])
    denoiser = DenoiserConfig.model_validate(config["denoiser"])
    return _unet_settings(denoiser.network, denoiser.token_width, config["latent_channels"])


def _settings_of_diffusers(folder: Path, network: Network) -> dict[str, Any]:
    """Return the settings in ``config.json`` of a diffusers folder."""
    theirs = config_of(folder)
    if theirs is None:
        raise ValueError(f"{folder} holds no config.json: give the folder of a network in the format of diffusers.")
    if isinstance(network, AutoencoderKL):
        return _vae_settings(*vae_config_from_diffusers(theirs))
    read = unet_config_from_diffusers(theirs)
    return _unet_settings(read.network, read.token_width, read.in_channels)


def _settings_of(network: Network) -> dict[str, Any]:
    if isinstance(network, AutoencoderKL):
        return _vae_settings(network.config, network.image_channels)
    return _unet_settings(network.config.network, network.config.token_width, network.latent_shape[0])


def _vae_settings(network: VAEConfig, image_channels: int) -> dict[str, Any]:
    return {**network.model_dump(mode="json", exclude={"checkpointed"}), "image channels": image_channels}


def _unet_settings(network: UNetConfig, token_width: int, latent_channels: int) -> dict[str, Any]:
    """Return the settings that decide the weights of a U-Net: heads only with attention, depth only with tokens."""
    found = network.model_dump(mode="json", exclude={"checkpointed_levels", "dropout", "heads", "transformer_depth"})
    for name in ("heads", "transformer_depth") if token_width else ("heads",):
        found[name] = [each if on else 0 for each, on in zip(getattr(network, name), network.attends, strict=True)]
    return {**found, "latent channels": latent_channels, "width of the tokens": token_width}
