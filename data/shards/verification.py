"""Verification of shards: the sha256 is computed once, and remembered while the file is untouched.

A shard that passed leaves a mark in the stage's folder with the file's size and time of change; a later start believes
the mark as long as both are the same. A copied or touched file is read again.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from data.files import MADE_AGAIN, verify_file, write_json
from data.manifest import FileEntry

MARKS_FOLDER = "index"


def verify_shard(folder: Path, entry: FileEntry) -> None:
    """Check a shard on this machine's disks against its entry in the manifest of ``folder``, unless its mark says so.

    Raises:
        ValueError: It is missing, or its size or content is another one; the message names it.
    """
    path = Path(entry.url) if entry.url else folder / entry.name
    seen = path.stat() if path.is_file() else None
    with contextlib.suppress(OSError, ValueError):
        if seen and json.loads(_mark(folder, entry).read_bytes()) == _state(seen):
            return
    mend = "Restore it: others made it." if entry.url else MADE_AGAIN
    verify_file(path, size=entry.bytes, sha256=entry.sha256, mend=mend)
    if seen:
        mark_verified(folder, entry, seen)


def mark_verified(folder: Path, entry: FileEntry, seen: os.stat_result) -> None:
    """Remember that a shard is what its entry says, with the status of the file from before it was read."""
    # A read-only folder costs the next start time, nothing else.
    with contextlib.suppress(OSError):
        mark = _mark(folder, entry)
        mark.parent.mkdir(exist_ok=True)
        write_json(mark, _state(seen))


def _state(seen: os.stat_result) -> dict[str, int]:
    return {"bytes": seen.st_size, "changed": seen.st_mtime_ns}


def _mark(folder: Path, entry: FileEntry) -> Path:
    name = hashlib.sha256(f"{entry.url or entry.name} {entry.sha256}".encode()).hexdigest()[:32]
    return folder / MARKS_FOLDER / f"{name}.verified"
