"""Files and folders that a reader sees whole or not at all; their hashes, and the lock of a folder.

Everything is written under a unique temporary name in the same folder, flushed with fsync, then renamed; the folder is
flushed last, so that the name itself survives a power cut. Temporary names start with a dot and end in ``.tmp``; what a
killed process leaves behind is never read and is swept by the next owner of the folder's lock.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

# The way out where a finished stage's file is damaged: without a manifest the stage is unfinished, and goes on.
MADE_AGAIN = "Restore it, or remove it and the manifest.json beside it and run its stage again, which makes it anew."


def temporary_beside(path: Path) -> Path:
    """Return a unique, hidden name in the folder of ``path``: rename within one folder is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")


def flush_file(path: Path) -> None:
    """Make the content of a closed file, or the names in a folder, durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | Path, *, sha256: Callable[[], str] | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file for writing and give it the name ``path`` when the block ends without an exception.

    Args:
        path: The name.
        sha256: Returns the hash of the written bytes, for files that several processes may write with equal bytes: then
            the first keeps the name, so that it never changes under a reader.

    Raises:
        OSError: The file could not be written, flushed or renamed; ``path`` is then as it was before.
    """
    path = Path(path)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if sha256 is None or not _linked_first(temporary, path, sha256()):
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a disk that is full does not say where
        raise
    flush_file(path.parent)


def _linked_first(temporary: Path, path: Path, sha256: str) -> bool:
    """Give ``temporary`` the name ``path``, or drop it when an equal file has the name; False when neither was done."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A file server may do the work and lose the answer; then both names are one file.
        if not os.path.samefile(temporary, path) and sha256_of(path) != sha256:
            return False
    except OSError:  # A file system without hard links.
        return False
    temporary.unlink()
    return True


def write_atomically(path: str | Path, payload: bytes) -> None:
    """Write ``payload`` to ``path``, whole or not at all."""
    with atomic_file(path) as file:
        file.write(payload)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path, *, mend: str) -> dict[str, Any]:
    """Return the JSON object that `write_json` wrote.

    Args:
        path: The file.
        mend: The way out for the user where the file has been damaged since, as a sentence.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It holds no JSON object: it was emptied, cut or changed by hand.
    """
    found, why = None, "it holds no JSON object"
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        why = str(error)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged ({why}). {mend}")
    return found


def write_json_once(path: Path, value: Any) -> bool:
    """Write ``value`` as `write_json` does, unless ``path`` exists already; return whether it was written."""
    proposal = temporary_beside(path)
    try:
        write_json(proposal, value)
        os.link(proposal, path)  # fails when the name is taken, and never shows half a file
    except FileExistsError:
        return False
    finally:
        proposal.unlink(missing_ok=True)
    return True


def write_beside(path: Path, payload: bytes) -> Path:
    """Write ``payload`` to ``path``, or to PATH-2, PATH-3, ... where that holds something else; return the name."""
    free, count = path, 1
    while free.exists() and free.read_bytes() != payload:
        count += 1
        free = path.with_stem(f"{path.stem}-{count}")
    if not free.exists():
        write_atomically(free, payload)
    return free


def make_folder(path: str | Path) -> Path:
    """Make a folder, with those above it, and return it; one that is there stays.

    Raises:
        OSError: It cannot be made, or not be written to; the message says why.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        taken = Path(error.filename)
        raise FileExistsError(f"{taken} is {'a link to nothing' if taken.is_symlink() else 'no folder'}.") from None
    except NotADirectoryError:
        taken = next((above for above in path.parents if above.exists() and not above.is_dir()), path.parent)
        raise NotADirectoryError(f"{path} lies below {taken}, which is no folder.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written to: its owner or its file system does not allow it.")
    return path


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its name when the block ends without an exception.

    The caller fsyncs nothing: every file in the folder is flushed here before the rename.

    Raises:
        FileExistsError: ``path`` is there already; committed folders are never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is already committed and is never overwritten.")
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            flush_file(file)
        flush_file(temporary)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_file(path.parent)


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits, reading it in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, *, sha256: str, size: int | None = None, mend: str = MADE_AGAIN) -> None:
    """Compare a file with the sha256 and the size (bytes; None is any) that its manifest lists.

    Args:
        path: The file.
        sha256: Its hash.
        size: Its size.
        mend: The way out for the user, as a sentence.

    Raises:
        ValueError: It is missing, or its size or content is another one; the message names it.
    """
    if not path.is_file():
        problem = "is missing, but its manifest lists it"
    elif size is not None and (found_size := path.stat().st_size) != size:
        problem = f"has {found_size} bytes, its manifest says {size}: it was cut or changed"
    elif (found := sha256_of(path)) != sha256:
        problem = f"has sha256 {found[:12]}, its manifest says {sha256[:12]}: its content was changed"
    else:
        return
    raise ValueError(f"{path} {problem}. {mend}")


class FolderLock:
    """An exclusive lock on a folder, so that an orphan and a restart never write together.

    The kernel's ``flock`` on ``folder/lock`` is the lock: it ends with its owner, however that dies, so a dead owner's
    lock needs no taking over. The file names the owner (host, process, start) for the error of a second process. NFS
    (v4 and Linux v3) carries flock to the server, so the lock holds between nodes that share a folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "lock"
        self._descriptor: int | None = None

    def acquire(self, *, patience_seconds: float = 0.0) -> None:
        """Take the lock, waiting at most ``patience_seconds`` for an owner that is just stopping.

        Raises:
            BlockingIOError: Another process holds it; the message names the owner.
        """
        import fcntl

        if self._descriptor is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    owner = os.read(descriptor, 4096).decode("utf-8", "replace").strip() or "an unknown process"
                    os.close(descriptor)
                    raise BlockingIOError(
                        f"{self.path.parent} is in use by {owner}. Two runs must not write one folder: "
                        "wait for it, stop it, or give this run another run.root."
                    ) from None
                time.sleep(0.1)
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
        self._descriptor = descriptor

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def release(self) -> None:
        """Give the lock back. Releasing twice is allowed."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def sweep_temporaries(folder: str | Path) -> list[str]:
    """Remove what killed writers left in ``folder`` (not below it) and return the names. Hold the folder's lock."""
    removed = []
    for path in sorted(Path(folder).glob(".*.tmp")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path.name)
    return removed
