"""Sender: spools of a stage to a store, in order, once each, with a memory of how far it came.

Whatever the store does not take now stays in the spool, and is tried again by the next `Sender.send`. What it will
never take is counted and written to ``tracking/refused.log``.
"""

import contextlib
import itertools
import logging
import math
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data.files import FolderLock
from pipelines.runtime.config.outcome import has_failed
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import RunIdentity, pipeline_lock
from pipelines.runtime.tracking.mlflow_store import METRICS_PER_REQUEST, Metric, MlflowStore, RefusedError
from pipelines.runtime.tracking.pages import COMMAND
from pipelines.runtime.tracking.spool import (
    EVENTS,
    FILES,
    METRICS,
    NOT_METRICS,
    SYSTEM,
    WRITER_LOCK,
    Sent,
    read_spool,
    read_spool_backwards,
    system_spools,
)

log = logging.getLogger("latentline.tracking")

POLL_SECONDS = 1.0
BACKOFF_SECONDS = (1.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # between attempts at a store that does not answer


class StoreUnavailableError(Exception):
    """The store did not take what it was sent, and may take it later."""


class Sender:
    """Sends the spools of one stage's folder. Only the holder of the folder's sender lock may."""

    def __init__(self, folder: Path, store: MlflowStore) -> None:
        self.folder = folder
        self.store = store
        self.sent = Sent.read(folder)
        self._connected = False

    def send(self, *, files_until: float = math.inf) -> None:
        """Send all that is there: metrics, then events, then files logged until ``files_until`` (Unix seconds).

        Raises:
            StoreUnavailableError: The store does not answer, or not as it should.
        """
        with self._connection():
            self._send_metrics()
            self._send_events(EVENTS)
            self._send_events(FILES, until=files_until)

    def send_file(self, path: Path) -> None:
        """Send a file that no spool names, such as a report that was written after the run.

        Raises:
            StoreUnavailableError: As in `send`.
        """
        with self._connection():
            self.store.log_artifact(path, folder="")

    def close_dead(self) -> str:
        """Close the run if it was started and never closed; return the status it was closed with, else "".

        It is FAILED where a rank has left its failure behind: the launcher then kills the main process. Else KILLED.

        Raises:
            StoreUnavailableError: As in `send`.
        """
        marks = (
            event for event in read_spool_backwards(self.folder / EVENTS) if event.get("kind") in ("start", "close")
        )
        if next(marks, {}).get("kind") != "start":
            return ""
        status: Literal["FAILED", "KILLED"] = "FAILED" if has_failed(self.folder) else "KILLED"
        last = [next(read_spool_backwards(self.folder / spool), {}) for spool in (METRICS, SYSTEM, EVENTS)]
        with self._connection():
            self.store.set_status(status, since=max(each.get("time", 0.0) for each in last))
        return status

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        """Connect to the store where that is not done yet; make one error of all that it may raise."""
        try:
            if not self._connected:
                self._connect()
            yield
        except Exception as error:
            self._connected = False  # look the run up again then: it may be another database
            self._note("sender.log", traceback.format_exc())
            reason = (without_credentials(str(error)).splitlines() or [""])[0][:200]
            raise StoreUnavailableError(f"MLflow at {self.store.name}: {type(error).__name__}: {reason}") from None

    def _connect(self) -> None:
        self._identity = identity = RunIdentity.read(self.folder)
        with pipeline_lock(self.folder.parent):
            run_id = self.store.connect(identity)
        if (self.sent.store, self.sent.mlflow_run_id) != (self.store.name, run_id):
            self.sent = Sent(store=self.store.name, mlflow_run_id=run_id)  # a store that has nothing yet
            self.sent.write(self.folder)
        if identity.mlflow_run_id != run_id:
            replace(identity, mlflow_run_id=run_id).write(self.folder)
        self._connected = True

    def _send_metrics(self) -> None:
        identity = self._identity
        for spool in (METRICS, *system_spools(self.folder)):
            started = None if spool == METRICS else identity.started
            metrics: list[Metric] = []
            offset = start = self.sent.offsets.get(spool, 0)
            for offset, record in read_spool(self.folder / spool, start=start):
                try:
                    metrics += metrics_of(record, started=started, density=identity.curve_density)
                except ValueError as error:
                    self._refuse(spool, str(error))
                if len(metrics) >= METRICS_PER_REQUEST:
                    self._log_metrics(spool, metrics)
                    metrics = []
                    self._reached(spool, offset)
            if offset != start:
                self._log_metrics(spool, metrics)
                self._reached(spool, offset)

    def _log_metrics(self, spool: str, metrics: Sequence[Metric]) -> None:
        """Send metrics; when a request is refused, halve it until the metric at fault stands alone."""
        for start in range(0, len(metrics), METRICS_PER_REQUEST):
            some = metrics[start : start + METRICS_PER_REQUEST]
            try:
                self.store.log_metrics(some)
            except RefusedError as error:
                if len(some) == 1:
                    self._refuse(spool, f"{error}: {some[0]}")
                else:
                    self._log_metrics(spool, some[: len(some) // 2])
                    self._log_metrics(spool, some[len(some) // 2 :])

    def _send_events(self, spool: str, *, until: float = math.inf) -> None:
        for offset, event in read_spool(self.folder / spool, start=self.sent.offsets.get(spool, 0)):
            if event is not None and event.get("time", 0.0) > until:
                return
            try:
                if event is None:
                    raise RefusedError("no JSON object")
                self._send_event(event)
            except (RefusedError, KeyError, FileNotFoundError) as error:
                self._refuse(spool, f"{error!r} in the event before byte {offset}: {event}")
            self._reached(spool, offset)
            if spool == FILES:  # a long queue of files holds up no curve
                self._send_metrics()
                self._send_events(EVENTS)

    def _send_event(self, event: Mapping[str, Any]) -> None:
        path = self.folder / event.get("path", "")
        match event["kind"]:
            case "start":
                self.store.log_tags({COMMAND: event.get("command", "")})
                self.store.set_status("RUNNING", since=event["time"])
            case "close":
                self._send_metrics()
                self.store.set_status(event["status"], since=event["time"])
            case "tags":
                self.store.log_tags(event["tags"])
            case "params":
                self.store.log_params(event["params"], shown=event.get("shown", event["params"]))
            case "input":
                given = {key: event[key] for key in ("name", "digest", "source", "context")}
                self.store.log_input(**given)
            case "artifact":
                self.store.log_artifact(path, folder=event["folder"])
            case "text":
                self.store.log_text(event["name"], event["text"])
            case "image":
                self.store.log_image(event["key"], path, step=event["step"], milliseconds=int(1000 * event["drawn"]))
            case "model":
                self.store.log_model(event["name"], path, alias=event.get("alias", ""))
            case kind:
                raise RefusedError(f"unknown kind {kind!r}")

    def _reached(self, spool: str, place: int) -> None:
        self.sent.offsets[spool] = place
        self.sent.write(self.folder)

    def _refuse(self, spool: str, why: str) -> None:
        self.sent.refused += 1
        self._note("refused.log", f"{spool}: {why}\n")

    def _note(self, name: str, text: str) -> None:
        with open(self.folder / "tracking" / name, "a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {without_credentials(text)}")


def metrics_of(record: Mapping[str, Any] | None, *, started: float | None = None, density: int = 0) -> list[Metric]:
    """Return those metrics of a record that the store gets, at its update, its step or the run's second.

    Args:
        record: Of metrics or of a node's load.
        started: Start of the run, Unix seconds, where records have no step; None where each must have one.
        density: Updates up to which training metrics are sent of each, as `is_sent` says; 0 for all.

    Raises:
        ValueError: The record has no time, or something that is no number.
    """
    try:
        assert record is not None
        at = "update" if "update" in record else "step"
        step = int(record[at] if started is None else record["time"] - started)
        sent = "update" not in record or is_sent(step, density=density)
        return [
            Metric(name, float(value), int(1000 * record["time"]), step)
            for name, value in record.items()
            # Measured every update or by each rank; what comes once a flush is sent as it is.
            if name not in NOT_METRICS and (sent or not name.startswith("train/")) and "/rank_" not in name
        ]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no record of metrics ({error!r}): {record}") from None


def is_sent(update: int, *, density: int) -> bool:
    """Return whether the store gets the training metrics of an update.

    It gets every one up to ``density``, then multiples of 2 up to twice that, of 5 up to five times, of 10, 20, 50 and
    so on: 1.6 ``density`` a decade. Periods of decimal numbers go with these.
    """
    strides = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return not density or update % next(stride for stride in strides if stride * density >= update) == 0


def is_running(folder: Path) -> bool:
    """Return whether a stage is tracking into ``folder`` now."""
    try:
        with FolderLock(folder / WRITER_LOCK):
            return False
    except BlockingIOError:
        return True


def send_once(sender: Sender) -> str:
    """Send what is there, and close a run whose process is gone; return the status it was closed with, else "".

    Raises:
        StoreUnavailableError: The store does not answer.
    """
    sender.send()
    # Asked only now: a stage that starts after this line writes a start that is sent after it, and runs again.
    return "" if is_running(sender.folder) else sender.close_dead()


def send_until_ended(sender: Sender) -> str:
    """Go on sending while the stage runs, also while the store does not answer; then as `send_once`."""
    while is_running(sender.folder):
        try:
            sender.send()
        except StoreUnavailableError as error:
            log.warning(f"{error}. Trying on.")
            time.sleep(BACKOFF_SECONDS[-1])
        time.sleep(POLL_SECONDS)
    return send_once(sender)
