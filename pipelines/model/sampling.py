"""From noise to images: what evaluation, the sample tool and the training grids share."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from data.randomness import SampleDraws
from data.transforms import to_levels
from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import SamplerConfig
from pipelines.model.weights import Normalisation


class ImageSampler:
    """A latent diffusion model with its VAE: conditions and sample indices in, images out.

    Args:
        network: Makes normalised latents.
        normalisation: Takes them back to the VAE's latents.
        vae: Decodes those.
        latent_shape: (c, h, w).
        seed: Noise of sample i depends on (seed, i) only, whoever draws it and in which batch.
        tile: Side of the tiles, in latent pixels, that images are decoded in; 0 decodes them at once.
    """

    def __init__(
        self,
        network: Denoiser,
        normalisation: Normalisation,
        vae: AutoencoderKL,
        *,
        latent_shape: tuple[int, int, int],
        seed: int,
        tile: int = 0,
    ) -> None:
        self.network, self.normalisation, self.vae = network, normalisation, vae
        self.latent_shape, self.seed, self.tile = latent_shape, seed, tile
        self.device = vae.last_layer.device

    def noise(self, indices: Sequence[int], purpose: str = "sample") -> Tensor:
        """Return the noise of the samples ``indices``; (n c h w)."""
        return torch.from_numpy(SampleDraws(self.seed, 0, indices).normals(purpose, self.latent_shape)).to(self.device)

    @torch.no_grad()
    def draw(
        self,
        indices: Sequence[int],
        conditions: Mapping[str, Tensor],
        *,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        autocast: AbstractContextManager[None] | None = None,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """Return the images of the samples ``indices``; uint8 (n h w C).

        Args:
            indices: Which samples; they fix the noise.
            conditions: Fields (n ...), as the denoiser's conditioners read them.
            sampler: How latents are drawn.
            guidance: How strongly the conditions pull.
            autocast: Precision of the networks; default float32.
            noise: Where the samples start, (n c h w); default their own noise.
        """
        with autocast or nullcontext():
            latents = self.network.sample(
                self.noise(indices) if noise is None else noise,
                {name: field.to(self.device) for name, field in conditions.items()},
                sampler=sampler,
                guidance=guidance,
                fresh_noise=lambda step: self.noise(indices, f"sample/{step}"),
            )
            return to_levels(self._decode(self.normalisation.restore(latents)))

    def _decode(self, latents: Tensor) -> Tensor:
        if self.tile:
            return self.vae.decode_tiled(latents, tile=self.tile, overlap=self.tile // 4)
        return self.vae.decode(latents)
