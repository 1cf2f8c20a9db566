"""Dotted keys: nested tables as flat ones, such as ``denoiser.conditioners.0.kind``."""

import json
from collections.abc import Collection, Mapping
from typing import Any


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves by dotted key; a list of tables is numbered, a list of plain values is one leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            leaves |= flattened(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def flattened_texts(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the leaves by dotted key as texts: a text as it is, anything else as JSON."""
    leaves = flattened(tree)
    return {key: leaf if isinstance(leaf, str) else json.dumps(leaf, default=str) for key, leaf in leaves.items()}


def is_among(key: str, names: Collection[str]) -> bool:
    """Return whether a dotted key is one of ``names`` or lies in one of their tables."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def below(tree: Any, part: str | int) -> Any:
    """Return the element of a table or list at one part of a dotted key; None where there is none."""
    if isinstance(tree, dict):
        return tree.get(part)
    return tree[int(part)] if isinstance(tree, list) and str(part).isdigit() and int(part) < len(tree) else None
