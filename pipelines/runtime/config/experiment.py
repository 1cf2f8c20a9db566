"""Experiment file and command line, merged into one tree and validated once, into one frozen model.

An experiment is one TOML file: a table ``[run]`` that all stages share and one table a stage. ``--dotted.name value``
changes a key of the stage's own table, ``--run.name value`` one of the shared table. ``[train_unet.named.guide]`` holds
the changes that ``--name guide`` makes. Whatever is wrong is reported at once, each mistake with its source, its key,
what was given, what is expected and the nearest valid name.
"""

import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import ValidationError

from data.manifest import MANIFEST_NAME
from pipelines.runtime.config.dotted_keys import below, flattened
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.mistakes import explained, nearest, shown, without_flaws
from pipelines.runtime.config.renamed_keys import new_name, with_new_names
from pipelines.runtime.config.schema import annotation_at, complete, kind_of, variant_at, variants_of
from pipelines.runtime.config.stage_config import INPUT_FOLDERS, STAGE_FOLDERS, TOOL_TABLES, CommandConfig, RunConfig

Config = TypeVar("Config", bound=CommandConfig)
MAX_DEPTH = 32  # tables and lists that a value lies in; no key of ours lies in half as many


def load_config(model: type[Config], *, table: str, argv: Sequence[str]) -> Config:
    """Merge the file named by ``--config`` with the other words of ``argv`` and validate the whole.

    Raises:
        ConfigError: With every mistake found.
    """
    tree, sources, mistakes = merged_tree(model, table=table, argv=argv)
    try:
        # JSON in strict mode: "32" is no number and 1 is no boolean, while lists may still become tuples.
        config = model.model_validate_json(json.dumps(without_flaws(tree), default=str), strict=True)
    except ValidationError as error:
        # What a default follows from is wrong: that is a mistake by itself.
        found = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
        mistakes += [explained(model, detail, tree, sources, table=table) for detail in found]
    if mistakes:
        count = "1 mistake" if len(mistakes) == 1 else f"{len(mistakes)} mistakes"
        raise ConfigError(f"{count} in the configuration.\n" + "\n".join(mistakes))
    return config


