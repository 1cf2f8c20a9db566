"""Tracker: the interface through which a stage logs, at no cost to the step.

A stage calls a ``Tracker``; the tracker appends to spools on the disk (``pipelines.runtime.tracking.spool``); a process
of its own sends them to MLflow (``pipelines.runtime.tracking.sender_process``). A server that is dead, slow or wrong is
therefore nothing that a stage could notice, and what was not sent is sent by ``python -m pipelines.tools.sync``.
"""

import contextlib
import filecmp
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from data.files import FolderLock, temporary_beside
from pipelines.runtime.config.dotted_keys import flattened_texts
from pipelines.runtime.config.outcome import resume_command
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.stage_config import CURVE_DENSITY
from pipelines.runtime.tracking.identity import AUTO, OFFLINE, RunIdentity, run_identity, sqlite_file, store_uri
from pipelines.runtime.tracking.pages import shown_params
from pipelines.runtime.tracking.spool import (
    EVENTS,
    FILES,
    METRICS,
    NOT_METRICS,
    SYSTEM,
    WRITER_LOCK,
    Sent,
    SpoolWriter,
    read_spool_backwards,
    unsent,
)
from pipelines.runtime.tracking.system_metrics import SystemSampler

log = logging.getLogger("latentline.tracking")

Status = Literal["FINISHED", "FAILED", "KILLED"]
Record = Mapping[str, float | int]  # {"update", "batch", "time", "train/loss", ...}

CLOSE_WAIT_SECONDS = 8.0  # a stage exits within 10 s when its server takes nothing
LONGEST_WAIT_SECONDS = 60.0  # while the server takes something; always of an sqlite file, which takes a while to make


class SilentTracker:
    """Tracker of the ranks beside the main process: takes what `Tracker` takes and writes nothing."""

    run_id = ""

    def resume_after(self, update: int) -> int:
        return 0

    def log_records(self, records: Sequence[Record]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], *, step: int, attempt: int = 1) -> None: ...
    def log_image(self, key: str, path: Path, *, step: int) -> None: ...
    def log_artifact(self, path: Path, folder: str = "") -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None: ...
    def log_model(self, name: str, folder: Path, *, alias: str = "") -> None: ...
    def flush(self) -> None: ...
    def close(self, status: Status) -> None: ...


class NodeTracker(SilentTracker):
    """Tracker of the first process of another node: writes the load of its node, which the main process's sender sends.

    Args:
        folder: The stage's folder, which the nodes share.
        node: Name of the node, a part of the metrics' names.
    """

    def __init__(self, folder: Path, *, node: str) -> None:
        self._name, self._sampler = f"tracking/system-{node}.jsonl", SystemSampler(node)
        self._spool = SpoolWriter(folder, every_second=self._each_second, spools=(self._name,))

    def _each_second(self) -> None:
        if record := self._sampler.due():
            self._spool.append(self._name, [record])

    def close(self, status: Status) -> None:
        """End the thread that writes."""
        self._spool.close(timeout_seconds=1.0)


def open_tracker(
    *,
    folder: Path,
    root: Path,
    stage: str,
    experiment: str,
    tracking_uri: str = AUTO,
    curve_density: int = CURVE_DENSITY,
    params: Mapping[str, Any],
    at_default: Collection[str] = (),
    tags: Mapping[str, str],
    config_file: Path | None = None,
) -> "Tracker":
    """Start or continue the run of a stage's folder; for the main process only.

    Never waits for the store and never fails because of it.

    Args:
        folder: The stage's folder, on which the stage holds its lock.
        root: The pipeline's folder; ``pipeline.json`` lies in it, the default store beside it.
        stage: Name of the stage, such as ``train_unet``.
        experiment: The MLflow experiment, shared by the pipelines that are to be compared.
        tracking_uri: ``auto`` (MLFLOW_TRACKING_URI, else sqlite beside ``root``), ``offline`` (send nothing; ``sync``
            can do so later) or the URI of a store.
        curve_density: Updates up to which the store gets the metrics of each, then of ever fewer; 0 for all.
        params: The resolved configuration.
        at_default: Dotted keys whose value is the default; MLflow shows headlines and the others.
        tags: Facts by which the run is found: digests, code version, host.
        config_file: The resolved configuration as a file; kept with the run, without credentials.

    Raises:
        ValueError: The store would be an sqlite file on a network folder, or run.json or pipeline.json is damaged.
        BlockingIOError: Another process tracks into this folder.
    """
    uri = store_uri(tracking_uri, root=root)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder / WRITER_LOCK)
    lock.acquire(patience_seconds=1.0)  # a sync holds it for a moment, to see whether the run is alive
    try:
        identity = run_identity(
            folder, root=root, stage=stage, experiment=experiment, uri=uri, curve_density=curve_density
        )
    except BaseException:
        lock.release()
        raise
    tracker = Tracker(folder=folder, identity=identity, uri=uri, lock=lock)
    tracker.event("start", process=os.getpid(), host=os.uname().nodename, command=resume_command())
    texts = {key: without_credentials(text) for key, text in flattened_texts(params).items()}
    # A changed one stays as it was in MLflow and becomes a tag.
    tracker.event("params", params=texts, shown=shown_params(texts, at_default=at_default))
    tracker.set_tags(tags)
    if config_file is not None:
        tracker.event("text", spool=FILES, name=config_file.name, text=without_credentials(config_file.read_text()))
    tracker.start_sending()
    return tracker


