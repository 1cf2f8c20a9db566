"""Laws of the tools that look before anything costs: the doctor finds what is wrong, the plan runs everything once."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, SMOKE, environment, run_stage
from test_ranks import free_port
from tiny_training import rank_environment


def tool(name: str, *words: str, config: Path = SMOKE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"pipelines.{name}", "--config", str(config), *words],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )


def changed(path: Path, **replacements: str) -> Path:
    """Write the smoke experiment to ``path`` with each text that is a key replaced."""
    text = SMOKE.read_text()
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


def levels(report: dict[str, Any], check: str) -> list[str]:
    return [finding["level"] for finding in report["findings"] if finding["check"] == check]


def test_a_healthy_machine_passes_though_the_tracking_server_is_dead(tmp_path: Path) -> None:
    done = tool("doctor", "--run.root", str(tmp_path / "run"), "--run.tracking_uri", "http://127.0.0.1:9", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == 0
    assert levels(report, "MLflow") == ["warning"]
    assert "pipelines.sync sends later" in done.stdout
    assert set(levels(report, "attention")) == {"ok"}
    assert not (tmp_path / "run").exists(), "it leaves nothing behind"


def test_a_disk_that_is_too_small_fails(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        done = tool("doctor", "--run.root", str(disk / "run"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.returncode == 1
    assert re.search(r"failed  free space, rank 0: 0.0 GiB free in .*disk, 0.03 GiB expected", done.stdout)


def test_a_wrong_experiment_is_refused_with_code_2(tmp_path: Path) -> None:
    wrong = changed(tmp_path / "wrong.toml", **{"global_batch = 16": "global_bach = 16"})
    for name in ("doctor", "plan"):
        done = tool(name, config=wrong)
        assert done.returncode == 2
        assert "global_bach" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_job_whose_ranks_differ_is_refused_on_every_rank(tmp_path: Path) -> None:
    other = changed(tmp_path / "other.toml", **{"global_batch = 16": "global_batch = 17"})
    port = free_port()
    ranks = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "pipelines.doctor", "--config", str(config), "--json"),
                *("--run.root", str(tmp_path / f"root of {rank}"), "--run.tracking_uri", "offline"),
            ],
            env=environment(**rank_environment(rank, 2, port)),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, config in enumerate((other, SMOKE))
    ]
    printed = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1], printed
    report = json.loads(printed[0][0])
    failed = {finding["check"]: finding["text"] for finding in report["findings"] if finding["level"] == "failed"}
    assert set(failed) == {"configuration", "shared folder", "shards"}
    assert "has another configuration than rank 0" in failed["configuration"]
    assert failed["shared folder"] == "rank 1 does not see a renamed file"
    assert "global_batch = 17 is no multiple of" in failed["shards"]
    assert levels(report, "all-reduce") == levels(report, "code") == ["ok"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which the corpus is finished."""
    root = tmp_path_factory.mktemp("plan") / "run"
    done = run_stage("prepare_corpus", "--run.root", str(root), "--run.tracking_uri", "offline")
    assert done.returncode == 0, done.stderr
    return root


def test_a_plan_runs_everything_once_and_says_what_is_stale(root: Path, tmp_path: Path) -> None:
    before = sorted(path for path in root.rglob("*"))
    done = tool("plan", "--run.root", str(root), "--json")
    assert done.returncode == 0, done.stderr
    stages = {one["stage"]: one for one in json.loads(done.stdout)["stages"]}
    assert [stages[name]["state"] for name in ("prepare_corpus", "train_vae")] == ["done", "absent"]
    assert stages["train_vae"]["measured"]
    assert stages["train_vae"]["images"] == 60 * 16
    assert stages["train_unet"]["why"] == [f"waits for {root}/latents", f"waits for {root}/vae"]
    assert not stages["train_unet"]["measured"]
    # But for the marks of shards whose content was checked: the next start need not read them again.
    after = sorted(path for path in root.rglob("*") if path.suffix != ".verified")
    assert after == before, "it writes nothing below run.root"

    other = changed(tmp_path / "other.toml", **{"num_train = 192": "num_train = 96"})
    done = tool("plan", "--run.root", str(root), "--trial", "false", config=other)
    assert done.returncode == 0, done.stderr
    assert "prepare_corpus: stale\n    source.num_train: was 192, is now 96" in done.stdout
    assert "its input corpus is stale" in done.stdout


@pytest.mark.soak
def test_a_trial_that_fails_says_what_it_said(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "run")
    (tmp_path / "run" / "corpus" / "train-000001.tar").unlink()
    done = tool("plan", "--run.root", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "train_vae failed in its trial with exit code" in done.stderr
    assert "train-000001.tar" in done.stderr
