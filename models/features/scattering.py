"""Wavelet scattering: fixed features for grey or small images that need no weights file and no training.

Bruna & Mallat 2013 (arXiv:1203.1513): averages of the moduli of a cascade of oriented wavelets. Textures and strokes
at each scale and angle give the first order, their arrangement the second; small shifts and deformations change little.
Here the cascade runs on a pyramid (each octave at half the size), so that all filters are 7x7 pixels. Letters:
b images, o octaves, l angles.
"""

import hashlib
import math
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional

from models.features.extractor import FeatureExtractor

_DEFINITION = "wavelet scattering, version 1"  # changes whenever the features of an image change
_NUM_ANGLES = 4
_GRID = 4  # cells a side in which the first order is averaged; also the size of the coarsest octave's low-pass
_FLOOR = 0.01  # of full brightness, 2.6 levels of 8 bits; moduli below it are hardly compressed


class ScatteringConfig(BaseModel, frozen=True, extra="forbid"):
    """Wavelet scattering: no weights, thousands of images a second on one core; for small or simple images."""

    kind: Literal["scattering"] = "scattering"  # fixed wavelets, no weights file
    resolution: Literal[16, 32, 64, 128] = 32  # pixels a side; the finest detail that is seen

    def check(self) -> None:
        """Refuse nothing: its filters are computed."""

    def build(self) -> "Scattering":
        """The extractor, on the CPU."""
        return Scattering(self)


class Scattering(FeatureExtractor):
    """Log-compressed scattering of the brightness to second order, and coarse colour.

    Per image, with o = log2(resolution / 4) octaves and l = 4 angles: of the brightness 16 local means, 16 l o
    first-order and l^2 o (o - 1) / 2 second-order coefficients; of two opponent colours (zero for grey images) 32 local
    means and 2 l o first-order coefficients. 312 features at 32 pixels.
    """

    wavelets: Tensor  # (2l 1 7 7), real then imaginary parts
    low_pass: Tensor  # (1 1 6 6)

    def __init__(self, config: ScatteringConfig) -> None:
        super().__init__()
        self.name = f"scattering-{config.resolution}"
        self.resolution = config.resolution
        self.images_per_pass = 64
        self.num_octaves = int(math.log2(config.resolution / _GRID))
        brightness = _GRID**2 * (1 + _NUM_ANGLES * self.num_octaves)
        brightness += _NUM_ANGLES**2 * self.num_octaves * (self.num_octaves - 1) // 2
        self.dimension = brightness + 2 * (_GRID**2 + _NUM_ANGLES * self.num_octaves)
        self.register_buffer("wavelets", morlet_wavelets(_NUM_ANGLES))
        # Of even length, so that halving keeps the image's centre, and a mirrored image has mirrored features.
        binomial = torch.tensor([1.0, 5.0, 10.0, 10.0, 5.0, 1.0]) / 32
        self.register_buffer("low_pass", torch.outer(binomial, binomial)[None, None])
        self.weights_sha256 = self._definition_digest(config)

    def _definition_digest(self, config: ScatteringConfig) -> str:
        # Rounded, since exp and cos differ in their last bits from one C library to another.
        filters = (torch.cat([self.wavelets.flatten(), self.low_pass.flatten()]) * 1e5).round().int().tolist()
        return hashlib.sha256(f"{_DEFINITION} {config.model_dump_json()} {filters}".encode()).hexdigest()

    def extract(self, levels: Tensor) -> Tensor:
        """Features (b d) of ``levels`` (b 3 r r) in [0, 255]."""
        red, green, blue = (levels / 255).unbind(dim=1)
        brightness = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
        colours = torch.stack([(red - green) / 2, (red + green) / 4 - blue / 2], dim=1)

        features: list[Tensor] = []
        low = brightness  # (b 1 h w), half the size after each octave
        for octave in range(self.num_octaves):
            modulus = self._modulus(low)  # (b l h w)
            features.append(_compressed(functional.adaptive_avg_pool2d(modulus, _GRID)))
            smoothed = modulus
            for _ in range(octave + 1, self.num_octaves):
                smoothed = self._halved(smoothed)
                features.append(_compressed(self._modulus(smoothed).mean(dim=(2, 3))))  # (b l*l)
            low = self._halved(low)
        features.append(low)  # (b 1 4 4)

        for _ in range(self.num_octaves):
            features.append(self._modulus(colours).mean(dim=(2, 3)))  # (b 2l)
            colours = self._halved(colours)
        features.append(colours)  # (b 2 4 4)
        return torch.cat([feature.flatten(1) for feature in features], dim=1)

    def _modulus(self, images: Tensor) -> Tensor:
        """Modulus of every channel's wavelet transform; (b c h w) -> (b c*l h w)."""
        b, c, h, w = images.shape
        planes = functional.pad(images.reshape(b * c, 1, h, w), (3, 3, 3, 3), mode="replicate")
        real, imaginary = functional.conv2d(planes, self.wavelets).chunk(2, dim=1)  # (bc l h w) each
        return (real.square() + imaginary.square()).sqrt().reshape(b, c * _NUM_ANGLES, h, w)

    def _halved(self, images: Tensor) -> Tensor:
        """Low-passed image at half the size; (b c h w) -> (b c h/2 w/2)."""
        b, c, h, w = images.shape
        planes = functional.pad(images.reshape(b * c, 1, h, w), (2, 2, 2, 2), mode="replicate")
        return functional.conv2d(planes, self.low_pass, stride=2).reshape(b, c, h // 2, w // 2)


def morlet_wavelets(num_angles: int) -> Tensor:
    """Morlet wavelets of the finest scale at equally spaced angles in [0, pi); (2 num_angles, 1, 7, 7) float32.

    Bruna & Mallat 2013, section 2.1, with the usual deviation of 0.8 pixels, centre frequency 3 pi / 4 and slant
    4 / num_angles. A Gaussian is subtracted so that each sums to zero: a flat image has no response.
    """
    offsets = torch.arange(-3, 4, dtype=torch.float64)
    y, x = torch.meshgrid(offsets, offsets, indexing="ij")
    wavelets = []
    for index in range(num_angles):
        angle = math.pi * index / num_angles
        along = x * math.cos(angle) + y * math.sin(angle)
        across = y * math.cos(angle) - x * math.sin(angle)
        envelope = torch.exp(-(along.square() + (across * 4 / num_angles).square()) / (2 * 0.8**2))
        wave = torch.polar(envelope, 3 * math.pi / 4 * along)
        wave = wave - envelope * (wave.sum() / envelope.sum())
        wavelets.append(wave / wave.abs().sum())
    stacked = torch.stack(wavelets)[:, None]
    return torch.cat([stacked.real, stacked.imag]).float()


def _compressed(moduli: Tensor) -> Tensor:
    # Moduli are skewed, their logarithms nearly Gaussian, which is what a Frechet distance assumes.
    return torch.log1p(moduli / _FLOOR)
