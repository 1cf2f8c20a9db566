"""`python -m pipelines.tools.compare` on folders as the stages leave them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from manifests import latents_manifest
from safetensors.numpy import save_file

from data.files import write_json
from data.manifest import write_manifest
from pipelines.evaluation.samples import key_prefix
from pipelines.runtime.tracking.tracker import open_tracker
from pipelines.tools import compare


def make_run(
    root: Path,
    *,
    peak_lr: float,
    loss: float,
    quality: float = 0.6,
    samples: int = 100,
    seed: int = 0,
    suffix: str = "",
    sweep: tuple[float, ...] = (1.0, 2.0),
) -> None:
    """Leave what train_unet and evaluate leave of themselves; at guidance 2 metrics are worse."""
    for stage, name in (("train_unet", f"unet{suffix}"), ("evaluate", f"evaluation{suffix}")):
        folder = root / name
        tracker = open_tracker(
            folder=folder, root=root, stage=stage, experiment="e", tracking_uri="offline", params={}, tags={}
        )
        if stage == "train_unet":
            tracker.log_records([{"update": n, "train/loss": loss / n} for n in range(1, 101)])
            tracker.log_metrics({"val/loss": loss}, step=50)
        tracker.close("FINISHED")
        (folder / "outcome.json").write_text('{"state": "done"}')
        made = {"config": {"seed": seed, "optim": {"peak_lr": peak_lr}, "log_every": 5, "flips": [stage]}}
        place = {"inputs": {"unet": str(root / f"unet{suffix}")}}
        write_manifest(folder, latents_manifest(parents={"vae": "ab" * 32}, provenance=place, **made))
    rng = np.random.default_rng(1000 * seed + round(100 * quality))
    common = np.random.default_rng(0).standard_normal(samples)
    entries = []
    for guidance in sweep:
        alone = (0.9 * common + 0.4 * rng.standard_normal(samples)).astype(np.float32)
        values = {"frechet_distance": (3 - quality) * guidance, "precision": quality / guidance, "copied": 0.0}
        entries.append({"guidance": guidance, **{key: {"value": v, "error": 0.1} for key, v in values.items()}})
        influences = {f"influence.{key}.samples": 0.1 * (alone - alone.mean()) for key in values if key != "copied"}
        save_file(influences, root / f"evaluation{suffix}" / f"features-{key_prefix(guidance)}.safetensors")
    contract = {"num_samples": samples, "seed": 0}
    scores = {"contract": contract, "floor": {}, "vae": {"psnr": {"value": 25.125}}, "sweep": entries}
    write_json(root / f"evaluation{suffix}" / "metrics.json", {**scores, "default_guidance": 2.0})


def said_of(*runs: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    assert compare.main([str(run) for run in runs]) == 0
    return capsys.readouterr().out


def table_of(text: str, stage: str) -> dict[str, list[str]]:
    """Return the rows of one stage's table: key -> the runs' entries."""
    lines = text[text.index(stage) :].split("\n\n")[0].splitlines()
    return {
        line.split("  ")[0].strip(): [part.strip() for part in line.split("  ")[1:] if part.strip()] for line in lines
    }


def test_runs_are_laid_side_by_side_with_only_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "demo", peak_lr=0.001, loss=2.0)
    make_run(tmp_path / "wide", peak_lr=0.002, loss=3.0, quality=0.7)
    said = said_of(tmp_path / "demo", tmp_path / "wide", capsys=capsys)
    unet = table_of(said, "train_unet")
    assert unet["train_unet"] == ["demo/unet", "wide/unet"]
    assert unet["train/loss"] == ["0.02", "0.03"]
    assert unet["val/loss"] == ["2", "3"]
    assert unet["optim.peak_lr"] == ["0.001", "0.002"]
    assert not {"seed", "state", "upstream.vae", "log_every"} & unet.keys()
    assert table_of(said, "evaluate  ")["vae.psnr"] == ["25.125", "25.125"]
    assert compare.main(["--json", str(tmp_path / "demo" / "unet")]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["metrics"]["val/loss"], run["facts"]["updates"]) == ("demo/unet", "2", "100")


def test_equal_stages_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo", "twin"):
        make_run(tmp_path / name, peak_lr=0.001, loss=2.0)
        make_run(tmp_path / "guides" / name, peak_lr=0.002, loss=2.0)
        shutil.copytree(tmp_path / "guides" / name / "unet", tmp_path / name / "unet-guide")
    said = said_of(tmp_path / "demo", tmp_path / "twin", capsys=capsys)
    assert [line for line in said.splitlines() if line.startswith("train_unet: equal, digest ")]
    assert [line for line in said.splitlines() if line.startswith("train_unet --name guide: equal, digest ")]
    assert "val/loss" not in said


def test_without_replicates_the_verdict_says_that_it_knows_sampling_luck_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "demo", peak_lr=0.001, loss=2.0, sweep=(1.0, 2.0))
    make_run(tmp_path / "wide", peak_lr=0.001, loss=2.0, quality=0.9, sweep=(1.5, 2.0))
    demo, wide = tmp_path / "demo", tmp_path / "wide"
    said = said_of(demo, wide, capsys=capsys)
    assert said.startswith(f"{wide} against {demo}: worse in frechet_distance by 0.75 [")
    assert "for sampling luck only" in said
    assert "Guidance 1.5 against 1, each side's best by frechet_distance" in said
    assert compare.main(["--json", str(demo), str(wide)]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)["verdicts"]
    found = verdict["metrics"]["frechet_distance"]
    assert verdict["guidance"] == {"baseline": 1.0, "run": 1.5}
    assert (found["verdict"], found["value"]) == ("worse", pytest.approx(0.75))
    assert found["low"] < 0.75 < found["high"]
    assert found["more_seeds"] is None


def test_replicates_beside_a_run_are_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo, wide = tmp_path / "demo", tmp_path / "wide"
    for seed, luck in enumerate((0.0, 0.05, -0.05)):
        suffix = f"-seed_{seed}" * (seed > 0)
        make_run(demo, peak_lr=0.001, loss=2.0, quality=0.5 + luck, seed=seed, suffix=suffix)
        make_run(wide, peak_lr=0.002, loss=2.0, quality=1.5 - luck, seed=seed, suffix=suffix)
    make_run(wide, peak_lr=0.003, loss=2.0, quality=9.0, seed=7, suffix="-seed_7")
    (wide / "evaluation-seed_8").mkdir()
    said = said_of(demo, wide, capsys=capsys)
    assert said.startswith(f"{wide} against {demo}: better in frechet_distance by 1 [")
    assert "from 3 and 3 trainings" in said
    assert "evaluation-seed_7 is of a training that differs in more than its seed" in said
    assert "evaluation-seed_8 is unfinished" in said
    assert table_of(said, "train_unet")["train_unet"] == ["demo/unet", "wide/unet"]
    luck = table_of(said, f"{wide}, 3 trainings")["frechet_distance"]
    assert (luck[0], float(luck[1])) == ("1.5", pytest.approx(0.1))
    assert float(luck[2]) == pytest.approx(0.05, rel=0.2)  # the spread of the seeds, less that of images in one alone
    # A single training against three has their training luck.
    make_run(tmp_path / "one", peak_lr=0.004, loss=2.0, quality=0.52)
    said = said_of(tmp_path / "one", wide, demo, capsys=capsys)
    assert f"the single one of {tmp_path / 'one'}" in said
    assert said.count(" against ") == 4  # two sentences, two lines on guidance


def test_replicates_are_compared_at_the_guidance_and_by_the_figures_that_all_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo, wide = tmp_path / "demo", tmp_path / "wide"
    make_run(demo, peak_lr=0.001, loss=2.0, sweep=(1.0, 2.0))
    make_run(wide, peak_lr=0.001, loss=2.0, sweep=(1.0, 1.5, 2.0))
    make_run(wide, peak_lr=0.001, loss=2.0, sweep=(1.5, 2.0), seed=1, suffix="-seed_1")
    make_run(wide, peak_lr=0.001, loss=2.0, sweep=(1.0,), seed=2, suffix="-seed_2")
    scores = json.loads((wide / "evaluation-seed_1" / "metrics.json").read_bytes())
    for entry in scores["sweep"]:
        del entry["precision"]
    write_json(wide / "evaluation-seed_1" / "metrics.json", scores)
    said = said_of(demo, wide, capsys=capsys)
    assert "evaluation-seed_2 has no guidance scale in common with the others" in said
    assert "Guidance 1.5 against 1" in said
    table = said[said.index("metric ") :].split("\n\n")[0]
    row = next(line.split() for line in table.splitlines() if line.startswith("precision"))
    assert row == ["precision", "higher", "is", "better", "0.6", "-", "-", "-", "-"]
    assert table_of(said, f"{wide}, 2 trainings")["precision"] == ["-"] * 4


def test_figures_that_contracts_make_incomparable_are_named_and_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "demo", peak_lr=0.001, loss=2.0)
    make_run(tmp_path / "wide", peak_lr=0.001, loss=2.0, samples=50)
    said = said_of(tmp_path / "demo" / "evaluation", tmp_path / "wide" / "evaluation", capsys=capsys)
    assert "no metric can be judged" in said
    names = "frechet_distance, precision, recall, retrieval, retrieval_in_five"
    assert f"Not compared, {names}: its value depends on the number of samples, which differs." in said


def test_an_unfinished_evaluation_is_no_other_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo", "wide"):
        make_run(tmp_path / name, peak_lr=0.001, loss=2.0)
    for name in ("metrics.json", "manifest.json"):
        (tmp_path / "wide" / "evaluation" / name).unlink()
    said = said_of(tmp_path / "demo", tmp_path / "wide", capsys=capsys)
    assert f"The evaluation of {tmp_path / 'wide'} is unfinished: there is nothing to judge yet." in said
    assert "Not compared" not in said


def test_a_run_without_an_evaluation_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo", "wide"):
        make_run(tmp_path / name, peak_lr=0.001, loss=2.0)
    shutil.rmtree(tmp_path / "wide" / "evaluation")
    said = said_of(tmp_path / "demo", tmp_path / "wide", capsys=capsys)
    assert f"{tmp_path / 'wide'} has no evaluation/: there is nothing to judge." in said


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path)]) == 2
    assert f"{tmp_path} is neither a stage's folder nor a pipeline's" in capsys.readouterr().err
