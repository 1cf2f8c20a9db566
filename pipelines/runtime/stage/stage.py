"""Frame of every stage: checks, lock, accelerator, tracker, manifest and outcome.

``running_stage`` is the frame of each stage: it refuses what cannot work before any work, takes the folder's lock,
starts the accelerator and the tracker, and leaves an outcome for scripts however the stage ends.
"""

import json
import logging
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator

import pipelines
from data.files import FolderLock, make_folder, read_json, sweep_temporaries, write_atomically
from data.manifest import FORMAT_VERSION, MANIFEST_NAME, FileEntry, Manifest, Parents, write_manifest
from pipelines.runtime.config.errors import ConfigError, Stopped, config_error_at, sentence
from pipelines.runtime.config.experiment import config_as_toml
from pipelines.runtime.config.logs import say_mistake, set_up_logging
from pipelines.runtime.config.outcome import OUTCOME_NAME, Outcome, resume_command
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, StageConfig
from pipelines.runtime.stage.fingerprint import (
    REQUEST_NAME,
    already_done,
    ancestors,
    begin,
    fingerprint_of,
    ignored_values,
    keys_at_default,
    read_parents,
)
from pipelines.runtime.stage.launch import Precision, StopSignal, any_rank, from_main, poll_seconds, start_accelerator
from pipelines.runtime.stage.leases import sweep_expired_leases
from pipelines.runtime.stage.provenance import code_version, hardware
from pipelines.runtime.stage.watchdog import Watchdog
from pipelines.runtime.tracking.identity import store_uri
from pipelines.runtime.tracking.pages import SHORT_DIGEST
from pipelines.runtime.tracking.tracker import NodeTracker, SilentTracker, Tracker, open_tracker

log = logging.getLogger("latentline.stage")

RUN_STATUSES: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "done": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
}
POLL_SECONDS = 0.2
JOIN_PATIENCE_SECONDS = 2.0
SHARED_PATIENCE_SECONDS = 30.0  # a network file system may show a new file late
LOCK_PATIENCE_SECONDS = 10.0  # a killed launcher's last worker takes a moment to die


@dataclass(kw_only=True)
class Stage:
    """One running stage: its folder, its parents, its tracker, and the request to stop."""

    name: str
    folder: Path
    config: StageConfig
    parents: Parents
    accelerator: Accelerator
    tracker: Tracker | SilentTracker
    stop: StopSignal
    lock: FolderLock
    watchdog: Watchdog | None = None  # where it reports from when it fails; training stages have one
    began: float = field(default_factory=time.time)
    is_main: bool = field(init=False)  # this process writes and logs for all

    def __post_init__(self) -> None:
        self.is_main = bool(self.accelerator.is_main_process)

    @property
    def log(self) -> logging.Logger:
        """Logger of this stage; ranks other than 0 show its warnings only."""
        return logging.getLogger(f"latentline.{self.name}")

    def finish(self, kind: type[Manifest], *, files: list[FileEntry], **content: Any) -> None:
        """Commit a manifest of ``kind`` with ``content`` on the main process; every rank waits for it.

        Of several runs on one folder, the one that holds its lock does this; the others wait for it, or take over.
        """
        if self._lock_unless_finished():
            made = fingerprint_of(self.name, self.config, self.parents)
            manifest = kind(
                format_version=FORMAT_VERSION, **made, **content, files=tuple(files), provenance=self._provenance()
            )
            write_manifest(self.folder, manifest)
            self.tracker.set_tags({f"digest.{STAGE_FOLDERS[self.name]}": manifest.digest[:SHORT_DIGEST]})
            self.tracker.log_artifact(self.folder / MANIFEST_NAME)
        self.accelerator.wait_for_everyone()

    def _lock_unless_finished(self) -> bool:
        """Wait for the manifest, or for the lock to write it; return whether this process holds the lock."""
        # Not in a collective, whose time is limited: the main process may have hours of measuring and storing to do.
        began = time.monotonic()
        while not (self.folder / MANIFEST_NAME).is_file():
            if self.is_main:
                with suppress(BlockingIOError):
                    self.lock.acquire()
                    return True
            if self.stop.requested():
                other = f"another run finishes {self.folder}" if self.is_main else "the main process was still at work"
                raise Stopped(f"{self.stop.reason}; {other}")
            time.sleep(poll_seconds(time.monotonic() - began))
        return self.lock.held

    def _provenance(self) -> dict[str, Any]:
        return {
            "local_run_id": self.tracker.run_id,
            "host": socket.gethostname(),
            "began": self.began,
            "ended": time.time(),
            "code_version": code_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "hardware": hardware(),
            "world_size": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "run": json.loads(without_credentials(self.config.run.model_dump_json())),
            "inputs": self.config.model_dump(mode="json").get("inputs", {}),
        }


