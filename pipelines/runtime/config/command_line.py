"""Entry of every command, stage or tool: its configuration, ``--help``, ``--print-config``, and a tool's answer."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import Any

import pipelines
from pipelines.runtime.config.errors import ConfigError, Stopped, sentence
from pipelines.runtime.config.experiment import Config, config_as_toml, early_folder, load_config
from pipelines.runtime.config.logs import print_answer, say_mistake, set_up_logging
from pipelines.runtime.config.outcome import EXIT_CODES, Outcome
from pipelines.runtime.config.schema import model_paths
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, TOOL_TABLES, CommandConfig


@dataclass(frozen=True)
class Answer:
    """Result of a tool: for scripts, for people (empty where it was printed on the way), and its exit code."""

    found: Mapping[str, Any]  # plain JSON
    text: str = ""
    code: int = 0


def run_tool(
    model: type[Config],
    work: Callable[[Config], Answer],
    *,
    table: str,
    about: str | None,
    argv: Sequence[str] | None = None,
) -> int:
    """Run a tool and print its answer, with ``--json`` as the one object on standard output; return the exit code.

    Args:
        model: Of its configuration.
        work: Gives the answer. Whatever it prints goes to standard error where standard output is for JSON.
        table: Name of the tool and of its table in an experiment file.
        about: Its module's docstring, for ``--help``.
        argv: Words of the command line; those of this process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        pipelines.catch_interrupts()
        config = config_from_command_line(model, table=table, about=about, argv=[w for w in words if w != "--json"])
        set_up_logging(table)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            answer = work(config)
        print_answer(table, json.dumps(answer.found, indent=2) if as_json else answer.text)
        return answer.code
    except (ConfigError, OSError) as error:  # the latter of a disk that is full or fails, or of a folder in use
        say_mistake(table, ConfigError(sentence(error)) if isinstance(error, OSError) else error)
        return 2
    except (Stopped, KeyboardInterrupt) as reason:
        say_mistake(table, Stopped(f"stopped. {reason}".rstrip()))
        return EXIT_CODES["stopped"]


def config_from_command_line(
    model: type[Config], *, table: str, about: str | None, argv: Sequence[str] | None = None
) -> Config:
    """Read the configuration of a command, or end the process: 0 after --help and --print-config, 2 on a mistake."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print_answer(table, help_text(model, table=table, about=about))
        raise SystemExit(0)
    words = [word for word in argv if word not in ("--print-config", "--print_config")]
    try:
        config = load_config(model, table=table, argv=words)
    except ConfigError as error:
        say_mistake(table, error)
        _leave_early_outcome(model, words, error, table=table)
        raise SystemExit(2) from None
    if words != argv:
        print_answer(table, config_as_toml(config, table=table).rstrip())
        raise SystemExit(0)
    return config


def help_text(model: type[CommandConfig], *, table: str, about: str | None) -> str:
    """Return one line a field: name, default and the comment that stands beside it in the code."""
    needs_experiment = "run" in model.model_fields
    shared = " (and of the shared [run])" if needs_experiment else ""
    lines = [(about or "").strip(), "", f"keys of [{table}]{shared}, with their defaults:", ""]
    for path, name, default, comment in model_paths(model):
        dotted = ".".join((*path, name))
        lines.append(f"  --{dotted:<42} {default:<24} {comment}".rstrip())
    lines += ["", f"  --config EXPERIMENT.toml    the experiment{'' if needs_experiment else '; not needed'}"]
    if model.positional:
        lines.append(f"  WORD ...                    words without a name are --{model.positional}")
    if table in TOOL_TABLES:
        lines.append("  --json                      print the result as one JSON object")
    lines.append("  --print-config              print the resolved configuration and exit")
    return "\n".join(lines)


def _leave_early_outcome(model: type[CommandConfig], argv: Sequence[str], error: ConfigError, *, table: str) -> None:
    """Leave outcome.json for scripts even when the configuration is wrong: the launcher hides the exit code."""
    if table not in STAGE_FOLDERS or os.environ.get("RANK", "0") != "0":
        return
    folder = early_folder(model, table=table, argv=argv)
    if folder is None:
        return
    set_up_logging(table)
    outcome = Outcome()
    outcome.set("failed", code=2, reason=error)
    outcome.write(folder, is_main=True)