def merged_tree(
    model: type[CommandConfig], *, table: str, argv: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return the tree to validate, the source of each dotted key in it, and mistakes that validation cannot find.

    Raises:
        ConfigError: There is no experiment, or it is no TOML: whatever it lacks would be shown as a mistake, too.
    """
    path, overrides, mistakes = _split_command_line(model, argv)
    whole = _tables_of(path, needed="run" in model.model_fields)
    tree, sources, file_mistakes = _tree_of_file(whole, path, table=table, shared="run" in model.model_fields)
    mistakes += file_mistakes
    words = [(key.removeprefix(f"{table}."), raw) for key, raw in overrides]
    if "name" in model.model_fields:
        name = {"name": tree.get("name", ""), **dict(words)}["name"]
        mistakes += _with_changes_of(name, model, tree, sources, source=path or "", table=table)
    for key, raw in sorted(words, key=lambda word: _kinds_first(word[0].split("."))):
        mistakes += _renamed(key, raw, source="command line", table=table)
        mistakes += _override(model, tree, sources, new_name(table, key), raw)
    has_guide = reduce(below, ("train_unet", "named", "guide"), whole) is not None
    return complete(model, _with_inputs(model, tree, has_guide=has_guide)), sources, mistakes


def config_as_toml(config: CommandConfig, *, table: str) -> str:
    """Return the resolved configuration as an experiment file that gives it back."""
    # TOML has no word for nothing; a field that may be None is so by default, so leaving it out gives it back.
    whole = config.model_dump(mode="json", exclude_none=True)
    shared = {"run": whole.pop("run")} if "run" in whole else {}
    return tomli_w.dumps({**shared, table: whole})


def experiment_path(argv: Sequence[str] | None) -> str:
    """Return what follows ``--config``, of this process where ``argv`` is None; that it is there has been checked."""
    path = _split_command_line(CommandConfig, sys.argv[1:] if argv is None else argv)[0]
    assert path is not None
    return path


def early_folder(model: type[CommandConfig], *, table: str, argv: Sequence[str]) -> Path | None:
    """Return a stage's folder by a configuration that may be wrong; None where it is not known."""
    try:
        tree = merged_tree(model, table=table, argv=argv)[0]
        root, name = root_of(tree), tree.get("name", "")
    except ConfigError:
        words = dict(_split_command_line(model, argv)[1])
        root, name = words.get("run.root"), words.get("name", "")
    name = name if "name" in model.model_fields else ""
    if not root or not isinstance(name, str) or "\0" in root + name:
        return None
    return Path(root) / (f"{STAGE_FOLDERS[table]}-{name}" if name else STAGE_FOLDERS[table])


def given_experiment() -> str | None:
    """Return what follows ``--config`` on this process's command line; None where it was started without."""
    return _split_command_line(CommandConfig, sys.argv[1:])[0]


def changed_on_command_line() -> bool:
    """Return whether this process's command line changes keys of its own table, besides those of [run]."""
    keys = [key for key, _ in _split_command_line(CommandConfig, sys.argv[1:])[1]]
    return any(not key.startswith("run.") and key != "allow_changed" for key in keys)


def root_of(tree: dict[str, Any]) -> str | None:
    """Return ``run.root`` of a tree that is not validated yet; None where it is no text."""
    run = tree.get("run", {})
    root = run.get("root", RunConfig().root) if isinstance(run, dict) else None
    return root if isinstance(root, str) else None


def _split_command_line(
    model: type[CommandConfig], argv: Sequence[str]
) -> tuple[str | None, list[tuple[str, str | None]], list[str]]:
    """Split words into the experiment's path, (dotted key, raw value) pairs, mistakes; a bare ``--flag`` has None."""
    path, overrides, mistakes = None, list[tuple[str, str | None]](), []
    words = list(argv)
    while words:
        word = words.pop(0)
        if model.positional and not word.startswith("-"):
            overrides.append((model.positional, word))
            continue
        if not word.startswith("--") or len(word) == 2:
            mistakes.append(f"  {word!r} (command line)\n      a value without a name; names start with --")
            continue
        name, equals, value = word[2:].partition("=")
        name, raw = name.replace("-", "_"), value if equals else None
        if not equals and words and not re.match(r"--[A-Za-z]", words[0]):
            # Where words may have no name, one behind a flag is the flag's value only when it can be.
            is_flag = model.positional and annotation_at(model, {}, name.split(".")) is bool
            if not is_flag or words[0].lower() in ("true", "false"):
                raw = words.pop(0)
        if name == "config" and raw is not None:
            path = raw
        else:
            overrides.append((name, raw))
    return path, overrides, mistakes


def _tables_of(path: str | None, *, needed: bool) -> dict[str, Any]:
    """Return the tables of a file, or none where it is neither there nor ``needed``."""
    if path is None:
        if needed:
            raise ConfigError("--config is missing; give the experiment: --config EXPERIMENT.toml")
        return {}
    try:
        return _parsed(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file, seen from {Path.cwd()}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read as TOML: {error}") from None


def _tree_of_file(
    whole: dict[str, Any], path: str | None, *, table: str, shared: bool
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return one table of a file, with [run] where the command has the ``shared`` one."""
    if path is None:
        return {}, {}, []
    known = ("run", *STAGE_FOLDERS, *TOOL_TABLES)
    mistakes = [
        f"  [{name}] ({path})\n      no stage reads this table{nearest(name, known)}; tables are {', '.join(known)}"
        for name in whole
        if name not in known
    ]
    tree: dict[str, Any] = {}
    for name in ("run", table) if shared else (table,):
        part = whole.get(name, {})
        if not isinstance(part, dict):
            mistakes.append(f"  {name} = {shown(part)} ({path})\n      expected a table: [{name}]")
        elif name == "run":
            tree["run"] = part
        else:
            tree.update({key: value for key, value in part.items() if key != "run"})
            if "run" in part:
                mistakes.append(f"  {table}.run ({path})\n      the table [run] is shared and stands on its own")
    for key, value in flattened(tree).items():
        mistakes += _renamed(key, value, source=path, table=table)
    tree = with_new_names(table, tree)
    return tree, dict.fromkeys(flattened(tree), path), mistakes


def _renamed(key: str, value: Any, *, source: str, table: str) -> list[str]:
    """Return the mistake of an old key. Its value is validated under the new one, so that both mistakes show."""
    if (new := new_name(table, key)) == key:
        return []
    return [f"  {table}.{key} = {shown(value)} ({source})\n      unknown key; it is called {table}.{new} now"]


def _parsed(text: str) -> dict[str, Any]:
    """Read TOML.

    Raises:
        ValueError: It is no TOML, or nested too deep, or has a number of thousands of digits.
    """
    try:
        whole = tomllib.loads(text)
    except RecursionError:
        raise ValueError("its lists or tables are nested too deep") from None
    inside: list[Any] = [whole]
    for _ in range(MAX_DEPTH):
        inside = [part for each in inside for part in (each.values() if isinstance(each, dict) else each)]
        inside = [part for part in inside if isinstance(part, dict | list)]
    if inside:
        raise ValueError(f"its lists or tables are nested more than {MAX_DEPTH} deep")
    return whole


def _with_changes_of(
    name: Any, model: type[CommandConfig], tree: dict[str, Any], sources: dict[str, str], *, source: str, table: str
) -> list[str]:
    """Put the changes of ``named.NAME`` into the tree, and no others; return mistakes that have no place in it."""
    named = tree.pop("named", {})
    for key in [key for key in sources if key.split(".")[0] == "named"]:
        del sources[key]
    if not isinstance(named, dict) or not all(isinstance(changes, dict) for changes in named.values()):
        return [f"  {table}.named ({source})\n      expected tables [{table}.named.NAME]"]
    name = re.sub(r"-?seed_\d+$", "", str(name))  # a replicate is what its name is but for the seed
    changes, mistakes, source = with_new_names(table, named.get(name, {})), [], f"{source}, [{table}.named.{name}]"
    for parts, value in sorted(_leaves(changes) if changes else (), key=lambda leaf: _kinds_first(leaf[0])):
        if parts[0] in ("run", "name"):
            mistakes.append(f"  {'.'.join(parts)} ({source})\n      is the same whatever the name")
        else:
            mistakes += _place(model, tree, sources, parts, value, source=source)
    return mistakes


def _leaves(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield what lies in nested tables with the keys to it; a list is one leaf."""
    if not isinstance(value, dict) or not value:
        yield (), value
        return
    for key, part in value.items():
        for parts, leaf in _leaves(part):
            yield (key, *parts), leaf


def _kinds_first(parts: Sequence[str]) -> tuple[bool, int]:
    """Sort kinds first, from the outside: a changed kind drops the old variant's keys."""
    return parts[-1] != "kind", len(parts)


def _override(
    model: type[CommandConfig], tree: dict[str, Any], sources: dict[str, str], key: str, raw: str | None
) -> list[str]:
    """Put one command-line value into the tree; return mistakes that have no place in it."""
    parts = ["run", key] if key == "allow_changed" else key.split(".")
    key = ".".join(parts)
    if len(parts) > MAX_DEPTH:
        return [f"  --{shown(key)} (command line)\n      unknown key"]
    annotation = annotation_at(model, tree, parts)
    if raw is None:
        if annotation is not bool:
            return [f"  --{key} (command line)\n      needs a value"]
        raw = "true"
    value = _value_of(raw, annotation)
    if key in ("run.allow_changed", model.positional):
        # Given again and again. Of the file's words none stay, while what it allows stays allowed.
        kept = reduce(below, parts, tree) if key == "run.allow_changed" or sources.get(key) == "command line" else None
        value = [*(kept or ()), *(value if isinstance(value, list) else [raw])]
    return _place(model, tree, sources, parts, value, source="command line")


def _place(
    model: type[CommandConfig],
    tree: dict[str, Any],
    sources: dict[str, str],
    parts: Sequence[str],
    value: Any,
    *,
    source: str,
) -> list[str]:
    """Put a value into the tree, ``parts`` below each other; return mistakes that have no place in it."""
    key = ".".join(parts)
    wrong = f"  {'--' if source == 'command line' else ''}{key} = {shown(value)}"
    place: Any = tree
    for index, part in enumerate(parts[:-1]):
        if isinstance(place, dict) and not parts[index + 1].isdigit():
            place.setdefault(part, {})
        if (place := below(place, part)) is None:
            missing = ".".join(parts[: index + 1])
            return [f"{wrong} ({source})\n      the experiment file has no {missing} to change"]
    last = parts[-1]
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        variant = variant_at(model, tree, parts[:-1])
        if last == "kind" and place.get("kind", variant and kind_of(variant)) != value:
            place.clear()  # Another variant: the old one's keys mean nothing to it.
        place[last] = value
    else:
        return [f"{wrong} ({source})\n      {'.'.join(parts[:-1])} holds no keys"]
    sources[key] = source
    return []


def _value_of(raw: str, annotation: Any) -> Any:
    """Read a command-line word as TOML, unless the field wants text; a list may come as ``a,b`` without brackets."""
    if annotation is str:
        return raw
    if get_origin(annotation) is tuple and not raw.lstrip().startswith("["):
        element = get_args(annotation)[0]
        if variants_of(element):
            return raw
        return [_value_of(part.strip(), element) for part in re.split(r",(?![^{}]*\})", raw)]  # a,{b,c} are two
    text = raw.lower() if raw.lower() in ("true", "false") else raw
    try:
        return _parsed(f"value = {text}")["value"]
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return raw


def _with_inputs(model: type[CommandConfig], tree: dict[str, Any], *, has_guide: bool) -> dict[str, Any]:
    """Let ``inputs.NAME`` default to its folder below ``run.root``; an optional input only where it is finished.

    The guide is one where the file names it, finished or not: an evaluation that came too early would be another one.

    Not a validator of the model: one that runs before validation would turn strict JSON into strict Python values.
    """
    field, given, root = model.model_fields.get("inputs"), tree.get("inputs", {}), root_of(tree)
    if field is None or not isinstance(given, dict) or root is None:
        return tree
    inputs = {name: each for model in variants_of(field.annotation) for name, each in model.model_fields.items()}
    folders = {name: Path(root) / INPUT_FOLDERS.get(name, name) for name in inputs}
    wanted = {
        name: inputs[name].is_required() or os.path.isfile(folder / MANIFEST_NAME)  # False, too, for no possible name
        for name, folder in folders.items()
    }
    if "guide" in folders:
        wanted["guide"] = has_guide and str(given.get("unet", "")) != str(folders["guide"])
    default = {name: str(folder) for name, folder in folders.items() if wanted[name]}
    return {**tree, "inputs": {**default, **given}}
