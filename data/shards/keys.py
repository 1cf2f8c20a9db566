"""Uniqueness of keys over any number of shards: by hashes, sixteen bytes a sample, then exactly where hashes repeat."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.manifest import FileEntry
from data.randomness import generator
from data.samples import MAX_KEY_CHARACTERS
from data.shards.index import ShardIndex

_MULTIPLIERS = generator(0, "key hashes").integers(0, 1 << 64, size=MAX_KEY_CHARACTERS, dtype=np.uint64)


def key_hashes(index: ShardIndex) -> np.ndarray:
    """Return a hash of each key of a shard; uint64 (samples,).

    The sum over the key's bytes of (byte + 1) times a fixed random number for its place, modulo 2^64: two keys that
    were not made to collide do so with a probability of at most 2^-56.
    """
    ends = np.asarray(index.key_ends)
    if not len(ends):
        return np.empty(0, dtype=np.uint64)
    starts = np.concatenate([[0], ends[:-1]])
    places = np.arange(len(index.key_bytes)) - np.repeat(starts, ends - starts)
    terms = (index.key_bytes.astype(np.uint64) + np.uint64(1)) * _MULTIPLIERS[places]
    return np.add.reduceat(terms, starts)


def repeated_key(shards: Callable[[], Iterable[tuple[str, ShardIndex]]]) -> tuple[str, str, str] | None:
    """Return a key that two samples have, with the shards that hold them; None when every key is unique.

    Args:
        shards: Goes through all shards, each with its name; called a second time when hashes repeat.
    """
    repeated = repeated_values(key_hashes(index) for _, index in shards())
    if not len(repeated):
        return None
    seen: dict[str, str] = {}
    for name, index in shards():
        for row in np.flatnonzero(np.isin(key_hashes(index), repeated)).tolist():
            key = index.key(row)
            if key in seen:
                return key, seen[key], name
            seen[key] = name
    return None


def check_unique(folder: Path, entries: Sequence[FileEntry]) -> None:
    """Check that no two samples of these shards of ``folder`` have one key, by their indexes.

    Raises:
        ValueError: Two have; the message names key and shards.
    """

    def shards() -> Iterator[tuple[str, ShardIndex]]:
        for entry in entries:
            yield entry.name, ShardIndex.of(folder / entry.name, entry=entry)

    if found := repeated_key(shards):
        key, first, second = found
        raise ValueError(f"{folder}: key {key!r} is in {first} and in {second}; a key names one sample of a corpus.")


def repeated_values(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return the values that occur more than once in all parts together, sorted; uint64 (k,)."""
    values = np.concatenate([*parts, np.empty(0, dtype=np.uint64)])
    values.sort()
    return np.unique(values[1:][values[1:] == values[:-1]])


def later_occurrences(hashes: np.ndarray, others_at: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the places whose key occurred at an earlier place, sorted; int64 (k,).

    Args:
        hashes: Eight bytes of a hash of each place's key; uint64 (n,).
        others_at: Returns eight bytes of another hash for the keys at these places, which tell them apart; uint64 (k,).
    """
    repeated = repeated_values([hashes])
    places = np.flatnonzero(np.isin(hashes, repeated)) if len(repeated) else np.empty(0, dtype=np.int64)
    first, second = hashes[places], others_at(places)
    order = np.lexsort((second, first))  # stable: of equal keys the earliest place stands first
    first, second = first[order], second[order]
    return np.sort(places[order[1:][(first[1:] == first[:-1]) & (second[1:] == second[:-1])]])
