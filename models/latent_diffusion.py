"""The trained model as one object: autoencoder, denoiser, and the normalisation of latents between them.

Latents are normalised and restored in this module alone. Shapes: b batch, C image channels, H and W image size,
c latent channels, h and w latent size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.autoencoder.vae import AutoencoderKL, Posterior
from models.denoiser import Denoiser
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.likelihood import VariationalBoundConfig, variational_bound
from models.diffusion.samplers import NoiseSource, SamplerConfig, ddim_inversion
from models.diffusion.spacing import sampling_moments


class Normalisation(nn.Module):
    """Latents of an autoencoder to about zero mean and unit variance in every channel, and back.

    Args:
        mean: One number a channel, measured over the whole corpus.
        std: The same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32)[:, None, None])

    def draw_normalised(self, posterior: Posterior, noise: Tensor | None = None) -> Tensor:
        """Draw normalised latents (b c h w), float32, from a posterior by ``noise``; without noise, take its mean."""
        latents = posterior.mean if noise is None else posterior.sample(noise)
        return (latents.float() - self.mean) / self.std

    def restore(self, latents: Tensor) -> Tensor:
        """Return normalised latents (b c h w) to the autoencoder's own scale."""
        return latents * self.std + self.mean


@dataclass(frozen=True, kw_only=True)
class LatentDiffusion:
    """A latent diffusion model: images to normalised latents and back, and noise to images."""

    autoencoder: AutoencoderKL
    denoiser: Denoiser
    normalisation: Normalisation
    caption_features: Mapping[str, Any] | None = None  # kind and digest of the text encoder, shape of its features
    guide: Denoiser | None = None  # a weaker one, which guidance leads away from (autoguidance), not from no condition

    @property
    def device(self) -> torch.device:
        """The device of all networks."""
        return self.normalisation.mean.device

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Encode images (b C H W) in [-1, 1] to normalised latents (b c h w), float32.

        They are drawn from the posterior by ``noise``, standard normal (b c h w), or are its mean without noise.
        """
        return self.normalisation.draw_normalised(self.autoencoder.encode(images.to(self.device)), noise)

    @torch.no_grad()
    def decode(self, latents: Tensor, *, tile: int = 0) -> Tensor:
        """Decode normalised latents (b c h w) to images (b C H W), about in [-1, 1] and not clamped.

        Args:
            latents: Normalised latents.
            tile: Side of the tiles that large latents are decoded in, latent pixels; 0 decodes them at once.
        """
        restored = self.normalisation.restore(latents)
        if tile:
            return self.autoencoder.decode_tiled(restored, tile=tile, overlap=tile // 4)
        return self.autoencoder.decode(restored)

    def sample(
        self,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        sampler: SamplerConfig,
        guidance: GuidanceConfig,
        fresh_noise: NoiseSource,
        uncond: Mapping[str, Tensor] | None = None,
        tile: int = 0,
    ) -> Tensor:
        """Turn noise into images (b C H W), about in [-1, 1] and not clamped.

        Args:
            noise: Standard normal (b c h w), float32.
            conditions: Fields (b ...), as the denoiser's conditioners read them.
            sampler: Steps from noise to data.
            guidance: Weight of the conditions.
            fresh_noise: Noise (b c h w) of a step by its index; deterministic samplers never call it.
            uncond: Fields of the unconditional branch in place of the null conditions; see ``Denoiser.denoise``.
            tile: As in ``decode``.
        """
        on_device, uncond = (
            {name: field.to(self.device) for name, field in fields.items()} for fields in (conditions, uncond or {})
        )
        latents = self.denoiser.sample(
            noise,
            on_device,
            sampler=sampler,
            guidance=guidance,
            fresh_noise=fresh_noise,
            uncond=uncond,
            guide=self.guide,
        )
        return self.decode(latents, tile=tile)

    @torch.no_grad()
    def invert(self, images: Tensor, conditions: Mapping[str, Tensor], *, sampler: SamplerConfig) -> Tensor:
        """Turn images (b C H W) in [-1, 1] into the noise (b c h w) that DDIM turns into them without guidance.

        ``conditions`` are as for ``sample``; of the sampler only its moments count.

        Raises:
            ValueError: The denoiser predicts x0, which tells nothing of the noise in clean data.
        """
        on_device = {name: field.to(self.device) for name, field in conditions.items()}
        denoise = self.denoiser.denoise(on_device, GuidanceConfig(scale=1.0))
        moments = sampling_moments(self.denoiser.process, num_steps=sampler.num_steps, spacing=sampler.spacing)
        *_, last = ddim_inversion(denoise, self.encode(images), moments)
        return last.x

    @torch.no_grad()
    def bound(
        self,
        images: Tensor,
        conditions: Mapping[str, Tensor],
        *,
        config: VariationalBoundConfig,
        noise: Callable[[str], Tensor],
    ) -> dict[str, Tensor]:
        """Measure the variational bound of the latents of images (b C H W) in [-1, 1], without guidance.

        The latents are those that the U-Net trains on, drawn from the posterior and normalised; so the bound is of a
        density, may be negative, and compares models of one VAE and one normalisation only.

        Args:
            images: Images.
            conditions: Fields (b ...), as the denoiser's conditioners read them.
            config: The chain.
            noise: Standard normal noise (b c h w) by purpose.

        Returns:
            The terms of ``VariationalBound.in_bits``; float64 (b,), on the CPU.
        """
        on_device = {name: field.to(self.device) for name, field in conditions.items()}
        sampler = config.sampler
        bound = variational_bound(
            self.denoiser.denoise(on_device, GuidanceConfig(scale=1.0)),
            self.encode(images, noise("bound/posterior")),
            sampling_moments(self.denoiser.process, num_steps=sampler.num_steps, spacing=sampler.spacing),
            variance=config.variance,
            fresh_noise=lambda index: noise(f"bound/{index}"),
        )
        return {name: values.double().cpu() for name, values in bound.in_bits.items()}
