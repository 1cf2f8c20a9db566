"""Scan of a shard: a tar's members grouped into samples by key, as webdataset does, each with its faults."""

import contextlib
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from data.samples import IMAGE_SUFFIXES, BadSample
from data.shards.tar import Fault, Member, scan_tar

KNOWN_SUFFIXES = frozenset({*IMAGE_SUFFIXES, "cls", "txt", "json"})


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one sample by suffix, where they lie, and what is wrong with it."""

    key: str
    members: Mapping[str, Member]
    faults: tuple[BadSample, ...] = ()


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as webdataset does: (key with folders, lower suffix)."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """Map a file for reading; an empty file gives ``b""``, which cannot be mapped."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            yield view


def scan_shard(buffer: bytes | mmap.mmap, *, shard: str) -> list[RawSample]:
    """Group the members of a shard into samples, in order; adjacent members with one key are one sample.

    A fault goes to the sample it hit: the one it names, else a neighbour that lacks members which the shard's other
    samples have, else a sample of its own without key and members, so that nothing is lost in silence.
    """
    groups: list[tuple[str, dict[str, Member], list[BadSample]]] = []
    unplaced: list[tuple[int, Fault]] = []
    seen: set[str] = set()
    for item in scan_tar(buffer):
        key, suffix = split_name(item.name if isinstance(item, Member) else item.member)
        if isinstance(item, Fault) and (not key or item.reason in ("unsafe_name", "long_name", "name_not_utf8")):
            unplaced.append((len(groups), item))
            continue
        if not groups or groups[-1][0] != key:
            groups.append((key, {}, []))
            if key in seen:
                groups[-1][2].append(BadSample("duplicate_key", "the shard holds this key twice", shard=shard, key=key))
            seen.add(key)
        _, members, faults = groups[-1]
        if isinstance(item, Fault):
            faults.append(BadSample(item.reason, item.detail, shard=shard, key=key, member=item.member))
        elif suffix in members:
            faults.append(
                BadSample("duplicate_member", f"two members {suffix!r}", shard=shard, key=key, member=item.name)
            )
        else:
            members[suffix] = item
            if suffix not in KNOWN_SUFFIXES and not suffix.endswith(".npy") and suffix != "npy":
                detail = f"{suffix[:40]!r} is not one of {', '.join(sorted(KNOWN_SUFFIXES))} or NAME.npy"
                faults.append(BadSample("unknown_extension", detail, shard=shard, key=key, member=item.name[:200]))
    return _place_faults(groups, unplaced, shard=shard)


def _place_faults(
    groups: list[tuple[str, dict[str, Member], list[BadSample]]], unplaced: list[tuple[int, Fault]], *, shard: str
) -> list[RawSample]:
    """Give each fault without a key to an incomplete neighbour, or make it a sample of its own."""
    kinds = Counter(frozenset(members) for _, members, _ in groups)
    usual: frozenset[str] = max(kinds, key=lambda kind: kinds[kind], default=frozenset())
    alone: dict[int, list[RawSample]] = {}
    for before, fault in unplaced:
        error = BadSample(fault.reason, fault.detail, shard=shard, member=fault.member)
        neighbours = groups[max(before - 1, 0) : before + 1]
        incomplete = [group for group in neighbours if not usual <= group[1].keys()]
        for key, _, faults in incomplete:
            faults.append(error.at(key=key))
        if not incomplete:
            alone.setdefault(before, []).append(RawSample("", {}, (error,)))
    samples: list[RawSample] = []
    for place, (key, members, faults) in enumerate(groups):
        samples += alone.get(place, [])
        samples.append(RawSample(key, members, tuple(faults)))
    return samples + alone.get(len(groups), [])
