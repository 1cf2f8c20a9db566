"""Watchdog of each rank: when updates stop coming, it reports where the rank is, and ends the process.

Each rank writes a heartbeat ``watchdog/rank-0003.json`` (host, last update, batch, time) every few seconds, from which
the others learn where it was. When no update has begun for ``hang_seconds``, each rank that can still run Python writes
``watchdog/rank-0003.report.txt`` with its update, its sample keys, every thread's stack and the other ranks'
heartbeats, and exits with code 1: the launcher then ends the rest, and a restart continues. One that is stuck in native
code is ended by the C library's timer, which needs no Python.
"""

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from data.files import temporary_beside
from pipelines.runtime.config.outcome import Outcome

log = logging.getLogger("latentline.stage")

KEY_SECONDS = 10.0  # the folder of the samples may be what hangs
NATIVE_GRACE = 1.5  # of hang_seconds, after which the timer outside of Python ends the process


class Watchdog:
    """Watchdog of one rank.

    Args:
        stage_folder: Seen by all ranks.
        accelerator: Of this process.
        hang_seconds: Time without a new update after which the process ends.
        keys: Gives this rank's sample keys of a batch; called only for a report.
    """

    def __init__(
        self,
        stage_folder: Path,
        accelerator: Accelerator,
        *,
        hang_seconds: float,
        keys: Callable[[int], list[str]],
    ) -> None:
        self.folder, self.hang_seconds = stage_folder / "watchdog", hang_seconds
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self._keys = keys
        self._tick = min(5.0, hang_seconds / 10)
        #: Update, batch and time (monotonic) of its beginning; set by the loop.
        self.current = (0, 0, time.monotonic())
        self._end = threading.Event()
        self._stderr = 2  # the descriptor: sys.stderr may be anything

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the duration of the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end.clear()
        self._path(self.rank, "report.txt").unlink(missing_ok=True)
        self.current = (*self.current[:2], time.monotonic())
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._write_heartbeat()  # the first report of a straggler may come before the first tick, and names hosts
        self._start_native_timer()
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def report(self, reason: str) -> Path:
        """Write this rank's report and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.rank, "report.txt")
        update, batch, began = self.current
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                f"{reason}\nrank {self.rank} on {socket.gethostname()}, process {os.getpid()}: in update "
                f"{update} (batch {batch}) for {time.monotonic() - began:.1f} s\n\nother ranks:\n"
            )
            file.writelines(f"  {line}\n" for line in self._other_ranks())
            file.write("\nstacks:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write(f"\nsample keys of the update: {' '.join(self._keys_in_time())}\n")
        return path

    def host_of(self, rank: int) -> str:
        """Return the host in a rank's heartbeat; "?" when there is none."""
        return str(self._heartbeat(rank).get("host", "?"))

    def _run(self) -> None:
        while not self._end.wait(self._tick):
            self._start_native_timer()
            self._write_heartbeat()
            if time.monotonic() - self.current[2] > self.hang_seconds:
                self._report_and_exit()

    def _start_native_timer(self) -> None:
        """Start the timer that needs no Python anew: it fires when this thread does not come by any more."""
        seconds = NATIVE_GRACE * self.hang_seconds + 2 * self._tick
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stderr)

    def _report_and_exit(self) -> None:
        try:
            report = str(self.report(f"No update has begun for {self.hang_seconds:g} s: a rank hangs or is gone."))
        except OSError as error:
            report = f"lost ({error})"
        log.error(
            f"rank {self.rank}: no update has begun for {self.hang_seconds:g} s (update {self.current[0]}, batch "
            f"{self.current[1]}); stack and sample keys: {report}. This process ends; the same command continues, "
            "with a larger hang_seconds where it was validation that took so long."
        )
        with suppress(OSError):
            outcome = Outcome(reason=f"rank {self.rank}: no update has begun for {self.hang_seconds:g} s", working=True)
            outcome.write(self.folder.parent, is_main=False)
        # Ranks on slower clocks need a moment for their own reports before the launcher ends them.
        time.sleep(2 * self._tick)
        os._exit(1)

    def _write_heartbeat(self) -> None:
        update, batch, began = self.current
        heartbeat = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "update": update,
            "batch": batch,
            "began": time.time() - (time.monotonic() - began),
            "written": time.time(),
        }
        path = self._path(self.rank, "json")
        temporary = temporary_beside(path)
        with suppress(OSError):  # a full disk is reported where it matters
            temporary.write_text(json.dumps(heartbeat), encoding="utf-8")
            temporary.rename(path)  # no fsync: it only serves ranks that run now

    def _heartbeat(self, rank: int) -> dict[str, Any]:
        try:
            found = json.loads(self._path(rank, "json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _other_ranks(self) -> Iterator[str]:
        for rank in (rank for rank in range(self.world_size) if rank != self.rank):
            if not (beat := self._heartbeat(rank)):
                yield f"rank {rank}: has left no heartbeat"
                continue
            age, silent = time.time() - beat["began"], time.time() - beat["written"]
            yield (
                f"rank {rank} on {beat['host']}, process {beat['process']}: in update {beat['update']} (batch "
                f"{beat['batch']}) since {age:.1f} s, last heartbeat {silent:.1f} s ago"
            )

    def _keys_in_time(self) -> list[str]:
        found: list[str] = []

        def read() -> None:
            try:
                found.extend(self._keys(self.current[1]))
            except Exception as error:
                found.append(f"(not found: {error})")

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(min(KEY_SECONDS, self.hang_seconds))
        return found or ["(their folder does not answer)"]

    def _path(self, rank: int, suffix: str) -> Path:
        return self.folder / f"rank-{rank:04}.{suffix}"
