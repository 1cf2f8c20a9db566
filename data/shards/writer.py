"""Writer of shards: deterministic tars as webdataset writes them, each with its index beside it.

Equal samples give equal bytes (fixed time, owner, mode and order). A shard is committed whole or not at all.
"""

import contextlib
import hashlib
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import atomic_file
from data.manifest import FileEntry
from data.samples import BadSample, check_key
from data.shards.index import ShardIndex, index_path
from data.shards.tar import BLOCK, sum_of_bytes

_UNNAMED = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # the header of an empty member without a name


class ShardWriter:
    """Write one shard; nothing is visible under ``path`` until the ``with`` block ends without an exception.

    ``entry`` describes the shard afterwards, and its index lies beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entry: FileEntry | None = None
        self._keys: set[str] = set()
        self._digest = hashlib.sha256()
        self._commit = contextlib.ExitStack()

    def __enter__(self) -> "ShardWriter":
        self._file = self._commit.enter_context(atomic_file(self.path, sha256=self._digest.hexdigest))
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample. Members are stored sorted by suffix, next to each other.

        Raises:
            BadSample: ``bad_key`` or ``duplicate_key``.
        """
        check_key(key)
        if key in self._keys:
            raise BadSample("duplicate_key", "a key names one sample of a shard", shard=self.path.name, key=key)
        self._keys.add(key)
        parts: list[bytes] = []
        for suffix, payload in sorted(members.items()):
            parts += _header(f"{key}.{suffix}", len(payload)), payload, bytes(-len(payload) % BLOCK)
        self._write(b"".join(parts))

    def _write(self, payload: bytes) -> None:
        # Hashed on the way to the file, not read back: a disk that changes bytes is found out.
        self._file.write(payload)
        self._digest.update(payload)

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._commit.__exit__(*exception)
            return
        with self._commit:
            end = 2 * BLOCK
            self._write(bytes(end + -(self._file.tell() + end) % tarfile.RECORDSIZE))
            self._file.flush()
            entry = FileEntry(
                name=self.path.name,
                bytes=self._file.tell(),
                sha256=self._digest.hexdigest(),
                samples=len(self._keys),
            )
            # Scanned from the file, not remembered, and before it is committed: what was written is what is found.
            index = ShardIndex.build(Path(self._file.name), entry=entry)
        index.save(index_path(self.path))
        self.entry = entry


def _header(name: str, size: int) -> bytes:
    """Return the header of a member as `tarfile` makes it, which takes twenty times as long."""
    if len(name) > tarfile.LENGTH_NAME or not name.isascii() or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT)
    # Size and checksum, in octal, are all that differs beside the name; the checksum counts itself as eight spaces.
    head = name.encode().ljust(tarfile.LENGTH_NAME, b"\0") + _UNNAMED[100:124] + b"%011o" % size + _UNNAMED[135:148]
    checksum = sum_of_bytes(head + b" " * 8 + _UNNAMED[156:])
    return b"%s%06o%s" % (head, checksum, _UNNAMED[154:])
