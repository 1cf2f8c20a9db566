"""Shards of one split as one long row of samples: opened when they are needed, checked, and closed again."""

import contextlib
import resource
import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from data.manifest import FileEntry, Manifest, read_manifest
from data.order.order import AnyOrderConfig, Order, WeightedConfig
from data.samples import BadSample, Split
from data.shards.index import ShardIndex, index_path
from data.shards.reader import FarShard, OpenShard, Shard
from data.shards.remote import TRIES, answers_ranges, held, is_remote, local_path, range_policy

MOST_OPEN_SHARDS = 4_096  # maps of memory are limited, too: to 65,530 a process by default
FEW = 0.1  # share of a remote shard's bytes below which its samples are fetched by themselves


def max_open_shards() -> int:
    """Return how many shards a reader keeps open: an eighth of the process's file descriptors, two a shard.

    A stage has up to four readers.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN_SHARDS if limit == resource.RLIM_INFINITY else max(16, min(limit // 16, MOST_OPEN_SHARDS))


@dataclass(frozen=True)
class ShardRange:
    """The samples [``first``, ``first + entry.samples``) of a split lie in this shard, in order."""

    entry: FileEntry
    first: int

    @property
    def indices(self) -> np.ndarray:
        """Indices of the shard's samples, in order; int64 (samples,)."""
        return np.arange(self.first, self.first + self.entry.samples, dtype=np.int64)


class ShardSet:
    """The shards of one split of a stage's folder, opened as they are needed."""

    def __init__(
        self, folder: str | Path, *, split: Split, manifest: Manifest | None = None, scattered: bool = False
    ) -> None:
        """Take the split's shards from the manifest (read from ``folder`` when not given).

        Args:
            folder: The stage's folder.
            split: ``train`` or ``val``.
            manifest: The folder's manifest, when it is known.
            scattered: Few samples of a shard are read: of a remote shard only these are fetched.

        Raises:
            FileNotFoundError: No manifest: the stage has not finished.
            ValueError: The manifest lists no shard of the split.
        """
        self.folder, self.split, self._scattered = Path(folder), split, scattered
        self.manifest = manifest or read_manifest(self.folder)
        entries = [e for e in self.manifest.files if e.name.startswith(f"{split}-") and e.name.endswith(".tar")]
        if not entries:
            raise ValueError(f"{self.folder} has no {split} shards; its manifest lists none named {split}-*.tar.")
        self._ends = np.cumsum([entry.samples for entry in entries], dtype=np.int64)
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._opened_before: set[int] = set()
        self._ranged_hosts: dict[str, bool] = {}
        self._max_open = max_open_shards()
        self._lock = threading.Lock()
        self.shards = tuple(
            ShardRange(entry, int(end) - entry.samples) for entry, end in zip(entries, self._ends, strict=True)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def path(self, entry: FileEntry) -> Path:
        """Return the path of a shard on this machine, fetching it when it is remote.

        Raises:
            OSError: It cannot be fetched.
        """
        return local_path(entry.url, size=entry.bytes, sha256=entry.sha256) if entry.url else self.folder / entry.name

    def locate(self, indices: np.ndarray) -> tuple[list[Shard], list[int]]:
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

    def _opened(self, number: int) -> Shard:
        with self._lock:
            if number not in self._open:
                entry = self.shards[number].entry
                self._open[number] = self._open_there(entry, trusted=number in self._opened_before)
                self._opened_before.add(number)
                # Dropped, not closed: a batch in another thread may still be reading from it.
                while len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            shard = self._open[number]
        shard.check_unchanged()
        return shard

    def _open_there(self, entry: FileEntry, *, trusted: bool) -> Shard:
        # A copy may be dropped from the cache between its fetch and its opening.
        for _ in range(TRIES - 1 if is_remote(entry.url) else 0):
            with contextlib.suppress(FileNotFoundError):
                return self._open_one(entry, trusted=trusted)
        try:
            return self._open_one(entry, trusted=trusted)
        except FileNotFoundError:
            where = entry.url or self.folder / entry.name
            raise BadSample("shard_missing", f"{where} is not there", shard=entry.name) from None

    def _open_one(self, entry: FileEntry, *, trusted: bool) -> Shard:
        kept = index_path(self.folder / entry.name)
        if is_remote(entry.url) and not held(entry.url):
            index = ShardIndex.of(Path(entry.url), entry=entry, kept=kept, trusted=trusted)
            # Also where the split has few samples in the shard, as validation has.
            few = int(np.maximum(index.sizes, 0).sum()) < FEW * entry.bytes
            if range_policy(self._scattered or few) and self._can_be_ranged(entry.url):
                return FarShard(entry, index)
        return OpenShard(self.path(entry), entry, index=kept, index_trusted=trusted)

    def _can_be_ranged(self, url: str) -> bool:
        host = urlsplit(url).netloc
        if host not in self._ranged_hosts:
            self._ranged_hosts[host] = answers_ranges(url)
        return self._ranged_hosts[host]

    def index_of(self, entry: FileEntry) -> ShardIndex:
        """Return the index of a shard, without fetching that."""
        name = self.folder / entry.name
        return ShardIndex.of(Path(entry.url) if entry.url else name, entry=entry, kept=index_path(name))

    def labels(self) -> np.ndarray:
        """Return the class of every sample, -1 where there is none; int64 (len,). Opens every shard once."""
        return np.concatenate([self._opened(number).index.labels for number in range(len(self.shards))])

    def corpora(self) -> dict[str, int]:
        """Return the number of samples of each corpus, in order; one without a name when there is only one.

        Raises:
            ValueError: The shards of a corpus do not lie together.
        """
        sizes: dict[str, int] = {}
        for name, shards in groupby(self.shards, key=lambda shard: shard.entry.corpus):
            if name in sizes:
                raise ValueError(f"{self.folder}: the shards of corpus {name!r} do not stand together in the manifest.")
            sizes[name] = sum(shard.entry.samples for shard in shards)
        return sizes

    def order(self, config: AnyOrderConfig, *, seed: int, global_batch: int) -> Order:
        """Return the order of training samples; see ``data.order.order``.

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
