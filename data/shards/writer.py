"""Writer of shards: deterministic tars by webdataset's writer, each with its index beside it.

Equal samples give equal bytes (fixed time, owner, mode and order). A shard is committed whole or not at all.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import webdataset

from data.files import atomic_file
from data.manifest import FileEntry
from data.samples import BadSample, check_key
from data.shards.index import ShardIndex, index_path


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
        stream = SimpleNamespace(write=self._write)
        self._tar = self._commit.enter_context(
            webdataset.TarWriter(stream, encoder=False, user="", group="", mode=0o644, mtime=0)
        )
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
        self._tar.write({"__key__": key, **members})

    def _write(self, payload: bytes) -> None:
        # Hashed on the way to the file, not read back: a disk that changes bytes is found out.
        self._file.write(payload)
        self._digest.update(payload)

    def __exit__(self, *exception: Any) -> None:
        if exception[0] is not None:
            self._commit.__exit__(*exception)
            return
        with self._commit:
            self._tar.close()
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
