"""Decoded images as stored pixels, after a look for values that are no numbers."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from data.transforms import to_levels
from pipelines.runtime.config.errors import ConfigError


def finite_levels(images: Tensor, *, names: Sequence[object], stage: str, precision: str) -> np.ndarray:
    """Return decoded images (n C H W), about in [-1, 1], as uint8 (n H W C).

    Args:
        images: Output of a decoder.
        names: Name of each image in a message.
        stage: Stage or tool that decodes them.
        precision: Precision of the networks, or accelerate's name of it.

    Raises:
        ConfigError: An image holds NaN or infinity, which would be stored as a black or white pixel.
    """
    bad = ~images.isfinite().flatten(1).all(dim=1)
    if bad.any():
        first, computed_in = names[int(bad.int().argmax())], "float32" if precision == "no" else precision
        raise ConfigError(
            f"{stage}: {int(bad.sum())} of {len(images)} decoded images hold NaN or infinity, first {first}; the "
            f"networks compute in {computed_in}. Published autoencoders overflow float16: set precision to bf16 or "
            "float32. If it is that already, the weights are at fault: look at the losses of their training."
        )
    return to_levels(images)
