"""Spools: the append-only files between a stage and the sender of its metrics.

In the stage's folder lie ``metrics.jsonl`` (a record an update; the source of truth) and ``tracking/`` with
``system.jsonl`` (records of the load of the main process's node; ``system-NODE.jsonl`` of each other node),
``events.jsonl`` (start, parameters, tags, data sets, end), ``files.jsonl`` (images, artefacts, models), ``images/`` and
``sent.json`` (how far the sender came). A ``.jsonl`` file holds one JSON object a line and only ever grows, so a place
in it is a number of bytes; an object without its newline is not there yet.
"""

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data.files import flush_file, read_json, write_json

log = logging.getLogger("latentline.tracking")

METRICS = "metrics.jsonl"
SYSTEM = "tracking/system.jsonl"
EVENTS = "tracking/events.jsonl"
FILES = "tracking/files.jsonl"
SPOOLS = (METRICS, SYSTEM, EVENTS, FILES)  # of the main process
SENT_FILE = "tracking/sent.json"
WRITER_LOCK = "tracking/writer"  # held by the stage for its lifetime
SENDER_LOCK = "tracking/sender"  # held by whoever sends
ORPHAN_SECONDS = 3.0  # a sender may still work for this long after its stage was killed
NOT_METRICS = frozenset({"update", "batch", "time", "step", "attempt"})
BLOCK_BYTES = 1 << 16
# A thread that asks for the interpreter waits 5 ms for one that does not offer it, and writing JSON never does.
HOLD_SECONDS = 0.3e-3  # of formatting at a time
REST_SECONDS = 0.1e-3  # between two such, in which the training step takes the interpreter when it wants it

JsonObject = Mapping[str, Any]  # a record or an event


