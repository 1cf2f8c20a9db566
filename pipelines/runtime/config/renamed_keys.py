"""Renamed configuration keys, old -> new, as old experiments, manifests and unfinished runs still spell them."""

from collections.abc import Mapping
from copy import deepcopy
from functools import reduce
from typing import Any

from pipelines.runtime.config.dotted_keys import below, is_among

_TRAINING = {"panel_every": "validate_every", "self_test_every": "replica_check_every"}
# Stage -> old dotted key -> new one, relative to the stage's table. A renamed table takes its keys along.
RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "train_vae": _TRAINING,
    "train_unet": {**_TRAINING, "panel": "grid"},
}


def new_name(stage: str, key: str) -> str:
    """Return the present name of a dotted key of a stage; the key itself when it was not renamed."""
    return next(
        (new + key[len(old) :] for old, new in RENAMED_KEYS.get(stage, {}).items() if is_among(key, (old,))), key
    )


def with_new_names(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's nested configuration under the present names of its keys."""
    renamed = deepcopy(dict(config))
    for old, new in RENAMED_KEYS.get(stage, {}).items():
        *tables, last = old.split(".")
        table: Any = reduce(below, tables, renamed)
        if isinstance(table, dict) and last in table:
            value = table.pop(last)
            *tables, last = new.split(".")
            reduce(lambda place, name: place.setdefault(name, {}), tables, renamed)[last] = value
    return renamed