@contextmanager
def running_stage(
    config: StageConfig,
    *,
    name: Literal["prepare_corpus", "train_vae", "encode_latents", "train_unet", "evaluate"],
    precision: Precision = "float32",
    tf32: bool = False,
    check: Callable[[Parents], None] = lambda parents: None,
    when_done: Callable[[Path], None] = lambda folder: None,
    folder_name: str | None = None,
    joinable: bool = False,
) -> Iterator[Stage]:
    """Run one stage in its frame; the block is its work.

    Args:
        config: The resolved configuration.
        name: Name of the stage and of its table.
        precision: What the networks compute in.
        tf32: Float32 products and convolutions are computed in TF32 on GPUs.
        check: Raises ConfigError when the request cannot work; called with the parents' manifests before any work.
        when_done: Called with the folder when the stage has finished already, on the main process.
        joinable: Several runs may work on the folder at once: its work falls into parts. Each has its own MLflow run;
            those that come later keep theirs in ``runs/HOST-PID`` below the folder.
        folder_name: Folder below ``run.root`` when it is not the stage's usual one.

    Raises:
        SystemExit: When the stage does not end by finishing: 0 already done, 2 a user's mistake, 75 stopped, 1 failed.
    """
    set_up_logging(name)
    is_main = os.environ.get("RANK", "0") == "0"
    folder = Path(config.run.root) / (folder_name or STAGE_FOLDERS[name])
    lock, own, outcome = FolderLock(folder), folder, Outcome()
    tracker: Tracker | SilentTracker = SilentTracker()
    stage: Stage | None = None
    try:
        pipelines.catch_interrupts()
        with config_error_at("run.root"):
            if not os.path.isfile(folder / MANIFEST_NAME):  # what is finished may be read-only
                make_folder(folder)
        manifests = read_parents(config)
        request = fingerprint_of(name, config, manifests)

        def is_done() -> bool:
            return already_done(
                folder,
                request,
                allowed=config.run.allow_changed,
                fingerprint_ignores=config.fingerprint_ignores,
                at_default=keys_at_default(config),
                revisions=config.revisions,
            )

        if not (done := is_done()):
            check(manifests)  # what a finished stage was made from may be gone
            if is_main:
                with config_error_at("run.tracking_uri"):
                    store_uri(config.run.tracking_uri, root=Path(config.run.root))
            accelerator = start_accelerator(config.run, precision=precision, tf32=tf32)
            own = take_folder(folder, lock, accelerator, joinable=joinable)
            done = done_by_now(is_done, folder, lock, accelerator)
        if done:
            outcome.set("done")
            log.info(f"already finished in {folder}; nothing to do.")
            if is_main:
                when_done(folder)
            raise SystemExit(0)
        if accelerator.is_main_process:
            ignored = ignored_values(config)
            if lock.held and (
                changes := begin(folder, request, fingerprint_ignores=ignored, revisions=config.revisions)
            ):
                log.info("changed since the last start:\n  " + "\n  ".join(changes))
            shown = without_credentials(config_as_toml(config, table=name))
            write_atomically(own / "config.toml", shown.encode())
            tracker = start_tracker(config, name=name, folder=own, parents=manifests, accelerator=accelerator)
        elif accelerator.is_local_main_process:
            tracker = NodeTracker(own, node=f"node{os.environ.get('GROUP_RANK', socket.gethostname())}")
        stop = StopSignal(folder, accelerator, own=own)
        stage = Stage(
            name=name,
            folder=folder,
            config=config,
            parents=manifests,
            accelerator=accelerator,
            tracker=tracker,
            stop=stop,
            lock=lock,
        )
        threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
        computes = f"{precision} with TF32" if tf32 and torch.cuda.is_available() else precision
        log.info(f"{accelerator.num_processes} process(es) x {threads} on {accelerator.device}, {computes}, {folder}")
        with stop.handling_signals():
            outcome.working = True
            yield stage
        outcome.set("done")
    except Stopped as reason:
        outcome.set("stopped", reason=reason)
        log.info(f"stopped ({reason}). Continue with: {resume_command()}")
    except (ConfigError, BlockingIOError) as error:
        outcome.set("failed", code=2, reason=error)
        # Before the work all ranks of a machine find the same; in the work one may be alone with it.
        if outcome.working:
            log.error(error)
        else:
            say_mistake(name, error)
    except KeyboardInterrupt:
        outcome.set("stopped", reason="Ctrl-C")
        log.info(f"stopped. Continue with: {resume_command()}")
    except Exception as error:
        if isinstance(error, OSError):  # of a disk that is full, read-only or gone
            outcome.set("failed", code=1 if outcome.working else 2, reason=sentence(error))
            log.error(f"{sentence(error)}. Nothing committed is lost; once that is mended: {resume_command()}")
        else:
            outcome.set("failed", reason=f"{type(error).__name__}: {error}")
            log.exception(f"{type(error).__name__}:")
        if stage is not None and stage.watchdog is not None:
            with suppress(OSError):
                stage.watchdog.report(f"{type(error).__name__}: {error}")
    finally:
        if not outcome.working:
            lock.release()  # the outcome of a run that ended before its work is written where the lock can be taken
        outcome.write(own, is_main=is_main)
        tracker.set_tags({"outcome": outcome.reason or outcome.state})
        tracker.close(RUN_STATUSES[outcome.state])
        if stage is not None and outcome.state != "failed":
            end_process_group(stage)
        if is_main and stage is not None:  # answered; one made before the start is still to be answered
            stage.stop.passed_on.unlink(missing_ok=True)
            if not (folder / "runs").is_dir():  # of runs that join each other each is to find it
                (folder / "stop").unlink(missing_ok=True)
        lock.release()
    if outcome.code:
        raise SystemExit(outcome.code)


