"""Counter-based random draws: each a function of (seed, purpose, batch, position in the global batch) and nothing else.

Drawn on the host with Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so the bits are the
same on every device, for every rank count, worker count and restart. Each purpose has its own key: adding a draw for
one purpose never shifts another's.
"""

import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=1024)
def key_of(seed: int, purpose: str) -> tuple[int, int]:
    """Derive a 128-bit Philox key (two words) from a seed and the name of what is drawn."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def derived_seed(seed: int, purpose: str) -> int:
    """Derive a seed whose order and draws are unrelated to those of ``seed`` and of other purposes; below 2^64."""
    return key_of(seed, purpose)[0]


def generator(seed: int, purpose: str, batch: int = 0, position: int = 0) -> np.random.Generator:
    """Return a generator that depends on its arguments alone.

    The lowest two counter words stay free for the draws themselves, 2^128 of them, so neighbours never overlap.
    """
    return np.random.Generator(np.random.Philox(key=key_of(seed, purpose), counter=(0, 0, position, batch)))


class SampleDraws:
    """The random draws of some samples of one global batch.

    Args:
        seed: Seed of the stage.
        batch: Index of the global batch; for evaluation 0, with the sample's index as position.
        positions: Position of each sample in the global batch; (n,).
    """

    def __init__(self, seed: int, batch: int, positions: Iterable[int]) -> None:
        self.seed, self.batch, self.positions = seed, batch, [int(position) for position in positions]

    def normals(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return standard normals; float32 (n, *shape)."""
        out = np.empty((len(self.positions), *shape), dtype=np.float32)
        for row, numbers in zip(out, self._generators(purpose), strict=True):
            numbers.standard_normal(dtype=np.float32, out=row)
        return out

    def uniforms(self, purpose: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Return uniforms in [0, 1); float64 (n, *shape)."""
        out = np.empty((len(self.positions), *shape), dtype=np.float64)
        for index, numbers in enumerate(self._generators(purpose)):
            out[index] = numbers.random(shape)
        return out

    def _generators(self, purpose: str) -> Iterator[np.random.Generator]:
        """Yield each sample's ``generator``: one object with its counter set anew.

        A new one takes ten times as long, in which the prefetch thread holds the interpreter and training waits.
        """
        numbers = generator(self.seed, purpose, self.batch)
        state = numbers.bit_generator.state
        for position in self.positions:
            state["state"]["counter"][2] = position
            numbers.bit_generator.state = state
            yield numbers
