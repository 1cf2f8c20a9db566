"""Process that sends the spools of one running stage, started by its tracker.

    python -m pipelines.runtime.tracking.sender_process runs/demo/unet     with the store in MLFLOW_TRACKING_URI

A process and not a thread, since the client's work (importing, building requests, SQL) would hold the interpreter's
lock that the training step needs. It ends with the stage, however that ends, and outlives it by seconds at most.
"""

import logging
import math
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from data.files import FolderLock
from pipelines.runtime.config.logs import set_up_logging
from pipelines.runtime.tracking.identity import RunIdentity
from pipelines.runtime.tracking.mlflow_store import MlflowStore
from pipelines.runtime.tracking.sender import (
    BACKOFF_SECONDS,
    POLL_SECONDS,
    Sender,
    StoreUnavailableError,
    send_once,
)
from pipelines.runtime.tracking.spool import ORPHAN_SECONDS, SENDER_LOCK

log = logging.getLogger("latentline.tracking")

FAILURES_TO_REPORT = 2  # in a row; a single one is no news
FAILURES_AT_THE_END = 3  # in a row, after which a store that never answered is given up
FILES_WAIT_SECONDS = 3.0  # a file waits this long, so that a run's end does not stand behind its last, large file
LOG_BYTES = 1 << 20


def send_while_owned(folder: Path) -> int:
    """Be the sender of a stage, which holds the other end of the standard input; return the exit code.

    The stage writes ``close`` when it has logged its last event, and kills a sender that then takes too long. When
    the pipe ends, the stage was killed: what a few seconds allow is sent, and the run is closed as KILLED, or as FAILED
    where another rank's failure came first.
    """
    set_up_logging(RunIdentity.read(folder).stage, stream=_become_a_background_process(folder))
    owner = _Owner()
    lock = FolderLock(folder / SENDER_LOCK)
    while not lock.held:
        try:
            lock.acquire(patience_seconds=POLL_SECONDS)
        except BlockingIOError:  # the sender of the stage before its restart, or a user's sync
            if owner.closing.is_set():
                return 1
    sender = Sender(folder, MlflowStore(os.environ["MLFLOW_TRACKING_URI"]))
    failures, has_answered = 0, False
    while True:
        gone, closing = owner.gone.is_set(), owner.closing.is_set()
        try:
            if gone:
                send_once(sender)
            else:
                sender.send(files_until=math.inf if closing else time.time() - FILES_WAIT_SECONDS)
            if failures >= FAILURES_TO_REPORT:
                log.info(f"MLflow at {sender.store.name} answers again.")
            if not has_answered:
                log.info(f"MLflow: {sender.store.link}")
            failures, has_answered = 0, True
            if closing:
                return 0
        except StoreUnavailableError as error:
            failures += 1
            if failures == FAILURES_TO_REPORT:
                log.warning(f"{error}. The run goes on; everything is kept, and sent when MLflow is back.")
            # A short stage ends before its first attempt, which a busy database may refuse.
            if gone or (closing and not has_answered and failures >= FAILURES_AT_THE_END):
                return 1
        if closing:
            time.sleep(0.5)
        else:
            owner.closing.wait(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)] if failures else POLL_SECONDS)


class _Owner:
    """State of the stage at the other end of the standard input; ``gone`` implies ``closing``."""

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


if __name__ == "__main__":
    sys.exit(send_while_owned(Path(sys.argv[1])))
