"""Statistics of all latents: alarms about collapsed channels and a scale that is not the VAE's, and their plot."""

import json
import math
from pathlib import Path

import numpy as np

from data.statistics import ChannelSums
from pipelines.model.grids import plot_png

COLLAPSED_STD = 1e-3  # of the posterior's means; a channel below it carries nothing of the image
SCALE_TOLERANCE = 0.2  # how far the scale may be from the VAE's own, relative
SCALE_METRIC = "val/latent_std"  # what train_vae measured of it


def alarms(sums: ChannelSums, vae_folder: Path) -> list[str]:
    """Return what is wrong with the scale of the latents, one sentence each; empty when it is sound."""
    found = [
        f"channel {channel} has collapsed: its means have a standard deviation of {std:.2g}"
        for channel, std in enumerate(np.sqrt(sums.variance_of_means))
        if std < COLLAPSED_STD
    ]
    expected, scale = scale_in_validation(vae_folder), scale_of(sums)
    if expected and abs(scale / expected - 1) > SCALE_TOLERANCE:
        found.append(
            f"the latents' scale is {scale:.4g}, but {expected:.4g} when the VAE was validated: these are other images "
            "than it was trained for, or they were prepared in another way"
        )
    return found


def scale_of(sums: ChannelSums) -> float:
    """Return the standard deviation of the posterior's means over all channels together."""
    mean = sums.channel_mean
    return math.sqrt(max(float((sums.variance_of_means + np.square(mean)).mean() - mean.mean() ** 2), 0.0))


def scale_in_validation(vae_folder: Path) -> float:
    """Return the same as the VAE's training measured it last, 0 when it did not."""
    path = vae_folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    values = [row[SCALE_METRIC] for row in map(json.loads, lines) if SCALE_METRIC in row]
    return float(values[-1]) if values else 0.0


def statistics_plot(sums: ChannelSums) -> bytes:
    """Draw mean, standard deviation and range of each channel; PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 1.5 + 0.4 * sums.num_channels), 3.6), layout="constrained")
    axis = figure.subplots()
    channels = np.arange(sums.num_channels)
    axis.vlines(channels, sums.low, sums.high, color="0.75", label="range of the means")
    axis.errorbar(channels, sums.channel_mean, sums.std, fmt="o", capsize=4, label="mean and standard deviation")
    axis.set_xticks(channels)
    axis.set_xlabel("channel")
    axis.set_ylabel("latent")
    axis.set_title(f"{int(sums.active.sum())} of {sums.num_channels} channels active", fontsize=10)
    axis.legend(fontsize=8)
    return plot_png(figure)
