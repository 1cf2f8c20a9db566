"""Pipelines: the five stages, and the storeys that they stand on.

In the order of the work: ``prepare_corpus``, ``train_vae``, ``encode_latents``, ``train_unet``, ``evaluate``. Beside
them ``tools`` (commands), below them ``evaluation``, ``model`` and ``runtime``; ``configs`` holds experiments. A module
imports those of its own storey and of the storeys below, then ``models`` and ``data``; a stage never imports a stage.
The siblings are checked here, since stages and tools import them at once: other packages of these names, in the working
directory or on PYTHONPATH, would come first. Ctrl-C is handled from here on: commands import for seconds, in which
libraries do not expect to be interrupted.
"""

import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path


def check_siblings(home: Path) -> None:
    """End the process with code 2 where the packages ``models`` and ``data`` are not those in the folder ``home``."""
    for name in ("models", "data"):
        spec = find_spec(name)
        found = Path(spec.origin) if spec is not None and spec.origin else None
        if found is None or found.resolve() != (home / name / "__init__.py").resolve():
            other = found and (found.parent if found.name == "__init__.py" else found)
            print(
                f"latentline: {other or 'nothing'} shadows the package {home / name}. Start from another folder, set "
                "PYTHONSAFEPATH=1, which leaves the working directory out, or look at PYTHONPATH.",
                file=sys.stderr,
            )
            raise SystemExit(2)


def end_at_once(*_: object) -> None:
    """End a command that has not begun on Ctrl-C, with the exit code of one that has."""
    os.write(2, b"latentline: stopped.\n")
    os._exit(75)


def catch_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt: the command has begun, and catches it."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# In a command's own process alone, which may have been told to ignore Ctrl-C; python -m is seen by its "-m".
if Path(sys.argv[0]).name in ("-m", "latentline") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)
check_siblings(Path(__file__).resolve().parents[1])
