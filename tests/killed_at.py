"""Run a stage that kills itself at a chosen moment of its work, as SIGKILL does: nothing is closed or cleaned up.

    python tests/killed_at.py PLACE COUNT STAGE [WORDS...]          killed at the COUNT-th passage of PLACE
    python tests/killed_at.py PLACE:COUNT,... - STAGE [WORDS...]    once at each of them, then to its end

Under a launcher the launcher dies first, so the other workers find themselves orphans.
"""

import itertools
import os
import random
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from data import files as commit
from data.loading import ImageShards
from data.shards.writer import ShardWriter
from models.autoencoder.vae import AutoencoderKL

PLACES = ("read", "encode", "write", "flush", "link", "linked", "rename", "renamed", "time")


def die() -> None:
    if "RANK" in os.environ:
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(place: str, count: int) -> None:
    """Arrange for death at the ``count``-th passage; ``linked`` and ``renamed`` are right after the system call."""
    passages = itertools.count(1)

    def deadly(holder: Any, name: str, *, after: bool = False) -> None:
        real: Callable[..., Any] = getattr(holder, name)

        def passing(*words: Any, **named: Any) -> Any:
            last = next(passages) == count
            if last and not after:
                die()
            result = real(*words, **named)
            if last:
                die()
            return result

        setattr(holder, name, passing)

    if place == "time":
        open_shards, begun = ImageShards.__init__, threading.Event()

        def some_time_later() -> None:
            begun.wait()
            time.sleep(random.uniform(0, 0.01 * count))
            die()

        def beginning(*words: Any, **named: Any) -> None:
            begun.set()
            open_shards(*words, **named)

        threading.Thread(target=some_time_later, daemon=True).start()
        ImageShards.__init__ = beginning  # type: ignore[method-assign]
        return
    holder, name = {
        "read": (ImageShards, "read"),
        "encode": (AutoencoderKL, "encode"),
        "write": (ShardWriter, "add"),
        "flush": (commit.os, "fsync"),
        "link": (commit.os, "link"),
        "linked": (commit.os, "link"),
        "rename": (commit.os, "replace"),
        "renamed": (commit.os, "replace"),
    }[place]
    deadly(holder, name, after=place.endswith("ed"))


def main() -> None:
    place, count, stage, *words = sys.argv[1:]
    module = f"pipelines.{stage}"
    if count != "-":
        die_at(place, int(count))
    else:
        __import__(module)  # once, for all that are forked
        for moment in place.split(","):
            child = os.fork()
            if child == 0:
                where, _, number = moment.partition(":")
                die_at(where, int(number))
                break
            _, status = os.waitpid(child, 0)
            assert os.WIFSIGNALED(status), f"{moment} was never passed"
            assert os.WTERMSIG(status) == signal.SIGKILL
            print(f"killed at {moment}", flush=True)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
