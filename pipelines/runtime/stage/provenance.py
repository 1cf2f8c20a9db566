"""Provenance of a result: the version of the code, and the hardware it ran on."""

import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from data.manifest import digest_of

REPOSITORY = Path(__file__).resolve().parents[3]


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return the git commit, with ``+changes`` when files differ from it; else the package's version.

    Git is believed about its own tree only: installed inside of a user's repository, it would name the user's commit.
    """
    with suppress(OSError, subprocess.SubprocessError):
        top, commit = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() == REPOSITORY:
            return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    try:
        return f"latentline {version('latentline')}"
    except PackageNotFoundError:
        return "unknown"


def made_by(request: Mapping[str, Any], *, world_size: int) -> dict[str, Any]:
    """Return what the bits of a checkpoint depend on besides its numbers."""
    return {
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "config": digest_of(request),
        "code": code_version(),
    }


def exactness(state: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how exactly training goes on from a checkpoint's ``state``; one of an older version does not say all."""
    changes = [
        f"{name} was {state[name]}, is now {value}" for name, value in now.items() if state.get(name, value) != value
    ]
    return f"to rounding at best, since {'; '.join(changes)}" if changes else "bit for bit"


def _git(*words: str) -> str:
    # Without GIT_DIR and the like, which name another repository where a git hook has started this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


@lru_cache(maxsize=1)
def hardware() -> str:
    """Return the accelerators' name and number, or the processor's."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
