"""Send what runs have recorded to MLflow, once each, whatever happened before.

    python -m pipelines.tools.sync runs/demo                 every stage of a pipeline
    python -m pipelines.tools.sync runs/demo/unet --follow   go on sending until that run ends

Reads a stage's spools (``pipelines.runtime.tracking.spool``) from where the last sender came, and writes
``tracking/sent.json`` and the MLflow run's id into ``run.json``. A run whose process has gone without closing it is
closed as KILLED. Sending something again stores nothing twice, so a sender may die at any moment. A running stage has a
sender of its own.
Exit code 0: everything is sent. 1: something is left, since the store does not answer. 2: there is nothing to send.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from data.files import FolderLock
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import OFFLINE, RUN_FILE, RunIdentity
from pipelines.runtime.tracking.mlflow_store import MlflowStore
from pipelines.runtime.tracking.sender import (
    Sender,
    StoreUnavailableError,
    is_running,
    send_once,
    send_until_ended,
)
from pipelines.runtime.tracking.spool import ORPHAN_SECONDS, SENDER_LOCK, Sent, unsent


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.tools.sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="a stage's folder, or a folder above some")
    parser.add_argument("--tracking-uri", default="", help="another store than the one that the run was started with")
    parser.add_argument("--follow", action="store_true", help="go on sending until the run ends")
    options = parser.parse_args(argv)
    folders = [folder for path in options.paths for folder in run_folders(path)]
    if not folders:
        print(f"No run lies in {', '.join(map(str, options.paths))}: no {RUN_FILE} there or below.", file=sys.stderr)
        return 2
    if options.follow and len(folders) > 1:
        print(f"--follow takes one run, and these are {len(folders)}: {', '.join(map(str, folders))}", file=sys.stderr)
        return 2
    return max(sync(folder, tracking_uri=options.tracking_uri, follow=options.follow) for folder in folders)


def run_folders(path: Path) -> list[Path]:
    """Return the stage folders at ``path`` or at most two levels below (runs/, runs/NAME, runs/NAME/STAGE)."""
    return sorted(file.parent for depth in ("", "*/", "*/*/") for file in path.glob(depth + RUN_FILE))


def sync(folder: Path, *, tracking_uri: str, follow: bool) -> int:
    """Send one run and say how it went; return the exit code."""
    uri = tracking_uri or uri_of(RunIdentity.read(folder))
    if uri == OFFLINE:
        print(f"{folder}: was run with tracking_uri = {OFFLINE!r}; name a store by --tracking-uri.", file=sys.stderr)
        return 2
    lock = FolderLock(folder / SENDER_LOCK)
    try:
        lock.acquire(patience_seconds=0 if is_running(folder) else 2 * ORPHAN_SECONDS)
    except BlockingIOError:
        print(f"{folder}: the running stage sends by itself.")
        return 0
    with lock:
        sender = Sender(folder, MlflowStore(uri))
        try:
            killed = send_until_ended(sender) if follow else send_once(sender)
        except StoreUnavailableError as error:
            left = unsent(folder, Sent.read(folder))
            print(f"{folder}: {left} records and events are left. {error}", file=sys.stderr)
            return 1
    notes = [f"{folder}: sent to {sender.store.name}"]
    notes += ["closed as KILLED"] if killed else []
    notes += [f"{sender.sent.refused} metrics or events refused"] if sender.sent.refused else []
    print("; ".join(notes))
    return 0


def uri_of(identity: RunIdentity) -> str:
    """Return the run's store; credentials, which a run does not record, come with MLFLOW_TRACKING_URI."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if without_credentials(given) == identity.tracking_uri else identity.tracking_uri


if __name__ == "__main__":
    sys.exit(main())
