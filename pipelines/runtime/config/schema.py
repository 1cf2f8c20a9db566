"""Walks over configuration models: their fields by dotted name, with types, defaults and comments."""

import ast
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pipelines.runtime.config.dotted_keys import below
from pipelines.runtime.config.stage_config import INPUT_FOLDERS


def unwrapped(annotation: Any) -> Any:
    """Strip ``Annotated``."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def variants_of(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Return the models an annotation admits: one for a nested model, several for a union by ``kind``, else none."""
    annotation = unwrapped(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return (annotation,)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(variant for part in get_args(annotation) for variant in variants_of(part))
    return ()


def kind_of(variant: type[BaseModel]) -> str | None:
    """Return the value of a variant's ``kind``, or None for a model that is no variant."""
    field = variant.model_fields.get("kind")
    return get_args(field.annotation)[0] if field is not None and get_origin(field.annotation) is Literal else None


def _chosen(annotation: Any, tree: Any, default: Any) -> type[BaseModel] | None:
    """Return the variant that ``tree`` describes: the one of its ``kind``, else the default's, else the only one."""
    variants = variants_of(annotation)
    if len(variants) == 1:
        return variants[0]
    given = tree.get("kind") if isinstance(tree, dict) else None
    wanted = given if given is not None else getattr(default, "kind", None)
    return next((variant for variant in variants if kind_of(variant) == wanted), None)


def complete(model: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """Fill partly given tables from the field's default, so that one changed key never resets its neighbours."""
    out = dict(tree)
    for name, field in model.model_fields.items():
        given = out.get(name)
        if isinstance(given, list):
            element = next(iter(get_args(unwrapped(field.annotation))), None)
            out[name] = [_completed(item, element, default=None) for item in given]
        elif isinstance(given, dict):
            out[name] = _completed(given, field.annotation, default=field.get_default(call_default_factory=False))
    return out


def _completed(given: Any, annotation: Any, *, default: Any) -> Any:
    """Return the table ``given`` for a field, filled from the field's default; anything else as it is."""
    variant = _chosen(annotation, given, default) if isinstance(given, dict) else None
    if variant is None:
        return given
    if isinstance(default, variant):
        # What a factory made of the default's other fields follows from those that are given now.
        factories = {name for name, field in variant.model_fields.items() if field.default_factory}
        given = _merged(default.model_dump(mode="json", exclude=factories - default.model_fields_set), given)
    return complete(variant, given)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = {**base, **over}
    for key in base.keys() & over.keys():
        old, new = base[key], over[key]
        if isinstance(old, dict) and isinstance(new, dict) and new.get("kind", old.get("kind")) == old.get("kind"):
            out[key] = _merged(old, new)
    return out


def annotation_at(model: type[BaseModel], tree: Any, parts: Sequence[str]) -> Any:
    """Return the type at a dotted name: ``str`` for anything textual, else the annotation; None where there is none."""
    annotation = _at(model, tree, parts)[0]
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    textual = annotation in (str, Path) or (choices and all(isinstance(choice, str) for choice in choices))
    return str if textual else annotation


def variant_at(model: type[BaseModel], tree: Any, parts: Sequence[str]) -> type[BaseModel] | None:
    """Return the model at a dotted name, given the variants that ``tree`` chose."""
    return _at(model, tree, parts)[1]


def _at(model: type[BaseModel], tree: Any, parts: Sequence[str]) -> tuple[Any, type[BaseModel] | None]:
    """Return annotation and chosen model at a dotted name; None for what is not there."""
    annotation: Any = model
    chosen: type[BaseModel] | None = model
    for part in parts:
        default = None
        if get_origin(annotation) in (tuple, list) and part.isdigit():
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) is Mapping:
            annotation = get_args(annotation)[1]
        elif chosen is not None and part in chosen.model_fields:
            field = chosen.model_fields[part]
            annotation, default = field.annotation, field.get_default(call_default_factory=False)
        else:
            return str if part == "kind" else None, None
        annotation, tree = unwrapped(annotation), below(tree, part)
        chosen = _chosen(annotation, tree, default)
    return annotation, chosen


@lru_cache(maxsize=256)
def field_comments(model: type[BaseModel]) -> dict[str, str]:
    """Return the comment that stands beside each field in the source: the one home of its unit and meaning."""
    comments: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base is BaseModel or not issubclass(base, BaseModel):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except OSError:
            continue
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
                found = [match[1] for line in lines if (match := re.search(r"  # (.*)$", line))]
                comments[node.target.id] = found[0].strip() if found else ""
    return comments


def model_paths(
    model: type[BaseModel], default: Any = None, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, str, str]]:
    """Yield (path, field, default as text, comment) for every field below ``model``, all variants included."""
    comments = field_comments(model)
    for name, field in model.model_fields.items():
        value = getattr(default, name, field.get_default(call_default_factory=False))
        annotation, path_below = unwrapped(field.annotation), (*path, name)
        if get_origin(annotation) in (tuple, list):
            annotation, path_below = get_args(annotation)[0], (*path, f"{name}.0")
        variants = variants_of(annotation)
        if not variants:
            shown = f"<run.root>/{INPUT_FOLDERS.get(name, name)}" if path == ("inputs",) else _shown(value)
            yield path, name, shown, comments.get(name, "") + _choices(annotation)
        for variant in variants:
            kind = kind_of(variant)
            chosen = value if isinstance(value, variant) else None
            if len(variants) > 1 or kind is not None:
                text = (variant.__doc__ or "").strip().partition("\n")[0]
                yield path_below, "kind", f"{kind}{' (default)' if chosen is not None else ''}", text
            for row in model_paths(variant, chosen, path_below):
                if row[1] != "kind" or row[0] != path_below:
                    yield row


def _choices(annotation: Any) -> str:
    """Return the values that a field is chosen from; empty where any of its type will do."""
    return f" ({', '.join(map(str, get_args(annotation)))})" if get_origin(annotation) is Literal else ""


def _shown(value: Any) -> str:
    if value is PydanticUndefined:
        return "(required)"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)
