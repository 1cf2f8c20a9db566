"""The shards of a split as one long row of samples: mapped when they are needed, checked, and closed again."""

import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from data.commit import sha256_of
from data.manifest import FileEntry, Manifest, read_manifest
from data.order import AnyOrderConfig, Order, WeightedConfig
from data.remote import local_path
from data.samples import BadSample, NpyLayout, Split, parse_caption
from data.shards import ShardIndex, index_path

VerifyLevel = Literal["size", "hash", "full"]

MOST_OPEN_SHARDS = 16_384


def max_open_shards() -> int:
    """Return how many shards a reader keeps open: half of the process's file descriptors, two a shard."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(16, min(limit // 4, MOST_OPEN_SHARDS))


@dataclass(frozen=True)
class ShardRange:
    """The samples [``first``, ``first + entry.samples``) of a split lie in this shard, in order."""

    entry: FileEntry
    first: int

    @property
    def indices(self) -> np.ndarray:
        """Indices of the shard's samples, in order; int64 (samples,)."""
        return np.arange(self.first, self.first + self.entry.samples, dtype=np.int64)


class OpenShard:
    """One mapped shard with its index."""

    def __init__(self, path: Path, entry: FileEntry, *, index: Path, index_trusted: bool = False) -> None:
        self.name, self.in_place = entry.name, bool(entry.url)
        self.index = ShardIndex.of(path, entry=entry, kept=index, trusted=index_trusted)
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

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {suffix: column for column, suffix in enumerate(self.index.suffixes)}

    def fetch(self, start: int, size: int) -> None:
        """Ask the kernel for these bytes, without waiting: the disk then works on a whole batch at once."""
        first = start - start % mmap.PAGESIZE
        self.map.madvise(mmap.MADV_WILLNEED, first, start + size - first)

    def will_need(self, row: int, suffix: str) -> None:
        """Ask the kernel for a member that will be read soon, where there is one."""
        if self.has(row, suffix):
            column = self._columns[suffix]
            self.fetch(self.index.offsets.item(row, column), self.index.sizes.item(row, column))

    def has(self, row: int, suffix: str) -> bool:
        """Say whether sample ``row`` has a member ``suffix``."""
        column = self._columns.get(suffix)
        return column is not None and self.index.offsets.item(row, column) >= 0

    def member(self, row: int, suffix: str) -> memoryview | None:
        """Return the bytes of a member of sample ``row``, or None when it has no such member."""
        if not self.has(row, suffix):
            return None
        column = self._columns[suffix]
        offset = self.index.offsets.item(row, column)
        return self.view[offset : offset + self.index.sizes.item(row, column)]

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
        try:
            return parse_caption(bytes(payload))
        except BadSample as error:
            raise error.at(shard=self.name, key=self.key(row), member=f"{self.key(row)}.txt") from None

    def column(self, suffix: str, layout: NpyLayout) -> int:
        """Return the column of arrays ``suffix`` in the index.

        Raises:
            BadSample: ``wrong_layout``: not all samples have such an array of this ``layout``.
        """
        found = self.index.layouts.get(suffix)
        if found != layout:
            what = "is missing or differs within the shard" if found is None else f"is {found.dtype} {found.shape}"
            raise BadSample(
                "wrong_layout",
                f"{suffix} {what}; the corpus holds {layout.dtype} {layout.shape}",
                shard=self.name,
                member=suffix,
            )
        return self._columns[suffix]


