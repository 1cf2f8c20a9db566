"""`python -m pipelines.tools.compare` on folders as the stages leave them."""

import json
from pathlib import Path

import pytest
from manifests import latents_manifest

from data.manifest import write_manifest
from pipelines.runtime.tracking.tracker import open_tracker
from pipelines.tools import compare


def make_run(root: Path, *, peak_lr: float, loss: float, accuracy: float = 0.9, samples: int = 1000) -> None:
    """Leave what train_unet and evaluate leave of themselves."""
    for stage, name in (("train_unet", "unet"), ("evaluate", "evaluation")):
        folder = root / name
        tracker = open_tracker(
            folder=folder, root=root, stage=stage, experiment="e", tracking_uri="offline", params={}, tags={}
        )
        if stage == "train_unet":
            tracker.log_records([{"update": n, "train/loss": loss / n} for n in range(1, 101)])
            tracker.log_metrics({"val/loss": loss}, step=50)
        tracker.close("FINISHED")
        table = f"[{stage}]\nseed = 3\n[{stage}.optim]\npeak_lr = {peak_lr}\n"
        (folder / "config.toml").write_text(f'[run]\nroot = "{root}"\n{table}')
        (folder / "outcome.json").write_text('{"state": "done"}')
        write_manifest(folder, latents_manifest(parents={"vae": "ab" * 32}))
    sweep = [{"guidance": g, "accuracy": {"value": accuracy * g, "error": 0.01}} for g in (0.5, 1.0)]
    scores = {"contract": {"samples": samples}, "floor": {}, "vae": {"psnr": {"value": 25.125}}, "sweep": sweep}
    (root / "evaluation" / "metrics.json").write_text(json.dumps({**scores, "default_guidance": 1.0}))


def table_of(text: str, stage: str) -> dict[str, list[str]]:
    """Return the rows of one stage's table: key -> the runs' entries."""
    lines = text[text.index(stage) :].split("\n\n")[0].splitlines()
    return {
        line.split("  ")[0].strip(): [part.strip() for part in line.split("  ")[1:] if part.strip()] for line in lines
    }


def test_runs_are_laid_side_by_side_with_only_the_settings_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "demo", peak_lr=0.001, loss=2.0)
    make_run(tmp_path / "wide", peak_lr=0.002, loss=3.0, accuracy=0.8)
    assert compare.main([str(tmp_path / "demo"), str(tmp_path / "wide")]) == 0
    said = capsys.readouterr().out
    unet = table_of(said, "train_unet")
    assert unet["train_unet"] == ["demo/unet", "wide/unet"]
    assert unet["state"] == ["done", "done"]
    assert unet["updates"] == ["100", "100"]
    assert unet["train/loss"] == ["0.02", "0.03"]
    assert unet["val/loss"] == ["2", "3"]
    assert unet["upstream.vae"] == ["ab" * 6, "ab" * 6]
    assert unet["optim.peak_lr"] == ["0.001", "0.002"]
    assert "seed" not in unet
    evaluation = table_of(said, "evaluate")
    assert evaluation["samples.accuracy"] == ["0.9 ± 0.01", "0.8 ± 0.01"]
    assert evaluation["vae.psnr"] == ["25.125", "25.125"]
    assert "contracts differ" not in said
    assert compare.main(["--json", str(tmp_path / "demo" / "unet")]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["metrics"]["val/loss"]) == ("demo/unet", "2")


def test_scores_of_different_contracts_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "demo", peak_lr=0.001, loss=2.0)
    make_run(tmp_path / "wide", peak_lr=0.001, loss=2.0, samples=50)
    compare.main([str(tmp_path / "demo" / "evaluation"), str(tmp_path / "wide" / "evaluation")])
    assert "! The contracts differ" in capsys.readouterr().out


def test_a_folder_without_a_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path)]) == 2
    assert f"{tmp_path} is neither a stage's folder nor a pipeline's" in capsys.readouterr().err
