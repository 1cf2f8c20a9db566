"""Laws of the tools that look before anything costs: the doctor finds what is wrong, the plan runs everything once."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SMOKE, Run, communicated, free_port, rank_environment, start_warm, warm_python
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from data.order.order import BlockedShuffleConfig
from models.unet import UNet, UNetConfig
from pipelines.prepare_corpus import PrepareCorpusConfig
from pipelines.runtime.config.experiment import load_config
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.flops import flops_of
from pipelines.tools.doctor_checks import file_operations, mlflow_store, shards, workers
from pipelines.tools.plan import StagePlan, add_costs, corpus_size, stage_configs


@dataclass(frozen=True)
class Answer:
    """How a tool ended, and what it printed."""

    code: int
    stdout: str
    stderr: str


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a tool in this process: as its own it would import torch for seconds to look for milliseconds."""

    def run(name: str, *words: str, config: Path = SMOKE) -> Answer:
        module = importlib.import_module(f"pipelines.tools.{name}")
        monkeypatch.setattr(sys, "argv", [name, "--config", str(config), "--run.threads", "1", *words])
        capfd.readouterr()
        try:
            code = module.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return Answer(code, *capfd.readouterr())

    return run


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


def test_a_healthy_machine_passes_though_the_tracking_server_is_dead(
    tmp_path: Path, tool: Callable[..., Answer]
) -> None:
    done = tool("doctor", "--run.root", str(tmp_path / "run"), "--run.tracking_uri", "http://127.0.0.1:9", "--json")
    assert done.code == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["failed"] == 0
    assert levels(report, "MLflow") == ["warning"]
    assert "pipelines.tools.sync sends later" in done.stdout
    for check in ("attention", "workers", "file operations"):
        assert set(levels(report, check)) == {"ok"}, check
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_a_disk_that_is_too_small_fails(tmp_path: Path, tool: Callable[..., Answer]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        done = tool("doctor", "--run.root", str(disk / "run"))
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.code == 1
    assert re.search(r"failed  free space, rank 0: 0.0 GiB free in .*disk, 0.03 GiB expected", done.stdout)


@pytest.mark.parametrize(("call", "step"), [("link", "make a hard link in"), ("fsync", "flush a file in")])
def test_a_file_system_on_which_nothing_can_be_committed_fails(
    call: str, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, call, refused)
    (found,) = file_operations(tmp_path / "run")
    assert found == ("failed", f"cannot {step} {tmp_path}: Operation not supported")


@pytest.mark.parametrize("name", ["file", "file/a/b", "link to nothing/run", "link to itself"])
def test_a_folder_that_cannot_be_made_fails(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link to nothing").symlink_to(tmp_path / "nothing")
    (tmp_path / "link to itself").symlink_to(tmp_path / "link to itself")
    ((level, text),) = file_operations(tmp_path / name)
    assert (level, text.partition(": ")[0]) == ("failed", f"cannot make a folder in {tmp_path / name.split('/')[0]}")


def test_sqlite_on_a_network_folder_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.runtime.tracking.identity.network_file_system", lambda path: "nfs4")
    ((level, text),) = mlflow_store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, experiment="mine")
    assert level == "failed"
    assert "would be an sqlite file on a network folder (nfs4)" in text


def test_more_threads_than_cores_and_machines_that_share_streams_unevenly_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ((level, text),) = workers(threads=10_000)
    assert level == "warning"
    assert text.startswith("2 process(es) x 10000 thread(s) on ")
    stages = stage_configs(str(SMOKE), root="-")
    blocked = BlockedShuffleConfig(canonical_nodes=4)
    stages = stages._replace(train_unet=stages.train_unet.model_copy(update={"order": blocked}))
    found = [text for level, text in shards(stages, world_size=6) if level == "warning"]
    assert [text.partition(":")[0] for text in found] == [
        "train_unet.order.canonical_nodes = 4 does not divide among 3 machines"
    ]


def test_a_corpus_that_is_not_made_yet_counts_in_the_forecast(two_process_run: Run) -> None:
    config = load_config(PrepareCorpusConfig, table="prepare_corpus", argv=["--config", str(SMOKE)])
    promised, made = corpus_size(config), two_process_run.manifest("prepare_corpus")["content"]
    assert promised.samples == made["counts"]["out"]
    assert list(promised.classes) == made["classes"]
    written = sum(entry["bytes"] for entry in made["files"])
    assert 0.7 * promised.disk_bytes < written <= promised.disk_bytes


def test_a_wrong_experiment_is_refused_with_code_2(tmp_path: Path, tool: Callable[..., Answer]) -> None:
    wrong = changed(tmp_path / "wrong.toml", **{"global_batch = 16": "global_bach = 16"})
    for name in ("doctor", "plan"):
        done = tool(name, config=wrong)
        assert done.code == 2
        assert "global_bach" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_job_whose_ranks_differ_is_refused_on_every_rank(tmp_path: Path) -> None:
    other = changed(tmp_path / "other.toml", **{"global_batch = 16": "global_batch = 17"})
    port = free_port()
    ranks = [
        start_warm(
            *("-m", "pipelines.tools.doctor", "--config", str(config), "--json"),
            *("--run.root", str(tmp_path / f"root of {rank}"), "--run.tracking_uri", "offline"),
            **rank_environment(rank, 2, port),
        )
        for rank, config in enumerate((other, SMOKE))
    ]
    printed = communicated(ranks)
    assert [process.returncode for process in ranks] == [1, 1], printed
    report = json.loads(printed[0][0])
    failed = {finding["check"]: finding["text"] for finding in report["findings"] if finding["level"] == "failed"}
    assert set(failed) == {"configuration", "shared folder", "shards"}
    assert "has another configuration than rank 0" in failed["configuration"]
    assert failed["shared folder"] == "rank 1 does not see a renamed file"
    assert "global_batch = 17 is no multiple of" in failed["shards"]
    assert levels(report, "all-reduce") == levels(report, "code") == ["ok"]


@pytest.fixture(scope="module")
def root(two_process_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which the corpus is finished."""
    root = tmp_path_factory.mktemp("plan") / "run"
    shutil.copytree(two_process_run.folder("prepare_corpus"), root / "corpus")
    return root


def warm_run(words: list[str], *, env: dict[str, str], timeout: float, **_: object) -> subprocess.CompletedProcess[str]:
    """Run a command as ``subprocess.run`` does, in a process that has the imports already."""
    process = warm_python().start(words[1:], env=env)
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(words, process.wait(), out, err)


def test_a_plan_runs_everything_once_and_says_what_is_stale(
    root: Path, tmp_path: Path, tool: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.tools.plan.subprocess", SimpleNamespace(run=warm_run))
    before = sorted(path for path in root.rglob("*") if path.suffix != ".verified")
    done = tool("plan", "--run.root", str(root), "--json")
    assert done.code == 0, done.stderr
    stages = {one["stage"]: one for one in json.loads(done.stdout)["stages"]}
    assert [stages[name]["state"] for name in ("prepare_corpus", "train_vae")] == ["done", "absent"]
    assert stages["train_vae"]["measured"]
    assert stages["train_vae"]["images"] == 24 * 16
    assert stages["train_unet"]["why"] == [f"waits for {root}/latents", f"waits for {root}/vae"]
    assert not stages["train_unet"]["measured"]
    # But for the marks of shards whose content was checked: the next start need not read them again.
    after = sorted(path for path in root.rglob("*") if path.suffix != ".verified")
    assert after == before, "it writes nothing below run.root"

    other = changed(tmp_path / "other.toml", **{"num_train = 192": "num_train = 96"})
    done = tool("plan", "--run.root", str(root), "--trial", "false", config=other)
    assert done.code == 0, done.stderr
    assert "prepare_corpus: stale\n    source.num_train: was 192, is now 96" in done.stdout
    assert "its input corpus is stale" in done.stdout


@pytest.mark.soak
@pytest.mark.parametrize("global_batch", [1, 32])
def test_the_planned_memory_is_what_torch_counts(global_batch: int) -> None:
    """With one image gradients are more than feature maps, with many less."""

    def network() -> UNet:
        config = UNetConfig(
            channels=(32, 64),
            blocks=(1, 1),
            attention=(False, True),
            heads=(1, 2),
            transformer_depth=(1, 1),
            norm_groups=8,
        )
        return UNet(config, in_channels=4, out_channels=4)

    def loss(net: nn.Module, images: int) -> Tensor:
        return net(torch.ones(images, 4, 8, 8), torch.ones(images)).square().mean()

    with FakeTensorMode():
        net = network()
        average = [parameter.detach().clone() for parameter in net.parameters()]
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        tracker = MemTracker()
        tracker.track_external(net, optimizer, *average)
        with tracker:
            for _ in range(2):  # the first makes the moments
                loss(net, global_batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    [counted] = tracker.get_tracker_snapshot("peak").values()
    found = StagePlan(stage="train_unet", state="absent")
    config = TrainingConfig(updates=1, global_batch=global_batch)
    with torch.device("meta"):
        net = network()
        add_costs(found, config, [net], flops=lambda: flops_of(net, lambda shadow: loss(shadow, 1)), devices=1)
    assert found.memory_bytes == pytest.approx(counted["Total"], rel=0.1)


@pytest.mark.soak
def test_a_trial_that_fails_says_what_it_said(root: Path, tmp_path: Path, tool: Callable[..., Answer]) -> None:
    shutil.copytree(root, tmp_path / "run")
    (tmp_path / "run" / "corpus" / "train-000001.tar").unlink()
    done = tool("plan", "--run.root", str(tmp_path / "run"))
    assert done.code == 2
    assert "train_vae failed in its trial with exit code" in done.stderr
    assert "train-000001.tar" in done.stderr
