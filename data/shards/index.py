"""Index of a shard: offset and size of every member, labels, keys and array layouts, so that any sample is reachable.

A shard is scanned once, strictly; its index is kept in ``index/SHARD.safetensors`` beside it. An index is a cache: it
names the shard's size and sha256, and is made again when it does not fit.
"""

import contextlib
import hashlib
import json
import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from data.files import write_atomically
from data.manifest import FileEntry
from data.samples import BadSample, NpyLayout, check_key, located, parse_label, parse_npy_layout
from data.shards.scan import RawSample, mapped, scan_shard

INDEX_FOLDER, INDEX_FORMAT = "index", 1
_NAMED = ("shard", "bytes", "sha256")  # the shard that an index is of
_TENSORS = {"offsets": "<i8", "sizes": "<i8", "labels": "<i8", "key_bytes": "|u1", "key_ends": "<i8"}


def index_path(shard: Path) -> Path:
    """Return the path of a shard's index."""
    return shard.parent / INDEX_FOLDER / f"{shard.name}.safetensors"


@dataclass(frozen=True)
class ShardIndex:
    """Place of everything in one shard.

    Args:
        shard: Name of the shard.
        bytes: Its size.
        sha256: Its hash.
        suffixes: Columns of ``offsets`` and ``sizes``.
        offsets: First byte of each member, int64 (samples, suffixes); -1 where there is none.
        sizes: Bytes of each member, likewise; -1 where there is none.
        labels: int64 (samples,); -1 without ``cls``.
        key_bytes: The keys in ASCII, one after the other, uint8.
        key_ends: End of each key in ``key_bytes``, int64 (samples,).
        layouts: Array layout by suffix, for those ``npy`` members that are alike in all samples.
    """

    shard: str
    bytes: int
    sha256: str
    suffixes: tuple[str, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    key_bytes: np.ndarray
    key_ends: np.ndarray
    layouts: Mapping[str, NpyLayout]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, row: int) -> str:
        """Return the key of a sample."""
        start = self.key_ends.item(row - 1) if row else 0
        return self.key_bytes[start : self.key_ends.item(row)].tobytes().decode("ascii")

    def keys(self) -> list[str]:
        """Return the keys of all samples, in order."""
        whole, ends = self.key_bytes.tobytes().decode("ascii"), self.key_ends.tolist()
        return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @classmethod
    def build(cls, path: Path, *, entry: FileEntry) -> "ShardIndex":
        """Scan a shard of ours.

        Raises:
            BadSample: The first thing that is wrong with it, naming shard and member.
        """
        with open(path, "rb") as file, mapped(file) as buffer:
            samples = scan_shard(buffer, shard=entry.name)
            for sample in samples:
                for fault in sample.faults:
                    raise fault
                check_key(sample.key)
            if len(samples) != entry.samples:
                detail = f"{len(samples)} samples, its manifest says {entry.samples}"
                raise BadSample("wrong_count", detail, shard=entry.name)
            labels = [_label(buffer, sample, shard=entry.name) for sample in samples]
            layouts = {
                suffix: layout
                for suffix in {suffix for sample in samples for suffix in sample.members}
                if suffix.endswith("npy") and (layout := _common_layout(buffer, samples, suffix, shard=entry.name))
            }
        return cls.of_samples(samples, labels=labels, layouts=layouts, entry=entry)

    @classmethod
    def of_samples(
        cls,
        samples: Sequence[RawSample],
        *,
        labels: Sequence[int],
        layouts: Mapping[str, NpyLayout],
        entry: FileEntry,
    ) -> "ShardIndex":
        """Make the index of these samples of a shard, be it all of them or some."""
        suffixes = tuple(sorted({suffix for sample in samples for suffix in sample.members}))
        table = np.full((2, len(samples), len(suffixes)), -1, dtype=np.int64)
        for row, sample in enumerate(samples):
            for column, suffix in enumerate(suffixes):
                if member := sample.members.get(suffix):
                    table[:, row, column] = member.offset, member.size
        keys = [sample.key for sample in samples]
        return cls(
            shard=entry.name,
            bytes=entry.bytes,
            sha256=entry.sha256,
            suffixes=suffixes,
            offsets=table[0],
            sizes=table[1],
            labels=np.array(labels, dtype=np.int64),
            key_bytes=np.frombuffer("".join(keys).encode("ascii"), dtype=np.uint8),
            key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
            layouts=layouts,
        )

    def save(self, path: Path) -> None:
        """Write the index, whole or not at all; equal indexes give equal bytes."""
        about = {
            "format": INDEX_FORMAT,
            **{name: getattr(self, name) for name in _NAMED},
            "suffixes": self.suffixes,
            "layouts": {suffix: [x.dtype, list(x.shape), x.header] for suffix, x in self.layouts.items()},
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _TENSORS}
        about["arrays_sha256"] = _sha256(arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One metadata entry: safetensors does not keep the order of several.
        write_atomically(path, save(arrays, metadata={"index": json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path, *, trusted: bool = False) -> "ShardIndex":
        """Map an index: its pages are read when they are used, and shared by all processes of a node.

        Args:
            path: An index that ``save`` wrote.
            trusted: It was checked before; its hash is not computed again.

        Raises:
            ValueError: It is damaged or of another format.
        """
        try:
            about, arrays = _map_safetensors(path)
            if about["format"] != INDEX_FORMAT:
                raise ValueError(f"format {about['format']}, expected {INDEX_FORMAT}")
            # A reader trusts these offsets without another check, so not a bit of them may have changed.
            if not trusted and _sha256(arrays) != about["arrays_sha256"]:
                raise ValueError("its content has changed")
            return cls(
                suffixes=tuple(about["suffixes"]),
                layouts={suffix: NpyLayout(v[0], tuple(v[1]), v[2]) for suffix, v in about["layouts"].items()},
                **{**{name: about[name] for name in _NAMED}, **arrays},
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path} is not a readable shard index ({error}). Delete it; it is made again.") from error

    @classmethod
    def of(cls, path: Path, *, entry: FileEntry, kept: Path | None = None, trusted: bool = False) -> "ShardIndex":
        """Return the index of a shard: the kept one when it fits ``entry``, else one made now and kept if possible.

        Args:
            path: The shard.
            entry: Its entry in the manifest.
            kept: Path of its index; default beside the shard.
            trusted: The kept one was checked before.

        Raises:
            ValueError: The index of a shard that others wrote does not fit: only its stage knows which samples count.
        """
        kept = kept or index_path(path)
        if kept.is_file():
            with contextlib.suppress(ValueError):
                index = cls.load(kept, trusted=trusted)
                if (index.bytes, index.sha256, len(index)) == (entry.bytes, entry.sha256, entry.samples):
                    return index
        if entry.url:
            raise ValueError(f"{kept} is missing or does not fit {entry.url}. Prepare the corpus again.")
        index = cls.build(path, entry=entry)
        # A read-only or full folder costs the next opening time, nothing else.
        with contextlib.suppress(OSError):
            index.save(kept)
        return index


def _sha256(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _TENSORS:
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape};".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _map_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata and, as views of the mapped file, the arrays of an index.

    The format: eight bytes of length, a JSON header of that length, then the arrays at the offsets it gives. The
    library would copy them, which for ten thousand shards is gigabytes in every process.
    """
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(buffer[:8], "little")
    header = json.loads(buffer[8:start])
    arrays = {}
    for name, dtype in _TENSORS.items():
        shape, (first, _) = header[name]["shape"], header[name]["data_offsets"]
        flat = np.frombuffer(buffer, dtype=dtype, count=math.prod(shape), offset=start + first)
        arrays[name] = flat.reshape(shape)
    return json.loads(header["__metadata__"]["index"]), arrays


def _label(buffer: bytes | mmap.mmap, sample: RawSample, *, shard: str) -> int:
    """Return the label of a sample, -1 without ``cls``."""
    member = sample.members.get("cls")
    if member is None:
        return -1
    with located(shard=shard, key=sample.key, member=member.name):
        return parse_label(buffer[member.offset : member.offset + min(member.size, 64)])


def _common_layout(buffer: bytes | mmap.mmap, samples: list[RawSample], suffix: str, *, shard: str) -> NpyLayout | None:
    """Return the layout that all arrays ``suffix`` share, or None when some sample has none or another."""
    first: NpyLayout | None = None
    head = b""
    for sample in samples:
        member = sample.members.get(suffix)
        if member is None:
            return None
        if (
            first
            and member.size == first.header + first.payload_bytes
            and buffer[member.offset : member.offset + first.header] == head
        ):
            continue
        with located(shard=shard, key=sample.key, member=member.name):
            layout = parse_npy_layout(buffer[member.offset : member.offset + min(member.size, 8192)], size=member.size)
        if first is None:
            first, head = layout, buffer[member.offset : member.offset + layout.header]
        elif layout != first:
            return None
    return first