def take_folder(folder: Path, lock: FolderLock, accelerator: Accelerator, *, joinable: bool) -> Path:
    """Take the folder's lock or join its owner; make sure that all ranks see one folder. A collective.

    Returns:
        Where this run keeps its own records: ``folder`` for its owner.

    Raises:
        BlockingIOError: Another run owns the folder, and it cannot be joined.
        ConfigError: A rank does not see the folder that the main process writes to.
    """
    token = 1 + secrets.randbelow(1 << 62) if accelerator.is_main_process else 0
    busy: BlockingIOError | None = None
    if accelerator.is_main_process:
        try:
            lock.acquire(patience_seconds=JOIN_PATIENCE_SECONDS if joinable else LOCK_PATIENCE_SECONDS)
        except BlockingIOError as error:
            busy, token = error, -token if joinable else 0
        else:
            sweep(folder, joinable=joinable)
    token = from_main(token, accelerator)
    if token == 0:
        raise busy or BlockingIOError(f"{folder} is in use by another run")
    own = folder if token > 0 else folder / "runs" / f"{-token:016x}"
    if accelerator.is_main_process:
        own.mkdir(parents=True, exist_ok=True)
        (own / OUTCOME_NAME).unlink(missing_ok=True)
        if busy is not None:
            log.info(f"{str(busy).partition('.')[0]}; joining it, with {own} for this run's records")
    if accelerator.num_processes > 1:
        _check_all_ranks_see(own / f".{abs(token):016x}.tmp", accelerator)
    return own


