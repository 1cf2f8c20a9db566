"""What a stage says about itself while it runs, at no cost to the step.

A stage calls a ``Tracker``; the tracker appends to spools on the disk (``pipelines.runtime.tracking.spool``); a process
of its own sends them to MLflow. A process and not a thread, since the client's work
(importing, building requests, SQL) would hold the interpreter's lock that the training step needs. A server that is
dead, slow or wrong is therefore nothing that a stage could notice, and what was not sent is sent by
``python -m pipelines.tools.sync``.
"""

import contextlib
import filecmp
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.files import FolderLock, temporary_beside
from pipelines.runtime.config.dotted_keys import flattened_texts
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import AUTO, OFFLINE, RunIdentity, run_identity, store_uri
from pipelines.runtime.tracking.spool import (
    EVENTS,
    FILES,
    METRICS,
    NOT_METRICS,
    SYSTEM,
    WRITER_LOCK,
    Sent,
    SpoolWriter,
    entries_backwards,
    unsent,
)
from pipelines.runtime.tracking.system_metrics import SystemSampler

Status = Literal["FINISHED", "FAILED", "KILLED"]

SYSTEM_EVERY_SECONDS = 10
CLOSE_WAIT_SECONDS = 8.0  # a stage exits within 10 s, whatever its server does


class SilentTracker:
    """Takes what `Tracker` takes and says nothing: what the ranks beside the main process hold."""

    run_id = ""
    pipeline_id = ""
    last_update = 0

    def resume_after(self, update: int) -> None: ...
    def log_records(self, rows: Sequence[Mapping[str, float | int]]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], *, step: int, attempt: int = 1) -> None: ...
    def log_image(self, key: str, path: Path, *, step: int) -> None: ...
    def log_artifact(self, path: Path, folder: str = "") -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def log_params(self, params: Mapping[str, Any]) -> None: ...
    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None: ...
    def log_model(self, name: str, folder: Path) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: Status) -> None: ...


