"""Lineage: finished stages by their digests, and what each says of how it was made."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import read_json
from data.manifest import MANIFEST_NAME, CorpusManifest, Manifest, read_manifest
from pipelines.runtime.config.outcome import OUTCOME_NAME
from pipelines.runtime.tracking.identity import RUN_FILE, RunIdentity

DEEPEST = 4  # folders below the one in which stages are looked for


@dataclass(frozen=True)
class FinishedStage:
    """A finished stage's folder."""

    folder: Path
    manifest: Manifest

    @property
    def mlflow_run_id(self) -> str:
        """Id of its run; empty where it was never sent."""
        return RunIdentity.read(self.folder).mlflow_run_id if (self.folder / RUN_FILE).exists() else ""

    @property
    def record(self) -> dict[str, Any]:
        """What its folder says of it; plain JSON, "" for what it does not say."""
        manifest, about, outcome = self.manifest, self.manifest.provenance, self.folder / OUTCOME_NAME
        of_corpus = isinstance(manifest, CorpusManifest)
        hours = (about["ended"] - about["began"]) / 3600 if {"began", "ended"} <= about.keys() else 0.0
        processes = int(about.get("world_size", 1))
        return {
            "stage": manifest.stage,
            "digest": manifest.digest,
            "folder": str(self.folder),
            "weights": getattr(manifest, "weights", ""),
            "code": about.get("code_version", ""),
            **({"source": manifest.config.get("source"), "shards": len(manifest.files)} if of_corpus else {}),
            "MLflow run": self.mlflow_run_id,
            "command": read_json(outcome, mend="Remove it.").get("resume_command", "") if outcome.exists() else "",
            "machine": f"{processes} process(es), {about.get('hardware', '')}, torch {about.get('torch', '')}",
            "hours": hours,
            "process_hours": hours * processes,
        }


def stages_below(folder: Path) -> dict[str, FinishedStage]:
    """Return all finished stages by the digests of their manifests and of their weights."""
    found: dict[str, FinishedStage] = {}
    for depth in range(DEEPEST + 1):
        for path in sorted(folder.glob("*/" * depth + MANIFEST_NAME)):
            try:
                stage = FinishedStage(path.parent, read_manifest(path.parent))
            except (OSError, ValueError):  # a checkpoint's, or damaged
                continue
            weights = getattr(stage.manifest, "weights", "") if stage.manifest.stage != "evaluate" else ""
            found |= dict.fromkeys(filter(None, (stage.manifest.digest, weights)), stage)
    return found


def ancestors_by_digest(
    digests: Mapping[str, str], known: Mapping[str, FinishedStage]
) -> tuple[list[FinishedStage], dict[str, str]]:
    """Return the stages that some digests lead to, and what is missing by digest."""
    found, missing, ahead = dict[str, FinishedStage](), dict[str, str](), dict(digests)
    while ahead:
        digest, what = ahead.popitem()
        if digest not in known:
            missing[digest] = what
        elif (stage := known[digest]).manifest.digest not in found:
            found[stage.manifest.digest] = stage
            ahead |= {parent: f"{name} of {stage.folder}" for name, parent in stage.manifest.parents.items()}
    return list(found.values()), missing


def ancestors_by_folder(folder: Path) -> dict[str, FinishedStage]:
    """Return a stage and all that it came from, by name, as far as they are still where it read them."""
    found, ahead = dict[str, FinishedStage](), [folder]
    while ahead:
        place = ahead.pop(0)
        try:
            manifest = read_manifest(place)
        except (OSError, ValueError):
            continue
        if manifest.stage not in found:
            found[manifest.stage] = FinishedStage(place, manifest)
            inputs = manifest.provenance.get("inputs", {}).items()
            ahead += [Path(given) for name, given in inputs if given and name != "guide"]  # it is a second U-Net
    return found