class Tracker:
    """The main process's tracker; made by `open_tracker`. No method waits for the store or for the disk."""

    def __init__(self, *, folder: Path, identity: RunIdentity, uri: str, lock: FolderLock) -> None:
        self._folder = folder
        self._identity = identity
        self._uri = uri
        self._lock = lock
        self._sender: subprocess.Popen[bytes] | None = None
        self._sender_retry_at = 0.0
        self._sampler = SystemSampler()
        self._spool = SpoolWriter(folder, every_second=self._each_second)

    @property
    def run_id(self) -> str:
        """Local id of the run; it outlives restarts and needs no store."""
        return self._identity.run_id

    def resume_after(self, update: int) -> int:
        """Set the update from which training goes on, so that records behind it are recognised, not written twice.

        Replaying is exact, so the records that a killed run wrote behind its last checkpoint are right and stay. Costs
        as much as there is to replay. Without this call the first logging call looks through the whole file.

        Returns:
            The highest attempt among these records, 0 where there are none.
        """
        self._written = _written_behind(self._folder / METRICS, update=update)
        return max((int(record[0]) for record in self._written), default=0)

    def log_records(self, records: Sequence[Record]) -> None:
        """Append training records ``{"update", "batch", "time", "train/loss", ...}`` to ``metrics.jsonl`` as they are.

        ``time`` is in Unix seconds and added when absent. A record may hold ``attempt`` (1 when absent), which counts
        rewinds: (attempt, update) names a record, and one that is there already is not written again.
        """
        now = round(time.time(), 3)
        new = [
            dict(record) if "time" in record else {"update": record["update"], "time": now, **record}
            for record in records
            if (record.get("attempt", 1), record["update"]) not in self._written
        ]
        if new:
            self._spool.append(METRICS, new)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int, attempt: int = 1) -> None:
        """Append a record of metrics that are not measured every update; those already there are not repeated."""
        new = {name: value for name, value in metrics.items() if (attempt, step, name) not in self._written}
        if new:
            rewound = {"attempt": attempt} if attempt > 1 else {}
            self._spool.append(METRICS, [{"step": step, "time": round(time.time(), 3), **rewound, **new}])

    def log_image(self, key: str, path: Path, *, step: int) -> None:
        """Keep a copy of a PNG as the image ``key`` at ``step``; keys are stable, so that steps make a series.

        A key holds letters, digits and ``_-./ `` only.
        """
        if not re.fullmatch(r"[\w\-./ ]+", key, flags=re.ASCII):
            raise ValueError(f"Image key {key!r}: only letters, digits, '_', '-', '.', '/' and spaces are allowed.")
        stem = f"{key.replace('/', '~')}-{step:07d}"
        kept = self._folder / "tracking" / "images" / f"{stem}.png"
        count = 1
        while kept.exists() and not filecmp.cmp(path, kept, shallow=False):  # drawn otherwise after a rewind
            count += 1
            kept = kept.with_name(f"{stem}-{count}.png")
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            whole = temporary_beside(kept)  # renamed without fsync, which may take longer than a step
            shutil.copyfile(path, whole)
            whole.rename(kept)
        # A replay logs it again, as the same picture: the run may have been killed before the first event was written.
        drawn = round(kept.stat().st_mtime, 3)
        self.event("image", spool=FILES, key=key, step=step, drawn=drawn, path=self._relative(kept))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send a file as an artefact. It is read when it is sent, so it must be written once and stay."""
        self.event("artifact", spool=FILES, path=self._relative(path), folder=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self.event("tags", tags={key: without_credentials(str(value)) for key, value in tags.items()})

    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Record a data set that the run reads: digest, place and purpose (``training``, ...)."""
        self.event("input", name=name, digest=digest, source=without_credentials(source), context=context)

    def log_model(self, name: str, folder: Path, *, alias: str = "") -> None:
        """Log the weights in ``folder`` as a model; with an ``alias`` send and register them."""
        self.event("model", spool=FILES, name=name, path=self._relative(folder), alias=alias)

    def flush(self) -> None:
        """Make everything logged so far durable; call it before a checkpoint is committed.

        Raises:
            OSError: The disk did not take it.
        """
        self._spool.flush(timeout_seconds=60.0)

    def close(self, status: Status, *, wait_seconds: float | None = None) -> None:
        """End the run, let the sender finish, and report what is left for ``sync``.

        The sender gets ``wait_seconds``. By default it gets a minute while its store takes something, and less where
        the run was told to stop, whose time is short.
        """
        longest = wait_seconds or (CLOSE_WAIT_SECONDS if status == "KILLED" else LONGEST_WAIT_SECONDS)
        patience = longest if wait_seconds or sqlite_file(self._uri) is not None else CLOSE_WAIT_SECONDS
        self.event("close", status=status)
        self._spool.close(timeout_seconds=patience / 2)
        try:
            if self._sender is not None:
                self._finish_sending(patience_seconds=patience, longest_seconds=longest)
        finally:
            self._lock.release()
        if self._uri != OFFLINE and (left := unsent(self._folder, Sent.read(self._folder))):
            log.warning(
                f"MLflow: {left} records and events are not sent yet to {without_credentials(self._uri)}. "
                f"Nothing is lost; send them with: python -m pipelines.tools.sync {self._folder}"
            )

    def event(self, kind: str, *, spool: str = EVENTS, **content: Any) -> None:
        """Append an event to a spool other than the metrics."""
        self._spool.append(spool, [{"kind": kind, "time": round(time.time(), 3), **content}])

    def start_sending(self) -> None:
        """Start the process that sends the spools; it ends with this process, however that dies."""
        if self._uri == OFFLINE:
            return
        code = str(Path(__file__).parents[3])
        environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_RUN_ID"}
        # By the environment: other users of the machine can read a process's arguments.
        environment["MLFLOW_TRACKING_URI"] = self._uri
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
        try:
            self._sender = subprocess.Popen(
                [sys.executable, "-m", "pipelines.runtime.tracking.sender_process", str(self._folder)],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C on a terminal is for the stage, which then closes the run
            )
        except OSError as error:
            log.warning(
                f"MLflow: the sender could not be started ({error}); python -m pipelines.tools.sync sends later."
            )
        self._sender_retry_at = time.monotonic() + 60

    def _finish_sending(self, *, patience_seconds: float, longest_seconds: float) -> None:
        """Let the sender finish while it comes on: at most so long without a step, and in all."""
        assert self._sender is not None
        assert self._sender.stdin is not None
        try:
            with contextlib.suppress(OSError):
                self._sender.stdin.write(b"close\n")
                self._sender.stdin.flush()
            began = last = time.monotonic()
            sent = Sent.read(self._folder)
            while self._sender.poll() is None:
                now = time.monotonic()
                if (sent_now := Sent.read(self._folder)) != sent:
                    sent, last = sent_now, now
                if now > min(last + patience_seconds, began + longest_seconds):
                    break
                time.sleep(0.05)
        finally:  # also when a second Ctrl-C cuts the wait short; one that has ended is not killed
            self._sender.kill()
            self._sender.wait()

    def _each_second(self) -> None:
        if record := self._sampler.due():
            self._spool.append(SYSTEM, [record])
        if self._sender is not None and self._sender.poll() is not None and time.monotonic() > self._sender_retry_at:
            self.start_sending()

    @cached_property
    def _written(self) -> set[tuple[int | str, ...]]:
        return _written_behind(self._folder / METRICS, update=-1)

    def _relative(self, path: Path) -> str:
        """Return a file's path as a copied stage folder still finds it."""
        path, folder = Path(path).resolve(), self._folder.resolve()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _written_behind(path: Path, *, update: int) -> set[tuple[int | str, ...]]:
    """Return (attempt, update) of each training record behind ``update``, (attempt, step, name) of each other metric.

    Reads ``metrics.jsonl`` backwards until the first training record that is not behind ``update``.
    """
    written: set[tuple[int | str, ...]] = set()
    for record in read_spool_backwards(path):
        attempt = record.get("attempt", 1)
        if "update" in record:
            if record["update"] <= update:
                break
            written.add((attempt, record["update"]))
        elif "step" in record:
            written |= {(attempt, record["step"], name) for name in record.keys() - NOT_METRICS}
    return written
