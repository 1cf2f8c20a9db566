"""Fingerprint of a stage: its configuration and its inputs' digests, and whether that very work is done already."""

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from data.files import read_json, write_json
from data.manifest import MANIFEST_NAME, Manifest, Parents, read_input, read_manifest
from pipelines.runtime.config.dotted_keys import flattened, is_among
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.renamed_keys import lacked_values, new_name, with_new_names
from pipelines.runtime.config.stage_config import StageConfig

REQUEST_NAME = "request.json"


def read_parents(config: StageConfig) -> Parents:
    """Read the manifests of a stage's inputs, which are the fields of ``config.inputs``.

    Raises:
        ConfigError: Naming every input that is missing, unreadable, or of another kind.
    """
    parents, mistakes = Parents(), []
    for name, folder in inputs_of(config).items():
        try:
            parents[name] = read_input(name, folder)
        except (ValueError, OSError) as error:
            mistakes.append(f"inputs.{name} = {folder!r}: {error}")
    if mistakes:
        raise ConfigError("\n  ".join(mistakes))
    return parents


def inputs_of(config: StageConfig) -> dict[str, str]:
    """Return a stage's input folders by name; an optional input that is not given is left out."""
    inputs = getattr(config, "inputs", None)
    fields = type(inputs).model_fields if inputs is not None else {}
    folders = {name: str(getattr(inputs, name)) for name in fields}
    return {name: folder for name, folder in folders.items() if folder or fields[name].is_required()}


def fingerprint_of(name: str, config: StageConfig, parents: Mapping[str, Manifest]) -> dict[str, Any]:
    """Return what the stage is asked to do: its configuration without places, and its parents' digests.

    Places (``run.*``, ``inputs.*``) and the keys in ``fingerprint_ignores`` do not change the result, so equal work
    has an equal digest wherever it was done.
    """
    whole = config.model_dump(mode="json", exclude={"run", "inputs"})
    for key in config.fingerprint_ignores:
        *tables, last = key.split(".")
        reduce(lambda table, name: table[name], tables, whole).pop(last)
    return {"stage": name, "config": whole, "parents": {key: parent.digest for key, parent in sorted(parents.items())}}


def keys_at_default(config: StageConfig) -> frozenset[str]:
    """Return the dotted keys whose value is the default: what an older version did that did not know them."""
    places = {"run", "inputs"}
    changed = flattened(config.model_dump(mode="json", exclude=places, exclude_defaults=True))
    whole = flattened(config.model_dump(mode="json", exclude=places))
    return frozenset(key for key in whole if not is_among(key, changed))


def ignored_values(config: StageConfig) -> dict[str, Any]:
    """Return the values of the keys that the fingerprint ignores, by dotted key."""
    leaves = flattened(config.model_dump(mode="json", exclude={"run", "inputs"}))
    return {key: value for key, value in leaves.items() if is_among(key, config.fingerprint_ignores)}


def begin(
    folder: Path, request: Mapping[str, Any], *, fingerprint_ignores: Mapping[str, Any], revisions: Sequence[str] = ()
) -> list[str]:
    """Write down what the stage now does, and return what of it has changed since its last start, line by line."""
    lines = []
    if before := begun_with(folder, request["stage"]):
        lines = [line for _, line in differing_keys(before, request, revisions=revisions)]
        # Up to a renaming the object was called "harmless".
        ignored = before.get("fingerprint_ignores", before.get("harmless", fingerprint_ignores))
        ignored = {new_name(request["stage"], key): value for key, value in ignored.items()}
        lines += [line for _, line in _differences(ignored, fingerprint_ignores)]
    write_json(
        folder / REQUEST_NAME,
        {**request, "fingerprint_ignores": dict(fingerprint_ignores), "revisions": list(revisions)},
    )
    return lines


