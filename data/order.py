"""The order of training data: one endless stream, each epoch a permutation, any position computed on its own.

Stream position ``p`` lies in epoch ``p // n``; the sample there is the epoch's permutation applied to ``p % n``. The
permutation is a Feistel network over the smallest even number of bits that holds ``n``, with cycle walking (Black &
Rogaway 2002, "Ciphers with arbitrary finite domains"), keyed by (seed, epoch). So there is no table: the order of a
hundred million samples costs no memory, and resuming at any step costs nothing.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, Field

from data.randomness import generator

ROUNDS = 8


class FullShuffleConfig(BaseModel, frozen=True, extra="forbid"):
    """Any sample anywhere in the epoch."""

    kind: Literal["full"] = "full"  # every sample can follow every other


class SequentialConfig(BaseModel, frozen=True, extra="forbid"):
    """Samples as they stand in the shards; for looking at data, not for training."""

    kind: Literal["sequential"] = "sequential"  # the order of the shards, each epoch alike


OrderConfig = Annotated[FullShuffleConfig | SequentialConfig, Field(discriminator="kind")]


class Order:
    """An endless stream of sample indices in which each epoch holds every index in [0, ``num_samples``) once.

    Args:
        num_samples: Samples an epoch; at least 1.
        seed: Seed of the stage; two seeds give unrelated orders.
    """

    def __init__(self, config: FullShuffleConfig | SequentialConfig, *, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError("An order needs at least one sample; the corpus is empty.")
        self.config, self.num_samples, self.seed = config, num_samples, seed

    def indices(self, first: int, count: int) -> np.ndarray:
        """Return the sample indices at stream positions [first, first + count); int64 (count,)."""
        positions = np.arange(first, first + count, dtype=np.int64)
        epochs, offsets = np.divmod(positions, self.num_samples)
        if self.config.kind == "sequential":
            return offsets
        out = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = permute(offsets[here], num_samples=self.num_samples, keys=round_keys(self.seed, int(epoch)))
        return out


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """Return the Feistel round keys of an epoch; uint64 (ROUNDS,)."""
    return generator(seed, "order", batch=epoch).integers(0, 1 << 64, size=ROUNDS, dtype=np.uint64, endpoint=False)


def permute(values: np.ndarray, *, num_samples: int, keys: np.ndarray) -> np.ndarray:
    """Apply the keyed permutation of [0, ``num_samples``) to ``values``; int64 (k,) -> int64 (k,)."""
    half_bits = max(1, (max(num_samples - 1, 1).bit_length() + 1) // 2)
    out = _feistel(values.astype(np.uint64), half_bits=half_bits, keys=keys)
    # Cycle walking: a value that left [0, n) is sent on until it comes back. The domain is at most 4n (8 for n = 1, 2).
    while (outside := out >= num_samples).any():
        out[outside] = _feistel(out[outside], half_bits=half_bits, keys=keys)
    return out.astype(np.int64)


def _feistel(values: np.ndarray, *, half_bits: int, keys: np.ndarray) -> np.ndarray:
    """One pass of a balanced Feistel network over ``2 * half_bits`` bits: a bijection for any round function."""
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit. Overflow is intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
