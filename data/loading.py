"""Loading of images and latents at random: indices in, batches out, without parsing a tar.

Shards are memory-mapped, and a batch is gathered by one copy outside the interpreter's lock, so reading never holds up
the training thread. Images are decoded outside that lock, too, so threads share the images of a batch.
"""

import resource
import threading
import warnings
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from data.manifest import CorpusManifest, LatentsManifest
from data.samples import FLIPPED_SUFFIX, IMAGE_SUFFIXES, LATENT_SUFFIX, BadSample, NpyLayout, Split, located
from data.shards.reader import OpenShard, Shard, brought_near
from data.shards.split import ShardSet
from data.transforms import DEFAULT_MAX_PIXELS, decode_image, view_image

CARRIED_SUFFIXES = ("txt", "json")
MOST_SPARE = 8  # buffers of one size that wait for their next use
COLD_READS = 64  # batches that are fetched in advance after one that had to wait for the disk


@dataclass(frozen=True, kw_only=True)
class ImageBatch:
    """Indices int64 (n,), images uint8 (n h w c), labels int64 (n,) with -1 for none, keys, captions ("" for none).

    ``carried``, where it was asked for: the members that are copied into shards of latents: ``cls``, ``txt``, ``json``.
    """

    indices: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    keys: list[str]
    captions: list[str]
    carried: list[dict[str, bytes]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LatentBatch:
    """Moments as stored (n 2 c h w) = mean, log-variance; labels int64 (n,); keys; captions; features (n ...)."""

    moments: np.ndarray
    labels: np.ndarray
    keys: list[str]
    captions: list[str]
    features: dict[str, np.ndarray]


class ImageShards(ShardSet):
    """Images of a corpus by index.

    Args:
        folder: The stage's folder.
        split: ``train`` or ``val``.
        cache_bytes: Decoded pixels are kept when the whole split needs no more than this.
        scattered: As for ``ShardSet``.
        threads: Images that are decoded at once, of all batches together; with 1 the reader's own thread does it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        split: Split,
        manifest: CorpusManifest | None = None,
        cache_bytes: int = 256 * 1024 * 1024,
        scattered: bool = False,
        threads: int = 1,
    ) -> None:
        super().__init__(folder, split=split, manifest=manifest, scattered=scattered)
        self._map = map if threads == 1 else ThreadPoolExecutor(threads, thread_name_prefix="decode").map
        assert isinstance(self.manifest, CorpusManifest), f"{folder} holds no images"
        # Shards that others wrote are brought to one size as they are read.
        self._view, self._max_pixels = self.manifest.view, self.manifest.max_pixels or DEFAULT_MAX_PIXELS
        image = self.manifest.image
        #: Shape (h, w, c) of every image.
        self.image_shape = (image.resolution, image.resolution, image.channels)
        self._cache_bytes = cache_bytes

    @cached_property
    def _cache(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Pixels of the whole split and which of them are there, when they fit."""
        if len(self) * int(np.prod(self.image_shape)) > self._cache_bytes:
            return None
        return np.empty((len(self), *self.image_shape), dtype=np.uint8), np.zeros(len(self), dtype=bool)

    def read(self, indices: np.ndarray, *, bad: list[BadSample] | None = None, carry: bool = False) -> ImageBatch:
        """Decode the images at ``indices``, int64 (n,).

        Args:
            indices: The samples.
            bad: When given, samples that cannot be read are left out of the batch, and their faults appended here.
            carry: Also read the members that are copied into the shards of latents.

        Raises:
            BadSample: An image cannot be decoded or has another shape than the corpus, or a caption cannot be read;
                with ``bad`` only that a shard is missing or changed. Names shard and member.
        """
        indices = np.asarray(indices, dtype=np.int64)
        shards, rows = self.locate(indices)
        images = np.empty((len(rows), *self.image_shape), dtype=np.uint8)
        undecoded = [self._cache is None or not self._cache[1][index] for index in indices.tolist()]
        for shard, row, wants in zip(shards, rows, undecoded, strict=True):
            if wants:
                shard.will_need(row, self._suffix(shard, row))
        wanted = [
            carry or wants or shard.place(row, "txt") is not None
            for shard, row, wants in zip(shards, rows, undecoded, strict=True)
        ]
        samples = list(zip(indices.tolist(), brought_near(shards, rows, wanted), rows, strict=True))

        def decode(place: int) -> str | BadSample:
            index, shard, row = samples[place]
            try:
                images[place] = self._pixels(index, shard, row)
                return shard.caption(row)
            except BadSample as error:
                return error

        kept: list[int] = []
        captions: list[str] = []
        for place, found in enumerate(self._map(decode, range(len(samples)))):
            if isinstance(found, str):
                kept.append(place)
                captions.append(found)
            elif bad is None:
                raise found
            else:
                bad.append(found)
        if len(kept) < len(samples):
            images, samples = images[kept], [samples[place] for place in kept]
        return ImageBatch(
            indices=np.array([index for index, _, _ in samples], dtype=np.int64),
            images=images,
            labels=np.array([shard.label(row) for _, shard, row in samples], dtype=np.int64),
            keys=[shard.key(row) for _, shard, row in samples],
            captions=captions,
            carried=[self._carried(shard, row) for _, shard, row in samples] if carry else [],
        )

    def _pixels(self, index: int, shard: Shard, row: int) -> np.ndarray:
        if self._cache is None:
            return self._decode(shard, row)
        pixels, there = self._cache
        if not there[index]:
            # Two threads may both decode it: they write the same bytes.
            pixels[index] = self._decode(shard, row)
            there[index] = True
        return pixels[index]

    @staticmethod
    def _carried(shard: Shard, row: int) -> dict[str, bytes]:
        found = {suffix: shard.member(row, suffix) for suffix in CARRIED_SUFFIXES}
        carried = {suffix: bytes(payload) for suffix, payload in found.items() if payload is not None}
        # The label is the corpus's, which in a shard of others may be another number than theirs.
        return {"cls": b"%d" % label, **carried} if (label := shard.label(row)) >= 0 else carried

    def labels_at(self, indices: np.ndarray) -> np.ndarray:
        """Return the labels, -1 for none, without reading a sample; int64 (n,)."""
        shards, rows = self.locate(indices)
        return np.array([shard.label(row) for shard, row in zip(shards, rows, strict=True)], dtype=np.int64)

    def labels_and_captions(self, indices: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Return the labels int64 (n,), -1 for none, and captions, "" for none, without decoding an image."""
        shards, rows = self.locate(indices)
        captioned = [shard.place(row, "txt") is not None for shard, row in zip(shards, rows, strict=True)]
        near = brought_near(shards, rows, captioned)
        return self.labels_at(indices), [shard.caption(row) for shard, row in zip(near, rows, strict=True)]

    @staticmethod
    def _suffix(shard: Shard, row: int) -> str:
        """Return the suffix of a sample's image, "" when it has none."""
        return next((suffix for suffix in IMAGE_SUFFIXES if shard.place(row, suffix)), "")

    def _decode(self, shard: Shard, row: int) -> np.ndarray:
        key, suffix = shard.key(row), self._suffix(shard, row)
        payload = shard.member(row, suffix)
        with located(shard=shard.name, key=key, member=f"{key}.{suffix}" if suffix else ""):
            if payload is None:
                raise BadSample("missing_image", f"no member {' or '.join(IMAGE_SUFFIXES)}")
            # A corpus may hold both shards that others wrote and finished squares of ours.
            if self._view is not None and shard.in_place:
                return view_image(bytes(payload), self._view, max_pixels=self._max_pixels, key=key)
            pixels = decode_image(bytes(payload), max_pixels=self._max_pixels)
            if pixels.shape != self.image_shape:
                raise BadSample("wrong_shape", f"{pixels.shape} (h w c), but {self.image_shape} is expected")
            return pixels


class Buffers:
    """Memory for batches that is used again: it comes back when the last view of an array is gone. Safe for threads.

    The kernel zeroes fresh pages one by one, which costs several times as much as filling them.
    """

    def __init__(self) -> None:
        self._spare: dict[int, list[bytearray]] = {}
        self._lock = threading.Lock()
        # Shards are mapped read-only, and torch is only asked to read them.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")

    def _take(self, size: int) -> np.ndarray:
        """Return ``size`` bytes with any content; uint8 (size,)."""
        with self._lock:
            spare = self._spare.setdefault(size, [])
            memory = spare.pop() if spare else bytearray(size)
        # Views of views refer to this one array, so that its end is the end of the last of them.
        lent = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def _give_back(self, memory: bytearray) -> None:
        # No lock: this runs wherever the last view dies, maybe inside ``_take``; appending is atomic.
        spare = self._spare[len(memory)]
        if len(spare) < MOST_SPARE:
            spare.append(memory)

    def joined(self, parts: Sequence[tuple[memoryview, int]], size: int) -> np.ndarray:
        """Copy ``size`` bytes at an offset of each view into one array; uint8 (parts x size,).

        The interpreter's lock is released once, for the whole copy. Copying part by part would take it back hundreds of
        times, each time waiting for the training thread.
        """
        out = self._take(len(parts) * size)
        if out.size:
            sources = [torch.frombuffer(view, dtype=torch.uint8, count=size, offset=start) for view, start in parts]
            torch.cat(sources, out=torch.from_numpy(out))
        return out


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
        manifest: LatentsManifest | None = None,
        features: Sequence[str] = (),
        captions: bool = False,
    ) -> None:
        super().__init__(folder, split=split, manifest=manifest)
        self._features, self._captions = tuple(features), captions
        self._cold_reads, self._buffers = COLD_READS, Buffers()
        (shard,), _ = self.locate(np.zeros(1, dtype=np.int64))
        self._layouts = {suffix: self._layout(shard, suffix) for suffix in (LATENT_SUFFIX, *map(_npy, features))}
        #: Whether the moments of the mirrored images are there.
        self.has_flipped = FLIPPED_SUFFIX in shard.index.layouts
        #: Shape (2, c, h, w) of every sample's moments.
        self.moments_shape = self._layouts[LATENT_SUFFIX].shape
        if len(self.moments_shape) != 4 or self.moments_shape[0] != 2:
            raise BadSample("wrong_layout", f"moments are (2 c h w), not {self.moments_shape}", shard=shard.name)

    def has_captions(self) -> bool:
        """Return whether any sample has a caption; opens shards until one has."""
        return any("txt" in self._opened(number).index.suffixes for number in range(len(self.shards)))

    def read(self, indices: np.ndarray, *, flipped: np.ndarray | None = None) -> LatentBatch:
        """Read the moments at ``indices``, int64 (n,).

        Args:
            indices: The samples.
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
            labels=np.array([s.label(row) for s, row in zip(shards, rows, strict=True)], dtype=np.int64),
            keys=[s.key(row) for s, row in zip(shards, rows, strict=True)],
            captions=[s.caption(row) for s, row in zip(shards, rows, strict=True)] if self._captions else [],
            features={
                name: self._gather(shards, rows, [_npy(name)] * len(rows), self._layouts[_npy(name)])
                for name in self._features
            },
        )

    def _layout(self, shard: Shard, suffix: str) -> NpyLayout:
        layout = shard.index.layouts.get(suffix)
        if layout is None:
            have = ", ".join(shard.index.suffixes)
            raise BadSample(
                "missing_latent", f"no member {suffix} of one shape in all samples; have {have}", shard=shard.name
            )
        return layout

    def _gather(self, shards: Sequence[Shard], rows: list[int], suffixes: list[str], layout: NpyLayout) -> np.ndarray:
        """Copy arrays into one; (n, *layout.shape)."""
        columns: dict[tuple[str, str], int] = {}
        size, parts = layout.payload_bytes, []
        for shard, row, suffix in zip(shards, rows, suffixes, strict=True):
            assert isinstance(shard, OpenShard), "latents are never read where others keep them"
            place = (shard.name, suffix)
            if place not in columns:
                columns[place] = shard.column(suffix, layout)
            start = shard.index.offsets.item(row, columns[place]) + layout.header
            if self._cold_reads:
                shard.fetch(start, size)
            parts.append((shard.view, start))
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
        joined = self._buffers.joined(parts, size)
        # Fetching in advance keeps a cold disk busy, but asking for what is in memory would cost as much as the copy.
        waited_for_disk = resource.getrusage(resource.RUSAGE_THREAD).ru_majflt > before
        self._cold_reads = COLD_READS if waited_for_disk else max(0, self._cold_reads - 1)
        return joined.view(layout.dtype).reshape(len(rows), *layout.shape)


def _npy(name: str) -> str:
    return f"{name}.npy"
