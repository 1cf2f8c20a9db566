"""Measuring what our code costs and not what the machine does meanwhile: it is busy, shared and sometimes stolen.

What our code causes, it causes in every round. A core that another process or another machine takes away does not go
missing round after round. So a limit holds when one round of several keeps it.
"""

import resource
import subprocess
import time
from collections.abc import Callable, Sequence

FOREVER_SECONDS = 120  # for what must end at all: many times what it takes on a busy machine


def seconds_of(call: Callable[[], object]) -> float:
    """Time a call; 0 when the processor was taken from it and it waited for nothing, which is nobody's fault.

    Whoever waits for a disk or a lock, the interpreter's included, gives the processor up himself, and that counts.
    """
    before, began = resource.getrusage(resource.RUSAGE_THREAD), time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_THREAD)
    return 0.0 if after.ru_nivcsw > before.ru_nivcsw and after.ru_nvcsw == before.ru_nvcsw else seconds


def quietest_round(measure: Callable[[], Sequence[float]], *, limit: float, rounds: int = 20) -> Sequence[float]:
    """Repeat a measurement until all its metrics keep the limit, at most ``rounds`` times; return the best round."""
    best = measure()
    for _ in range(rounds - 1):
        if max(best) < limit:
            break
        best = min(best, measure(), key=max)
    return best


def processor_seconds_of(words: Sequence[str], **more: object) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command to its end; return the processor time of it and its children, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(words, capture_output=True, text=True, **more)  # type: ignore[call-overload]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done
