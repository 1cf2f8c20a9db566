"""Cache of scans: what was found in a remote shard, kept beside it, so that a restart need not fetch it again.

Of each sample only the hash of its key is kept, in order, and of other members their number by suffix. A shard that was
replaced, or was scanned in another way, is scanned again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.files import write_atomically
from data.shards.remote import Cache, is_remote, local_path, properties_of

ASKED_AT_ONCE = 16
SCAN_FORMAT = 2  # what a scan takes for a sample, so that rows are counted alike
PACKED_SUFFIXES = (".gz", ".tgz")
_VERSIONS = ("ETag", "etag", "generation", "LastModified", "Last-Modified", "Content-MD5", "md5Hash")


@dataclass(frozen=True)
class FoundShard:
    """A shard of a source as it is now: its size, and a hash of its version ("" when the service tells none)."""

    url: str
    bytes: int
    version: str

    @property
    def path(self) -> Path:
        """A local file with its content, unpacked; fetched and unpacked again when the cache has dropped it."""
        found = local_path(self.url, size=self.bytes)
        if not self.is_packed:
            return found
        # Of a fetched copy the time says when it was used last.
        version = self.version if is_remote(self.url) else str(found.stat().st_mtime_ns)
        return Cache.of_environment().unpacked(found, version=f"{self.bytes} {version}")

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed, so that its samples cannot be found by their place in it."""
        return self.url.endswith(PACKED_SUFFIXES)

    def current_bytes(self) -> int:
        """Return the size that the file has now.

        Raises:
            OSError: It is not there.
        """
        return local_path(self.url, size=self.bytes).stat().st_size

    def scan(self, kind: str) -> tuple[np.ndarray, Counter[str]] | None:
        """Return the keys' hashes, uint64 (samples,), and the members left out that a scan of this kind found."""
        path = Cache.of_environment().note(self.url)
        if not self.version or not path.is_file():
            return None
        head, _, payload = path.read_bytes().partition(b"\n")
        if head.decode("latin-1") != self._head(kind, hashlib.sha256(payload).hexdigest()):
            return None
        others, _, hashes = payload.partition(b"\n")
        return np.frombuffer(hashes, dtype="<u8"), Counter(json.loads(others))

    def remember(self, key_hashes: np.ndarray, left_out: Mapping[str, int], kind: str) -> None:
        """Keep what a scan found, if this version can be told from others."""
        if self.version:
            payload = json.dumps(left_out).encode() + b"\n" + key_hashes.astype("<u8").tobytes()
            head = self._head(kind, hashlib.sha256(payload).hexdigest())
            write_atomically(Cache.of_environment().note(self.url), head.encode() + b"\n" + payload)

    def _head(self, kind: str, digest: str) -> str:
        return f"{self.version} {SCAN_FORMAT} {kind} {digest}"


def found_shards(urls: list[str]) -> list[FoundShard]:
    """Return the size and version of each shard; of remote ones many are asked for at once.

    Raises:
        OSError: One is not there.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return list(pool.map(_found, urls))


def _found(url: str) -> FoundShard:
    if not is_remote(url):
        return FoundShard(url, local_path(url).stat().st_size, "")
    about = properties_of(url)
    known = {name: str(about[name]) for name in _VERSIONS if about.get(name)}
    version = hashlib.sha256(json.dumps([about["size"], known], sort_keys=True).encode()).hexdigest() if known else ""
    return FoundShard(url, int(about["size"]), version)
