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
from pipelines.runtime.config.stage_config import RunConfig

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


def made_by(request: Mapping[str, Any], run: RunConfig, *, world_size: int, device: torch.device) -> dict[str, Any]:
    """Return what the bits of a checkpoint depend on besides its numbers."""
    on_gpu = device.type == "cuda"
    return {
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "config": digest_of(request),
        "code": code_version(),
        "torch": torch.__version__,
        **({"cudnn": torch.backends.cudnn.version()} if on_gpu else {}),
        "processor": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "attention": run.attention,
        "deterministic": run.deterministic or not on_gpu,
    }


def exactness(state: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say how exactly training goes on from a checkpoint's ``state``: as the same run without a stop, or to rounding.

    Bit for bit it does with the same of everything in ``now``, unless kernels of a GPU may sum in any order. What a
    checkpoint of an older version does not say may have been another.
    """
    changes = [
        f"{name} was {state.get(name, 'not recorded')}, is now {value}"
        for name, value in now.items()
        if state.get(name, "not recorded") != value
    ]
    if not now["deterministic"]:
        changes.append("kernels of a GPU sum in any order with run.deterministic = false")
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
    return f"{os.cpu_count()} x {processor()}"


@lru_cache(maxsize=1)
def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