def begun_with(folder: Path, stage: str) -> dict[str, Any] | None:
    """Return the request that the unfinished work in ``folder`` was begun with; None where nothing is begun.

    Raises:
        ConfigError: It is damaged, or another stage's.
    """
    # A corpus is begun with the listing of its source: a source that could not be opened binds nobody.
    if stage == "prepare_corpus" and not any((folder / name).exists() for name in ("listing.json", "parts")):
        return None
    path, away = folder / REQUEST_NAME, f"Restore it, choose another run.root, or move {folder} away."
    try:
        before = read_json(path, mend=f"It says what {folder} was begun with. {away}")
        if not all(isinstance(before.get(name), dict) for name in ("config", "parents")):
            raise ValueError(f"{path} is damaged (it holds no request). {away}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _check_stage(folder, before.get("stage", stage), stage)
    return before


def _check_stage(folder: Path, found: str, stage: str) -> None:
    if found != stage:
        raise ConfigError(
            f"{folder} holds the work of {found}, not of {stage}. Choose another run.root, or move the folder away."
        )


def ancestors(parents: Mapping[str, Manifest]) -> dict[str, str]:
    """Return the digests of the inputs and of what those were made from, as far as the manifests tell."""
    older = {key: digest for parent in parents.values() for key, digest in parent.parents.items()}
    return {**older, **{key: parent.digest for key, parent in parents.items()}}


def already_done(
    folder: Path,
    request: Mapping[str, Any],
    *,
    allowed: tuple[str, ...],
    fingerprint_ignores: Collection[str] = (),
    at_default: Collection[str] = (),
    revisions: Sequence[str] | None = None,
) -> bool:
    """Return whether the stage has finished this very request; False when it has yet to start or to continue.

    Args:
        folder: Of the stage.
        request: What it is asked to do.
        allowed: Keys whose change the user accepts. Only a training stage heeds them: finished parts of the others stay
            as they are, so that a changed request would mix with the old one. One that is finished heeds them, and is
            then unfinished, where ``updates`` is among them and has grown.
        fingerprint_ignores: Keys that do not matter, though an older version may have written them down.
        at_default: Keys that have their default, which is no difference where an older version did not know them.
        revisions: Of the stage's configuration. What is finished stays valid: they count for what is begun.

    Raises:
        ConfigError: The folder holds another request's work; the message shows each difference.
    """
    finished, trains = (folder / MANIFEST_NAME).is_file(), request["stage"].startswith("train_")
    if finished:
        try:
            before: Mapping[str, Any] = read_manifest(folder).content
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _check_stage(folder, before["stage"], request["stage"])
    elif (begun := begun_with(folder, request["stage"])) is not None:
        before = begun
    else:
        return False

    # A training is longer now: it is unfinished work, of the versions that have worked on it.
    if finished and trains and "updates" in allowed and request["config"]["updates"] > before["config"]["updates"]:
        finished = False
        if (begun := begun_with(folder, request["stage"])) is not None:
            before = {**before, "revisions": begun.get("revisions", ())}

    # What differs, but for what may.
    can_change = trains and not finished
    differences = [
        line
        for key, line in differing_keys(
            before,
            request,
            fingerprint_ignores=fingerprint_ignores,
            at_default=at_default,
            revisions=None if finished else revisions,
        )
        if not (can_change and key in allowed)
    ]
    if not differences:
        return finished
    what = "finished with" if finished else "begun with"
    advice = ", or accept the change with --allow-changed KEY" if can_change else ""
    if finished and trains:
        advice = (
            ". To train it on from its last checkpoint, give a larger --updates with --allow-changed updates (and any "
            "other key that changes): its weights are then replaced"
        )
    raise ConfigError(
        f"{folder} was {what} another request:\n    "
        + "\n    ".join(differences)
        + "\n  Change it back, choose another "
        f"run.root, or move the folder away{advice}."
    )


def differing_keys(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    fingerprint_ignores: Collection[str] = (),
    at_default: Collection[str] = (),
    revisions: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Return (key, "key: was X, is now Y") for each difference between two requests that matters.

    Keys of ``before`` that were renamed since are compared under their present names, and those that its version
    lacked by what it did; of the rest that it lacked, those ``at_default`` are no difference. With ``revisions``, those
    that are newer than ``before`` are differences of the key "revisions".
    """
    old = flattened({"parents": before["parents"], **with_new_names(now["stage"], before["config"])})
    new = flattened({"parents": now["parents"], **now["config"]})
    old = lacked_values(now["stage"], new.keys() - old.keys()) | old
    if revisions is None:  # what is finished by a version that knew fewer inputs stays valid, but for other samples
        known_inputs = {"parents.guide", *old}
        new = {key: value for key, value in new.items() if not key.startswith("parents.") or key in known_inputs}
    found = [
        (key, line)
        for key, line in _differences(old, new)
        if not is_among(key, fingerprint_ignores) and not (key in at_default and _is_new(key, old))
    ]
    known = before.get("revisions", ())
    if revisions is not None and not set(known) <= set(revisions):
        found.append(("revisions", "revisions: a newer version of Latentline began it; continue with that one"))
    newer = [change for change in revisions or () if change not in known]
    return found + [("revisions", f"revisions: an older version began it; since then {change}") for change in newer]


def _is_new(key: str, old: Mapping[str, Any]) -> bool:
    """Return whether ``old`` was written by a version without this key; one more table of a list is no new key."""
    parts = key.split(".")
    above = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
    unknown = next((each for each in above if not any(is_among(known, (each,)) for known in old)), "")
    return bool(unknown) and not unknown.rsplit(".", 1)[-1].isdigit()


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, f"{key}: was {_show(old.get(key))}, is now {_show(new.get(key))}")
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _show(value: Any) -> str:
    return "absent" if value is None else str(value)
