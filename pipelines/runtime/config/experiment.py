"""TOML and command line, merged into one tree and validated once, into one frozen model.

An experiment is one TOML file: a table ``[run]`` that all stages share and one table a stage. ``--dotted.name value``
changes a key of the stage's own table, ``--run.name value`` one of the shared table. Whatever is wrong is reported at
once, each mistake with its source, its key, what was given, what is expected and the nearest valid name.
"""

import difflib
import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, NonNegativeInt, ValidationError

from pipelines.runtime.config.outcome import leave_outcome
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.schema import annotation_at, complete, kind_at, model_paths, names_at, variants_of

STAGE_FOLDERS = {
    "prepare_corpus": "corpus",
    "train_vae": "vae",
    "encode_latents": "latents",
    "train_unet": "unet",
    "evaluate": "evaluation",
}
TOOL_TABLES = ("sample", "export", "reconstruct", "benchmark", "doctor", "plan")


class ConfigError(Exception):
    """A user's mistake: the message says what, why, and what to do. The program ends with exit code 2."""


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """Where and how a run happens. Nothing here changes the result, so nothing here ever counts as a difference."""

    root: str = "runs/default"  # folder of the experiment; the stages' folders lie in it
    experiment: str = "latentline"  # MLflow experiment
    tracking_uri: str = "auto"  # MLflow server or store; "auto" is MLFLOW_TRACKING_URI, else sqlite beside run.root
    num_processes: NonNegativeInt = 0  # world size to insist on; 0 accepts what was launched
    threads: NonNegativeInt = 0  # CPU threads of each process; 0 divides the machine's cores among its processes
    attention: Literal["auto", "sdpa", "xformers", "math"] = "auto"  # its backend; auto takes the first that runs here
    deterministic: bool = False  # bit-reproducible GPU kernels, at some speed; CPU runs always are
    allow_changed: tuple[str, ...] = ()  # keys whose change is accepted on resume (also: --allow-changed KEY)


class StageConfig(BaseModel, frozen=True, extra="forbid"):
    """What every stage's configuration has. ``inputs.NAME`` defaults to the folder NAME below ``run.root``."""

    fingerprint_ignores: ClassVar[frozenset[str]] = (
        frozenset()
    )  # dotted keys that may change without changing the result

    run: RunConfig = RunConfig()


Config = TypeVar("Config", bound=StageConfig)


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
        config = load_config(model, table=table, argv=[word for word in argv if word != "--print-config"])
    except ConfigError as error:
        if is_main:
            print(f"{table}: {error}", file=sys.stderr)
            write_early_outcome(argv, table=table)
        raise SystemExit(2) from None
    if "--print-config" in argv:
        if is_main:
            print(config_as_toml(config, table=table), end="")
        raise SystemExit(0)
    return config


def load_config(model: type[Config], *, table: str, argv: Sequence[str]) -> Config:
    """Merge the file named by ``--config`` with the other words of ``argv`` and validate the whole.

    Raises:
        ConfigError: With every mistake found.
    """
    path, overrides, mistakes = _split_command_line(argv)
    tree, sources, file_mistakes = _tree_of_file(path, table=table)
    mistakes += file_mistakes
    # Kinds first: a changed kind drops the old variant's keys, but never a word of the same command line.
    for key, raw in sorted(overrides, key=lambda override: not override[0].endswith(".kind")):
        mistakes += _override(model, tree, sources, key, raw, table=table)
    tree = complete(model, _with_inputs(model, tree))
    try:
        # JSON in strict mode: "32" is no number and 1 is no boolean, while lists may still become tuples.
        config = model.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        mistakes += [_explain(model, detail, tree, sources, table=table) for detail in error.errors()]
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{count} in the configuration.\n" + "\n".join(mistakes))
    return config


def config_as_toml(config: StageConfig, *, table: str) -> str:
    """Return the resolved configuration as an experiment file that gives it back."""
    # TOML has no word for nothing; a field that may be None is so by default, so leaving it out gives it back.
    whole = config.model_dump(mode="json", exclude_none=True)
    return tomli_w.dumps({"run": whole.pop("run"), table: whole})


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


