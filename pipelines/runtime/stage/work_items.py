"""Work items: independent pieces of a stage's work, shared among the ranks, resumable one by one, free of collectives.

An item is done when its result is committed as ``parts/NAME.json``. Its files are committed before that; a process that
is killed in between leaves the item to be made again, with files that are equal in every byte.

Each rank begins with a share of its own, then helps with those of the next ranks, so that few ask for one item at once.
One listing of the folder shows what others have made and are making; a rank without a free item lists it again after a
growing time and asks for the age of one lease then. So an idle rank costs a shared file system a few requests a second,
however many items are missing.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.files import read_json, write_json
from pipelines.runtime.config.errors import ConfigError, Stopped
from pipelines.runtime.stage.launch import poll_seconds
from pipelines.runtime.stage.leases import Leases, sweep_expired_leases
from pipelines.runtime.stage.stage import Stage

LISTING_SHARE = 0.05  # of the time of a rank that makes many short items: the most that listings take

Result = Mapping[str, Any]


def make_items(
    stage: Stage,
    names: Sequence[str],
    make: Callable[[str], Result],
    *,
    folder: Path | None = None,
    sizes: Mapping[str, int] | None = None,
    at_once: int = 1,
    after_each: Callable[[int, int, Result], None] = lambda done, size, result: None,
) -> None:
    """Make the items that no process has made or is making; all are done when it returns.

    Ranks, and other runs on the same folder, take the next item whenever they are free.

    Args:
        stage: The running stage.
        names: One an item; safe as file names.
        make: Makes one item and returns its result: plain JSON.
        folder: Holds the results; default ``parts`` in the stage's folder.
        sizes: Duration of each item, in any unit: long ones of a share are begun first, which keeps all ranks busy.
        at_once: Items that this process makes at once, in threads.
        after_each: Called after each item that this rank made, with the number of items that are done and their size.

    Raises:
        Stopped: This process was asked to stop; finished items are kept.
    """
    folder = folder or stage.folder / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = sizes or dict.fromkeys(names, 1)
    work = _Work(stage, folder, sizes, make, after_each)
    if stage.is_main and 0 < (num_done := work.num_done()) < len(names):
        stage.log.info(f"continuing: {num_done} of {len(names)} parts are done")
    if stage.is_main and folder.is_relative_to(stage.folder):
        sweep_expired_leases(folder)

    by_size = sorted(names, key=lambda name: -sizes[name])
    rank, num_ranks = stage.accelerator.process_index, stage.accelerator.num_processes
    order = [name for nth in range(num_ranks) for name in by_size[(rank + nth) % num_ranks :: num_ranks]]
    with Leases(folder) as leases:
        if at_once == 1:
            work.go_through(order, leases)
        else:
            with ThreadPoolExecutor(at_once, thread_name_prefix="work items") as pool:
                for job in [pool.submit(work.go_through, order, leases) for _ in range(at_once)]:
                    job.result()


def results_of(stage: Stage, names: Sequence[str]) -> list[Result]:
    """Return the results of items that are done, in the order of ``names``."""
    return [_result(stage.folder / "parts" / f"{name}.json") for name in names]


def _result(path: Path) -> Result:
    try:
        return read_json(path, mend="It is removed, so that the same command makes it again.")
    except FileNotFoundError:
        raise ConfigError(f"{path} was made and is gone: the first process has refused it, and says why.") from None
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(str(error)) from None


def finished_items(stage: Stage, names: Sequence[str]) -> list[str]:
    """Return those items that are done."""
    done, _ = _listed(stage.folder / "parts")
    return [name for name in names if name in done]


def _listed(folder: Path) -> tuple[set[str], set[str]]:
    """Return the names of the items that are done, and of those that are leased; none where there is no folder."""
    files: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        files = os.listdir(folder)
    done, leased = ({file[: -len(end)] for file in files if file.endswith(end)} for end in (".json", ".lease"))
    return done, leased


class _Work:
    """The items of one call, as this process sees them; its threads share it."""

    def __init__(
        self,
        stage: Stage,
        folder: Path,
        sizes: Mapping[str, int],
        make: Callable[[str], Result],
        after_each: Callable[[int, int, Result], None],
    ) -> None:
        self._stage, self._folder, self._make, self._after_each = stage, folder, make, after_each
        self._missing, self._sizes, self._lock = set(sizes), sizes, threading.Lock()
        self._ended = threading.Event()  # every item is done, or one has failed
        self._look()

    def num_done(self) -> int:
        """Return the number of items that are done, as far as this process has seen."""
        return len(self._sizes) - len(self._missing)

    def size_done(self) -> int:
        """Return the size of those items together."""
        return sum(self._sizes.values()) - sum(self._sizes[name] for name in self._missing)

    def go_through(self, order: Sequence[str], leases: Leases) -> None:
        """Make free items until every item is done, here or elsewhere."""
        turn, waiting_since = self._stage.accelerator.process_index, time.monotonic()
        try:
            while not self._ended.is_set():
                # Free items; from time to time what others have made and are making is listed anew.
                began = time.monotonic()
                leased = self._look()
                free = [name for name in order if name in self._missing and name not in leased]
                believed_until = time.monotonic() + (time.monotonic() - began) / LISTING_SHARE
                made = False
                for name in free:
                    # What another thread raised is raised by it alone, so that nothing hides it.
                    if name in self._missing and not self._ended.is_set():
                        made |= (here := self._try(name, leases))
                        if made and (not here or time.monotonic() > believed_until):
                            break

                # The owner of a leased item may have gone: that of one item is looked at, by each rank another's.
                if not made and leased:
                    turn += 1
                    made = self._try(sorted(leased)[turn % len(leased)], leases)
                if made:
                    waiting_since = time.monotonic()
                elif not self._ended.is_set():
                    self._stop_if_asked()
                    self._ended.wait(poll_seconds(time.monotonic() - waiting_since))
        except BaseException:
            self._ended.set()
            raise

    def _look(self) -> set[str]:
        """List the folder; return the missing items that are leased."""
        done, leased = _listed(self._folder)
        with self._lock:
            self._missing -= done
            if not self._missing:
                self._ended.set()
            return leased & self._missing

    def _try(self, name: str, leases: Leases) -> bool:
        """Make an item unless it is done or leased; return whether it was made here."""
        self._stop_if_asked()
        with leases.lease(name) as mine:
            made = mine and not self._result_path(name).exists()
            if made:
                result = self._make(name)
                write_json(self._result_path(name), result)
        with self._lock:
            if mine:  # then it is done
                self._missing.discard(name)
            if not self._missing:
                self._ended.set()
            if made:
                self._after_each(self.num_done(), self.size_done(), result)
        return made

    def _result_path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _stop_if_asked(self) -> None:
        if self._stage.stop.requested():
            if self._stage.accelerator.num_processes > 1:
                self._stage.stop.request_on_all_ranks()
            raise Stopped(f"{self._stage.stop.reason}; finished items are kept")
