"""The whole road through real launches: artefacts, equality over process counts, and stopping anywhere."""

import json
import random
import re
import shutil
import signal
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from conftest import (
    SMOKE,
    STAGES,
    Run,
    kill_tree,
    run_here,
    run_stage,
    stage_command,
    start_ranks,
    start_warm,
    time,
    training_rows,
    wait_until,
)
from PIL import Image
from warm import WarmProcess

from data.files import sha256_of


def test_every_stage_leaves_its_artefacts(two_process_run: Run) -> None:
    expected = {
        "prepare_corpus": ["manifest.json", "train-000000.tar", "train-000003.tar", "val-000000.tar"],
        "train_vae": ["manifest.json", "config.json", "vae.safetensors", "metrics.jsonl", "checkpoints"],
        "encode_latents": ["manifest.json", "train-000000.tar", "train-000003.tar", "val-000000.tar"],
        "train_unet": ["manifest.json", "config.json", "unet.safetensors", "metrics.jsonl", "checkpoints"],
        "evaluate": ["manifest.json", "metrics.json", "samples.png", "samples-000000.tar"],
    }
    for stage, names in expected.items():
        folder = two_process_run.folder(stage)
        for name in [*names, "run.json", "outcome.json", "config.toml"]:
            assert (folder / name).exists(), f"{folder.name}/{name}"
        assert json.loads((folder / "outcome.json").read_bytes())["state"] == "done"
        assert not list(folder.rglob("*.tmp"))


def test_two_processes_really_are_two_and_one_of_them_speaks(two_process_run: Run) -> None:
    for stage in STAGES:
        said = [line for line in two_process_run.output[stage].splitlines() if "2 process(es) x 1 thread" in line]
        assert len(said) == 1, "the main process alone says so, and once"
        assert re.match(rf"\d\d:\d\d:\d\d INFO {stage}\[0/2\] 2 process", said[0]), said


def test_every_training_update_is_logged_once(two_process_run: Run) -> None:
    for stage in ("train_vae", "train_unet"):
        rows = two_process_run.rows(stage)
        assert sorted(rows) == list(range(1, 25))
        assert all(row["batch"] == row["update"] - 1 for row in rows.values())


def test_manifests_name_their_parents_by_digest(two_process_run: Run) -> None:
    from data.manifest import read_manifest

    digests = {folder: read_manifest(two_process_run.root / folder).digest for folder in STAGES.values()}
    wanted = {
        "prepare_corpus": [],
        "train_vae": ["corpus"],
        "encode_latents": ["corpus", "vae"],
        "train_unet": ["latents", "vae"],
        "evaluate": ["corpus", "latents", "unet", "vae"],
    }
    for stage, parents in wanted.items():
        content = two_process_run.manifest(stage)["content"]
        assert content["parents"] == {name: digests[name] for name in parents}
        assert content["counts"]["in"] == content["counts"]["out"]


def test_one_and_two_processes_make_the_same_shards_and_latents(one_process_run: Run, two_process_run: Run) -> None:
    stages = ["prepare_corpus", "encode_latents"]
    # The two VAEs differ in rounding, so latents are compared by encoding with the same one.
    again = run_stage(
        "encode_latents",
        *("--run.root", str(one_process_run.root / "again")),
        *("--inputs.corpus", str(two_process_run.folder("prepare_corpus"))),
        *("--inputs.vae", str(two_process_run.folder("train_vae"))),
    )
    assert again.returncode == 0, again.stderr
    folders = {
        "prepare_corpus": one_process_run.folder("prepare_corpus"),
        "encode_latents": one_process_run.root / "again" / "latents",
    }
    for stage in stages:
        shards = sorted(two_process_run.folder(stage).glob("*.tar"))
        assert len(shards) == 5
        for shard in shards:
            assert sha256_of(shard) == sha256_of(folders[stage] / shard.name)


