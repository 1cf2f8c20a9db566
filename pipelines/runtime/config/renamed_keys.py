"""Renamed configuration keys, old -> new, as old experiments, manifests and unfinished runs still spell them."""

from collections.abc import Mapping
from typing import Any

_TRAINING = {"panel_every": "validate_every", "self_test_every": "replica_check_every"}
# Stage -> old key of the stage's table -> new one. A renamed table takes its keys along.
RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "train_vae": _TRAINING,
    "train_unet": {**_TRAINING, "panel": "grid"},
}


def new_name(stage: str, key: str) -> str:
    """Return the present name of a dotted key of a stage; the key itself when it was not renamed."""
    first, dot, rest = key.partition(".")
    return RENAMED_KEYS.get(stage, {}).get(first, first) + dot + rest


def with_new_names(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's nested configuration under the present names of its keys."""
    return {new_name(stage, key): value for key, value in config.items()}
