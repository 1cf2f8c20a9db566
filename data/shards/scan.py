"""Scan of a shard: a tar's members grouped into samples by key, each with its faults.

Names are split as webdataset does. It only finds members together that are adjacent; here they may lie anywhere in the
shard, as ``tar`` writes a folder that it did not sort.
"""

import contextlib
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO

from data.samples import IMAGE_SUFFIXES, BadSample, count_left_out
from data.shards.tar import Fault, Member, scan_tar

IMAGES = frozenset(IMAGE_SUFFIXES)
KNOWN_SUFFIXES = IMAGES | {"cls", "txt", "json"}


@dataclass(frozen=True, slots=True)
class RawSample:
    """The members of one sample by suffix, where they lie, and what is wrong with it."""

    key: str
    members: Mapping[str, Member]
    faults: tuple[BadSample, ...] = ()


@dataclass(slots=True)
class _Group:
    """A sample in the making."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    faults: list[BadSample] = field(default_factory=list)

    def fault(self, reason: str, detail: str, *, shard: str, member: str = "") -> None:
        self.faults.append(BadSample(reason, detail, shard=shard, key=self.key, member=member))


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as webdataset does: (key with folders, lower suffix)."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


@contextlib.contextmanager
def mapped(file: IO[bytes]) -> Iterator[mmap.mmap | bytes]:
    """Map an open file for reading; an empty file gives ``b""``, which cannot be mapped."""
    if os.fstat(file.fileno()).st_size == 0:
        yield b""
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        yield view


def scan_shard(buffer: bytes | mmap.mmap, *, shard: str, left_out: Counter[str] | None = None) -> list[RawSample]:
    """Group the members of a shard into samples, in the order of their first members.

    A fault goes to the sample it hit: the one it names, else a neighbour that lacks members which the shard's other
    samples have, else a sample of its own without key and members, so that nothing is lost in silence. Where samples
    are scattered, damage hits all that lack members.

    Args:
        buffer: The shard.
        shard: Its name, for errors.
        left_out: Counts the members of unknown suffix, which are then no faults of their samples.
    """
    groups: list[_Group] = []
    unplaced: list[tuple[int, Fault]] = []
    first: dict[str, _Group] = {}
    scattered: set[str] = set()
    others: dict[str, str] = {}  # of a key: a member that is left out, an image if there is one
    for item in scan_tar(buffer):
        # A fault of no sample in particular is placed at the end.
        key, suffix = split_name(item.name if isinstance(item, Member) else item.member)
        if isinstance(item, Fault):
            # A cut is the last that is found; of scattered samples it may have taken members from any.
            hits_any = item.reason == "truncated" and scattered
            if not key or hits_any or item.reason in ("unsafe_name", "long_name", "name_not_utf8"):
                unplaced.append((len(groups), item))
                continue

        # A member that nothing reads is counted.
        is_hidden = not key or key.endswith("/")
        is_known = not is_hidden and (suffix in KNOWN_SUFFIXES or suffix.endswith(".npy") or suffix == "npy")
        if isinstance(item, Member) and not is_known and left_out is not None:
            name = "hidden files" if is_hidden else f".{suffix}" if suffix else item.name.rpartition("/")[2]
            count_left_out(left_out, name)
            # An image is never left out alone: its sample is bad for the want of one.
            if is_hidden or suffix.rpartition(".")[2] not in IMAGE_SUFFIXES:
                others.setdefault(key, item.name)
                continue
            others[key] = item.name

        # The sample it belongs to: the last one, one that was left before, or a new one.
        group = groups[-1] if groups and groups[-1].key == key else first.get(key)
        if group is None:
            group = first[key] = _Group(key)
            groups.append(group)
        elif group is not groups[-1] and suffix in group.members:
            groups.append(_Group(key))
            # Nobody can say which of the two the scattered members belong to.
            for twin in (groups[-1], group) if key in scattered else (groups[-1],):
                twin.fault("duplicate_key", "the shard holds this key twice", shard=shard)
            group = groups[-1]
        elif group is not groups[-1]:
            scattered.add(key)

        # What it adds to that sample.
        if isinstance(item, Fault):
            group.fault(item.reason, item.detail, shard=shard, member=item.member)
        elif suffix in group.members:
            group.fault("duplicate_member", f"two members {suffix!r}", shard=shard, member=item.name)
        elif is_known or left_out is None:
            group.members[suffix] = item
            if not is_known:
                detail = f"{suffix[:40]!r} is not one of {', '.join(sorted(KNOWN_SUFFIXES))} or NAME.npy"
                group.fault("unknown_extension", detail, shard=shard, member=item.name[:200])

    # Samples that were left without an image by what they had in its place.
    for group in groups:
        if group.key in others and not group.members.keys() & IMAGES:
            name = others[group.key][:200]
            detail = f"its suffix, all behind the first dot, is {split_name(name)[1]!r}, which is no image's"
            group.fault("missing_image", detail, shard=shard, member=name)
    return _place_faults(groups, unplaced, shard=shard, scattered=bool(scattered))


def _place_faults(
    groups: list[_Group], unplaced: list[tuple[int, Fault]], *, shard: str, scattered: bool
) -> list[RawSample]:
    """Give each fault without a key to an incomplete neighbour, or make it a sample of its own."""
    kinds = Counter(frozenset(group.members) for group in groups)
    usual: frozenset[str] = max(kinds, key=lambda kind: kinds[kind], default=frozenset())
    every = usual.union(*kinds)
    lacking = [group for group in groups if not every <= group.members.keys()] if scattered else []
    alone: dict[int, list[RawSample]] = {}
    for before, fault in unplaced:
        error = BadSample(fault.reason, fault.detail, shard=shard, member=fault.member)
        neighbours = groups[max(before - 1, 0) : before + 1]
        incomplete = [group for group in neighbours if not usual <= group.members.keys()]
        if scattered and fault.reason in ("truncated", "damaged_header"):
            incomplete, lacking = lacking, []
        for group in incomplete:
            group.faults.append(error.at(key=group.key))
        if not incomplete:
            alone.setdefault(before, []).append(RawSample("", {}, (error,)))
    samples: list[RawSample] = []
    for place, group in enumerate(groups):
        samples += alone.get(place, [])
        samples.append(RawSample(group.key, group.members, tuple(group.faults)))
    return samples + alone.get(len(groups), [])
