"""Whether a shard still is what its manifest says: its sha256, computed once, remembered while the file is untouched.

A shard that passed leaves a mark in the stage's folder with the file's size and time of change; a later start believes
the mark as long as both are the same. A copied or touched file is read again.
"""

import contextlib
import hashlib
import json
from pathlib import Path

from data.files import sha256_of, write_json
from data.manifest import FileEntry

MARKS_FOLDER = "index"


def verify_once(folder: Path, entry: FileEntry) -> None:
    """Check a shard on this machine's disks against its entry in the manifest of ``folder``, unless its mark says so.

    Raises:
        ValueError: It is missing, or its size or content is another one; the message names it.
    """
    path = _path(folder, entry)
    if not path.is_file():
        raise ValueError(f"{path} is missing, but {folder}/manifest.json lists it. Restore it or run its stage again.")
    now = _state(path)
    if now["bytes"] != entry.bytes:
        raise ValueError(f"{path} has {now['bytes']} bytes, its manifest says {entry.bytes}: it was cut or changed.")
    with contextlib.suppress(OSError, ValueError):
        if json.loads(_mark(folder, entry).read_bytes()) == now:
            return
    if (found := sha256_of(path)) != entry.sha256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}, its manifest says {entry.sha256[:12]}: its content was changed. Restore "
            "it, or remove its stage's folder and run that stage again."
        )
    mark_verified(folder, entry, now)


def mark_verified(folder: Path, entry: FileEntry, state: dict[str, int] | None = None) -> None:
    """Remember that a shard was seen to be what its entry says, with its size and time of change then, or now."""
    # A read-only folder costs the next start time, nothing else.
    with contextlib.suppress(OSError):
        state = state or _state(_path(folder, entry))
        _mark(folder, entry).parent.mkdir(exist_ok=True)
        write_json(_mark(folder, entry), state)


def _path(folder: Path, entry: FileEntry) -> Path:
    return Path(entry.url) if entry.url else folder / entry.name


def _state(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"bytes": status.st_size, "changed": status.st_mtime_ns}


def _mark(folder: Path, entry: FileEntry) -> Path:
    name = hashlib.sha256(f"{entry.url or entry.name} {entry.sha256}".encode()).hexdigest()[:32]
    return folder / MARKS_FOLDER / f"{name}.verified"
