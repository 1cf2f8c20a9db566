"""Work items: independent pieces of a stage's work, shared among the ranks, resumable one by one, free of collectives.

An item is done when its result is committed as ``parts/NAME.json``. Its files are committed before that; a process that
is killed in between leaves the item to be made again, with files that are equal in every byte.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data.files import read_json, write_json
from pipelines.runtime.config.errors import ConfigError, Stopped
from pipelines.runtime.stage.leases import Leases, sweep_expired_leases
from pipelines.runtime.stage.stage import Stage

POLL_SECONDS = 0.05

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
) -> list[Result]:
    """Make the items that no process has made or is making, and return all results in the order of ``names``.

    Ranks, and other runs on the same folder, take the next item whenever they are free.

    Args:
        stage: The running stage.
        names: One an item; safe as file names.
        make: Makes one item and returns its result: plain JSON.
        folder: Holds the results; default ``parts`` in the stage's folder.
        sizes: Duration of each item, in any unit: long ones are begun first, which keeps all ranks busy to the end.
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

    order = sorted(names, key=lambda name: -sizes[name])
    with Leases(folder) as leases:
        if at_once == 1:
            work.go_through(order, leases)
        else:
            with ThreadPoolExecutor(at_once, thread_name_prefix="work items") as pool:
                for job in [pool.submit(work.go_through, order, leases) for _ in range(at_once)]:
                    job.result()
    return [_result(folder / f"{name}.json") for name in names]


def _result(path: Path) -> Result:
    try:
        return read_json(path, mend="It is removed, so that the same command makes it again.")
    except ValueError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(str(error)) from None


def finished_items(stage: Stage, names: Sequence[str]) -> list[str]:
    """Return those items that are done."""
    return [name for name in names if (stage.folder / "parts" / f"{name}.json").exists()]


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
        self._missing = {name for name in sizes if not self._result_path(name).exists()}
        self._sizes, self._lock, self._failed = sizes, threading.Lock(), False

    def num_done(self) -> int:
        """Return the number of items that are done, as far as this process has seen."""
        return len(self._sizes) - len(self._missing)

    def size_done(self) -> int:
        """Return the size of those items together."""
        return sum(self._sizes.values()) - sum(self._sizes[name] for name in self._missing)

    def go_through(self, order: Sequence[str], leases: Leases) -> None:
        """Make free items until every item is done, here or elsewhere."""
        try:
            while self._missing and not self._failed:
                made = False
                for name in order:
                    # What another thread raised is raised by it alone, so that nothing hides it.
                    if name in self._missing and not self._failed:
                        made |= self._try(name, leases)
                if not made and not self._failed:
                    self._stop_if_asked()
                    time.sleep(POLL_SECONDS)
        except BaseException:
            self._failed = True
            raise

    def _try(self, name: str, leases: Leases) -> bool:
        """Make an item unless it is done or leased; return whether it was made here."""
        self._stop_if_asked()
        with leases.lease(name) as mine:
            made = mine and not self._result_path(name).exists()
            if made:
                result = self._make(name)
                write_json(self._result_path(name), result)
        with self._lock:
            if self._result_path(name).exists():
                self._missing.discard(name)
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
