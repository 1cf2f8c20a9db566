"""Keys that name two samples are found wherever they are, and others are not accused."""

from pathlib import Path

import numpy as np
import pytest

from data.manifest import FileEntry
from data.shards import keys as keys_module
from data.shards.index import ShardIndex
from data.shards.keys import check_unique, key_hashes, later_occurrences, repeated_key
from data.shards.writer import ShardWriter


def write(folder: Path, name: str, keys: list[str]) -> FileEntry:
    with ShardWriter(folder / name) as shard:
        for key in keys:
            shard.add(key, {"txt": b"x"})
    assert shard.entry is not None
    return shard.entry


def index_of(keys: list[str]) -> ShardIndex:
    """An index of these keys alone."""
    none = np.empty((len(keys), 0), dtype=np.int64)
    return ShardIndex(
        shard="s",
        bytes=0,
        sha256="",
        suffixes=(),
        offsets=none,
        sizes=none,
        labels=np.full(len(keys), -1),
        key_bytes=np.frombuffer("".join(keys).encode(), dtype=np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        layouts={},
    )


def test_a_key_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    entries = [write(tmp_path, f"{n}.tar", [f"k{n}-{row}" for row in range(5)]) for n in range(4)]
    check_unique(tmp_path, entries)
    check_unique(tmp_path, [])
    entries.append(write(tmp_path, "9.tar", ["k9-0", "k2-3"]))
    with pytest.raises(ValueError, match=r"key 'k2-3' is in 2\.tar and in 9\.tar"):
        check_unique(tmp_path, entries)


def test_hashes_tell_keys_apart_by_every_byte_and_place() -> None:
    keys = [
        "a",
        "b",
        "ab",
        "ba",
        "a" * 79,
        "a" * 80,
        "b" + "a" * 79,
        "a" * 79 + "b",
        *(f"{n:09d}" for n in range(50_000)),
    ]
    hashes = key_hashes(index_of(keys))
    assert len(np.unique(hashes)) == len(keys)
    assert key_hashes(index_of(["x", "ab", "y"]))[1] == hashes[2]
    assert len(key_hashes(index_of([]))) == 0


def test_equal_hashes_of_different_keys_are_no_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [("a", index_of(["ab", "xy"])), ("b", index_of(["ba", "q"]))]
    monkeypatch.setattr(keys_module, "_MULTIPLIERS", np.full(80, 3, dtype=np.uint64))
    assert key_hashes(shards[0][1])[0] == key_hashes(shards[1][1])[0]
    assert repeated_key(lambda: shards) is None
    assert repeated_key(lambda: [*shards, ("c", index_of(["q"]))]) == ("q", "b", "c")
    clashing, others = np.array([7, 7, 7, 7, 7, 9], dtype=np.uint64), np.array([1, 2, 3, 2, 1, 2], dtype=np.uint64)
    assert later_occurrences(clashing, lambda places: others[places]).tolist() == [3, 4]
    assert later_occurrences(np.arange(6, dtype=np.uint64), lambda places: others[places]).tolist() == []


def test_memory_is_a_few_bytes_a_sample() -> None:
    import tracemalloc

    per_shard, num_shards = 20_000, 40
    index = index_of([f"{n:09d}" for n in range(per_shard)])
    hashes = key_hashes(index)

    def parts() -> list[np.ndarray]:
        return (hashes + np.uint64(number) for number in range(num_shards))  # type: ignore[return-value]

    tracemalloc.start()
    keys_module.repeated_values(parts())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 8 * per_shard * num_shards
