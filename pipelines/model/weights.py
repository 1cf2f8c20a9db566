"""Published weights: what a training stage leaves for the others, and how they take it up again.

``vae.safetensors`` and ``unet.safetensors`` are averaged weights, written once, each with a ``config.json`` that says
how to build its network. The manifest beside them holds their digest; weights that do not match it are refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data.files import sha256_of, verify_file, write_atomically, write_json
from data.manifest import AnyVAEManifest, DiffusersVAEManifest, FileEntry, LatentScaling, UNetManifest, VAEManifest
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.samplers import SamplerConfig, check_sampler
from pipelines.model.device import Device
from pipelines.model.diffusers_weights import read_diffusers_vae
from pipelines.runtime.stage.stage import Stage


@dataclass(frozen=True, kw_only=True)
class PublishedVAE:
    """A trained autoencoder, and the sha256 of its weights file."""

    network: AutoencoderKL
    weights: str


@dataclass(frozen=True, kw_only=True)
class PublishedDenoiser:
    """A trained latent diffusion model, with what its latents are normalised by."""

    network: Denoiser
    normalisation: "Normalisation"
    latent_channels: int
    latent_size: int
    vae_weights: str
    text: Mapping[str, Any] | None  # of the captions' features that it was trained on; None without captions


class Normalisation(nn.Module):
    """Per-channel mean and standard deviation of latents, measured over the whole corpus.

    Args:
        scaling: One number a channel, as in the manifest of the latents.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, scaling: LatentScaling) -> None:
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(scaling, name), dtype=torch.float32)[:, None, None])

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents of the VAE (b c h w) to about zero mean and unit variance in every channel."""
        return (latents - self.mean) / self.std

    def restore(self, latents: Tensor) -> Tensor:
        """The inverse of ``normalise``."""
        return latents * self.std + self.mean


def publish(stage: Stage, *, name: str, network: nn.Module, config: Mapping[str, Any]) -> tuple[list[FileEntry], str]:
    """Write ``NAME.safetensors`` and ``config.json``; return their entries and the weights' sha256.

    On the main process, which alone commits a manifest; the others get nothing.
    """
    if not stage.is_main:
        return [], ""
    folder = stage.folder
    weights = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    path = folder / f"{name}.safetensors"
    write_atomically(path, save(weights))
    write_json(folder / "config.json", config)
    return [FileEntry.of(path), FileEntry.of(folder / "config.json")], sha256_of(path)


def load_vae(folder: str | Path, manifest: AnyVAEManifest, *, device: Device) -> PublishedVAE:
    """Build a published VAE, ours or that of a diffusers folder, frozen.

    Raises:
        ValueError: The weights are missing or not those of the manifest.
    """
    if isinstance(manifest, DiffusersVAEManifest):
        theirs = read_diffusers_vae(Path(folder), manifest)
        return PublishedVAE(network=device.place(theirs.requires_grad_(False).eval()), weights=manifest.weights)
    config, weights = _read(Path(folder), manifest, name="vae")
    network = AutoencoderKL(VAEConfig(**config["network"]), image_channels=config["image_channels"])
    network.load_state_dict(load_file(Path(folder) / "vae.safetensors"))
    return PublishedVAE(network=device.place(network.requires_grad_(False).eval()), weights=weights)


def load_denoiser(folder: str | Path, manifest: UNetManifest, *, device: Device) -> PublishedDenoiser:
    """Build a published U-Net with its process, frozen.

    Raises:
        ValueError: The weights are missing or not those of the manifest.
    """
    config, _ = _read(Path(folder), manifest, name="unet")
    network = Denoiser(
        DenoiserConfig.model_validate(config["denoiser"]),
        latent_channels=config["latent_channels"],
        latent_size=config["latent_size"],
        num_classes=len(manifest.classes),
    )
    network.load_state_dict(load_file(Path(folder) / "unet.safetensors"))
    return PublishedDenoiser(
        network=device.place(network.requires_grad_(False).eval()),
        normalisation=Normalisation(LatentScaling(**{name: config["statistics"][name] for name in ("mean", "std")})).to(
            device.torch
        ),
        latent_channels=config["latent_channels"],
        latent_size=config["latent_size"],
        vae_weights=manifest.vae,
        text=config.get("text"),
    )


def denoiser_config(folder: str | Path) -> DenoiserConfig:
    """Read how a published U-Net is built, without its weights."""
    return DenoiserConfig.model_validate(json.loads((Path(folder) / "config.json").read_bytes())["denoiser"])


def check_sampler_suits(sampler: SamplerConfig, denoiser: DenoiserConfig) -> None:
    """Refuse a sampler that the denoiser's process cannot be sampled with.

    Raises:
        ValueError: Saying why, and which sampler would do.
    """
    learned = denoiser.objective.variance == "learned"
    check_sampler(sampler, denoiser.schedule.build(), variance_is_learned=learned)


def check_same_vae(used: str, *, given: AnyVAEManifest, given_at: str, user: str) -> None:
    """Refuse a VAE that is not the one which made the latents.

    Args:
        used: sha256 of the weights that made the latents.
        given: Manifest of the VAE at hand.
        given_at: Its folder, for the message.
        user: Who holds ``used``, for the message.

    Raises:
        ValueError: They differ.
    """
    found = given.weights
    if used != found:
        raise ValueError(
            f"{given_at!r} holds the VAE {found[:12]}, but {user} was made with the VAE {used[:12]}. A latent means "
            "nothing to another VAE: point inputs.vae at the one that was used, or encode and train again."
        )


def _read(folder: Path, manifest: VAEManifest | UNetManifest, *, name: str) -> tuple[dict[str, Any], str]:
    path = folder / f"{name}.safetensors"
    verify_file(path, sha256=manifest.weights)
    return json.loads((folder / "config.json").read_bytes()), manifest.weights