class ShardSet:
    """The shards of one split of a stage's folder, opened as they are needed."""

    def __init__(self, folder: str | Path, *, split: Split, manifest: Manifest | None = None) -> None:
        """Take the split's shards from the manifest (read from ``folder`` when not given).

        Raises:
            FileNotFoundError: No manifest: the stage has not finished.
            ValueError: The manifest lists no shard of the split.
        """
        self.folder, self.split = Path(folder), split
        self.manifest = manifest or read_manifest(self.folder)
        entries = [e for e in self.manifest.files if e.name.startswith(f"{split}-") and e.name.endswith(".tar")]
        if not entries:
            raise ValueError(f"{self.folder} has no {split} shards; its manifest lists none named {split}-*.tar.")
        self._ends = np.cumsum([entry.samples for entry in entries], dtype=np.int64)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._opened_before: set[int] = set()
        self._max_open = max_open_shards()
        self._lock = threading.Lock()
        self.shards = tuple(
            ShardRange(entry, int(end) - entry.samples) for entry, end in zip(entries, self._ends, strict=True)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def path(self, entry: FileEntry) -> Path:
        """Return where a shard lies on this machine, fetching it when it is far away.

        Raises:
            OSError: It cannot be fetched.
        """
        return local_path(entry.url) if entry.url else self.folder / entry.name

    def locate(self, indices: np.ndarray) -> tuple[list[OpenShard], list[int]]:
        """Return, for each index, its shard (open and unchanged) and its row there.

        Raises:
            IndexError: An index outside [0, len).
            BadSample: A shard cannot be read as its manifest says.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(
                f"{self.folder} ({self.split}) has {len(self)} samples; asked for {indices.min()} to {indices.max()}."
            )
        numbers = np.searchsorted(self._ends, indices, side="right")
        firsts = np.concatenate([[0], self._ends])[numbers]
        wanted = {number: self._opened(number) for number in set(numbers.tolist())}
        return [wanted[number] for number in numbers.tolist()], (indices - firsts).tolist()

    def keys(self, indices: np.ndarray) -> list[str]:
        """Return the keys of the samples at ``indices``, int64 (n,)."""
        shards, rows = self.locate(indices)
        return [shard.key(row) for shard, row in zip(shards, rows, strict=True)]

    def _opened(self, number: int) -> OpenShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                entry = self.shards[number].entry
                kept = index_path(self.folder / entry.name)
                try:
                    shard = OpenShard(self.path(entry), entry, index=kept, index_trusted=number in self._opened_before)
                except FileNotFoundError:
                    where = entry.url or self.folder / entry.name
                    raise BadSample("shard_missing", f"{where} is not there", shard=entry.name) from None
                self._open[number] = shard
                self._opened_before.add(number)
                # Dropped, not closed: a batch in another thread may still be reading from it.
                while len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
        shard.check_unchanged()
        return shard

    def rows(self) -> Iterator[tuple[OpenShard, int]]:
        """Yield every sample of the split, in order, as its shard and row."""
        for part in self.shards:
            shards, rows = self.locate(part.indices)
            yield from zip(shards, rows, strict=True)

    def labels(self) -> np.ndarray:
        """Return the class of every sample, -1 where there is none; int64 (len,). Opens every shard once."""
        return np.concatenate([self._opened(number).index.labels for number in range(len(self.shards))])

    def corpora(self) -> dict[str, int]:
        """Return the number of samples of each corpus, in order; one without a name when there is only one.

        Raises:
            ValueError: The shards of a corpus do not lie together.
        """
        sizes: dict[str, int] = {}
        last = None
        for shard in self.shards:
            name = shard.entry.corpus
            if name in sizes and name != last:
                raise ValueError(f"{self.folder}: the shards of corpus {name!r} do not stand together in the manifest.")
            sizes[name] = sizes.get(name, 0) + shard.entry.samples
            last = name
        return sizes

    def order(self, config: AnyOrderConfig, *, seed: int, global_batch: int) -> Order:
        """Return the order in which training goes through the split; see ``data.order``.

        Raises:
            ValueError: The configuration does not suit the corpus or the batch.
        """
        return Order(
            config,
            num_samples=len(self),
            seed=seed,
            global_batch=global_batch,
            shard_sizes=[shard.entry.samples for shard in self.shards],
            labels=self.labels() if isinstance(config, WeightedConfig) and config.by == "class" else None,
            classes=self.manifest.classes,
            corpora=self.corpora(),
        )

    def verify(self, level: VerifyLevel = "size") -> None:
        """Check every shard: its size, also its sha256 (``hash``), also its whole structure (``full``).

        Raises:
            BadSample: The first thing that is wrong.
        """
        for shard in self.shards:
            entry = shard.entry
            path = self.path(entry)
            if not path.is_file():
                raise BadSample("shard_missing", f"{path} is not there", shard=entry.name)
            if (size := path.stat().st_size) != entry.bytes:
                raise BadSample("shard_changed", f"{size} bytes, its manifest says {entry.bytes}", shard=entry.name)
            if level != "size" and (digest := sha256_of(path)) != entry.sha256:
                raise BadSample("shard_changed", f"sha256 {digest}, its manifest says {entry.sha256}", shard=entry.name)
            if level == "full" and not entry.url:  # of shards that others wrote, samples may have been left out
                ShardIndex.build(path, entry=entry)
