"""Configuration keys of older versions, whose experiments, manifests and unfinished runs are still read.

Renamed keys, old -> new, and keys that older versions lacked, with the value that says what they did.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

_TRAINING = {"panel_every": "validate_every", "self_test_every": "replica_check_every"}
# Stage -> old key of the stage's table -> new one. A renamed table takes its keys along.
RENAMED_KEYS: Mapping[str, Mapping[str, str]] = {
    "train_vae": _TRAINING,
    "train_unet": {**_TRAINING, "panel": "grid"},
}

# Stage -> key that older versions lacked -> what they did; "*" is any name or number.
ADDED_KEYS: Mapping[str, Mapping[str, Any]] = {
    "encode_latents": {"captions.padding": "masked", "captions.pooled": "own"},
    "train_unet": {
        "denoiser.joint_drop_probability": 0.0,
        "denoiser.conditioners.*.name": "text",
        "denoiser.conditioners.*.encoder.padding": "masked",
        "denoiser.conditioners.*.encoder.pooled": "own",
    },
}


def new_name(stage: str, key: str) -> str:
    """Return the present name of a dotted key of a stage; the key itself when it was not renamed."""
    first, dot, rest = key.partition(".")
    return RENAMED_KEYS.get(stage, {}).get(first, first) + dot + rest


def with_new_names(stage: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's nested configuration under the present names of its keys."""
    return {new_name(stage, key): value for key, value in config.items()}


def lacked_values(stage: str, keys: Iterable[str]) -> dict[str, Any]:
    """Return what an older version did by dotted key, for those of ``keys`` that it lacked."""
    added = ADDED_KEYS.get(stage, {})
    return {key: value for key in keys for pattern, value in added.items() if fnmatchcase(key, pattern)}
