"""Whether a shard still is what its manifest says: its sha256, computed once, remembered while the file is untouched.

A shard that passed leaves a mark in the stage's folder with the file's size and time of change; a later start believes
the mark as long as both are the same. A copied or touched file is read again.
"""

import contextlib
import json
from pathlib import Path

from data.commit import sha256_of, write_json
from data.manifest import FileEntry

MARKS_FOLDER = "index"


def verify_once(folder: Path, entry: FileEntry) -> None:
    """Check a shard of ``folder`` against its manifest's entry, unless its mark says that it was.

    Raises:
        ValueError: It is missing, or its size or content is another one; the message names it.
    """
    path, mark = folder / entry.name, folder / MARKS_FOLDER / f"{entry.sha256[:32]}.verified"
    if not path.is_file():
        raise ValueError(f"{path} is missing, but the manifest beside it lists it. Restore it or run its stage again.")
    now = {"bytes": path.stat().st_size, "changed": path.stat().st_mtime_ns}
    if now["bytes"] != entry.bytes:
        raise ValueError(f"{path} has {now['bytes']} bytes, its manifest says {entry.bytes}: it was cut or changed.")
    with contextlib.suppress(OSError, ValueError):
        if json.loads(mark.read_bytes()) == now:
            return
    if (found := sha256_of(path)) != entry.sha256:
        raise ValueError(
            f"{path} has sha256 {found[:12]}, its manifest says {entry.sha256[:12]}: its content was changed. Restore "
            "it, or remove its stage's folder and run that stage again."
        )
    # A read-only folder costs the next start time, nothing else.
    with contextlib.suppress(OSError):
        mark.parent.mkdir(exist_ok=True)
        write_json(mark, now)