def write_early_outcome(argv: Sequence[str], *, table: str) -> None:
    """Leave outcome.json for scripts even when the configuration is wrong: the launcher hides the exit code."""
    root = _early_root(argv, table=table)
    if root is None or table not in STAGE_FOLDERS:
        return
    folder = Path(root) / STAGE_FOLDERS[table]
    try:
        leave_outcome(folder, state="failed", code=2)
    except OSError as error:
        print(f"{table}: outcome.json could not be written to {folder}: {error}", file=sys.stderr)


def _early_root(argv: Sequence[str], *, table: str) -> str | None:
    path, overrides, _ = _split_command_line(argv)
    for key, raw in overrides:
        if key == "run.root" and isinstance(raw, str):
            return raw
    tree, _, _ = _tree_of_file(path, table=table)
    run = tree.get("run")
    root = run.get("root", RunConfig().root) if isinstance(run, dict) else None
    return root if isinstance(root, str) else None


def _split_command_line(argv: Sequence[str]) -> tuple[str | None, list[tuple[str, str | None]], list[str]]:
    """Split words into the experiment's path, (dotted key, raw value) pairs, mistakes; a bare ``--flag`` has None."""
    path, overrides, mistakes = None, [], []
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            mistakes.append(f"  {word!r} (command line)\n      a value without a name; names start with --")
            continue
        name, equals, value = word[2:].partition("=")
        raw: str | None = value if equals else None
        if not equals and words and not re.match(r"--[A-Za-z]", words[0]):
            raw = words.pop(0)
        key = name.replace("-", "_")
        if key == "config":
            path = raw
        elif key == "print_config":
            continue
        elif key == "allow_changed":
            overrides.append(("run.allow_changed+", raw))
        else:
            overrides.append((key, raw))
    return path, overrides, mistakes


def _tree_of_file(path: str | None, *, table: str) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    if path is None:
        return {}, {}, ["  --config (command line)\n      missing; give the experiment: --config EXPERIMENT.toml"]
    try:
        whole = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, {}, [f"  --config {path}\n      there is no such file, seen from {Path.cwd()}"]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return {}, {}, [f"  --config {path}\n      cannot be read as TOML: {error}"]
    known = ("run", *STAGE_FOLDERS, *TOOL_TABLES)
    mistakes = [
        f"  [{name}] ({path})\n      no stage reads this table{_nearest(name, known)}; tables are {', '.join(known)}"
        for name in whole
        if name not in known
    ]
    tree: dict[str, Any] = {}
    for name in ("run", table):
        part = whole.get(name, {})
        if not isinstance(part, dict):
            mistakes.append(f"  {name} = {part!r} ({path})\n      expected a table: [{name}]")
        elif name == "run":
            tree["run"] = part
        else:
            tree.update({key: value for key, value in part.items() if key != "run"})
            if "run" in part:
                mistakes.append(f"  {table}.run ({path})\n      the table [run] is shared and stands on its own")
    sources = {".".join(key): path for key in _leaves(tree)}
    return tree, sources, mistakes