def test_one_and_two_processes_make_the_same_evaluation(one_process_run: Run, two_process_run: Run) -> None:
    inputs = [
        word
        for name, stage in (
            ("corpus", "prepare_corpus"),
            ("vae", "train_vae"),
            ("latents", "encode_latents"),
            ("unet", "train_unet"),
        )
        for word in (f"--inputs.{name}", str(two_process_run.folder(stage)))
    ]
    root = one_process_run.root / "again"
    again = run_stage("evaluate", "--run.root", str(root), *inputs)
    assert again.returncode == 0, again.stderr
    ours, theirs = root / "evaluation", two_process_run.folder("evaluate")
    for name in ("metrics.json", "samples.png", "guidance.png", "samples-000000.tar", "samples-000001.tar"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["train_vae", "train_unet"])
def test_one_and_two_processes_have_the_same_losses(stage: str, one_process_run: Run, two_process_run: Run) -> None:
    if stage == "train_unet":
        root = one_process_run.root / "unet again"
        latents, vae = two_process_run.folder("encode_latents"), two_process_run.folder("train_vae")
        again = run_stage(
            "train_unet", "--run.root", str(root), "--inputs.latents", str(latents), "--inputs.vae", str(vae)
        )
        assert again.returncode == 0, again.stderr
        ours = training_rows(root / "unet")
    else:
        ours = one_process_run.rows(stage)
    theirs = two_process_run.rows(stage)
    losses = np.array([[rows[update]["train/loss"] for update in sorted(rows)] for rows in (ours, theirs)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    if stage == "train_unet":
        # Before the first update the weights have the same bits: so has what the ranks draw and measure together.
        validated = [validation_rows(folder) for folder in (root / "unet", two_process_run.folder("train_unet"))]
        assert validated[0][0] == validated[1][0]
        for rows in validated:
            first, last = (row["val/frechet_distance"] for row in rows.values())
            assert first > last > 0


def validation_rows(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics of validation by the update they were measured after."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "val/loss" in line]
    return {line["step"]: {name: line[name] for name in line if name.startswith("val/")} for line in measured}


def test_samples_carry_class_and_provenance(two_process_run: Run) -> None:
    metrics = json.loads((two_process_run.folder("evaluate") / "metrics.json").read_bytes())
    keys, first = [], None
    for path in sorted(two_process_run.folder("evaluate").glob("samples-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    keys.append(member.name)
                    first = first or json.load(tar.extractfile(member))
    assert len(keys) == len(set(keys)) == 48 * len(metrics["sweep"])
    weights = {name: two_process_run.manifest(f"train_{name}")["content"]["weights"] for name in ("vae", "unet")}
    assert first == {"seed": 0, "index": 0, "guidance": metrics["default_guidance"], "steps": 5, **weights}
    assert metrics["contract"]["num_samples"] == 48
    assert all(np.isfinite(f["value"]) for entry in metrics["sweep"] for k, f in entry.items() if k != "guidance")


def test_the_sample_grid_shows_one_column_a_class(two_process_run: Run) -> None:
    picture = Image.open(two_process_run.folder("evaluate") / "samples.png")
    assert picture.width > 4 * 64
    assert picture.height > 8 * 64
    assert np.asarray(picture).std() > 10


def test_running_a_finished_stage_again_says_so_and_changes_nothing(two_process_run: Run) -> None:
    before = sha256_of(two_process_run.folder("train_unet") / "manifest.json")
    done = run_stage("train_unet", "--run.root", str(two_process_run.root))
    assert done.returncode == 0
    assert "already finished" in done.stdout
    assert sha256_of(two_process_run.folder("train_unet") / "manifest.json") == before


def test_every_stage_is_one_finished_run_below_one_parent(two_process_run: Run) -> None:
    import mlflow

    from data.manifest import read_manifest

    root = two_process_run.root
    store = f"sqlite:///{root.parent / 'mlflow.db'}"
    assert json.loads((root / "unet" / "run.json").read_bytes())["mlflow_run_id"], "its own sender has begun it"
    assert run_here("sync", str(root), "--tracking-uri", store, config=None).returncode == 0
    client = mlflow.MlflowClient(tracking_uri=store)
    (experiment,) = client.search_experiments(filter_string="name = 'smoke'")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"run", *(f"run/{folder}" for folder in STAGES.values())}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs["run"].info.run_id
    for stage, folder in STAGES.items():
        run = runs[f"run/{folder}"]
        local = json.loads((root / folder / "run.json").read_bytes())
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.tags["stage"] == stage
        assert run.data.tags["world_size"] == "2"
        assert run.info.run_id == local["mlflow_run_id"]
    evaluation = runs["run/evaluation"]
    for name in ("corpus", "vae", "latents", "unet"):
        assert evaluation.data.tags[f"digest.{name}"] == read_manifest(root / name).digest[:12]
    metrics = json.loads((root / "evaluation" / "metrics.json").read_bytes())
    (default,) = [entry for entry in metrics["sweep"] if entry["guidance"] == metrics["default_guidance"]]
    assert evaluation.data.metrics["eval/frechet_distance"] == default["frechet_distance"]["value"]
    history = client.get_metric_history(runs["run/unet"].info.run_id, "train/loss")
    assert {point.step: point.value for point in history} == {
        update: row["train/loss"] for update, row in two_process_run.rows("train_unet").items()
    }
    assert len(evaluation.inputs.dataset_inputs) == 4
    assert client.search_logged_models(experiment_ids=[experiment.experiment_id])


def start_in_copy(stage: str, run: Run, root: Path, *, processes: int) -> list[WarmProcess]:
    """Start a stage on its own in ``root``, with the inputs of a finished run."""
    inputs = {"train_vae": ["corpus"], "encode_latents": ["corpus", "vae"], "train_unet": ["latents", "vae"]}[stage]
    words = [word for name in inputs for word in (f"--inputs.{name}", str(run.root / name))]
    words += ["--validate_samples", "0"] if stage == "train_unet" else []  # which changes nothing else
    command = stage_command(stage, "--run.root", str(root), *words)[1:]
    # With the launcher the undisturbed run was made.
    return start_ranks(*command, world_size=processes) if processes > 1 else [start_warm(*command)]


@pytest.mark.parametrize("stage", ["train_vae", "train_unet"])
def test_killed_training_ends_with_the_weights_of_an_undisturbed_one(
    stage: str, two_process_run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / STAGES[stage]
    processes = start_in_copy(stage, two_process_run, tmp_path, processes=2)
    wait_until(lambda: (folder / "checkpoints/update-00000008").exists(), seconds=180, what="the first checkpoint")
    time.sleep(random.uniform(0, 0.3))
    kill_tree(*processes)
    assert not (folder / "manifest.json").exists(), "it finished before it was killed"

    assert [process.wait(timeout=120) for process in start_in_copy(stage, two_process_run, tmp_path, processes=2)] == [
        0 for _ in processes
    ]
    weights = f"{STAGES[stage]}.safetensors"
    expected = two_process_run.rows(stage)
    found = training_rows(folder)
    assert {u: row["train/loss"] for u, row in found.items()} == {u: row["train/loss"] for u, row in expected.items()}
    assert sha256_of(folder / weights) == sha256_of(two_process_run.folder(stage) / weights)


def test_killed_encoding_ends_with_the_bytes_of_an_undisturbed_one(two_process_run: Run, tmp_path: Path) -> None:
    processes = start_in_copy("encode_latents", two_process_run, tmp_path, processes=2)
    wait_until(lambda: any((tmp_path / "latents").glob("*.tar")), seconds=180, what="the first shard")
    kill_tree(*processes)
    assert not (tmp_path / "latents/manifest.json").exists(), "it finished before it was killed"
    (process,) = start_in_copy("encode_latents", two_process_run, tmp_path, processes=1)
    assert process.wait(timeout=120) == 0
    for shard in two_process_run.folder("encode_latents").glob("*.tar"):
        assert sha256_of(shard) == sha256_of(tmp_path / "latents" / shard.name)
    assert (
        two_process_run.manifest("encode_latents")["content"]
        == json.loads((tmp_path / "latents/manifest.json").read_bytes())["content"]
    )


def test_sigterm_commits_a_checkpoint_and_says_how_to_go_on(two_process_run: Run, tmp_path: Path) -> None:
    (process,) = start_in_copy("train_unet", two_process_run, tmp_path, processes=1)
    folder = tmp_path / "unet"
    wait_until(lambda: (folder / "checkpoints/update-00000008").exists(), seconds=180, what="the first checkpoint")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    outcome = json.loads((folder / "outcome.json").read_bytes())
    assert outcome["state"] == "stopped"
    assert outcome["exit_code"] == 75
    assert "-m pipelines.train_unet --config" in outcome["resume_command"]
    (process,) = start_in_copy("train_unet", two_process_run, tmp_path, processes=1)
    assert process.wait(timeout=120) == 0
    assert sorted(training_rows(folder)) == list(range(1, 25))


def test_a_vae_that_did_not_make_the_latents_is_refused(
    two_process_run: Run, one_process_run: Run, tmp_path: Path
) -> None:
    wrong = tmp_path / "vae"
    shutil.copytree(two_process_run.folder("train_vae"), wrong)
    manifest = json.loads((wrong / "manifest.json").read_bytes())
    manifest["content"]["weights"] = "0" * 64
    del manifest["provenance"]["digest"]
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    root = tmp_path / "run"
    done = run_stage(
        "train_unet",
        *("--run.root", str(root), "--inputs.vae", str(wrong)),
        *("--inputs.latents", str(two_process_run.folder("encode_latents"))),
    )
    assert done.returncode == 2
    assert "A latent means nothing to another VAE" in done.stderr
    assert not (root / "unet" / "checkpoints").exists()
    assert json.loads((root / "unet" / "outcome.json").read_bytes())["exit_code"] == 2


def test_a_metric_that_validation_does_not_measure_is_refused_before_the_first_update(
    two_process_run: Run, tmp_path: Path
) -> None:
    done = run_stage(
        "train_vae",
        *("--run.root", str(tmp_path), "--inputs.corpus", str(two_process_run.folder("prepare_corpus"))),
        *("--checkpoint.best.kind", "metric", "--checkpoint.best.metric", "val/loss"),
    )
    assert done.returncode == 2
    assert "'val/loss' is not measured here; measured are val/psnr" in done.stderr
    assert not list((tmp_path / "vae" / "checkpoints").glob("update-*"))


def test_a_latent_shard_with_one_flipped_bit_is_refused(two_process_run: Run, tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    shutil.copytree(two_process_run.folder("encode_latents"), latents)
    shard = latents / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    done = run_stage(
        "train_unet",
        *("--run.root", str(tmp_path / "run"), "--inputs.latents", str(latents)),
        *("--inputs.vae", str(two_process_run.folder("train_vae"))),
    )
    assert done.returncode == 2
    assert "train-000002.tar has sha256" in done.stderr
    assert not list((tmp_path / "run" / "unet" / "checkpoints").glob("update-*"))


def test_a_flat_folder_of_images_goes_through_all_stages_at_the_first_try(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 256, (18, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"IMG_{number:04}.{('jpg', 'png', 'webp')[number % 3]}")
    (tmp_path / "images" / "IMG_0060.heic").touch()
    experiment = tomllib.loads(SMOKE.read_text())
    source = {"kind": "image_folder", "path": str(tmp_path / "images"), "val_fraction": 0.2}
    experiment["prepare_corpus"]["source"] = source
    del experiment["train_unet"]["denoiser"]["conditioners"]
    for training in ("train_vae", "train_unet"):
        experiment[training] |= {"updates": 2, "validate_every": 2}
    experiment["evaluate"] |= {"num_samples": 16, "sweep": [], "probe_images": 0}
    experiment["evaluate"]["sampler"]["num_steps"] = 2
    (tmp_path / "flat.toml").write_text(tomli_w.dumps(experiment))
    for stage in STAGES:
        done = run_stage(stage, "--run.root", str(tmp_path / "run"), config=tmp_path / "flat.toml")
        assert done.returncode == 0, done.stderr
        if stage == "prepare_corpus":
            assert "60 images in 3 shards, 0 quarantined, 0 classes; left out: 1 .heic" in done.stdout
    counts = json.loads((tmp_path / "run" / "corpus" / "manifest.json").read_bytes())["content"]["counts"]
    assert counts == {"in": 61, "out": 60, "quarantined": {}, "left_out": {".heic": 1}}
    words = ("--run.root", str(tmp_path / "run"), "--number", "2", "--output", str(tmp_path / "samples"))
    assert run_here("sample", *words, config=tmp_path / "flat.toml").returncode == 0
