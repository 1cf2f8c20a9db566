"""Entry of every command: its configuration from the command line, ``--help`` and ``--print-config``."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import Config, config_as_toml, load_config, merged_tree, root_of
from pipelines.runtime.config.outcome import leave_outcome
from pipelines.runtime.config.schema import model_paths
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, StageConfig


def config_from_command_line(
    model: type[Config], *, table: str, about: str | None, argv: Sequence[str] | None = None
) -> Config:
    """Read the configuration of one stage, or end the process: 0 after --help and --print-config, 2 on a mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    is_main = os.environ.get("RANK", "0") == "0"
    if "--help" in argv or "-h" in argv:
        if is_main:
            print(help_text(model, table=table, about=about))
        raise SystemExit(0)
    try:
        config = load_config(model, table=table, argv=argv)
    except ConfigError as error:
        if is_main:
            print(f"{table}: {error}", file=sys.stderr)
            _leave_early_outcome(model, argv, table=table)
        raise SystemExit(2) from None
    if "--print-config" in argv:
        if is_main:
            print(config_as_toml(config, table=table), end="")
        raise SystemExit(0)
    return config


@contextmanager
def exit_on_config_error(command: str) -> Iterator[None]:
    """Print a ConfigError as the command's, on the main process, and end with exit code 2."""
    try:
        yield
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{command}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def help_text(model: type[StageConfig], *, table: str, about: str | None) -> str:
    """Return one line a field: name, default and the comment that stands beside it in the code."""
    lines = [(about or "").strip(), "", f"keys of [{table}] (and of the shared [run]), with their defaults:", ""]
    for path, name, default, comment in model_paths(model):
        dotted = ".".join((*path, name))
        lines.append(f"  --{dotted:<42} {default:<24} {comment}".rstrip())
    lines += [
        "",
        "  --config EXPERIMENT.toml    the experiment",
        "  --print-config              print the resolved configuration and exit",
    ]
    return "\n".join(lines)


def _leave_early_outcome(model: type[StageConfig], argv: Sequence[str], *, table: str) -> None:
    """Leave outcome.json for scripts even when the configuration is wrong: the launcher hides the exit code."""
    root = root_of(merged_tree(model, table=table, argv=argv)[0])
    if root is None or table not in STAGE_FOLDERS:
        return
    folder = Path(root) / STAGE_FOLDERS[table]
    try:
        leave_outcome(folder, state="failed", code=2)
    except OSError as error:
        print(f"{table}: outcome.json could not be written to {folder}: {error}", file=sys.stderr)