def open_tracker(
    *,
    folder: Path,
    root: Path,
    stage: str,
    experiment: str,
    tracking_uri: str = AUTO,
    params: Mapping[str, Any],
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
        params: The resolved configuration, nested or flat.
        tags: What the run is found by: digests, code version, host.
        config_file: The resolved configuration as a file; kept with the run, without credentials.

    Raises:
        ValueError: The store would be an sqlite file on a network folder, or run.json or pipeline.json is damaged.
        BlockingIOError: Another process tracks into this folder.
    """
    uri = store_uri(tracking_uri, root=root)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder / WRITER_LOCK)
    lock.acquire(patience_seconds=1.0)  # pipelines.tools.sync holds it for a moment, to see whether the run is alive
    try:
        identity = run_identity(folder, root=root, stage=stage, experiment=experiment, uri=uri)
    except BaseException:
        lock.release()
        raise
    tracker = Tracker(folder=folder, identity=identity, uri=uri, lock=lock)
    tracker.event("start", process=os.getpid(), host=os.uname().nodename)
    tracker.log_params(params)
    tracker.set_tags({**tags, "folder": str(folder.resolve())})
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
        self._sampler = SystemSampler(folder, since=identity.started, every_seconds=SYSTEM_EVERY_SECONDS)
        self._spool = SpoolWriter(folder, every_second=self._each_second)
        self._known: _Known | None = None

    @property
    def run_id(self) -> str:
        """This pipeline's own name of the run; it outlives restarts and needs no store."""
        return self._identity.run_id

    @property
    def pipeline_id(self) -> str:
        """Name of the pipeline that the run belongs to."""
        return self._identity.pipeline_id

    @property
    def last_update(self) -> int:
        """The last update whose line was in ``metrics.jsonl`` when the tracker was opened; 0 when there is none."""
        return self._already().last_update

    def resume_after(self, update: int) -> None:
        """Say from which update training goes on, so that lines behind it are recognised and not written twice.

        Replaying is exact, so the lines that a killed run wrote behind its last checkpoint are right and stay. Costs as
        much as there is to replay. Without this call the first logging call looks through the whole file.
        """
        self._known = _Known.behind(self._folder / METRICS, update=update)

    def log_records(self, rows: Sequence[Mapping[str, float | int]]) -> None:
        """Append training lines ``{"update", "batch", "time", "train/loss", ...}`` to ``metrics.jsonl`` as they are.

        ``time`` is in Unix seconds and added when absent. A row may hold ``attempt`` (1 when absent), which counts
        rewinds: (attempt, update) names a line, and one that is there already is not written again.
        """
        known, now = self._already().rows, round(time.time(), 3)
        new = [
            dict(row) if "time" in row else {"update": row["update"], "time": now, **row}
            for row in rows
            if (row.get("attempt", 1), row["update"]) not in known
        ]
        if new:
            self._spool.append(METRICS, new)

    def log_metrics(self, metrics: Mapping[str, float], *, step: int, attempt: int = 1) -> None:
        """Append one line of numbers that are not measured every update; those already there are not repeated."""
        known = self._already().points
        new = {key: value for key, value in metrics.items() if (attempt, step, key) not in known}
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
        # A replay says it again, as the same picture: the run may have been killed before the first entry was written.
        drawn = round(kept.stat().st_mtime, 3)
        self.event("image", spool=FILES, key=key, step=step, drawn=drawn, path=self._relative(kept))

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Send a file as an artefact. It is read when it is sent, so it must be written once and stay."""
        self.event("artifact", spool=FILES, path=self._relative(path), folder=folder)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self.event("tags", tags={key: without_credentials(str(value)) for key, value in tags.items()})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Add parameters, flattened with dots. A changed one stays as it was in MLflow and becomes a tag."""
        self.event("params", params={key: without_credentials(text) for key, text in flattened_texts(params).items()})

    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Name a data set that the run reads: its digest, where it lies, and what for (``training``, ...)."""
        self.event("input", name=name, digest=digest, source=without_credentials(source), context=context)

    def log_model(self, name: str, folder: Path) -> None:
        """Send ``*.safetensors`` and ``config.json`` of ``folder`` (nothing below it) as a logged model."""
        self.event("model", spool=FILES, name=name, path=self._relative(folder))

    def flush(self) -> None:
        """Make everything logged so far durable; call it before a checkpoint is committed.

        Raises:
            OSError: The disk did not take it.
        """
        self._spool.flush(timeout_seconds=60.0)

    def close(self, status: Status, *, wait_seconds: float = CLOSE_WAIT_SECONDS) -> None:
        """End the run, let the sender finish for at most ``wait_seconds``, and say what is left for ``sync``."""
        deadline = time.monotonic() + wait_seconds
        self.event("close", status=status)
        self._spool.close(timeout_seconds=wait_seconds / 2)
        try:
            if self._sender is not None:
                self._finish_sending(deadline)
        finally:
            self._lock.release()
        if self._uri != OFFLINE and (left := unsent(self._folder, Sent.read(self._folder))):
            print(
                f"MLflow: {left} entries are not sent yet to {without_credentials(self._uri)}. "
                f"Nothing is lost; send them with: python -m pipelines.tools.sync {self._folder}",
                file=sys.stderr,
            )

    def event(self, kind: str, *, spool: str = EVENTS, **content: Any) -> None:
        """Append one entry to a spool other than the metrics."""
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
                [sys.executable, "-m", "pipelines.tools.sync", "--follow", "--with-owner", str(self._folder)],
                stdin=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C on a terminal is for the stage, which then closes the run
            )
        except OSError as error:
            print(
                f"MLflow: the sender could not be started ({error}); python -m pipelines.tools.sync sends later.",
                file=sys.stderr,
            )
        self._sender_retry_at = time.monotonic() + 60

    def _finish_sending(self, deadline: float) -> None:
        assert self._sender is not None
        assert self._sender.stdin is not None
        try:
            with contextlib.suppress(OSError):
                self._sender.stdin.write(b"close\n")
                self._sender.stdin.flush()
            self._sender.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:  # also when a second Ctrl-C cuts the wait short
            if self._sender.poll() is None:
                self._sender.kill()
                self._sender.wait()

    def _each_second(self) -> None:
        try:
            if sample := self._sampler.due():
                self._spool.append(SYSTEM, [sample])
        except Exception as error:  # of whatever kind: it must not end the thread that writes the metrics
            print(f"System metrics end here: {error!r}", file=sys.stderr)
            self._sampler.stop()
        if self._sender is not None and self._sender.poll() is not None and time.monotonic() > self._sender_retry_at:
            self.start_sending()

    def _already(self) -> "_Known":
        if self._known is None:
            self.resume_after(-1)
        assert self._known is not None
        return self._known

    def _relative(self, path: Path) -> str:
        """Name a file so that a copied stage folder still finds it."""
        path, folder = Path(path).resolve(), self._folder.resolve()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What ``metrics.jsonl`` holds already behind the update from which training goes on."""

    last_update: int
    rows: frozenset[tuple[int, int]]  # (attempt, update)
    points: frozenset[tuple[int, int, str]]  # (attempt, step, metric)

    @classmethod
    def behind(cls, path: Path, *, update: int) -> "_Known":
        """Read backwards until the first training line that is not behind ``update``."""
        last_update, rows, points = 0, set(), set()
        for line in entries_backwards(path):
            attempt = line.get("attempt", 1)
            if "update" in line:
                last_update = last_update or line["update"]
                if line["update"] <= update:
                    break
                rows.add((attempt, line["update"]))
            elif "step" in line:
                points |= {(attempt, line["step"], key) for key in line.keys() - NOT_METRICS}
        return cls(last_update=last_update, rows=frozenset(rows), points=frozenset(points))
