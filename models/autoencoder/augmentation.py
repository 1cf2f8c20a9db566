"""Augmentation of latents in training: they are transformed or made noisy before they are decoded.

By their authors' account a diffusion model learns the latents of such an autoencoder more easily.

Equivariance, EQ-VAE (Kouzelis et al. 2025, arXiv:2502.09509, the implicit form): for a transformation tau of images and
latents alike, D(tau E(x)) is compared with tau x in every term of the loss. The authors resample to any scale; here tau
is the mean of blocks and a turn by multiples of 90 degrees, whose gradients are deterministic on every device.

Latent denoising, l-DeTok (Yang et al. 2025, arXiv:2507.15856): x is still compared with D(z'), where z' = (1 - tau) z +
tau gamma eps, with tau uniform in [0, 1) and eps standard normal. The noise comes after the transformation, so that it
is as strong at any scale.

Shapes: b images, c channels, h and w pixels, of latents or of images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor


class EquivarianceConfig(BaseModel, frozen=True, extra="forbid"):
    """Equivariance of latents under downscaling and quarter turns; one of each a global batch."""

    probability: Annotated[float, Field(ge=0, le=1)] = 0.0  # of transforming a global batch; 0 is off, 0.5 usual
    factors: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4)  # of downscaling; one is drawn


@dataclass(frozen=True)
class Transformation:
    """Downscaling and turn of images and latents alike."""

    factor: int  # pixels a side that become one
    turns: int  # by 90 degrees, anticlockwise

    @classmethod
    def drawn(cls, config: EquivarianceConfig, uniforms: Sequence[float]) -> Self | None:
        """Pick one by three uniforms in [0, 1); None leaves the batch as it is."""
        applied, scale, turn = uniforms
        if applied >= config.probability:
            return None
        return cls(config.factors[int(scale * len(config.factors))], int(turn * 4))

    def __call__(self, x: Tensor) -> Tensor:
        """(b c h w), of sides that ``factor`` divides, to (b c h/factor w/factor), or with the sides exchanged."""
        # Not compiled: else the decoder would be compiled for every turn. Said here, as it imports the compiler.
        return torch.compiler.disable(self._transformed)(x)

    def _transformed(self, x: Tensor) -> Tensor:
        return torch.rot90(F.avg_pool2d(x, self.factor), self.turns, dims=(2, 3))


@dataclass(frozen=True)
class LatentAugmentation:
    """Change of a micro-batch's latents on their way to the decoder."""

    transformation: Transformation | None = None
    level: Tensor | None = None  # tau; (b 1 1 1)
    noise: Tensor | None = None  # gamma eps; (b c h w)

    def __call__(self, latents: Tensor) -> Tensor:
        """(b c h w) to what is decoded, smaller where it is downscaled."""
        if self.transformation is not None:
            latents = self.transformation(latents)
        if self.level is not None and self.noise is not None:
            h, w = latents.shape[-2:]
            latents = (1 - self.level) * latents + self.level * self.noise[..., :h, :w]
        return latents
