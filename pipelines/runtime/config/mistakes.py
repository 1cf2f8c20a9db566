"""Validation errors in the user's terms: source, dotted key, the given value, the expected one, the nearest name."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from pipelines.runtime.config.dotted_keys import below
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.schema import model_paths, variant_at
from pipelines.runtime.config.stage_config import TOOL_TABLES, CommandConfig


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
    shown = key if parts[:1] == ["run"] else f"{table}.{key}" if key else f"[{table}]"
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    source = next((sources[prefix] for prefix in prefixes if prefix in sources), None)
    source = source or next(
        (name for leaf, name in sources.items() if leaf.startswith(f"{key}.") or not key), "default"
    )
    hidden = detail["type"] == "missing" or isinstance(detail["input"], dict | BaseModel)
    given = "" if hidden else f" = {detail['input']!r}"
    if detail["type"] == "extra_forbidden":
        variant = variant_at(model, tree, parts[:-1])
        siblings = list(variant.model_fields) if variant is not None else []
        everything = [".".join((*path, name)) for path, name, _, _ in model_paths(model)]
        everything += ["config", "help", "print_config", *(["json"] if table in TOOL_TABLES else [])]
        hint = nearest(parts[-1], siblings) or nearest(key, everything) or f"; known here: {', '.join(siblings)}"
        advice = f"unknown key{hint}"
    elif detail["type"] in ("union_tag_invalid", "literal_error"):
        shown += ".kind" if detail["type"] == "union_tag_invalid" else ""
        expected = str(detail["ctx"].get("expected_tags") or detail["ctx"].get("expected"))
        found = detail["ctx"].get("tag", detail["input"])
        given = f" = {found!r}"
        names = re.findall(r"'([^']*)'", expected)
        advice = f"expected one of {expected}{nearest(str(found), names)}"
    elif detail["type"] == "missing":
        advice = "missing: this key has no default" + "; give words without a name" * (key == model.positional)
    else:
        advice = re.sub(r"^(Value error|Assertion failed), ", "", detail["msg"])
        advice = advice.replace("Input should be", "expected").replace("\n", "\n      ")
    return without_credentials(f"  {shown}{given} ({source})\n      {advice}", queries=True)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``; did you mean NAME?`` for the known name that is most like ``name``; empty when none is."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""
