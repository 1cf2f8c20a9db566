"""Metrics of images and of sets of images: each value with its standard error, and the same bits every time.

Read ``estimate`` (a value with its error), then ``distribution`` (Frechet and kernel distance, precision, recall),
``fidelity`` (PSNR, SSIM) and ``probe`` (class accuracy). No other package of ours is imported.
"""

from models.metrics.distribution import (
    GaussianStatistics,
    PrecisionRecall,
    frechet_distance,
    gaussian_frechet_distance,
    kernel_distance,
    precision_recall,
)
from models.metrics.estimate import Estimate, mean_estimate
from models.metrics.fidelity import psnr, ssim
from models.metrics.probe import LinearProbe

__all__ = [
    "Estimate",
    "GaussianStatistics",
    "LinearProbe",
    "PrecisionRecall",
    "frechet_distance",
    "gaussian_frechet_distance",
    "kernel_distance",
    "mean_estimate",
    "precision_recall",
    "psnr",
    "ssim",
]
