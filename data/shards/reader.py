"""Readers of one shard through its index: mapped from this machine's disk, or far away and read in ranges."""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from data.manifest import FileEntry
from data.samples import BadSample, NpyLayout, located, parse_caption
from data.shards.index import ShardIndex
from data.shards.remote import read_ranges
from data.shards.tar import BLOCK, is_header_of


class Shard(ABC):
    """Samples by row.

    Args:
        entry: Its entry in the manifest.
        index: Its index.
    """

    def __init__(self, entry: FileEntry, index: ShardIndex) -> None:
        self.entry, self.index = entry, index
        self.name, self.in_place = entry.name, bool(entry.url)
        self._columns = {suffix: column for column, suffix in enumerate(index.suffixes)}

    def place(self, row: int, suffix: str) -> tuple[int, int] | None:
        """Return offset and size of a member of sample ``row``, or None when it has no such member."""
        column = self._columns.get(suffix)
        if column is None or (offset := self.index.offsets.item(row, column)) < 0:
            return None
        return offset, self.index.sizes.item(row, column)

    def member(self, row: int, suffix: str) -> memoryview | None:
        """Return the bytes of a member of sample ``row``, or None when it has no such member."""
        place = self.place(row, suffix)
        return self._read(row, *place) if place else None

    @abstractmethod
    def _read(self, row: int, offset: int, size: int) -> memoryview:
        """Return ``size`` bytes of sample ``row`` at ``offset`` of the shard."""

    def will_need(self, row: int, suffix: str) -> None:  # noqa: B027 (of use where there is a disk to warn)
        """Say that a member will be read soon."""

    def check_unchanged(self) -> None:  # noqa: B027 (a range is checked as it comes)
        """Raise when the shard is seen to have changed since it was opened."""

    def key(self, row: int) -> str:
        """Return the key of sample ``row``."""
        return self.index.key(row)

    def label(self, row: int) -> int:
        """Return the label of sample ``row``, -1 when it has none."""
        return int(self.index.labels.item(row))

    def caption(self, row: int) -> str:
        """Return the caption of sample ``row``, "" when it has none.

        Raises:
            BadSample: It cannot be read.
        """
        payload = self.member(row, "txt")
        if payload is None:
            return ""
        with located(shard=self.name, key=self.key(row), member=f"{self.key(row)}.txt"):
            return parse_caption(bytes(payload))


class OpenShard(Shard):
    """A mapped shard."""

    def __init__(self, path: Path, entry: FileEntry, *, index: Path, index_trusted: bool) -> None:
        super().__init__(entry, ShardIndex.of(path, entry=entry, kept=index, trusted=index_trusted))
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise self._changed(size)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.view = memoryview(self.map)

    def check_unchanged(self) -> None:
        """Raise when the file has another size than at opening: touching a page that is gone would kill the process."""
        size = self.map.size()
        if size != self.index.bytes:
            raise self._changed(size)

    def _changed(self, size: int) -> BadSample:
        found = f"{size} bytes, its manifest says {self.index.bytes}"
        return BadSample("shard_changed", f"{found}: it was cut or changed", shard=self.name)

    def fetch(self, start: int, size: int) -> None:
        """Ask the kernel for these bytes, without waiting: the disk then works on a whole batch at once."""
        first = start - start % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, first, start + size - first)

    def will_need(self, row: int, suffix: str) -> None:
        """Ask the kernel for a member that will be read soon, where there is one."""
        if place := self.place(row, suffix):
            self.fetch(*place)

    def _read(self, row: int, offset: int, size: int) -> memoryview:
        return self.view[offset : offset + size]

    def column(self, suffix: str, layout: NpyLayout) -> int:
        """Return the column of arrays ``suffix`` in the index.

        Raises:
            BadSample: ``wrong_layout``: not all samples have such an array of this ``layout``.
        """
        found = self.index.layouts.get(suffix)
        if found != layout:
            what = "is missing or differs within the shard" if found is None else f"is {found.dtype} {found.shape}"
            detail = f"{suffix} {what}; the corpus holds {layout.dtype} {layout.shape}"
            raise BadSample("wrong_layout", detail, shard=self.name, member=suffix)
        return self._columns[suffix]


class FarShard(Shard):
    """A remote shard, of which samples are fetched by themselves; see ``brought_near``."""

    def _read(self, row: int, offset: int, size: int) -> memoryview:
        (near,) = brought_near([self], [row], [True])  # one request a call
        return near._read(row, offset, size)

    def span(self, row: int) -> tuple[int, int]:
        """Return the first byte of a sample, its first header included, and its end: its members lie together."""
        places = [place for suffix in self.index.suffixes if (place := self.place(row, suffix))]
        return min(offset for offset, _ in places) - BLOCK, max(offset + size for offset, size in places)


class _FetchedShard(Shard):
    """The samples of a remote shard that one batch needs."""

    def __init__(self, shard: FarShard) -> None:
        super().__init__(shard.entry, shard.index)
        self.spans: dict[int, tuple[int, memoryview]] = {}  # of each row: its first byte in the shard, and its bytes

    def _read(self, row: int, offset: int, size: int) -> memoryview:
        start, payload = self.spans[row]
        # The shard's hash cannot be known from a piece of it, but each member comes with its header.
        if not is_header_of(bytes(payload[offset - start - BLOCK : offset - start]), size):
            detail = f"{self.entry.url} has no member of {size} bytes at byte {offset} any more"
            raise BadSample("shard_changed", detail, shard=self.name, key=self.key(row))
        return payload[offset - start : offset - start + size]


def brought_near(shards: Sequence[Shard], rows: Sequence[int], needed: Sequence[bool]) -> list[Shard]:
    """Return the shard of each sample with that sample in memory; those of remote shards are fetched all at once.

    Args:
        shards: Of each sample.
        rows: Of each sample.
        needed: Whether its members will be read.

    Raises:
        OSError: A range cannot be fetched.
    """
    near: dict[int, _FetchedShard] = {}
    wanted: list[tuple[_FetchedShard, int, tuple[str, int, int]]] = []
    out: list[Shard] = []
    for shard, row, wants in zip(shards, rows, needed, strict=True):
        if not wants or not isinstance(shard, FarShard):
            out.append(shard)
            continue
        fetched = near.setdefault(id(shard), _FetchedShard(shard))
        wanted.append((fetched, row, (shard.entry.url, *shard.span(row))))
        out.append(fetched)
    payloads = read_ranges([place for _, _, place in wanted])
    for (fetched, row, (_, start, _)), payload in zip(wanted, payloads, strict=True):
        fetched.spans[row] = start, memoryview(payload)
    return out