@dataclass(kw_only=True)
class Sent:
    """Progress of sending: how far each spool has been sent, and to which run of which store."""

    store: str = ""
    mlflow_run_id: str = ""
    offsets: dict[str, int] = field(default_factory=dict)  # bytes of each spool that the store has
    refused: int = 0  # records and events that the store will never take; tracking/refused.log names each

    def write(self, folder: Path) -> None:
        """Commit it. A stale one only causes objects to be sent again, which stores nothing twice."""
        write_json(folder / SENT_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Sent":
        """Return what was committed; nothing sent, when there is none or it is damaged."""
        with contextlib.suppress(OSError, TypeError, ValueError):
            found = cls(**read_json(folder / SENT_FILE, mend=""))
            if isinstance(found.offsets, dict) and all(isinstance(place, int) for place in found.offsets.values()):
                return found
        return cls()


def unsent(folder: Path, sent: Sent) -> int:
    """Return how many records and events of the spools are not sent yet."""
    count = 0
    for spool in (METRICS, *system_spools(folder), EVENTS, FILES):
        with contextlib.suppress(FileNotFoundError), open(folder / spool, "rb") as file:
            file.seek(sent.offsets.get(spool, 0))
            while block := file.read(BLOCK_BYTES):
                count += block.count(b"\n")
    return count


def system_spools(folder: Path) -> list[str]:
    """Return the spools of system metrics that are there, each of one node."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("tracking/system*.jsonl"))


def read_spool(path: Path, *, start: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (offset behind it, record or event) for every complete line from byte ``start`` on.

    A line that is no JSON object yields None: the reader counts it and goes on. A spool shorter than ``start`` was
    replaced, and is read from its beginning. A missing spool is an empty one.
    """
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if start > os.fstat(file.fileno()).st_size:
            start = 0
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield start, _object_in(line)


def read_spool_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield records or events from the last to the first, reading only as far as the caller goes."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        for _, line in _lines_backwards(file):
            if (value := _object_in(line)) is not None:
                yield value


def cut_torn_tail(path: Path) -> int:
    """Cut what a killed process or a power cut left behind the last whole line; return the number of bytes cut."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        ends = (
            start + len(line) + 1
            for start, line in _lines_backwards(file)
            if start + len(line) < size and _object_in(line) is not None
        )
        if (end := next(ends, 0)) < size:
            file.truncate(end)
        return size - end
    return 0


def _lines_backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line without newline) from the last to the first; the last is empty where the file is whole."""
    end = place = file.seek(0, os.SEEK_END)
    rest = b""
    while place > 0:
        size = min(BLOCK_BYTES, place)
        place -= size
        file.seek(place)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        for line in reversed(lines):
            yield end - len(line), line
            end -= len(line) + 1
    yield 0, rest


def _object_in(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


class SpoolWriter:
    """Appends records and events in a thread of its own, so that a slow or full disk never holds up the caller.

    What cannot be written is kept, tried again every second and reported once; ``flush`` raises it.
    """

    def __init__(self, folder: Path, *, every_second: Callable[[], None], spools: Sequence[str] = SPOOLS) -> None:
        """Open ``spools`` below ``folder``; ``every_second`` is called in the thread, about once a second."""
        (folder / EVENTS).parent.mkdir(parents=True, exist_ok=True)
        for spool in spools:
            cut_torn_tail(folder / spool)
        self._folder, self._spools = folder, spools
        self._every_second = every_second
        self._queue: queue.SimpleQueue[tuple[str, Sequence[JsonObject]] | threading.Event | None] = queue.SimpleQueue()
        self._pending: dict[str, bytearray] = {}
        self._rest_at = 0.0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def append(self, spool: str, objects: Sequence[JsonObject]) -> None:
        """Queue objects for a spool. Takes microseconds; the caller must not change them afterwards."""
        self._queue.put((spool, objects))

    def flush(self, *, timeout_seconds: float) -> None:
        """Wait until everything queued so far is on the disk (fsync).

        Raises:
            OSError: It could not be written, or not in time.
        """
        done = threading.Event()
        self._queue.put(done)
        if not done.wait(timeout_seconds):
            raise TimeoutError(f"{self._folder}: metrics could not be written within {timeout_seconds:.0f} s.")
        if self._error is not None:
            raise self._error

    def close(self, *, timeout_seconds: float) -> None:
        """Write what is queued and end the thread; a disk that hangs is left alone after ``timeout_seconds``."""
        self._queue.put(None)
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        open_ = True
        tick = time.monotonic()
        while open_:
            waiting: list[threading.Event] = []
            with contextlib.suppress(queue.Empty):
                task = self._queue.get(timeout=max(0.0, tick + 1 - time.monotonic()))
                while True:  # everything that has gathered goes to the disk in one write a spool
                    if task is None:
                        open_ = False
                    elif isinstance(task, threading.Event):
                        waiting.append(task)
                    else:
                        self._format(*task)
                    task = self._queue.get_nowait()
            self._write_pending(durable=bool(waiting) or not open_)
            for event in waiting:
                event.set()
            if time.monotonic() >= tick + 1:
                tick = time.monotonic()
                self._every_second()

    def _format(self, spool: str, objects: Sequence[JsonObject]) -> None:
        pending = self._pending.setdefault(spool, bytearray())
        for each in objects:
            pending += (json.dumps(each, default=_plain) + "\n").encode()
            if time.perf_counter() > self._rest_at:
                time.sleep(REST_SECONDS)
                self._rest_at = time.perf_counter() + HOLD_SECONDS

    def _write_pending(self, *, durable: bool) -> None:
        spool = ""
        try:
            for spool in list(self._pending):
                _append(self._folder / spool, self._pending[spool])
                del self._pending[spool]
            for spool in self._spools if durable else ():
                if (self._folder / spool).exists():
                    flush_file(self._folder / spool)
            self._error = None
        except OSError as error:
            if self._error is None:
                log.warning(f"{self._folder / spool} cannot be written: {error}. It is tried again every second.")
            self._error = error


def _append(path: Path, payload: bytes | bytearray) -> None:
    """Append all of ``payload`` or nothing: what a full disk took of it is cut off again."""
    with open(path, "ab", buffering=0) as file:
        size, rest = os.fstat(file.fileno()).st_size, bytes(payload)
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(size)
            raise


def _plain(value: Any) -> Any:
    """Let numpy scalars and paths through; anything else is a bug of the caller's, and still must not stop the run."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
