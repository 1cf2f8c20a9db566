"""Convolutional blocks of the U-Net and the VAE.

Shapes: b batch, c channels, h and w height and width, d embedding width. Blocks take a feature map and,
where they depend on time, an embedding that has already passed its activation: every block would otherwise repeat it.
"""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

TimeInjection = Literal["shift", "scale_shift"]
Widths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]  # channels of each level


def set_to_zero(module: nn.Module) -> None:
    """Zero every parameter of ``module``, so that the residual branch which it ends starts as no change at all."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time, then a two-layer perceptron (Ho et al. 2020, arXiv:2006.11239, appendix B).

    Wavelengths run geometrically from 2 pi to 2 pi * 10,000; cosines come first, as in latent diffusion.
    """

    frequencies: Tensor

    def __init__(self, num_sinusoids: int, width: int) -> None:
        """``num_sinusoids`` (even) sinusoids in, ``width`` features out."""
        super().__init__()
        half = num_sinusoids // 2
        # On the meta device, where networks are built to be checked, arange would import torch's compiler: two seconds.
        exponents = torch.arange(half, dtype=torch.float32, device="cpu")
        frequencies = torch.exp(-math.log(10_000) * exponents / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.linear_1 = nn.Linear(num_sinusoids, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        """Time (b,) in steps of the training process, any real number, to features (b d)."""
        # float32 even where the weights are half precision: bfloat16 cannot tell step 997 from step 1,000.
        phase = time.float()[:, None] * self.frequencies.float()
        sinusoids = torch.cat([phase.cos(), phase.sin()], dim=1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class TimeModulation(nn.Module):
    """Time injection: a block's features are shifted, or scaled and shifted (Dhariwal & Nichol 2021, sec. 3)."""

    def __init__(self, *, embedding_width: int, channels: int, kind: TimeInjection) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(embedding_width, 2 * channels if kind == "scale_shift" else channels)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Modulate h (b c h w) by an activated embedding (b d)."""
        parameters = self.linear(embedding)[:, :, None, None]
        if self.kind == "shift":
            return h + parameters
        scale, shift = parameters.chunk(2, dim=1)
        return torch.addcmul(shift, h, 1 + scale)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a shortcut; the time enters between the two.

    Ho et al. 2020 (arXiv:2006.11239), appendix B. A shift is added before the second normalisation, a scale-shift is
    applied after it (Dhariwal & Nichol 2021, arXiv:2105.05233). The second convolution is zero at
    first, so that the block starts as its shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_groups: int,
        norm_eps: float,
        dropout: float = 0.0,
        embedding_width: int = 0,
        time_injection: TimeInjection = "shift",
    ) -> None:
        """``embedding_width`` 0 makes a block without a time, as the VAE uses."""
        super().__init__()
        self.norm_1 = nn.GroupNorm(norm_groups, in_channels, eps=norm_eps)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time: TimeModulation | None = None
        if embedding_width:
            self.time = TimeModulation(embedding_width=embedding_width, channels=out_channels, kind=time_injection)
        self.norm_2 = nn.GroupNorm(norm_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = _shortcut(in_channels, out_channels)
        set_to_zero(self.conv_2)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map x (b c h w) to the same size; ``embedding`` (b d) is the activated time embedding."""
        h = self.conv_1(F.silu(self.norm_1(x)))
        if self.time is None:
            h = self.norm_2(h)
        elif self.time.kind == "shift":
            h = self.norm_2(self.time(h, embedding))
        else:
            h = self.time(self.norm_2(h), embedding)
        return self.shortcut(x) + self.conv_2(self.dropout(F.silu(h)))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, normalisation, inverted bottleneck (Liu et al. 2022, arXiv:2201.03545, figure 4).

    The time modulates the normalised features. The last convolution is zero at first, in the place of a layer scale.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm_eps: float,
        dropout: float,
        embedding_width: int,
        time_injection: TimeInjection,
    ) -> None:
        super().__init__()
        hidden = self.expansion * out_channels
        self.depthwise = nn.Conv2d(in_channels, in_channels, 7, padding=3, groups=in_channels)
        self.norm = nn.GroupNorm(1, in_channels, eps=norm_eps)
        self.time = TimeModulation(embedding_width=embedding_width, channels=in_channels, kind=time_injection)
        self.expand = nn.Conv2d(in_channels, hidden, 1)
        self.dropout = nn.Dropout(dropout)
        self.reduce = nn.Conv2d(hidden, out_channels, 1)
        self.shortcut = _shortcut(in_channels, out_channels)
        set_to_zero(self.reduce)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x (b c h w) to the same size; ``embedding`` (b d) is the activated time embedding."""
        h = self.time(self.norm(self.depthwise(x)), embedding)
        return self.shortcut(x) + self.reduce(self.dropout(F.gelu(self.expand(h))))


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)


class Downsample(nn.Module):
    """Halve height and width by a convolution of stride 2.

    ``pads`` is the place of a row and a column of zeros: on all sides as in the U-Net, or at the far end only as in the
    VAE of latent diffusion, whose published weights depend on it.
    """

    def __init__(self, channels: int, *, pads: Literal["all_sides", "far_end"]) -> None:
        super().__init__()
        self.pads_far_end = pads == "far_end"
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if self.pads_far_end else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b c h w) to (b c h/2 w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pads_far_end else x)


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a 3x3 convolution.

    Computed as one transposed convolution of stride 2, which is equal to rounding: each output pixel sees four pixels
    at most, so the kernel's nine weights are first summed to four. That takes 4/9 of the products, and the enlarged
    map is never stored (Shi et al. 2016, arXiv:1609.07009, section 3).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b c h w) to (b c 2h 2w)."""
        # The kernel convolved with the 2x2 box that repeats a pixel; a transposed convolution turns kernels around.
        kernel = F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1))
        kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
        kernel = kernel[..., 1:] + kernel[..., :-1]
        return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)
