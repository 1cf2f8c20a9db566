"""Reading a stage's shards at random: indices in, batches out, without parsing a tar.

Shards are memory-mapped, and a batch is gathered by one copy outside the interpreter's lock, so reading never holds up
the training thread.
"""

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from data.commit import sha256_of
from data.manifest import FileEntry, Manifest, read_manifest
from data.prefetch import Loaded, Prefetch, prefetch
from data.samples import (
    FLIPPED_SUFFIX,
    IMAGE_SUFFIXES,
    LATENT_SUFFIX,
    BadSample,
    NpyLayout,
    Split,
    parse_caption,
)
from data.shards import ShardIndex
from data.transforms import DEFAULT_MAX_PIXELS, ImageViewConfig, decode_image, view_image

VerifyLevel = Literal["size", "hash", "full"]

__all__ = ["ImageBatch", "ImageShards", "LatentBatch", "LatentShards", "Loaded", "Prefetch", "ShardRange", "prefetch"]

MAX_OPEN_SHARDS = 512  # maps held at once in a reader; each holds one file descriptor
CARRIED_SUFFIXES = ("cls", "txt", "json")


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Images uint8 (n h w c), labels int64 (n,) with -1 for none, keys and captions ("" for none)."""

    images: np.ndarray
    labels: np.ndarray
    keys: list[str]
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """Moments as stored (n 2 c h w) = mean, log-variance; labels int64 (n,); keys; captions; features (n ...)."""

    moments: np.ndarray
    labels: np.ndarray
    keys: list[str]
    captions: list[str]
    features: dict[str, np.ndarray]


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

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self.name = entry.name
        self.index = ShardIndex.of(path, entry=entry)
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.bytes:
                raise self._changed(size)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Training reads single samples all over the file; reading ahead would fetch what nobody asked for.
        self.map.madvise(mmap.MADV_RANDOM)
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

    def member(self, row: int, suffix: str) -> memoryview | None:
        """Return the bytes of a member of sample ``row``, or None when it has no such member."""
        column = self._columns.get(suffix)
        if column is None or (offset := self.index.offsets.item(row, column)) < 0:
            return None
        return self.view[offset : offset + self.index.sizes.item(row, column)]

    def starts(self, suffix: str, layout: NpyLayout) -> np.ndarray:
        """Return where each sample's array ``suffix`` starts; int64 (samples,). All must have ``layout``."""
        found = self.index.layouts.get(suffix)
        if found != layout:
            what = "is missing or differs within the shard" if found is None else f"is {found.dtype} {found.shape}"
            raise BadSample(
                "wrong_layout",
                f"{suffix} {what}; the corpus holds {layout.dtype} {layout.shape}",
                shard=self.name,
                member=suffix,
            )
        return self.index.offsets[:, self._columns[suffix]] + layout.header


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
        self._lock = threading.Lock()
        self.shards = tuple(
            ShardRange(entry, int(end) - entry.samples) for entry, end in zip(entries, self._ends, strict=True)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def path(self, entry: FileEntry) -> Path:
        """Return where a shard lies."""
        return self.folder / entry.name

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

    def _opened(self, number: int) -> OpenShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                entry = self.shards[number].entry
                try:
                    shard = OpenShard(self.path(entry), entry)
                except FileNotFoundError:
                    raise BadSample("shard_missing", f"{self.path(entry)} is not there", shard=entry.name) from None
                self._open[number] = shard
                # Dropped, not closed: a batch in another thread may still be reading from it.
                while len(self._open) > MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
        shard.check_unchanged()
        return shard

    def verify(self, level: VerifyLevel = "size") -> None:
        """Check every shard: its size, also its sha256 (``hash``), also its whole structure (``full``).

        Raises:
            BadSample: The first thing that is wrong.
        """
        for shard in self.shards:
            path, entry = self.path(shard.entry), shard.entry
            if not path.is_file():
                raise BadSample("shard_missing", f"{path} is not there", shard=entry.name)
            if (size := path.stat().st_size) != entry.bytes:
                raise BadSample("shard_changed", f"{size} bytes, its manifest says {entry.bytes}", shard=entry.name)
            if level != "size" and (digest := sha256_of(path)) != entry.sha256:
                raise BadSample("shard_changed", f"sha256 {digest}, its manifest says {entry.sha256}", shard=entry.name)
            if level == "full":
                ShardIndex.build(path, entry=entry)


class ImageShards(ShardSet):
    """Images of a corpus by index.

    Args:
        folder: The stage's folder.
        split: ``train`` or ``val``.
        view: How to bring images to one size; None when they are stored at one size already.
        max_pixels: Larger images are refused before decoding.
        cache_bytes: Decoded pixels are kept when the whole split needs no more than this.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split: Split,
        manifest: Manifest | None = None,
        view: ImageViewConfig | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        cache_bytes: int = 256 * 1024 * 1024,
    ) -> None:
        super().__init__(folder, split=split, manifest=manifest)
        self.view, self.max_pixels, self._cache_bytes = view, max_pixels, cache_bytes

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (h, w, c) of every image."""
        (shard,), (row,) = self.locate(np.zeros(1, dtype=np.int64))
        height, width, channels = self._decode(shard, row).shape
        return height, width, channels

    @cached_property
    def _cache(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Pixels of the whole split and which of them are there, when they fit."""
        if len(self) * int(np.prod(self.image_shape)) > self._cache_bytes:
            return None
        return np.empty((len(self), *self.image_shape), dtype=np.uint8), np.zeros(len(self), dtype=bool)

    def read(self, indices: np.ndarray) -> ImageBatch:
        """Decode the images at ``indices``, int64 (n,).

        Raises:
            BadSample: An image cannot be decoded or has another shape than the first; names shard and member.
        """
        indices = np.asarray(indices, dtype=np.int64)
        shards, rows = self.locate(indices)
        images = np.empty((len(rows), *self.image_shape), dtype=np.uint8)
        for place, (index, shard, row) in enumerate(zip(indices.tolist(), shards, rows, strict=True)):
            if self._cache is None:
                images[place] = self._checked(shard, row)
                continue
            pixels, there = self._cache
            if not there[index]:
                # Two threads may both decode it: they write the same bytes.
                pixels[index] = self._checked(shard, row)
                there[index] = True
            images[place] = pixels[index]
        return ImageBatch(
            images=images,
            labels=np.array([s.index.labels.item(row) for s, row in zip(shards, rows, strict=True)], dtype=np.int64),
            keys=[s.index.key(row) for s, row in zip(shards, rows, strict=True)],
            captions=[caption_of(s, row) for s, row in zip(shards, rows, strict=True)],
        )

    def carried(self, index: int) -> dict[str, bytes]:
        """Return the members of a sample that go along with its latent: ``cls``, ``txt``, ``json``, where present."""
        (shard,), (row,) = self.locate(np.array([index]))
        found = {suffix: shard.member(row, suffix) for suffix in CARRIED_SUFFIXES}
        return {suffix: bytes(payload) for suffix, payload in found.items() if payload is not None}

    def _checked(self, shard: OpenShard, row: int) -> np.ndarray:
        pixels = self._decode(shard, row)
        if pixels.shape != self.image_shape:
            detail = (
                f"{pixels.shape} (h w c), but the first is {self.image_shape}; give a view to bring them to one size"
            )
            raise BadSample("wrong_shape", detail, shard=shard.name, key=shard.index.key(row))
        return pixels

    def _decode(self, shard: OpenShard, row: int) -> np.ndarray:
        key = shard.index.key(row)
        for suffix in IMAGE_SUFFIXES:
            payload = shard.member(row, suffix)
            if payload is None:
                continue
            try:
                if self.view is None:
                    return decode_image(bytes(payload), max_pixels=self.max_pixels)
                return view_image(bytes(payload), self.view, max_pixels=self.max_pixels)
            except BadSample as error:
                raise error.at(shard=shard.name, key=key, member=f"{key}.{suffix}") from None
        raise BadSample("missing_image", f"no member {' or '.join(IMAGE_SUFFIXES)}", shard=shard.name, key=key)

    def verify(self, level: VerifyLevel = "size") -> None:
        """As for any shards; ``full`` also decodes every image, label and caption."""
        super().verify(level)
        if level == "full":
            for shard, row in _all_rows(self):
                self._checked(shard, row)
                caption_of(shard, row)


class LatentShards(ShardSet):
    """Latent moments of a corpus by index.

    Args:
        folder: The stage's folder.
        split: ``train`` or ``val``.
        features: Names of further arrays to read, such as ``text_tokens`` for ``KEY.text_tokens.npy``.
        captions: Read captions too; they cost a decode a sample.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split: Split,
        manifest: Manifest | None = None,
        features: Sequence[str] = (),
        captions: bool = False,
    ) -> None:
        super().__init__(folder, split=split, manifest=manifest)
        self._features, self._captions = tuple(features), captions
        (shard,), _ = self.locate(np.zeros(1, dtype=np.int64))
        self._layouts = {suffix: self._layout(shard, suffix) for suffix in (LATENT_SUFFIX, *map(_npy, features))}
        #: Whether the moments of the mirrored images are there.
        self.has_flipped = FLIPPED_SUFFIX in shard.index.layouts
        if len(self.moments_shape) != 4 or self.moments_shape[0] != 2:
            raise BadSample("wrong_layout", f"moments are (2 c h w), not {self.moments_shape}", shard=shard.name)

    @property
    def moments_shape(self) -> tuple[int, ...]:
        """Shape (2, c, h, w) of every sample's moments."""
        return self._layouts[LATENT_SUFFIX].shape

    def read(self, indices: np.ndarray, *, flipped: np.ndarray | None = None) -> LatentBatch:
        """Read the moments at ``indices``, int64 (n,).

        Args:
            indices: Which samples.
            flipped: bool (n,); where true, the moments of the mirrored image.

        Raises:
            ValueError: ``flipped`` asks for what was not encoded.
            BadSample: A shard is missing, changed, or differs in layout.
        """
        shards, rows = self.locate(indices)
        if flipped is not None and flipped.any() and not self.has_flipped:
            raise ValueError(f"{self.folder} holds no {FLIPPED_SUFFIX}: encode with flipped images, or never flip.")
        suffixes = [LATENT_SUFFIX] * len(rows)
        if flipped is not None:
            suffixes = [FLIPPED_SUFFIX if mirror else LATENT_SUFFIX for mirror in flipped.tolist()]
        return LatentBatch(
            moments=self._gather(shards, rows, suffixes, self._layouts[LATENT_SUFFIX]),
            labels=np.array([s.index.labels.item(row) for s, row in zip(shards, rows, strict=True)], dtype=np.int64),
            keys=[s.index.key(row) for s, row in zip(shards, rows, strict=True)],
            captions=[caption_of(s, r) for s, r in zip(shards, rows, strict=True)] if self._captions else [],
            features={
                name: self._gather(shards, rows, [_npy(name)] * len(rows), self._layouts[_npy(name)])
                for name in self._features
            },
        )

    def _layout(self, shard: OpenShard, suffix: str) -> NpyLayout:
        layout = shard.index.layouts.get(suffix)
        if layout is None:
            have = ", ".join(shard.index.suffixes)
            raise BadSample(
                "missing_latent", f"no member {suffix} of one shape in all samples; have {have}", shard=shard.name
            )
        return layout

    @staticmethod
    def _gather(shards: list[OpenShard], rows: list[int], suffixes: list[str], layout: NpyLayout) -> np.ndarray:
        """Copy arrays into one; (n, *layout.shape)."""
        starts: dict[tuple[str, str], np.ndarray] = {}
        size, parts = layout.payload_bytes, []
        for shard, row, suffix in zip(shards, rows, suffixes, strict=True):
            place = (shard.name, suffix)
            if place not in starts:
                starts[place] = shard.starts(suffix, layout)
            start = starts[place].item(row)
            parts.append(shard.view[start : start + size])
        # One copy for the whole batch, for which the interpreter's lock is released once. Copying sample by sample
        # would take the lock back hundreds of times, each time waiting for the training thread.
        joined = bytearray().join(parts)
        return np.frombuffer(joined, dtype=layout.dtype).reshape(len(rows), *layout.shape)

    def verify(self, level: VerifyLevel = "size") -> None:
        """As for any shards; ``full`` also looks for NaN and infinity in every sample."""
        super().verify(level)
        if level == "full":
            for shard, row in _all_rows(self):
                for suffix in (LATENT_SUFFIX, FLIPPED_SUFFIX) if self.has_flipped else (LATENT_SUFFIX,):
                    values = self._gather([shard], [row], [suffix], self._layouts[LATENT_SUFFIX])
                    if not np.isfinite(values).all():
                        key = shard.index.key(row)
                        raise BadSample(
                            "latent_not_finite", "NaN or infinity", shard=shard.name, key=key, member=f"{key}.{suffix}"
                        )


def _npy(name: str) -> str:
    return f"{name}.npy"


def _all_rows(shards: ShardSet) -> Iterator[tuple[OpenShard, int]]:
    for part in shards.shards:
        yield from zip(*shards.locate(part.indices), strict=True)


def caption_of(shard: OpenShard, row: int) -> str:
    """Return a sample's caption, "" when it has none."""
    payload = shard.member(row, "txt")
    if payload is None:
        return ""
    try:
        return parse_caption(bytes(payload))
    except BadSample as error:
        raise error.at(shard=shard.name, key=shard.index.key(row)) from None
