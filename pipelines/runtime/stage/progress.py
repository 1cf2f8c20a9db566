"""Progress for people: a bar with rate and ETA on a terminal, a log line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger("latentline.stage")

PLAIN_LINE_EVERY_SECONDS = 10.0


class ProgressLine:
    """Progress of one pass over ``total`` units of work. Silent on all ranks but the main one."""

    def __init__(self, label: str, *, total: int, unit: str, start: int, is_main: bool) -> None:
        self.label, self.total, self.unit, self.done, self.is_main = label, total, unit, start, is_main
        self._start, self._began, self._last_line = start, time.monotonic(), time.monotonic()
        self.bar: Progress | None = None
        if is_main and sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.description:>16}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn(f"{unit} {{task.fields[metrics]}}"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(file=sys.stdout),
            )
            self._task = self.bar.add_task(label, total=total, completed=start, metrics="")

    def advance_to(self, done: int, metrics: Mapping[str, float] | None = None) -> None:
        """Show that ``done`` units are finished; ``metrics`` are shown beside, in the order given."""
        has_ended, self.done = done == self.total > self.done, done
        shown = "  ".join(f"{name} {value:.4g}" for name, value in (metrics or {}).items())
        now = time.monotonic()
        rate = (done - self._start) / max(now - self._began, 1e-9)
        if self.bar is not None:
            self.bar.update(self._task, completed=done, metrics=f"{rate:.3g}/s  {shown}".rstrip())
            return
        if self.is_main and (now - self._last_line >= PLAIN_LINE_EVERY_SECONDS or has_ended):
            self._last_line = now
            eta = (self.total - done) / rate if rate > 0 else float("inf")
            log.info(f"{done}/{self.total} {self.unit}  {rate:.3g}/s  ETA {duration(eta)}  {shown}".rstrip())


def duration(seconds: float) -> str:
    """Return 75 as "1:15" and 3,675 as "1:01:15"; "?" when it is not known."""
    if seconds == float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_line(label: str, *, total: int, unit: str, start: int = 0, is_main: bool = True) -> Iterator[ProgressLine]:
    """Show a progress line for the time of the block; then the bar stays as it is, and the terminal is given back."""
    line = ProgressLine(label, total=total, unit=unit, start=start, is_main=is_main)
    with line.bar or nullcontext():
        yield line
