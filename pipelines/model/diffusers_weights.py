"""Weights in the format of diffusers: a published autoencoder as ``inputs.vae``.

Only safetensors are read. A folder of diffusers has no manifest of ours, so one is made of what it holds: the sha256
of its weights ties latents to it as to a VAE of our own. Its scaling is taken over, since a published U-Net expects
latents that are scaled so.
"""

from pathlib import Path

from safetensors.torch import load_file

from data.diffusers_folder import config_of, weights_of
from data.files import verify_file
from data.manifest import DiffusersVAEManifest
from models.autoencoder.vae import AutoencoderKL
from models.diffusers.config import vae_config_from_diffusers
from models.diffusers.weights import vae_from_diffusers


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
