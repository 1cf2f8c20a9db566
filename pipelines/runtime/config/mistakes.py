"""Validation errors in the user's terms: source, dotted key, the given value, the expected one, the nearest name."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipelines.runtime.config.dotted_keys import below
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.schema import model_paths, variant_at
from pipelines.runtime.config.stage_config import TOOL_TABLES, CommandConfig

LONGEST_SHOWN = 200  # characters of a value


def explained(
    model: type[CommandConfig], detail: ErrorDetails, tree: dict[str, Any], sources: Mapping[str, str], *, table: str
) -> str:
    """Return one of pydantic's error details as a line for the key and one with advice.

    Args:
        model: The configuration that was validated.
        detail: An element of ``ValidationError.errors()``.
        tree: The merged tree that was validated.
        sources: Dotted key -> file or command line that gave it.
        table: The stage's table in the experiment file.
    """
    parts: list[str] = []
    place: Any = tree
    for part in detail["loc"]:
        if isinstance(place, dict) and part not in place and place.get("kind") == part:
            continue  # The tag of a union: the user never wrote it.
        parts.append(str(part))
        place = below(place, part)
    key = ".".join(parts)
    named = key if parts[:1] == ["run"] else f"{table}.{key}" if key else f"[{table}]"
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    source = next((sources[prefix] for prefix in prefixes if prefix in sources), None)
    source = source or next(
        (name for leaf, name in sources.items() if leaf.startswith(f"{key}.") or not key), "default"
    )
    found = place if (flaw := flaw_of(place)) else detail["input"]
    hidden = detail["type"] == "missing" or isinstance(found, dict | BaseModel)
    given = "" if hidden else f" = {shown(found)}"
    if detail["type"] == "extra_forbidden":
        variant = variant_at(model, tree, parts[:-1])
        siblings = list(variant.model_fields) if variant is not None else []
        everything = [".".join((*path, name)) for path, name, _, _ in model_paths(model)]
        everything += ["config", "help", "print_config", *(["json"] if table in TOOL_TABLES else [])]
        hint = nearest(parts[-1], siblings) or nearest(key, everything) or f"; known here: {', '.join(siblings)}"
        advice = f"unknown key{hint}"
    elif detail["type"] in ("union_tag_invalid", "literal_error"):
        named += ".kind" if detail["type"] == "union_tag_invalid" else ""
        expected = str(detail["ctx"].get("expected_tags") or detail["ctx"].get("expected"))
        found = detail["ctx"].get("tag", found)
        given = f" = {shown(found)}"
        names = re.findall(r"'([^']*)'", expected)
        advice = f"expected one of {expected}{nearest(found, names) if isinstance(found, str) else ''}"
    elif detail["type"] == "missing":
        advice = "missing: this key has no default" + "; give words without a name" * (key == model.positional)
    else:
        advice = re.sub(r"^(Value error|Assertion failed), ", "", detail["msg"])
        advice = advice.replace("Input should be", "expected").replace("\n", "\n      ")
    advice += f"; this {flaw}" * bool(flaw)
    return without_credentials(f"  {named}{given} ({source})\n      {advice}", queries=True)


def without_flaws(value: Any) -> Any:
    """Return ``value`` with None, which no field takes, for everything in it that has a flaw."""
    if isinstance(value, dict):
        return {key: without_flaws(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_flaws(part) for part in value]
    return None if flaw_of(value) else value


def flaw_of(value: Any) -> str:
    """Return why no field may have a value that TOML may: files, networks and stores cannot hold it; else empty."""
    match value:
        case float() if not math.isfinite(value):
            return "is not finite"
        case int() if abs(value) >= 2**63:
            return "needs more than 64 bits"
        case str() if "\0" in value:
            return "holds a NUL character"
    return ""


def shown(value: Any) -> str:
    """Return a value as it may be written in a message: cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN // 2]}... ({len(text)} characters)"


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``; did you mean NAME?`` for the known name that is most like ``name``; empty when none is."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
