"""The files through which a run is tracked: written by a stage, read by whoever sends them to MLflow.

In the stage's folder lie ``metrics.jsonl`` (every measured number, the source of truth) and ``tracking/``:
``system.jsonl`` (load of the machine), ``events.jsonl`` (start, parameters, tags, data sets, end), ``files.jsonl``
(images, artefacts, models), ``images/`` and ``sent.json`` (how far the sender came). The ``.jsonl`` files are spools:
lines are only ever appended, so a place in one is a number of bytes, and a line without its newline is not there yet.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.files import flush_file, write_json

METRICS = "metrics.jsonl"
SYSTEM = "tracking/system.jsonl"
EVENTS = "tracking/events.jsonl"
FILES = "tracking/files.jsonl"
SPOOLS = (METRICS, SYSTEM, EVENTS, FILES)  # in the order in which they are sent
SENT_FILE = "tracking/sent.json"
WRITER_LOCK = "tracking/writer"  # held by the stage for its lifetime
SENDER_LOCK = "tracking/sender"  # held by whoever sends
NOT_METRICS = frozenset({"update", "batch", "time", "step", "attempt"})
BLOCK_BYTES = 1 << 16
# A thread that asks for the interpreter waits 5 ms for one that does not offer it, and writing JSON never does.
HOLD_SECONDS = 0.3e-3  # of formatting at a time
REST_SECONDS = 0.1e-3  # between two such, in which the training step takes the interpreter when it wants it

Line = Mapping[str, Any]


@dataclass(kw_only=True)
class Sent:
    """How far a spool has been sent, and to which run of which store."""

    store: str = ""
    mlflow_run_id: str = ""
    offsets: dict[str, int] = field(default_factory=dict)  # bytes of each spool that the store has
    refused: int = 0  # entries that the store will never take; each is named in tracking/sender.log

    def write(self, folder: Path) -> None:
        """Commit it. A stale one only causes entries to be sent again, which stores nothing twice."""
        write_json(folder / SENT_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Sent":
        """Return what was committed; nothing sent, when there is none or it is damaged."""
        try:
            return cls(**json.loads((folder / SENT_FILE).read_text()))
        except (OSError, TypeError, json.JSONDecodeError):
            return cls()


def unsent(folder: Path, sent: Sent) -> int:
    """Return how many entries of the spools are not sent yet."""
    lines = 0
    for spool in SPOOLS:
        with contextlib.suppress(FileNotFoundError), open(folder / spool, "rb") as file:
            file.seek(sent.offsets.get(spool, 0))
            while block := file.read(BLOCK_BYTES):
                lines += block.count(b"\n")
    return lines


def entries(path: Path, *, start: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield (offset behind the line, what the line says) for every complete line from byte ``start`` on.

    A line that is no JSON object yields None: the reader counts it and goes on. A spool shorter than ``start`` was
    replaced, and is read from its beginning.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; a missing spool is an empty one)
    except FileNotFoundError:
        return
    with file:
        if start > os.fstat(file.fileno()).st_size:
            start = 0
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            yield start, parsed(line)


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line holds, or None."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def entries_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a spool from the last line to the first, reading only as far as the caller goes."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return
    with file:
        place = file.seek(0, os.SEEK_END)
        rest = b""
        while place > 0:
            size = min(BLOCK_BYTES, place)
            place -= size
            file.seek(place)
            first, *lines = (file.read(size) + rest).split(b"\n")
            for line in reversed(lines):
                if (value := parsed(line)) is not None:
                    yield value
            rest = first
        if (value := parsed(rest)) is not None:
            yield value


def cut_torn_tail(path: Path) -> int:
    """Cut what a killed process or a power cut left behind the last whole line; return the number of bytes cut."""
    try:
        file = open(path, "rb+")  # noqa: SIM115
    except FileNotFoundError:
        return 0
    with file:
        size = end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = _start_of_line(file, end)
            file.seek(start)
            line = file.read(end - start)
            if line.endswith(b"\n") and parsed(line) is not None:
                break
            end = start
        if end < size:
            file.truncate(end)
    return size - end


def _start_of_line(file: Any, end: int) -> int:
    """Return where the line begins that ends just before byte ``end``."""
    place = end - 1
    while place > 0:
        begin = max(0, place - BLOCK_BYTES)
        file.seek(begin)
        newline = file.read(place - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        place = begin
    return 0


class SpoolWriter:
    """Appends lines to spools in a thread of its own, so that a slow or full disk never holds up the caller.

    What cannot be written is kept, tried again every second and reported once; ``flush`` raises it.
    """

    def __init__(self, folder: Path, *, every_second: Callable[[], None] = lambda: None) -> None:
        """Open the spools below ``folder``; ``every_second`` is called in the thread, about once a second."""
        (folder / EVENTS).parent.mkdir(parents=True, exist_ok=True)
        for spool in SPOOLS:
            cut_torn_tail(folder / spool)
        self._folder = folder
        self._every_second = every_second
        self._queue: queue.SimpleQueue[tuple[str, Sequence[Line]] | threading.Event | None] = queue.SimpleQueue()
        self._pending: dict[str, bytearray] = {}
        self._rest_at = 0.0
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def append(self, spool: str, lines: Sequence[Line]) -> None:
        """Queue lines for a spool. Takes microseconds; the caller must not change the mappings afterwards."""
        self._queue.put((spool, lines))

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
            try:
                task = self._queue.get(timeout=max(0.0, tick + 1 - time.monotonic()))
                while True:  # everything that has gathered goes to the disk in one write a spool
                    if task is None:
                        open_ = False
                    elif isinstance(task, threading.Event):
                        waiting.append(task)
                    else:
                        self._format(*task)
                    task = self._queue.get_nowait()
            except queue.Empty:
                pass
            self._write_pending(durable=bool(waiting) or not open_)
            for event in waiting:
                event.set()
            if time.monotonic() >= tick + 1:
                tick = time.monotonic()
                self._every_second()

    def _format(self, spool: str, lines: Sequence[Line]) -> None:
        pending = self._pending.setdefault(spool, bytearray())
        for line in lines:
            pending += (json.dumps(line, default=_plain) + "\n").encode()
            if time.perf_counter() > self._rest_at:
                time.sleep(REST_SECONDS)
                self._rest_at = time.perf_counter() + HOLD_SECONDS

    def _write_pending(self, *, durable: bool) -> None:
        for spool, payload in list(self._pending.items()):
            try:
                _append(self._folder / spool, payload)
            except OSError as error:
                self._failed(spool, error)
                return
            del self._pending[spool]
        if durable:
            try:
                for spool in filter(lambda spool: (self._folder / spool).exists(), SPOOLS):
                    flush_file(self._folder / spool)
            except OSError as error:
                self._failed(spool, error)
                return
        self._error = None

    def _failed(self, spool: str, error: OSError) -> None:
        if self._error is None:
            print(
                f"{self._folder / spool} cannot be written: {error}. It is tried again every second.", file=sys.stderr
            )
        self._error = error


def _append(path: Path, payload: bytes | bytearray) -> None:
    """Append all of ``payload`` or nothing: what a full disk took of it is cut off again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        try:
            written = 0
            while written < len(payload):
                written += os.write(descriptor, memoryview(payload)[written:])
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    """Let numpy scalars and paths through; anything else is a bug of the caller's, and still must not stop the run."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)
