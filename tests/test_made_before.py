"""Folders that version 0.1 made: what was finished stays valid, what was begun goes on or is refused with a way on."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STAGES, run_here
from safetensors.torch import load_file

from data.loading import ImageShards, LatentShards
from data.manifest import EvaluationManifest, read_input, read_manifest

OLD = Path(__file__).with_name("made_by_0_1")
RENAMED = {"panel_every": "validate_every", "self_test_every": "replica_check_every", "panel = ": "grid = "}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return shutil.copytree(OLD, tmp_path / "run")


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """The experiment with today's names."""
    text = (OLD / "experiment.toml").read_text()
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    (tmp_path / "experiment.toml").write_text(text)
    return tmp_path / "experiment.toml"


def test_manifests_keep_the_digests_that_their_children_name(root: Path) -> None:
    manifests = {name: read_input(name, root / name) for name in ("corpus", "vae", "latents", "unet")}
    evaluation = read_manifest(root / "evaluation")
    assert isinstance(evaluation, EvaluationManifest)
    named = [(name, digest) for child in (*manifests.values(), evaluation) for name, digest in child.parents.items()]
    assert len(named) == 8
    for name, digest in named:
        assert manifests[name].digest == digest


def test_shards_are_read(root: Path) -> None:
    images = ImageShards(root / "corpus", split="train").read(np.arange(8))
    latents = LatentShards(root / "latents", split="train").read(np.arange(8), flipped=np.arange(8) % 2 == 0)
    assert images.keys == latents.keys
    assert images.images.std() > 10
    assert np.isfinite(latents.moments.astype(np.float32)).all()


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_done(stage: str, root: Path, experiment: Path) -> None:
    done = run_here(stage, "--run.root", str(root), config=experiment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "already finished" in done.stdout


def test_samples_are_drawn_from_its_model(root: Path, experiment: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples"
    done = run_here("sample", "--run.root", str(root), "--number", "4", "--output", str(output), config=experiment)
    assert done.returncode == 0, done.stderr
    assert len(list(output.glob("0*.png"))) == 4


def test_an_old_key_is_answered_with_the_new_one(root: Path) -> None:
    done = run_here("train_unet", "--run.root", str(root), config=OLD / "experiment.toml")
    assert done.returncode == 2
    for new in ("train_unet.grid", "train_unet.validate_every", "train_unet.replica_check_every"):
        assert new in done.stderr


def test_a_training_starts_from_its_weights_and_is_trained_on_after_its_end(
    root: Path, experiment: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "vae"
    words = ("--run.root", str(folder.parent), "--inputs.corpus", str(root / "corpus"), "--optim.peak_lr", "1e-6")
    words = (*words, "--start", f'{{ kind = "run", folder = "{root / "vae"}" }}')
    weights = []
    for more in (("--updates", "2"), ("--updates", "4", "--run.allow_changed", '["updates"]')):
        done = run_here("train_vae", *words, *more, config=experiment)
        assert done.returncode == 0, done.stderr
        manifest = read_input("vae", folder)
        assert manifest.start == read_input("vae", root / "vae").weights
        assert manifest.config["updates"] == int(more[1])
        weights.append(load_file(folder / "vae.safetensors"))
    assert "was finished after update 2: its manifest is removed, it trains on until update 4" in done.stdout
    old = load_file(root / "vae" / "vae.safetensors")
    for found in weights:
        for name, value in old.items():  # at a rate of almost nothing
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)
    done = run_here("train_vae", *words, "--updates", "2", config=experiment)
    assert done.returncode == 2
    assert "give a larger --updates with --allow-changed updates" in done.stderr


def test_an_unfinished_training_is_refused_with_a_way_on(root: Path, experiment: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "unfinished" / "unet", tmp_path / "begun" / "unet")
    inputs = ("--inputs.latents", str(root / "latents"), "--inputs.vae", str(root / "vae"))
    words = ("train_unet", "--run.root", str(tmp_path / "begun"), *inputs)
    done = run_here(*words, config=experiment)
    assert done.returncode == 2
    assert "an older version began it; since then validation looks at a sample" in done.stderr
    assert "run.root" in done.stderr
    done = run_here(*words, "--allow-changed", "revisions", config=experiment)
    assert done.returncode == 2
    assert "verdicts" in done.stderr, "its checkpoints cannot be read"


def test_an_unfinished_encoding_is_refused_with_a_way_on(root: Path, experiment: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "unfinished" / "latents", tmp_path / "begun" / "latents")
    inputs = ("--inputs.corpus", str(root / "corpus"), "--inputs.vae", str(root / "vae"))
    done = run_here("encode_latents", "--run.root", str(tmp_path / "begun"), *inputs, config=experiment)
    assert done.returncode == 2
    assert "since then JPEGs are cropped" in done.stderr
    assert "run.root" in done.stderr
