"""The autoencoder with a Gaussian posterior that turns images into latents and back.

Shapes: b batch, C image channels, H and W image size, c latent channels, h and w latent size (H/f, W/f).

Kingma & Welling 2013 (arXiv:1312.6114) with the convolutional encoder and decoder of Rombach et al. 2022
(arXiv:2112.10752, appendix E.1). It is, weight for weight, ``AutoencoderKL`` of diffusers: see
``models/diffusers/weights.py``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import AttentionBlock
from models.layers import Downsample, ResidualBlock, Upsample, Widths

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class VAEConfig(BaseModel, frozen=True, extra="forbid"):
    """A KL autoencoder; the image is halved between levels, so 3 levels make f4, 4 make f8 and 5 make f16."""

    latent_channels: PositiveInt = 4  # channels of the latent
    channels: Widths = (128, 256, 512, 512)  # width of each level, from the full resolution down
    blocks_per_level: PositiveInt = 2  # residual blocks of an encoder level; a decoder level has one more
    mid_attention: bool = True  # self-attention over the lowest resolution
    quant_convs: bool = False  # 1x1 convolutions on both sides of the latent, as published autoencoders have
    norm_groups: PositiveInt = 32  # groups of every GroupNorm; divides every width
    norm_eps: PositiveFloat = 1e-6  # added to the variance in every GroupNorm
    checkpointed: bool = False  # compute each level twice, to save memory

    @model_validator(mode="after")
    def _widths_split_into_groups(self) -> Self:
        for level, width in enumerate(self.channels):
            if width % self.norm_groups:
                raise ValueError(f"channels[{level}] = {width} is not a multiple of norm_groups = {self.norm_groups}")
        return self

    @property
    def factor(self) -> int:
        """Image size over latent size."""
        return 2 ** (len(self.channels) - 1)


class Posterior(NamedTuple):
    """A Gaussian over latents, independent in every element; both tensors (b c h w)."""

    mean: Tensor
    log_variance: Tensor

    def mode(self) -> Tensor:
        """The most probable latent."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """The latent that ``noise``, standard normal and shaped as the mean, picks (Kingma & Welling 2013, eq. 10)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl_per_channel(self) -> Tensor:
        """Kullback-Leibler divergence to the standard normal, in nats, summed over space: (b c), float32.

        Kingma & Welling 2013, appendix B.
        """
        mean, log_variance = self.mean.float(), self.log_variance.float()
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(2, 3))

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence to the standard normal, in nats a sample: (b,), float32."""
        return self.kl_per_channel().sum(dim=1)


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to a posterior over latents, and latents to images."""

    def __init__(self, config: VAEConfig, *, image_channels: int) -> None:
        super().__init__()
        self.config = config
        self.image_channels = image_channels
        self.factor = config.factor
        self.encoder = Encoder(config, image_channels=image_channels)
        self.decoder = Decoder(config, image_channels=image_channels)
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if config.quant_convs:
            self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's last convolution, where the gradients of the loss terms are compared."""
        weight = self.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def encode(self, images: Tensor) -> Posterior:
        """Images (b C H W) in [-1, 1], H and W multiples of ``factor``, to the posterior over (b c h w)."""
        height, width = images.shape[-2:]
        if images.shape[1] != self.image_channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"Images of {images.shape[1]} channels and {height}x{width} pixels do not suit this autoencoder: it "
                f"takes {self.image_channels} channels and sizes that are multiples of {self.factor}. Change the "
                f"resolution or the channels of the corpus, or the VAE's levels."
            )
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b c h w) to images (b C H W), about in [-1, 1] and not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(
        self, images: Tensor, noise: Tensor, augmentation: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Posterior]:
        """Encode images (b C H W), draw a latent by ``noise`` (b c h w), decode it: reconstruction and posterior.

        ``augmentation`` changes the latents before they are decoded.
        """
        posterior = self.encode(images)
        latents = posterior.sample(noise)
        return self.decode(latents if augmentation is None else augmentation(latents)), posterior

    def decode_tiled(self, latents: Tensor, *, tile: int, overlap: int) -> Tensor:
        """Decode large latents in square tiles that blend into each other, in the memory that one tile takes.

        Each tile has its own normalisation statistics, so the result is close to ``decode``, and equal only where one
        tile covers everything. Neighbouring tiles are cross-faded linearly over what they share.

        Args:
            latents: (b c h w).
            tile: Side of a tile, in latent pixels.
            overlap: Latent pixels that neighbouring tiles share at least; below ``tile``.
        """
        if not 0 <= overlap < tile:
            raise ValueError(f"overlap = {overlap} must be at least 0 and below tile = {tile}: tiles have to advance")
        b, _, height, width = latents.shape
        factor, ramp = self.factor, overlap * self.factor
        image = latents.new_zeros(b, self.image_channels, height * factor, width * factor)
        weight = latents.new_zeros(height * factor, width * factor)
        for top in _tile_starts(height, tile, overlap):
            for left in _tile_starts(width, tile, overlap):
                decoded = self.decode(latents[..., top : top + tile, left : left + tile])
                rows, columns = decoded.shape[-2:]
                fade = _fade(rows, ramp, decoded)[:, None] * _fade(columns, ramp, decoded)
                y, x = top * factor, left * factor
                image[..., y : y + rows, x : x + columns] += decoded * fade
                weight[y : y + rows, x : x + columns] += fade
        return image / weight


