"""A watchdog in each rank: when updates stop coming, it says where, and ends the process.

Each rank leaves ``watchdog/rank-0003.json`` (host, last update, batch, time) every few seconds, so that the living can
tell where a dead one was. When no update has begun for ``hang_seconds``, each rank that can still run Python writes
``watchdog/rank-0003.report.txt`` with its update, its sample keys, every thread's stack and what is known of the other
ranks, and exits with code 1: the launcher then ends the rest, and a restart continues. One that is stuck in native code
is ended by the C library's timer, which needs no Python.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data.files import temporary_beside

KEY_SECONDS = 10.0  # the folder of the samples may be what hangs
NATIVE_GRACE = 1.5  # of hang_seconds, after which the timer outside of Python ends the process


class Watchdog:
    """The watchdog of one rank.

    Args:
        folder: ``watch`` in the stage's folder, seen by all ranks.
        rank: Of this process.
        world_size: Number of processes.
        hang_seconds: Time without a new update after which the process ends.
        keys: Gives this rank's sample keys of a batch; asked only when something is wrong.
        on_exit: Called before this process ends itself.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        hang_seconds: float,
        keys: Callable[[int], list[str]],
        on_exit: Callable[[], None],
    ) -> None:
        self.folder, self.rank, self.world_size, self.hang_seconds = folder, rank, world_size, hang_seconds
        self._keys, self._last_words = keys, on_exit
        self._tick = min(5.0, hang_seconds / 10)
        self._update, self._batch, self._beat = 0, 0, time.monotonic()
        self._end = threading.Event()
        self._stderr = 2  # the descriptor: sys.stderr may be anything

    @contextmanager
    def watching(self) -> Iterator["Watchdog"]:
        """Watchdog for the duration of the block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._end.clear()
        self._report_path(self.rank).unlink(missing_ok=True)
        self._beat = time.monotonic()
        thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._write_heartbeat()  # the first look at the pace may come before the first tick, and names hosts
        self._arm()
        thread.start()
        try:
            yield self
        finally:
            self._end.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self, *, update: int, batch: int) -> None:
        """Say that an update begins."""
        self._update, self._batch, self._beat = update, batch, time.monotonic()

    def report(self, reason: str) -> Path:
        """Write this rank's report and return its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._report_path(self.rank)
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                f"{reason}\nrank {self.rank} on {socket.gethostname()}, process {os.getpid()}: in update "
                f"{self._update} (batch {self._batch}) for {time.monotonic() - self._beat:.1f} s\n\nother ranks:\n"
            )
            file.writelines(f"  {line}\n" for line in self._others())
            file.write("\nstacks:\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write(f"\nsample keys of the update: {' '.join(self._keys_in_time())}\n")
        return path

    def host_of(self, rank: int) -> str:
        """Return the host that a rank said it runs on; "?" when it said nothing."""
        return str(self._heartbeat(rank).get("host", "?"))

    def _run(self) -> None:
        while not self._end.wait(self._tick):
            self._arm()
            self._write_heartbeat()
            if time.monotonic() - self._beat > self.hang_seconds:
                self._give_up()

    def _arm(self) -> None:
        """Wind up the timer that needs no Python: it fires when this thread does not come by any more."""
        seconds = NATIVE_GRACE * self.hang_seconds + 2 * self._tick
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._stderr)

    def _give_up(self) -> None:
        try:
            found = str(self.report(f"No update has begun for {self.hang_seconds:g} s: a rank hangs or is gone."))
        except OSError as error:
            found = f"lost ({error})"
        print(
            f"rank {self.rank}: no update has begun for {self.hang_seconds:g} s (update {self._update}, batch "
            f"{self._batch}); stack and sample keys: {found}. This process ends; the same command continues.",
            file=sys.stderr,
            flush=True,
        )
        with suppress(OSError):
            self._last_words()
        # Its peers on slower clocks need a moment for their own reports before the launcher ends them.
        time.sleep(2 * self._tick)
        os._exit(1)

    def _write_heartbeat(self) -> None:
        beat = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "update": self._update,
            "batch": self._batch,
            "began": time.time() - (time.monotonic() - self._beat),
            "written": time.time(),
        }
        path = self._heartbeat_path(self.rank)
        temporary = temporary_beside(path)
        with suppress(OSError):  # a full disk is told of where it matters
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.rename(path)  # no fsync: it only serves those who live now

    def _others(self) -> Iterator[str]:
        for rank in range(self.world_size):
            if rank == self.rank:
                continue
            beat = self._heartbeat(rank)
            if not beat:
                yield f"rank {rank}: has left no sign"
                continue
            age, silent = time.time() - beat["began"], time.time() - beat["written"]
            yield (
                f"rank {rank} on {beat['host']}, process {beat['process']}: in update {beat['update']} (batch "
                f"{beat['batch']}) since {age:.1f} s, last sign of life {silent:.1f} s ago"
            )

    def _heartbeat(self, rank: int) -> dict[str, Any]:
        try:
            found = json.loads(self._heartbeat_path(rank).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _keys_in_time(self) -> list[str]:
        found: list[str] = []

        def ask() -> None:
            try:
                found.extend(self._keys(self._batch))
            except Exception as error:
                found.append(f"(not found: {error})")

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(min(KEY_SECONDS, self.hang_seconds))
        return found or ["(their folder does not answer)"]

    def _heartbeat_path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04}.json"

    def _report_path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:04}.report.txt"
