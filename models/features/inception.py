"""Inception-v3 as the Frechet Inception distance uses it: 2048 features, weights from a local file.

Szegedy et al. 2016 (arXiv:1512.00567), in the variant of Heusel et al. 2017's TensorFlow graph of 2015: averages in
the mixed blocks leave out the padding, and the last block pools by the maximum. Names are those of the usual PyTorch
weights file (``pt_inception-2015-12-05``), which is not downloaded here. Inputs are resized by an antialiased bicubic
filter as "clean" FID does (Parmar et al. 2022), so metrics differ a little from those of tools that do not filter.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.nn import functional

from models.features.extractor import FeatureExtractor, check_weights_file, load_exactly, read_weights


class InceptionConfig(BaseModel, frozen=True, extra="forbid"):
    """FID-Inception-v3 from a local weights file; for comparison with published figures."""

    kind: Literal["inception"] = "inception"  # the features of published FID figures, 2048 an image
    weights: Path  # .pth or .safetensors state dict with the names of pt_inception-2015-12-05

    def check(self) -> None:
        """Refuse it where the weights file is missing, without reading it.

        Raises:
            ValueError: Naming the file.
        """
        check_weights_file(self.weights)

    def build(self) -> "Inception":
        """The extractor, on the CPU.

        Raises:
            ValueError: The weights file is missing, damaged, or of another network.
        """
        return Inception(self)


class Inception(FeatureExtractor):
    """Global average of the last mixed block ("pool3") of FID-Inception-v3."""

    def __init__(self, config: InceptionConfig) -> None:
        super().__init__()
        state, self.weights_sha256 = read_weights(config.weights)
        self.name = "inception-v3-fid"
        self.dimension = 2048
        self.resolution = 299
        self.images_per_pass = 16
        with torch.device("meta"):  # no time is spent on initial values
            self.network = InceptionNetwork()
        # The classifier is not part of the features, and files differ in whether they hold it.
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        load_exactly(self.network, state, path=config.weights)
        self.network.eval().requires_grad_(False)

    def extract(self, levels: Tensor) -> Tensor:
        """Features (b 2048) of ``levels`` (b 3 299 299) in [0, 255]."""
        features: Tensor = self.network(levels / 127.5 - 1)
        return features


class InceptionNetwork(nn.Sequential):
    """The convolutional part, ``images`` (b 3 299 299) in [-1, 1] -> (b 2048)."""

    def __init__(self) -> None:
        layers = {
            "Conv2d_1a_3x3": _Convolution(3, 32, 3, stride=2),
            "Conv2d_2a_3x3": _Convolution(32, 32, 3),
            "Conv2d_2b_3x3": _Convolution(32, 64, 3, padding=1),  # (b 64 147 147)
            "pool_1": nn.MaxPool2d(3, stride=2),
            "Conv2d_3b_1x1": _Convolution(64, 80, 1),
            "Conv2d_4a_3x3": _Convolution(80, 192, 3),  # (b 192 71 71)
            "pool_2": nn.MaxPool2d(3, stride=2),
            "Mixed_5b": _MixedA(192, pooled=32),
            "Mixed_5c": _MixedA(256, pooled=64),
            "Mixed_5d": _MixedA(288, pooled=64),  # (b 288 35 35)
            "Mixed_6a": _MixedB(288),
            "Mixed_6b": _MixedC(768, width=128),
            "Mixed_6c": _MixedC(768, width=160),
            "Mixed_6d": _MixedC(768, width=160),
            "Mixed_6e": _MixedC(768, width=192),  # (b 768 17 17)
            "Mixed_7a": _MixedD(768),
            "Mixed_7b": _MixedE(1280, pool=_average),
            "Mixed_7c": _MixedE(2048, pool=_maximum),  # (b 2048 8 8)
        }
        super().__init__(OrderedDict(layers))

    def forward(self, images: Tensor) -> Tensor:
        """Features (b 2048)."""
        maps: Tensor = super().forward(images)
        return maps.mean(dim=(2, 3))


class _Convolution(nn.Module):
    """Convolution without bias, frozen batch normalisation, ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    # The TensorFlow graph of 2015 counts only real pixels at the border.
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    # In the last block the graph of 2015 has a maximum where the paper has an average.
    return functional.max_pool2d(x, 3, stride=1, padding=1)


class _MixedA(nn.Module):
    """1x1, 5x5, double 3x3 and pooled branch (Szegedy et al. 2016, fig. 5)."""

    def __init__(self, in_channels: int, *, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(in_channels, 64, 1)
        self.branch5x5_1 = _Convolution(in_channels, 48, 1)
        self.branch5x5_2 = _Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Convolution(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, padding=1)
        self.branch_pool = _Convolution(in_channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class _MixedB(nn.Module):
    """Half the size (section 5): strided 3x3, strided double 3x3, strided maximum."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Convolution(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Convolution(in_channels, 64, 1)
        self.branch3x3dbl_2 = _Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, functional.max_pool2d(x, 3, stride=2)], dim=1)


class _MixedC(nn.Module):
    """1x1, factorised 7x7, double factorised 7x7 and pooled branch (fig. 6 with n = 7)."""

    def __init__(self, in_channels: int, *, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Convolution(in_channels, 192, 1)
        self.branch7x7_1 = _Convolution(in_channels, width, 1)
        self.branch7x7_2 = _Convolution(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = _Convolution(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = _Convolution(in_channels, width, 1)
        self.branch7x7dbl_2 = _Convolution(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = _Convolution(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = _Convolution(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = _Convolution(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = _Convolution(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class _MixedD(nn.Module):
    """Half the size: strided 3x3, factorised 7x7 with strided 3x3, strided maximum."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Convolution(in_channels, 192, 1)
        self.branch3x3_2 = _Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Convolution(in_channels, 192, 1)
        self.branch7x7x3_2 = _Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = _Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = _Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, functional.max_pool2d(x, 3, stride=2)], dim=1)


class _MixedE(nn.Module):
    """1x1, split 3x3, double split 3x3 and pooled branch (fig. 7)."""

    def __init__(self, in_channels: int, *, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = _Convolution(in_channels, 320, 1)
        self.branch3x3_1 = _Convolution(in_channels, 384, 1)
        self.branch3x3_2a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Convolution(in_channels, 448, 1)
        self.branch3x3dbl_2 = _Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Convolution(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return torch.cat(branches, dim=1)
