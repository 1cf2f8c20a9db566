"""Trace a sample back to what it was made of: U-Net, latents, VAE and corpus, and the training images nearest to it.

    latentline trace runs/demo/evaluation/samples-000000.tar:guidance_2p5-000007     a member of a sample tar
    latentline trace samples/000000-sneaker-seed0.png                                an image of `latentline sample`
    latentline trace exported/README.md                                              an exported model's card
    latentline trace runs/demo/unet                                                  a run, or its id in MLflow

Ancestors are found by digest among all stages below ``search``, so that a folder may have been moved or renamed; one
that is not there is named with what is known of it. Exit code 1 when any is missing.
"""

import json
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field
from safetensors.numpy import load_file

from data.loading import ImageShards
from data.manifest import CorpusManifest, read_manifest
from data.samples import PNG_KEYWORD
from pipelines.evaluation.figures import features_name
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, CommandConfig
from pipelines.runtime.stage.lineage import FinishedStage, ancestors_by_digest, stages_below

SHOWN = ("weights", "code", "source", "shards", "MLflow run", "command")  # of each ancestor
SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


class TraceConfig(CommandConfig):
    """Sample to trace."""

    positional = "samples"

    samples: Annotated[tuple[str, ...], Field(min_length=1)]  # TAR:KEY, PNG, card, stage's folder, or MLflow run's id
    search: str = "."  # folder below which ancestors are looked for


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(TraceConfig, trace, table="trace", about=__doc__, argv=argv)


def trace(config: TraceConfig) -> Answer:
    """Find all ancestors of each sample."""
    known = stages_below(Path(config.search))
    with config_error_at("trace.samples"):
        beginnings = {sample: beginning_of(sample, known) for sample in config.samples}
    traced = [traced_back(sample, beginning, known) for sample, beginning in beginnings.items()]
    texts = [text_of(each, searched=config.search) for each in traced]
    return Answer({"samples": traced}, "\n\n".join(texts), code=int(any(each["missing"] for each in traced)))


def traced_back(sample: str, beginning: "Beginning", known: Mapping[str, FinishedStage]) -> dict[str, Any]:
    """Return what a sample was made of: how it was drawn, its ancestors, what is missing, and the nearest image."""
    found, missing = ancestors_by_digest(beginning.digests, known)
    rows = [stage.record for name in STAGE_FOLDERS for stage in found if stage.manifest.stage == name]
    near = nearest_image(beginning, found)
    return {"sample": sample, **beginning.about, "ancestors": rows, "missing": missing, "nearest": near}


def text_of(traced: Mapping[str, Any], *, searched: str) -> str:
    """Return the same as lines."""
    about = {key: value for key, value in traced.items() if key not in ("sample", "ancestors", "missing", "nearest")}
    lines = [f"{traced['sample']}: " + ", ".join(f"{key} {value}" for key, value in about.items())]
    for row in traced["ancestors"]:
        lines.append(f"{row['stage']}  {row['digest'][:12]}  {row['folder']}")
        lines += [f"    {key}: {row[key]}" for key in SHOWN if row.get(key)]
    lines += [f"missing: {what} {digest[:12]}, not below {searched}" for digest, what in traced["missing"].items()]
    if near := traced["nearest"]:
        far = "not equal to it, as a copy would be" if near["distance"] is None else ""
        far = far or f"at {near['distance']:.2f} times the distance of a copy"
        lines.append(f"nearest training image: {near['key']} in {near['shard']}, {far}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Beginning:
    """What is known of a sample itself: digests of what made it, and how it was drawn."""

    digests: dict[str, str]  # of a manifest, or of weights -> what it is
    about: dict[str, Any]
    evaluation: Path | None = None


def beginning_of(sample: str, known: Mapping[str, FinishedStage]) -> Beginning:
    """Read what a sample says of itself.

    Raises:
        ValueError: It is nothing that can be traced, or says nothing.
    """
    path, _, key = sample.rpartition(":")
    try:
        if path.endswith(".tar") and Path(path).is_file():
            return _of_member(Path(path), key)
        if sample.endswith(".png") and Path(sample).is_file():
            return _of_png(Path(sample))
    except (tarfile.TarError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{sample} does not say what drew it, or not as Latentline does ({error!r}).") from None
    if Path(sample).is_dir():
        return Beginning({read_manifest(sample).digest: "run"}, {"run": sample})
    if Path(sample).is_file():
        digests = SHA256.findall(Path(sample).read_text(errors="replace"))
        if not digests:
            raise ValueError(f"{sample} names no weights.")
        return Beginning(dict.fromkeys(digests, "weights"), {"card": sample})
    for stage in known.values():
        if stage.mlflow_run_id == sample:
            return Beginning({stage.manifest.digest: "run"}, {"run": sample})
    raise ValueError(f"there is no tar member, PNG, model card, folder or finished run of that name: {sample!r}.")


def _of_png(path: Path) -> Beginning:
    with Image.open(path) as picture:
        about = json.loads(picture.info[PNG_KEYWORD])
    names = ("unet", "vae", *(["guide"] if "guide" in about else []))
    return Beginning({about.pop(name): name for name in names}, about)


def _of_member(tar: Path, key: str) -> Beginning:
    with tarfile.open(tar) as members:
        try:
            file = members.extractfile(f"{key}.json")
        except KeyError:
            raise ValueError(f"{tar} holds no {key}.json. Name a sample as TAR:KEY.") from None
        assert file is not None
        about = json.load(file)
    digests = {about.pop(name): name for name in ("unet", "vae", "guide") if name in about}
    if not digests:  # an older version's samples name nothing, but lie beside the manifest
        digests = {read_manifest(tar.parent).digest: "evaluation"}
    return Beginning(digests, {"key": key, **about}, tar.parent)


def nearest_image(beginning: Beginning, found: Sequence[FinishedStage]) -> dict[str, Any]:
    """Return the training image nearest to a sample, as its evaluation has found it; empty where it has not."""
    if beginning.evaluation is None:
        return {}
    kind, _, index = beginning.about["key"].rpartition("-")
    try:
        stored = load_file(beginning.evaluation / features_name(kind))
        place, distance = (stored[f"nearest.{name}"][int(index)] for name in ("index", "distance"))
        corpus = next(stage for stage in found if isinstance(stage.manifest, CorpusManifest))
    except (OSError, KeyError, ValueError, IndexError, StopIteration):
        return {}
    shards, rows = ImageShards(corpus.folder, split="train").locate(np.array([place]))
    far = float(distance) if np.isfinite(distance) else None  # JSON has no infinity
    return {"key": shards[0].key(rows[0]), "shard": shards[0].name, "distance": far}


if __name__ == "__main__":
    sys.exit(main())
