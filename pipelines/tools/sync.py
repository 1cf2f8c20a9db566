"""Send what runs have recorded to MLflow, once each, whatever happened before.

    python -m pipelines.tools.sync runs/demo                 every stage of a pipeline
    python -m pipelines.tools.sync runs/demo/unet --follow   go on sending until that run ends

Reads a stage's spools (``pipelines.runtime.tracking.spool``) from where the last sender came, and writes
``tracking/sent.json`` and the MLflow run's id into ``run.json``.
A run whose process has gone without closing it is closed as KILLED, or as FAILED where a rank has left its failure in
``outcome.json``. Sending something again stores nothing twice, so a sender may die at any moment. A running stage has a
sender of its own.
Exit code 0: everything is sent. 1: something is left, since the store does not answer. 2: there is nothing to send.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data.files import FolderLock
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.stage_config import CommandConfig
from pipelines.runtime.tracking.identity import OFFLINE, RUN_FILE, RunIdentity
from pipelines.runtime.tracking.mlflow_store import MlflowStore
from pipelines.runtime.tracking.sender import Sender, StoreUnavailableError, is_running, send_once, send_until_ended
from pipelines.runtime.tracking.spool import ORPHAN_SECONDS, SENDER_LOCK, Sent, unsent

log = logging.getLogger("latentline.sync")

EXIT_CODES = {"sent": 0, "running": 0, "left": 1, "offline": 2}


class SyncConfig(CommandConfig):
    """Runs to send."""

    positional = "runs"

    runs: Annotated[tuple[str, ...], Field(min_length=1)]  # stages' folders, or folders above some
    tracking_uri: str = ""  # another store than the one that a run was started with
    follow: bool = False  # go on sending until the run ends


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(SyncConfig, sync_all, table="sync", about=__doc__, argv=argv)


def sync_all(config: SyncConfig) -> Answer:
    """Send every run, one after the other."""
    folders = [folder for path in config.runs for folder in run_folders(Path(path))]
    if not folders:
        raise ConfigError(f"No run lies in {', '.join(config.runs)}: no {RUN_FILE} there or below.")
    if config.follow and len(folders) > 1:
        raise ConfigError(f"--follow takes one run, and these are {len(folders)}: {', '.join(map(str, folders))}")
    sent = [sync(folder, tracking_uri=config.tracking_uri, follow=config.follow) for folder in folders]
    return Answer({"runs": sent}, code=max(EXIT_CODES[each["state"]] for each in sent))


def run_folders(path: Path) -> list[Path]:
    """Return the stage folders at ``path`` or at most two levels below (runs/, runs/NAME, runs/NAME/STAGE)."""
    found = sorted(file.parent for depth in ("", "*/", "*/*/") for file in path.glob(depth + RUN_FILE))
    return sorted(found, key=lambda folder: folder.name.startswith("evaluation"))  # which give models their metrics


def sync(folder: Path, *, tracking_uri: str, follow: bool) -> dict[str, Any]:
    """Send one run, say how it went, and return it: its state is a key of EXIT_CODES."""
    with config_error_at("sync.runs"):
        uri, found = tracking_uri or uri_of(RunIdentity.read(folder)), {"folder": str(folder)}
    if uri == OFFLINE:
        log.error(f"{folder}: was run with tracking_uri = {OFFLINE!r}; name a store by --tracking-uri.")
        return {**found, "state": "offline"}
    lock = FolderLock(folder / SENDER_LOCK)
    try:
        lock.acquire(patience_seconds=0 if is_running(folder) else 2 * ORPHAN_SECONDS)
    except BlockingIOError:
        log.info(f"{folder}: the running stage sends by itself.")
        return {**found, "state": "running"}
    with lock:
        sender = Sender(folder, MlflowStore(uri))
        try:
            closed = send_until_ended(sender) if follow else send_once(sender)
        except StoreUnavailableError as error:
            left = unsent(folder, Sent.read(folder))
            log.error(f"{folder}: {left} records and events are left. {error}")
            return {**found, "state": "left", "left": left}
    notes = [f"{folder}: sent to {sender.store.link}"]
    notes += [f"closed as {closed}"] if closed else []
    notes += [f"{sender.sent.refused} metrics or events refused"] if sender.sent.refused else []
    log.info("; ".join(notes))
    return {**found, "state": "sent", "store": sender.store.name, "closed": closed, "refused": sender.sent.refused}


def uri_of(identity: RunIdentity) -> str:
    """Return the run's store; credentials, which a run does not record, come with MLFLOW_TRACKING_URI."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if without_credentials(given) == identity.tracking_uri else identity.tracking_uri


if __name__ == "__main__":
    sys.exit(main())
