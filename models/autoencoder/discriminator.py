"""The patch discriminator of the VAE, and the weight of its loss.

Isola et al. 2017 (arXiv:1611.07004, PatchGAN), with the adaptive weight of Esser et al. 2021 (arXiv:2012.09841, eq. 7).
GroupNorm stands where the original has batch normalisation, whose statistics would depend on the number of ranks.
"""

from typing import Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveInt, model_validator
from torch import Tensor, nn


class DiscriminatorConfig(BaseModel, frozen=True, extra="forbid"):
    """A PatchGAN discriminator."""

    channels: PositiveInt = 64  # width of the first layer; doubles a layer, up to eight times
    downsamplings: PositiveInt = 3  # halvings of the image; 3 give patches of 70 pixels
    norm_groups: PositiveInt = 32  # groups of every GroupNorm; divides channels times 2

    @model_validator(mode="after")
    def _groups_divide_channels(self) -> Self:
        if 2 * self.channels % self.norm_groups:
            raise ValueError(f"norm_groups = {self.norm_groups} does not divide {2 * self.channels}, channels times 2")
        return self

    @property
    def smallest_image(self) -> int:
        """Pixels a side from which on there is a patch: the last two convolutions take one pixel each."""
        return 3 * 2**self.downsamplings


class Discriminator(nn.Module):
    """Images to one logit a patch, high where it looks real."""

    def __init__(self, config: DiscriminatorConfig, *, image_channels: int) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(image_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for depth in range(1, config.downsamplings + 1):
            out = config.channels * min(2**depth, 8)
            stride = 2 if depth < config.downsamplings else 1
            layers += [
                nn.Conv2d(width, out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(config.norm_groups, out),
                nn.LeakyReLU(0.2),
            ]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (b C H W) in [-1, 1] to logits (b 1 h w)."""
        return self.layers(images)


def discriminator_hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator: both sides at their margin of 1 give 0 (Lim & Ye 2017, arXiv:1705.02894).

    Logits of any shape to a scalar.
    """
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_hinge_loss(fake_logits: Tensor) -> Tensor:
    """Adversarial loss of the autoencoder: a scalar without bounds."""
    return -fake_logits.mean()


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor, *, maximum: float = 1e4) -> Tensor:
    """The factor that gives the adversarial term the gradient norm of the reconstruction term (eq. 7).

    Args:
        reconstruction_gradient: Of the reconstruction loss with respect to the decoder's last layer, any shape.
        adversarial_gradient: Of the generator's loss, same shape. Both averaged over all ranks before they come here:
            a norm of averages is not the average of norms, and each rank would weigh its own loss differently.
        maximum: Bound, for when the discriminator's gradient vanishes.

    Returns:
        A scalar in [0, maximum] without a gradient.
    """
    ratio = torch.linalg.vector_norm(reconstruction_gradient) / (torch.linalg.vector_norm(adversarial_gradient) + 1e-4)
    return ratio.clamp(0.0, maximum).detach()
