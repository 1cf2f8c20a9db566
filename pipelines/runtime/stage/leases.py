"""Leases: hints that keep several processes from making one work item twice.

A lease is a file made exclusively, touched again and again while its owner runs. It is a hint and no lock: an item that
is made twice has equal bytes, and the first to commit wins. So nothing breaks when a file server is slow to show a
lease, or when an owner was only suspended. Ages are by the file server's clock, since machines disagree about the time.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from data.files import sweep_temporaries

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0  # without a heartbeat a lease's owner counts as gone


def sweep_expired_leases(folder: Path) -> bool:
    """Remove leases and temporary files of killed processes in ``folder``; False when a process is still at work."""
    with Leases(folder) as leases:
        if any(not leases.is_expired(path) for path in folder.glob("*.lease")):
            return False
        for path in folder.glob("*.lease"):
            path.unlink(missing_ok=True)
    sweep_temporaries(folder)
    return True


class Leases:
    """The leases of one process in a folder; close it when the work ends."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held = folder, set[Path]()
        self._clock = folder / f".clock-{os.getpid()}-{secrets.token_hex(6)}.tmp"
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="leases", daemon=True)
        self._heartbeat.start()

    def __enter__(self) -> "Leases":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._heartbeat.join()
        for path in self._held.copy():
            self._release(path)
        self._clock.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lease(self, name: str) -> Iterator[bool]:
        """Lease an item for the time of the block; yields False when another process is making it."""
        path = self._folder / f"{name}.lease"
        taken = self._take(path)
        try:
            yield taken
        finally:
            if taken:
                self._release(path)

    def _take(self, path: Path) -> bool:
        with self._lock:
            if path in self._held:  # by another thread of this process
                return False
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                if not self.is_expired(path):
                    return False
                # Two may take over at once; then the item is made twice, which harms nothing.
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            with os.fdopen(descriptor, "w") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid(), "began": _start_of(os.getpid())}, file)
            self._held.add(path)
            return True

    def _release(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)
            path.unlink(missing_ok=True)

    def is_expired(self, path: Path) -> bool:
        """Return whether a lease's owner is gone: its process has ended, or its heartbeat has stopped."""
        with contextlib.suppress(FileNotFoundError):
            # An owner that has just made it may not have written yet; then its age decides.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                owner = json.loads(path.read_bytes())
                if owner["host"] == socket.gethostname() and _start_of(owner["pid"]) != owner["began"]:
                    return True
            self._clock.write_bytes(b"")
            return self._clock.stat().st_mtime - path.stat().st_mtime > STALE_SECONDS
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._lock:
                for path in self._held:
                    with contextlib.suppress(OSError):
                        os.utime(path)


def _start_of(pid: int) -> float:
    """Return the start of a process of this machine, Unix seconds; 0 when there is none of that number."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
