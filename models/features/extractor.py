"""Interface of the feature extractors: 8-bit images in, features out that depend on nothing else."""

import abc
import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional


class FeatureExtractor(nn.Module, abc.ABC):
    """A frozen map from images to feature vectors, with a name and a digest for the metric's contract.

    An image's features do not depend on the other images of its batch, on the batch's size or on the number of
    threads: every pass has the same fixed shape, filled up with black images.
    """

    name: str  # of the features; metrics compare only under one name and digest
    weights_sha256: str  # of the weights file, or of the definition where there is none
    dimension: int  # features an image
    resolution: int  # pixels a side to which images are resized
    images_per_pass: int  # fixed batch size of the network

    @abc.abstractmethod
    def extract(self, levels: Tensor) -> Tensor:
        """Features (b d) float32 of ``levels`` (b 3 r r), float32 in [0, 255], at ``resolution``."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of ``images``, on the extractor's device.

        Args:
            images: (b c h w) with 1 or 3 channels (grey ones are repeated); uint8, or float in [-1, 1], which is
                clamped and rounded to 8 bits, as it is when it is written to a file. Other sizes than ``resolution``
                are resized by an antialiased bicubic filter (Parmar et al. 2022, arXiv:2104.11222), squashed if they
                are not square.

        Returns:
            (b d) float32.

        Raises:
            ValueError: The shape or dtype is another one, or a value is NaN or infinite.
        """
        images = eight_bit(images)
        device = next(self.buffers()).device
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            features = [self._features_of_pass(part.to(device)) for part in images.split(self.images_per_pass)]
        return torch.cat(features) if features else torch.empty(0, self.dimension, device=device)

    def _features_of_pass(self, images: Tensor) -> Tensor:
        num_images = len(images)
        missing = self.images_per_pass - num_images
        levels = functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)).float()
        size = (self.resolution, self.resolution)
        if levels.shape[-2:] != size:
            levels = functional.interpolate(levels, size=size, mode="bicubic", align_corners=False, antialias=True)
            levels = levels.clamp(0, 255)  # the bicubic filter overshoots at edges
        return self.extract(levels.expand(-1, 3, -1, -1))[:num_images]


def eight_bit(images: Tensor) -> Tensor:
    """``images`` as a file holds them, uint8; float images in [-1, 1] are clamped and rounded to the nearest level.

    Raises:
        ValueError: Not (b 1|3 h w), not uint8 or float, or NaN or infinite.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be (b c h w) with 1 or 3 channels, not of shape {tuple(images.shape)}.")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 levels or float in [-1, 1], not {images.dtype}.")
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(images)} images hold NaN or infinite values, the first is image "
            f"{int(finite.int().argmin())} of its batch. The model that made them has probably diverged."
        )
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_weights_file(path: Path) -> None:
    """Refuse a weights file that is missing or of another kind, without reading it.

    Raises:
        ValueError: Naming the file.
    """
    if not path.is_file():
        raise ValueError(f"There is no weights file {path}. Give the path of one that was downloaded before.")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"{path} must end in .safetensors, .pth or .pt.")


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """State dict and sha256 of a weights file, ``.safetensors`` or ``.pth`` / ``.pt`` (tensors only, never code).

    Raises:
        ValueError: The file is missing, of another kind, or not a state dict of tensors.
    """
    check_weights_file(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors for a damaged file
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights ({reason}). Download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict of tensors. Save `model.state_dict()` instead of the model.")
    return state, digest


def load_exactly(network: nn.Module, state: dict[str, Tensor], *, path: Path) -> None:
    """Give ``network`` (which may be on the meta device) the tensors of ``state``; every name and shape must fit.

    Raises:
        ValueError: Names are missing or left over, or a shape differs.
    """
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for name in network.state_dict():
        if name.endswith("num_batches_tracked"):  # read in training only, and not in every file
            state.setdefault(name, torch.tensor(0))
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reasons = [line.strip()[:160] for line in str(error).splitlines()[1:4]]
        raise ValueError(f"{path} does not fit the network: {' '.join(reasons)}") from error
