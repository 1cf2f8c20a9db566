"""Scans of shards: the keys of their samples, found once for all processes and starts, several shards at a time.

Of a sample two hashes of its key are kept, sixteen bytes, in order, and of other members their number by suffix. So
neither another rank nor a later start fetches a shard, or reads its headers, only to know what it holds. A shard that
was replaced, or was scanned in another way, is scanned again.
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_atomically
from data.shards.remote import TRIES, Cache, is_remote, local_path, properties_of

ASKED_AT_ONCE = 64
SCANS_AT_ONCE = 8  # by each process
SCAN_FORMAT = 2  # another number whenever a scan finds other samples or keys in a shard than before
PACKED_SUFFIXES = (".gz", ".tgz")
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "Content-MD5", "md5Hash")


@dataclass(frozen=True)
class FoundShard:
    """A shard of a source as it is now: its size and its version, which is unlike any other when nothing tells it."""

    url: str
    bytes: int
    version: str

    @property
    def path(self) -> Path:
        """A local file with its content, unpacked; fetched and unpacked again when the cache has dropped it."""
        found = local_path(self.url, size=self.bytes, version=self.version)
        if not self.is_packed:
            return found
        return Cache.of_environment().unpacked(found, version=f"{self.bytes} {self.version}")

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed, so that its samples cannot be found by their place in it."""
        return self.url.endswith(PACKED_SUFFIXES)

    def scan_name(self, kind: str) -> str:
        """Return the name of its scan of this kind."""
        return hashlib.sha256(f"{SCAN_FORMAT} {kind} {self.bytes} {self.version} {self.url}".encode()).hexdigest()[:40]

    def opened(self) -> BufferedReader:
        """Open its content for reading. What is open stays readable, but a copy may be dropped before it is opened."""
        for _ in range(TRIES):
            with contextlib.suppress(FileNotFoundError):
                return open(self.path, "rb")
        return open(self.path, "rb")

    def current_bytes(self) -> int:
        """Return the size that the file has now; that of a remote one is checked when it is fetched.

        Raises:
            OSError: It is not there.
        """
        return self.bytes if is_remote(self.url) else local_path(self.url).stat().st_size


@dataclass(frozen=True)
class ShardScan:
    """What a scan found: two hashes of each sample's key, uint64 (2, samples), and the members left out by suffix."""

    key_hashes: np.ndarray
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class ScanSharing:
    """What processes that open one source together have in common.

    Args:
        folder: Keeps the scans; all processes see it.
        from_main: Returns on every process the JSON value that a function returns on the main one.
        make_each: Has each named item made once, with its result as JSON, and waits for all.
    """

    folder: Path
    from_main: Callable[[Callable[[], Any]], Any]
    make_each: Callable[[Sequence[str], Callable[[str], Mapping[str, Any]]], None]


def scans_of(
    shards: Sequence[FoundShard], scan: Callable[[int], ShardScan], sharing: ScanSharing | None, *, kind: str
) -> Callable[[int], ShardScan]:
    """Scan all shards, several at once, each in one of the processes; return the reader of their scans, by number.

    Args:
        shards: To be scanned.
        scan: Scans a shard by number.
        sharing: Of the processes; None for one alone, which keeps the scans in memory.
        kind: Tells scans from those that take other things for samples.

    Raises:
        OSError: A shard cannot be read.
        ValueError: A scan that was kept is damaged.
    """
    if sharing is None:
        with ThreadPoolExecutor(SCANS_AT_ONCE) as pool:
            return list(pool.map(scan, range(len(shards)))).__getitem__
    paths = [sharing.folder / f"{shard.scan_name(kind)}.keys" for shard in shards]
    numbers = {path.stem: number for number, path in enumerate(paths)}
    sharing.make_each(list(numbers), lambda name: _keep(paths[numbers[name]], scan(numbers[name])))
    return lambda number: _kept(paths[number])


def _keep(path: Path, found: ShardScan) -> dict[str, int]:
    payload = json.dumps(dict(found.left_out)).encode() + b"\n" + found.key_hashes.astype("<u8").tobytes()
    write_atomically(path, hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    return {"samples": found.key_hashes.shape[1]}


def _kept(path: Path) -> ShardScan:
    head, _, payload = (path.read_bytes() if path.is_file() else b"").partition(b"\n")
    if head.decode("latin-1") != hashlib.sha256(payload).hexdigest():
        raise ValueError(f"{path} is missing or damaged. Delete {path.with_suffix('.json')}: it is then made again.")
    left_out, _, hashes = payload.partition(b"\n")
    return ShardScan(np.frombuffer(hashes, dtype="<u8").reshape(2, -1), json.loads(left_out))


def found_shards(urls: Sequence[str]) -> list[FoundShard]:
    """Return the size and version of each shard; many services are asked at once.

    Raises:
        OSError: One is not there.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(_found, urls))


def _found(url: str) -> FoundShard:
    if not is_remote(url):
        status = local_path(url).stat()
        return FoundShard(url, status.st_size, str(status.st_mtime_ns))
    about = properties_of(url)
    known = {name: str(about[name]) for name in _VERSIONS if about.get(name)} or {"none": secrets.token_hex(16)}
    version = hashlib.sha256(json.dumps([about["size"], known], sort_keys=True).encode()).hexdigest()
    return FoundShard(url, int(about["size"]), version)