def _leaves(tree: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    empty = True
    for key, value in items:
        empty = False
        yield from _leaves(value, (*prefix, str(key)))
    if empty:
        yield prefix


def _override(
    model: type[BaseModel], tree: dict[str, Any], sources: dict[str, str], key: str, raw: str | None, *, table: str
) -> list[str]:
    """Put one command-line value into the tree; return mistakes that have no place in it."""
    appends, key = key.endswith("+"), key.rstrip("+")
    if key.startswith(f"{table}."):
        key = key.removeprefix(f"{table}.")
    parts = key.split(".")
    annotation = annotation_at(model, tree, parts)
    if raw is None:
        if annotation is not bool:
            return [f"  --{key} (command line)\n      needs a value"]
        raw = "true"
    value = [*(tree.get("run", {}).get("allow_changed", ())), raw] if appends else _value_of(raw, annotation)
    place: Any = tree
    for index, part in enumerate(parts[:-1]):
        if isinstance(place, list) and part.isdigit() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict) and (part in place or not parts[index + 1].isdigit()):
            place = place.setdefault(part, {})
        else:
            missing = ".".join(parts[: index + 1])
            return [f"  --{key} {raw} (command line)\n      the experiment file has no {missing} to change"]
    last = parts[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        if last == "kind" and place.get("kind", kind_at(model, tree, parts[:-1])) != value:
            place.clear()  # Another variant: the old one's keys mean nothing to it.
        place[last] = value
    else:
        return [f"  --{key} {raw} (command line)\n      {'.'.join(parts[:-1])} holds no keys"]
    sources[key] = "command line"
    return []


def _value_of(raw: str, annotation: Any) -> Any:
    """Read a command-line word as TOML, unless the field wants text."""
    if annotation is str:
        return raw
    text = raw.lower() if raw.lower() in ("true", "false") else raw
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        try:
            return float(text)
        except ValueError:
            return raw


def _explain(
    model: type[BaseModel], detail: Mapping[str, Any], tree: dict[str, Any], sources: Mapping[str, str], *, table: str
) -> str:
    """Say one of pydantic's findings in the user's terms."""
    parts: list[str] = []
    place: Any = tree
    for part in detail["loc"]:
        if isinstance(place, dict) and part not in place and place.get("kind") == part:
            continue  # The tag of a union: the user never wrote it.
        parts.append(str(part))
        place = _below(place, part)
    key = ".".join(parts)
    shown = key if parts[:1] == ["run"] else f"{table}.{key}" if key else f"[{table}]"
    source = next((sources[prefix] for prefix in _prefixes(parts) if prefix in sources), None)
    source = source or next(
        (name for leaf, name in sources.items() if leaf.startswith(f"{key}.") or not key), "default"
    )
    given = (
        ""
        if detail["type"] == "missing" or isinstance(detail["input"], dict | BaseModel)
        else f" = {detail['input']!r}"
    )
    if detail["type"] == "extra_forbidden":
        siblings = names_at(model, tree, parts[:-1])
        everything = [".".join((*path, name)) for path, name, _, _ in model_paths(model)]
        hint = _nearest(parts[-1], siblings) or _nearest(key, everything) or f"; known here: {', '.join(siblings)}"
        advice = f"unknown key{hint}"
    elif detail["type"] in ("union_tag_invalid", "literal_error"):
        shown += ".kind" if detail["type"] == "union_tag_invalid" else ""
        expected = detail["ctx"].get("expected_tags") or detail["ctx"].get("expected")
        given = f" = {detail['ctx'].get('tag', detail['input'])!r}"
        names = re.findall(r"'([^']*)'", expected)
        advice = f"expected one of {expected}{_nearest(str(detail['ctx'].get('tag', detail['input'])), names)}"
    elif detail["type"] == "missing":
        advice = "missing: this key has no default"
    else:
        advice = re.sub(r"^(Value error|Assertion failed), ", "", detail["msg"])
        advice = advice.replace("Input should be", "expected").replace("\n", "\n      ")
    return without_credentials(f"  {shown}{given} ({source})\n      {advice}", queries=True)


def _with_inputs(model: type[StageConfig], tree: dict[str, Any]) -> dict[str, Any]:
    """Let ``inputs.NAME`` default to the folder NAME below ``run.root``.

    Not a validator of the model: one that runs before validation would turn strict JSON into strict Python values.
    """
    field, given = model.model_fields.get("inputs"), tree.get("inputs", {})
    run = tree.get("run", {})
    root = run.get("root", RunConfig().root) if isinstance(run, dict) else None
    if field is None or not isinstance(given, dict) or not isinstance(root, str):
        return tree
    (inputs_model,) = variants_of(field.annotation)
    return {**tree, "inputs": {**{name: str(Path(root) / name) for name in inputs_model.model_fields}, **given}}


def _below(place: Any, part: str | int) -> Any:
    if isinstance(place, dict):
        return place.get(part)
    return place[part] if isinstance(place, list) and isinstance(part, int) and part < len(place) else None


def _prefixes(parts: Sequence[str]) -> Iterator[str]:
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