def _tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of tiles along one side; spread evenly, the last one ends at the border."""
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(index * (size - tile) / (count - 1)) for index in range(count)]


def _fade(length: int, ramp: int, like: Tensor) -> Tensor:
    """Weights along one side of a tile: they rise over ``ramp`` pixels, stay at 1, and fall again."""
    position = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(position, length - position) / max(ramp, 1)).clamp(max=1.0)


class Encoder(nn.Module):
    """Images to the raw parameters of the posterior."""

    def __init__(self, config: VAEConfig, *, image_channels: int) -> None:
        super().__init__()
        widths = config.channels
        self.checkpointed = config.checkpointed
        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            into = [widths[max(level - 1, 0)]] + [width] * (config.blocks_per_level - 1)
            resample = Downsample(width, pads="far_end") if level < len(widths) - 1 else None
            self.levels.append(_level(config, [(channels, width) for channels in into], resample))
        self.middle = _middle(config)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(b C H W) to mean and log-variance, (b 2c h w)."""
        h = self.conv_in(images)
        for level in self.levels:
            h = _run(level, h, checkpointed=self.checkpointed)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, config: VAEConfig, *, image_channels: int) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.checkpointed = config.checkpointed
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = _middle(config)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            into = [widths[max(level - 1, 0)]] + [width] * config.blocks_per_level
            resample = Upsample(width) if level < len(widths) - 1 else None
            self.levels.append(_level(config, [(channels, width) for channels in into], resample))
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(b c h w) to (b C H W)."""
        h = self.middle(self.conv_in(latents))
        for level in self.levels:
            h = _run(level, h, checkpointed=self.checkpointed)
        return self.conv_out(F.silu(self.norm_out(h)))


def _run(level: nn.Module, h: Tensor, *, checkpointed: bool) -> Tensor:
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(level, h, use_reentrant=False)
    return level(h)


def _level(config: VAEConfig, widths: list[tuple[int, int]], resample: Downsample | Upsample | None) -> nn.Sequential:
    blocks: list[nn.Module] = [_block(config, into, out) for into, out in widths]
    return nn.Sequential(*blocks, *([] if resample is None else [resample]))


def _middle(config: VAEConfig) -> nn.Sequential:
    width = config.channels[-1]
    attention: list[nn.Module] = []
    if config.mid_attention:
        attention = [AttentionBlock(width, heads=1, norm_groups=config.norm_groups, norm_eps=config.norm_eps)]
    return nn.Sequential(_block(config, width, width), *attention, _block(config, width, width))


def _block(config: VAEConfig, in_channels: int, out_channels: int) -> ResidualBlock:
    return ResidualBlock(
        in_channels,
        out_channels,
        norm_groups=config.norm_groups,
        norm_eps=config.norm_eps,
    )