def done_by_now(is_done: Callable[[], bool], folder: Path, lock: FolderLock, accelerator: Accelerator) -> bool:
    """Check the request again, since another run may have begun or finished before the lock was taken. A collective.

    Raises:
        ConfigError: On every rank: the folder holds another request's work.
    """
    done, mistake = 0, None
    if accelerator.is_main_process:
        # An owner that is joined may have its request still to write.
        deadline = time.monotonic() + SHARED_PATIENCE_SECONDS
        while not lock.held and not (folder / REQUEST_NAME).exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        try:
            done = int(is_done())
        except ConfigError as error:
            done, mistake = -1, error
    done = from_main(done, accelerator)
    if done < 0:
        raise mistake or ConfigError(f"{folder} holds the work of another request, which has just begun.")
    return bool(done)


def _check_all_ranks_see(mark: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        mark.touch()
    deadline = time.monotonic() + SHARED_PATIENCE_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    everybody = not any_rank(not seen, accelerator)
    if accelerator.is_main_process:
        mark.unlink(missing_ok=True)
    if not everybody:
        who = "" if seen else f" {socket.gethostname()} does not see what the main process writes there."
        raise ConfigError(
            f"{mark.parent.resolve()} is not one folder for all processes.{who} All machines need run.root on a shared "
            "file system, under the same path."
        )


def end_process_group(stage: Stage) -> None:
    """Wait for the other ranks: the launcher ends all when one has gone, and a slow one must still find ``stop``."""
    if dist.is_initialized():
        # Not all come where one of them fails after all; its launcher then ends the rest.
        with suppress(RuntimeError):
            dist.barrier(group=stage.stop.group)
            dist.destroy_process_group()


def sweep(folder: Path, *, joinable: bool) -> None:
    """Remove what killed runs left in a folder, and damaged results of its parts, which are then made again.

    Nothing is removed where several runs share the folder and one of them is still at work.
    """
    parts = folder / "parts"
    if joinable and parts.is_dir() and not sweep_expired_leases(parts):
        return
    if joinable:
        remove_answered_stop(folder)
    for place in (folder, folder / "index"):
        sweep_temporaries(place)
    for path in sorted(parts.glob("*.json")):
        if not _is_whole(path, folder):
            log.warning(f"{folder / path.stem} or its result, {path}, was cut or changed: it is made again")
            path.unlink()


def remove_answered_stop(folder: Path) -> None:
    """Remove a request to stop that is older than the end of a run: runs that join each other leave it to the next."""
    ends = [folder / OUTCOME_NAME, *folder.glob(f"runs/*/{OUTCOME_NAME}")]
    with suppress(FileNotFoundError):
        made = (folder / "stop").stat().st_mtime_ns
        if any(end.stat().st_mtime_ns >= made for end in ends if end.exists()):
            (folder / "stop").unlink()


def _is_whole(path: Path, folder: Path) -> bool:
    """Return whether a part's result can be read, and the file that it describes has the size that it says."""
    try:
        entry = read_json(path, mend="").get("entry")
        return entry is None or bool(entry.get("url")) or (folder / entry["name"]).stat().st_size == entry["bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def start_tracker(
    config: StageConfig, *, name: str, folder: Path, parents: Parents, accelerator: Accelerator
) -> Tracker:
    """Open the tracker of the main process, with the stage's parameters, tags and inputs."""
    tags = {
        "stage": name,
        "code_version": code_version(),
        "world_size": str(accelerator.num_processes),
        "host": socket.gethostname(),
        "hardware": hardware(),
        **{f"digest.{key}": digest[:SHORT_DIGEST] for key, digest in ancestors(parents).items()},
    }
    with config_error_at("tracking"):
        tracker = open_tracker(
            folder=folder,
            root=Path(config.run.root),
            stage=name,
            experiment=config.run.experiment,
            tracking_uri=config.run.tracking_uri,
            curve_density=config.run.curve_density,
            params=config.model_dump(mode="json"),
            at_default=keys_at_default(config),
            tags=tags,
            config_file=folder / "config.toml",
        )
    for key, parent in parents.items():
        tracker.log_input(key, digest=parent.digest, source=str(getattr(config.inputs, key)), context=name)  # type: ignore[attr-defined]
    return tracker
