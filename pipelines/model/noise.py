"""Noise of samples: standard normal tensors, each a function of (seed, index of the sample, purpose) alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data.randomness import SampleDraws


def noise_of(
    seed: int, indices: Sequence[int], *, shape: Sequence[int], device: torch.device
) -> Callable[[str], Tensor]:
    """Return the noise of the samples ``indices`` by purpose: (n, *shape), float32, whatever their batch."""
    draws = SampleDraws(seed, 0, indices)
    return lambda purpose: torch.from_numpy(draws.normals(purpose, tuple(shape))).to(device)
