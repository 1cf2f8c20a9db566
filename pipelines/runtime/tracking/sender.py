"""From the spools of a stage to a store, in order, once each, with a memory of how far it came.

Knows no MLflow: what a store is, `Store` says. Whatever the store does not take now stays in the spool, and is tried
again by the next `Sender.send`. What it will never take is counted and written to ``tracking/refused.log``.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from data.files import FolderLock
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import RunIdentity, pipeline_lock
from pipelines.runtime.tracking.spool import (
    EVENTS,
    FILES,
    METRICS,
    NOT_METRICS,
    SENDER_LOCK,
    SYSTEM,
    WRITER_LOCK,
    Sent,
    entries,
    entries_backwards,
)

POINTS_PER_REQUEST = 1000  # MLflow's limit
POLL_SECONDS = 1.0
BACKOFF_SECONDS = (1.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # between attempts at a store that does not answer
FAILURES_TO_SPEAK_OF = 2  # in a row; a single one is no news
FILES_WAIT_SECONDS = 3.0  # a file waits this long, so that a run's end does not stand behind its last, large file
ORPHAN_SECONDS = 3.0  # what a sender may still take after its stage was killed
LOG_BYTES = 1 << 20


class Metric(NamedTuple):
    """One measured number."""

    key: str
    value: float
    milliseconds: int  # Unix time
    step: int


class RefusedError(Exception):
    """The store will never take this entry."""


class StoreSilentError(Exception):
    """The store did not take what it was sent, and may take it later."""


class Store(Protocol):
    """What a sender needs. Every method may be called again with the same content, and then stores nothing twice.

    Methods raise `RefusedError` for what no repetition mends, anything else for what may pass.
    """

    name: str  # the URI, without credentials

    def connect(self, identity: RunIdentity) -> str: ...  # finds or makes the run; returns its id in the store
    def set_status(self, status: str, *, since: float) -> None: ...  # Unix seconds
    def log_metrics_batch(self, points: Sequence[Metric]) -> None: ...
    def log_tags(self, tags: Mapping[str, str]) -> None: ...
    def log_params(self, params: Mapping[str, str]) -> None: ...
    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None: ...
    def log_artifact(self, path: Path, *, folder: str) -> None: ...
    def log_text(self, name: str, text: str) -> None: ...
    def log_image(self, key: str, path: Path, *, step: int, milliseconds: int) -> None: ...
    def log_model(self, name: str, folder: Path) -> None: ...


class Sender:
    """Sends the spools of one stage's folder. Only the holder of the folder's sender lock may."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store
        self.sent = Sent.read(folder)
        self._connected = False

    def send(self, *, files_older_than: float = 0.0) -> None:
        """Send all that is there: numbers, then events, then files that were logged ``files_older_than`` seconds ago.

        Raises:
            StoreSilentError: The store does not answer, or not as it should.
        """
        with self._blaming_the_store():
            self._connect()
            self._send_numbers()
            self._send_each(EVENTS, self._send_event)
            self._send_each(FILES, self._send_file, until=time.time() - files_older_than)

    def close_as_killed(self) -> bool:
        """Close the run as KILLED if it was started and never closed; return whether it was so.

        Raises:
            StoreSilentError: As in `send`.
        """
        marks = (line for line in entries_backwards(self.folder / EVENTS) if line.get("kind") in ("start", "close"))
        if next(marks, {}).get("kind") != "start":
            return False
        last = [
            next(entries_backwards(self.folder / spool), {}).get("time", 0.0) for spool in (METRICS, SYSTEM, EVENTS)
        ]
        with self._blaming_the_store():
            self._connect()
            self.store.set_status("KILLED", since=max(last))
        return True

    @contextlib.contextmanager
    def _blaming_the_store(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._connected = False  # look the run up again then: it may be another database
            self._note("sender.log", traceback.format_exc())
            reason = (without_credentials(str(error)).splitlines() or [""])[0][:200]
            raise StoreSilentError(f"MLflow at {self.store.name}: {type(error).__name__}: {reason}") from None

    def _connect(self) -> None:
        if self._connected:
            return
        identity = RunIdentity.read(self.folder)
        with pipeline_lock(self.folder.parent):
            run_id = self.store.connect(identity)
        if (self.sent.store, self.sent.mlflow_run_id) != (self.store.name, run_id):
            self.sent = Sent(store=self.store.name, mlflow_run_id=run_id)  # a store that has nothing yet
            self.sent.write(self.folder)
        if identity.mlflow_run_id != run_id:
            replace(identity, mlflow_run_id=run_id).write(self.folder)
        self._connected = True

    def _send_numbers(self) -> None:
        for spool in (METRICS, SYSTEM):
            points: list[Metric] = []
            place = start = self.sent.offsets.get(spool, 0)
            for place, line in entries(self.folder / spool, start=start):
                try:
                    points += points_of(line)
                except ValueError as error:
                    self._refuse(spool, str(error))
                if len(points) >= POINTS_PER_REQUEST:
                    self._log_points(spool, points)
                    points = []
                    self._reached(spool, place)
            if place != start:
                self._log_points(spool, points)
                self._reached(spool, place)

    def _log_points(self, spool: str, points: Sequence[Metric]) -> None:
        """Send points; when a request is refused, halve it until the one that is to blame stands alone."""
        for start in range(0, len(points), POINTS_PER_REQUEST):
            some = points[start : start + POINTS_PER_REQUEST]
            try:
                self.store.log_metrics_batch(some)
            except RefusedError as error:
                if len(some) == 1:
                    self._refuse(spool, f"{error}: {some[0]}")
                else:
                    self._log_points(spool, some[: len(some) // 2])
                    self._log_points(spool, some[len(some) // 2 :])

    def _send_each(self, spool: str, send: Callable[[Mapping[str, Any]], None], *, until: float = float("inf")) -> None:
        for place, line in entries(self.folder / spool, start=self.sent.offsets.get(spool, 0)):
            if line is not None and line.get("time", 0.0) > until:
                return
            try:
                if line is None:
                    raise RefusedError("no JSON object")
                send(line)
            except (RefusedError, KeyError, FileNotFoundError) as error:
                self._refuse(spool, f"{error!r} in the entry before byte {place}: {line}")
            self._reached(spool, place)

    def _send_event(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case "start":
                self.store.set_status("RUNNING", since=event["time"])
            case "close":
                self._send_numbers()
                self.store.set_status(event["status"], since=event["time"])
            case "tags":
                self.store.log_tags(event["tags"])
            case "params":
                self.store.log_params(event["params"])
            case "input":
                self.store.log_input(
                    event["name"], digest=event["digest"], source=event["source"], context=event["context"]
                )
            case kind:
                raise RefusedError(f"unknown kind {kind!r}")

    def _send_file(self, event: Mapping[str, Any]) -> None:
        path = self.folder / event.get("path", "")
        match event["kind"]:
            case "artifact":
                self.store.log_artifact(path, folder=event["folder"])
            case "text":
                self.store.log_text(event["name"], event["text"])
            case "image":
                self.store.log_image(event["key"], path, step=event["step"], milliseconds=int(1000 * event["drawn"]))
            case "model":
                self.store.log_model(event["name"], path)
            case kind:
                raise RefusedError(f"unknown kind {kind!r}")
        self._send_numbers()  # a long queue of files holds up no curve
        self._send_each(EVENTS, self._send_event)

    def _reached(self, spool: str, place: int) -> None:
        self.sent.offsets[spool] = place
        self.sent.write(self.folder)

    def _refuse(self, spool: str, why: str) -> None:
        self.sent.refused += 1
        self._note("refused.log", f"{spool}: {why}\n")

    def _note(self, name: str, text: str) -> None:
        with open(self.folder / "tracking" / name, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {without_credentials(text)}")


def points_of(line: Mapping[str, Any] | None) -> list[Metric]:
    """Return the numbers of a line of a metrics spool, at its update or step.

    Raises:
        ValueError: The line has no step, no time, or something that is no number.
    """
    try:
        assert line is not None
        step, milliseconds = int(line["update"] if "update" in line else line["step"]), int(1000 * line["time"])
        return [Metric(key, float(value), milliseconds, step) for key, value in line.items() if key not in NOT_METRICS]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no measurement ({error!r}): {line}") from None


def is_running(folder: Path) -> bool:
    """Return whether a stage is tracking into ``folder`` now."""
    try:
        with FolderLock(folder / WRITER_LOCK):
            return False
    except BlockingIOError:
        return True


def send_once(sender: Sender) -> bool:
    """Send what is there, and close a run whose process is gone; return whether it was closed so.

    Raises:
        StoreSilentError: The store does not answer.
    """
    sender.send()
    # Asked only now: a stage that starts after this line writes a start that is sent after it, and runs again.
    return not is_running(sender.folder) and sender.close_as_killed()


def send_until_ended(sender: Sender) -> bool:
    """Go on sending while the stage runs, over silences of the store; then as `send_once`."""
    while is_running(sender.folder):
        try:
            sender.send()
        except StoreSilentError as silent:
            say(f"{silent}. Trying on.")
            time.sleep(BACKOFF_SECONDS[-1])
        time.sleep(POLL_SECONDS)
    return send_once(sender)


def send_while_owned(folder: Path, open_store: Callable[[Callable[[str], None]], Store]) -> int:
    """Be the sender of a stage, which holds the other end of the standard input; return the exit code.

    The stage writes ``close`` when it has written its last line, and kills a sender that then takes too long. When
    the pipe ends, the stage was killed: what a few seconds allow is sent, and the run is closed as KILLED.

    Args:
        folder: The stage's folder.
        open_store: Makes the store, given the function that tells the stage's user something.
    """
    tell = partial(print, file=_become_a_background_process(folder), flush=True)
    owner = _Owner()
    lock = FolderLock(folder / SENDER_LOCK)
    while True:
        try:
            lock.acquire(patience_seconds=POLL_SECONDS)
            break
        except BlockingIOError:  # the sender of the stage's last life, or a person with pipelines.tools.sync
            if owner.closing.is_set():
                return 1
    sender = Sender(folder, open_store(tell))
    failures, has_answered = 0, False
    while True:
        gone, closing = owner.gone.is_set(), owner.closing.is_set()
        try:
            if gone:
                send_once(sender)
            else:
                sender.send(files_older_than=0.0 if closing else FILES_WAIT_SECONDS)
            if failures >= FAILURES_TO_SPEAK_OF:
                tell(f"MLflow at {sender.store.name} answers again.")
            failures, has_answered = 0, True
            if closing:
                return 0
        except StoreSilentError as silent:
            failures += 1
            if failures == FAILURES_TO_SPEAK_OF:
                tell(f"{silent}. The run goes on; everything is kept, and sent when MLflow is back.")
            if gone or (closing and not has_answered):
                return 1
        if closing:
            time.sleep(0.5)
        else:
            owner.closing.wait(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)] if failures else POLL_SECONDS)


class _Owner:
    """What the stage at the other end of the standard input does; ``gone`` implies ``closing``."""

    def __init__(self) -> None:
        self.closing = threading.Event()
        self.gone = threading.Event()
        self._parent = os.getppid()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # The parent is asked for too: a process that the stage forked may hold the pipe open after its death.
        while os.getppid() == self._parent:
            if select.select([0], [], [], 0.5)[0]:
                if not os.read(0, 64):
                    break
                self.closing.set()
        self.gone.set()
        self.closing.set()
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)  # a request may hang in the client for much longer, and an orphan must not


def _become_a_background_process(folder: Path) -> TextIO:
    """Yield the processor to training, leave signals to the stage, and write to a log; return the stage's terminal."""
    os.nice(5)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    terminal = open(os.dup(2), "w")  # noqa: SIM115 (for the life of the process)
    log = os.open(folder / "tracking" / "sender.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    if os.fstat(log).st_size > LOG_BYTES:
        os.ftruncate(log, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return terminal


def say(text: str) -> None:
    """Tell the user."""
    print(text, file=sys.stderr, flush=True)
