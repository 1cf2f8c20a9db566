"""Fidelity of a reconstruction to its image: peak signal-to-noise ratio and structural similarity, image by image.

Images are (b c h w), either uint8 or float in [-1, 1]; float images outside the range are clamped, as they are when
they are written to a file. Results are float64 on the images' device.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from models.metrics.estimate import on_one_thread

_PEAK = 255.0
SSIM_WINDOW = 11  # pixels a side
_ROUNDING_ERROR = 1 / 12  # mean square error of rounding to whole levels


@on_one_thread
def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: ``10 log10(255^2 / mean square error in 8-bit levels)``.

    An error below that of rounding to 8 bits counts as that error, so equal images have 58.9 dB and a mean over images
    stays finite.

    Args:
        images, reference: (b c h w), uint8 or float in [-1, 1].

    Returns:
        (b,) float64.

    Raises:
        ValueError: The shapes differ or are not (b c h w).
    """
    images, reference = _checked_levels(images, reference)
    mean_square_error = (images - reference).square().mean(dim=(1, 2, 3))
    return 20 * math.log10(_PEAK) - 10 * mean_square_error.clamp_min(_ROUNDING_ERROR).log10()


@on_one_thread
def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Mean structural similarity of each image, averaged over its channels.

    Wang et al. 2004 (10.1109/TIP.2003.819861), eq. 13 with the paper's constants: an 11x11 Gaussian window of 1.5
    pixels deviation, K1 = 0.01, K2 = 0.03, 8-bit levels; only windows that lie wholly in the image count.

    Args:
        images, reference: (b c h w), uint8 or float in [-1, 1]; at least 11 pixels wide and high.

    Returns:
        (b,) float64, at most 1, which only equal images reach.

    Raises:
        ValueError: The shapes differ, are not (b c h w), or are smaller than the window.
    """
    images, reference = _checked_levels(images, reference)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        size = f"{images.shape[-2]}x{images.shape[-1]}"
        raise ValueError(f"SSIM looks through {SSIM_WINDOW}x{SSIM_WINDOW} windows; images of {size} are smaller.")

    mean, mean_ref = _window_mean(images), _window_mean(reference)
    variance = _window_mean(images.square()) - mean.square()
    variance_ref = _window_mean(reference.square()) - mean_ref.square()
    covariance = _window_mean(images * reference) - mean * mean_ref

    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    luminance = (2 * mean * mean_ref + c1) / (mean.square() + mean_ref.square() + c1)
    structure = (2 * covariance + c2) / (variance + variance_ref + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _window_mean(levels: Tensor) -> Tensor:
    """Gaussian mean around each pixel, by two one-dimensional passes; (b c h w) -> (b c h-10 w-10)."""
    offsets = torch.arange(-5, 6, dtype=levels.dtype, device=levels.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    batch, channels, height, width = levels.shape
    planes = levels.reshape(batch * channels, 1, height, width)
    planes = functional.conv2d(planes, window.reshape(1, 1, -1, 1))
    planes = functional.conv2d(planes, window.reshape(1, 1, 1, -1))
    return planes.reshape(batch, channels, height - 10, width - 10)


def _checked_levels(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape != reference.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and reference {tuple(reference.shape)} must have one shape (b c h w)."
        )
    return _levels(images), _levels(reference)


def _levels(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.double()
    return (images.double().clamp(-1, 1) + 1) * (_PEAK / 2)
