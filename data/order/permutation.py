"""Keyed permutations of [0, n), computed value by value: a shuffle without a table.

A Feistel network over pairs (left, right) in Z_a x Z_b with a * b just above n, each round adding a keyed hash of one
half to the other (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", the generalised Feistel cipher).
Halves of a few values are mixed badly, so small sets are sorted by a keyed hash instead.
"""

from functools import lru_cache

import numpy as np

from data.randomness import generator

SMALL = 64  # sizes below it are sorted: after the rounds pairs of places are still not uniform at 40
ROUNDS = 6  # even; from four rounds on a Feistel network cannot be told from random (Luby & Rackoff 1988)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, near 2^64 over the golden ratio


@lru_cache(maxsize=256)
def round_keys(seed: int, purpose: str, epoch: int = 0) -> tuple[np.uint64, ...]:
    """Return the round keys of one permutation, or of a family of them that salts tell apart."""
    keys = generator(seed, purpose, batch=epoch).integers(0, 1 << 64, size=ROUNDS, dtype=np.uint64, endpoint=False)
    return tuple(keys)


def permute(
    values: np.ndarray, sizes: int | np.ndarray, keys: tuple[np.uint64, ...], *, salts: np.ndarray | None = None
) -> np.ndarray:
    """Apply a keyed permutation of [0, size) to each value; int64 (k,) -> int64 (k,).

    Args:
        values: Each in [0, its size).
        sizes: One for all, or one a value (k,); at least 1.
        keys: Of ``round_keys``.
        salts: One a value: equal salts (and sizes) share a permutation, others have unrelated ones. int64 (k,).
    """
    bound = np.asarray(sizes, dtype=np.uint64)
    mixed = None if salts is None else _mix(salts.astype(np.uint64) + GOLDEN)
    small = np.broadcast_to(bound < SMALL, values.shape)
    if small.all():
        return _rank(values.astype(np.uint64), bound, keys, mixed).astype(np.int64)
    if small.any():
        out = np.empty(values.shape, dtype=np.int64)
        for part in (small, ~small):
            out[part] = permute(values[part], bound[part], keys, salts=None if salts is None else salts[part])
        return out
    num_left = np.asarray(np.ceil(np.sqrt(bound)), dtype=np.uint64)
    num_right = np.asarray((bound + num_left - np.uint64(1)) // num_left)
    out = _feistel(values.astype(np.uint64), num_left, num_right, keys, mixed)
    # Cycle walking: a value that left [0, n) is sent on until it comes back; at most one in sqrt(n) is outside.
    while (outside := np.flatnonzero(out >= bound)).size:
        some_left, some_right = (half if half.ndim == 0 else half[outside] for half in (num_left, num_right))
        again = None if mixed is None else mixed[outside]
        out[outside] = _feistel(out[outside], some_left, some_right, keys, again)
    return out.astype(np.int64)


def _rank(values: np.ndarray, sizes: np.ndarray, keys: tuple[np.uint64, ...], mixed: np.ndarray | None) -> np.ndarray:
    """Return how many of [0, size) have a smaller hash than each value: every permutation is equally likely."""
    state = np.atleast_1d(keys[0] if mixed is None else keys[0] ^ mixed)
    own, rank = _mix(state + (values + np.uint64(1)) * GOLDEN), np.zeros_like(values)
    for other in range(int(sizes.max(initial=0))):
        state = state + GOLDEN  # SplitMix64, which gives no number twice: there are no ties
        rank += (_mix(state) < own) & (other < sizes)
    return rank


def _feistel(
    values: np.ndarray,
    num_left: np.ndarray,
    num_right: np.ndarray,
    keys: tuple[np.uint64, ...],
    mixed: np.ndarray | None,
) -> np.ndarray:
    left, right = np.divmod(values, num_right)
    one = np.uint64(1)
    for number, key in enumerate(keys):
        given, changed, modulus = (left, right, num_right) if number % 2 else (right, left, num_left)
        hashed = _mix(given ^ key if mixed is None else given ^ key ^ mixed)
        hashed >>= one  # Room for the sum.
        hashed += changed
        hashed %= modulus
        left, right = (left, hashed) if number % 2 else (hashed, right)
    return left * num_right + right


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit. Overflow is intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
