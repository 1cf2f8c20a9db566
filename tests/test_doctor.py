"""Laws of the tools that look before anything costs: the doctor finds what is wrong, the plan runs everything once."""

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMOKE, Run, communicated, free_port, rank_environment, start_warm, warm_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from data.manifest import ImageShape, LatentShape
from data.order.order import BlockedShuffleConfig
from models.autoencoder.discriminator import DiscriminatorConfig
from models.autoencoder.objective import PatchAdversary, VAEObjectiveConfig
from pipelines.prepare_corpus import PrepareCorpusConfig
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import load_config
from pipelines.runtime.training.memory import Settings, Sketch, gib
from pipelines.runtime.training.optim import OptimConfig, Optimizer
from pipelines.tools.doctor_checks import file_operations, free_space, gpu_memory, mlflow_store, shards, workers
from pipelines.tools.plan import (
    StagePlan,
    add_costs,
    corpus_size,
    memory_lines,
    stage_configs,
    try_out,
    unet_sketch,
    vae_sketch,
)
from pipelines.train_unet import TrainUNetConfig
from pipelines.train_vae import TrainVAEConfig


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


def test_what_is_finished_needs_no_more_space(tmp_path: Path) -> None:
    needed = []
    for finished in ("", "corpus", "latents"):
        if finished:
            (tmp_path / finished).mkdir()
            (tmp_path / finished / "manifest.json").touch()
        ((_, said),) = free_space(
            stage_configs(str(REPOSITORY / "pipelines/configs/demo.toml"), root=str(tmp_path)), tmp_path
        )
        needed.append(float(re.search(r"free in .*, (\S+) GiB expected", said)[1]))
    assert needed == sorted(set(needed), reverse=True)


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

    guide = "[train_unet.named.guide]\nupdates = 12\n[evaluate]"
    other = changed(tmp_path / "other.toml", **{"num_train = 192": "num_train = 96", "[evaluate]": guide})
    done = tool("plan", "--run.root", str(root), "--trial", "false", config=other)
    assert done.code == 0, done.stderr
    assert "prepare_corpus: stale\n    source.num_train: was 192, is now 96" in done.stdout
    assert "its input corpus is stale" in done.stdout
    assert "its guide, train_unet --name guide, takes 50% more" in done.stdout


def sketch_of(experiment: str, stage: str, **changes: Any) -> Sketch:
    """The networks of an experiment's training, with other settings, for ImageNet's classes."""
    configs = stage_configs(str(REPOSITORY / "pipelines" / experiment), root="-")
    view = configs.prepare_corpus.view
    if stage == "train_vae":
        image = ImageShape(resolution=view.resolution, channels=view.channels)
        return vae_sketch(configs.train_vae.model_copy(update=changes), image)
    vae = configs.train_vae.network
    shape = LatentShape(channels=vae.latent_channels, size=view.resolution // vae.factor)
    return unet_sketch(configs.train_unet.model_copy(update=changes), shape, num_classes=1000)


class Totals(MemTracker):
    """MemTracker without its figures of each module: it walks through all of them at every operation."""

    def _nothing(self, *_: object) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _nothing


@pytest.mark.soak
@pytest.mark.parametrize(
    ("experiment", "stage", "images", "parameters", "changes"),
    [
        ("configs/demo.toml", "train_unet", 1, 2.28, {}),  # gradients are more than feature maps
        ("configs/demo.toml", "train_unet", 64, 2.28, {}),
        ("configs/imagenet256.toml", "train_vae", 3, 86.4, {}),
        ("configs/imagenet256.toml", "train_vae", 3, 86.4, {"freeze_encoder": True}),
        ("configs/imagenet256.toml", "train_unet", 8, 374.0, {}),
        ("tools/benchmarks/sd.toml", "train_unet", 2, 866.0, {}),
    ],
)
@pytest.mark.parametrize(("levels", "parts"), [((), 1), ((0,), 2)])
def test_the_planned_memory_is_what_torch_counts(
    experiment: str,
    stage: str,
    images: int,
    parameters: float,
    changes: dict[str, bool],
    levels: tuple[int, ...],
    parts: int,
) -> None:
    """On one device, by updates of one micro-batch, and of two with the widest level checkpointed."""
    sketch = sketch_of(experiment, stage, precision="float32", global_batch=parts * images, **changes)
    assert sketch.weights / 4e6 == pytest.approx(parameters, rel=0.01)
    with FakeTensorMode():
        networks = sketch.build(levels)
        averages = [weight.detach().clone() for _ in sketch.config.averages for weight in networks[0].parameters()]
        optimizer = torch.optim.AdamW((one for one in networks.parameters() if one.requires_grad), fused=True)
        tracker = Totals()
        tracker.track_external(networks, optimizer, *averages)
        with tracker:
            for _ in range(2):  # the first makes the moments
                for _ in range(parts):
                    sketch.run(networks, images).backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
    [counted] = tracker.get_tracker_snapshot("peak").values()
    found = sketch.peak(Settings(images, False, levels), devices=1)
    print(f"{experiment} {stage} {levels}: {found / 2**30:.2f} GiB, {found / counted['Total']:.3f} of MemTracker's")
    assert found == pytest.approx(counted["Total"], rel=0.1)


def state_after_a_step(sketch: Sketch, rank: int, num_ranks: int) -> int:
    """Bytes that the optimizers of a training's networks hold on one rank."""
    total, accelerator = 0, Mock(process_index=rank, num_processes=num_ranks, scaler=None)
    for network in sketch.build(()):
        optimizer = Optimizer(network, sketch.config.optim, accelerator=accelerator, shards=True)
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.apply(update=1, total_updates=1, refused=torch.zeros(()))
        total += sum(tensor.nbytes for tensor in optimizer.tensors().values())
    return total


def test_the_planned_state_of_the_optimizers_is_what_they_hold_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an autoencoder whose encoder is frozen, and of a discriminator."""
    monkeypatch.setattr("torch.distributed.broadcast", Mock())
    monkeypatch.setattr(Sketch, "_traced", Mock(return_value=np.zeros((1, 2))))
    small = PatchAdversary(discriminator=DiscriminatorConfig(channels=16))
    objective, peaks, held, disk = VAEObjectiveConfig(adversary=small), [], [], []
    for algorithm in ("adamw", "muon"):
        changes = {"optim": OptimConfig(algorithm=algorithm), "objective": objective, "freeze_encoder": True}
        sketch = sketch_of("configs/demo.toml", "train_vae", **changes)
        whole, *parts = (state_after_a_step(sketch, rank, of) for rank, of in ((0, 1), (0, 3), (1, 3), (2, 3)))
        assert (sketch.optimizer(1), sketch.optimizer(3)) == (whole, max(parts))
        add_costs(plan := StagePlan(stage="train_vae", state="absent"), sketch)
        peaks += [sketch.peak(Settings(2, shards, ()), devices=3) for shards in (False, True)]
        held += [whole, max(parts)]
        disk.append(plan.disk_bytes)
    kept = sketch.config.checkpoint.keep_last + 1
    assert disk[0] - disk[1] == kept * (held[0] - held[2]) > 0
    assert np.array_equal(np.diff(peaks), np.diff(held))


def test_settings_are_chosen_by_their_cost() -> None:
    """For any card the chosen settings fit, and no cheaper ones do."""
    config = stage_configs(str(SMOKE), root="-").train_unet
    network = config.denoiser.network.model_copy(update={"attention": (False, False), "mid_attention": False})
    denoiser = config.denoiser.model_copy(update={"network": network})
    config = config.model_copy(update={"denoiser": denoiser, "global_batch": 24})
    sketch, devices = unet_sketch(config, LatentShape(channels=4, size=32), num_classes=3), 2
    by_cost = sketch.candidates(devices=devices)
    kinds = set(itertools.product((False, True), [(), (0,), (0, 1)]))
    assert set(by_cost) == {Settings(images, *kind) for kind in kinds for images in (12, 6, 4, 3, 2, 1)}
    costs = [sketch.cost(settings, devices=devices) for settings in by_cost]
    assert costs == sorted(costs)
    peaks = {settings: sketch.peak(settings, devices=devices) for settings in by_cost}
    chosen = set()
    for limit in np.linspace(min(peaks.values()) / 2, 1.1 * max(peaks.values()), 100):
        *cheaper, (last, needed) = sketch.choose(devices=devices, limit=limit).items()
        assert all(peaks[settings] == peak > limit for settings, peak in cheaper)
        fit = [settings for settings in by_cost if peaks[settings] <= limit]
        assert last == (fit or by_cost[-1:])[0]
        assert needed == peaks[last]
        chosen.add(last)
    assert len({settings[1:] for settings in chosen}) > 2, "cards of several kinds"


@pytest.fixture
def simple_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature maps of 1 MiB an image, of which a checkpointed level saves a third, instead of seconds of tracing."""

    def traced(self: Sketch, levels: tuple[int, ...], images: int) -> np.ndarray:
        return np.array([[images * 2**20 * (1 - len(levels) / 3), 0.0]])

    monkeypatch.setattr(Sketch, "_traced", traced)


@pytest.mark.usefixtures("simple_traces")
def test_a_plan_names_settings_that_fit_and_warns_beyond_the_memory(
    tmp_path: Path, tool: Callable[..., Answer]
) -> None:
    words = ("--run.root", str(tmp_path), "--trial", "false", "--devices", "2")
    card = 0.007  # GiB
    done = tool("plan", *words, "--memory_gb", str(card), "--json")
    assert done.code == 0, done.stderr
    stages = {one["stage"]: one for one in json.loads(done.stdout)["stages"]}
    for stage, model in (("train_vae", TrainVAEConfig), ("train_unet", TrainUNetConfig)):
        plan = stages[stage]
        assert plan["memory_bytes"] > card * 2**30
        assert plan["notes"] == [f"warning: it needs {gib(plan['memory_bytes'])} on a device, which has 0.007 GiB"]
        *too_large, (options, peak) = plan["settings"].items()
        assert peak <= 0.9 * card * 2**30 < min(peak for _, peak in too_large)
        pasted = load_config(model, table=stage, argv=["--config", str(SMOKE), *shlex.split(options)])
        assert options.startswith(f"--images_per_device {pasted.images_per_device} --shard_optimizer ")
        assert pasted.shard_optimizer == ("--shard_optimizer true" in options)

    nothing = StagePlan(stage="train_vae", state="absent", device_bytes=2**30, settings={"--settings": 2**30})
    assert [line.split(":")[0].strip() for line in memory_lines(nothing)] == ["too large", "nothing fits"]


@pytest.mark.usefixtures("simple_traces")
def test_the_doctor_warns_of_a_training_that_needs_more_than_a_gpu_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, found = stage_configs(str(SMOKE), root=str(tmp_path)), []
    for memory in (0, 2**20, 2**30):
        monkeypatch.setattr("pipelines.tools.doctor_checks.device_memory", lambda memory=memory: memory)
        found.append(list(gpu_memory(stages, world_size=2)))
    none, beyond, within = found
    assert none == []
    assert [level for level, _ in beyond] == ["warning"] * 2
    assert re.fullmatch(r"train_vae: 0\.0\d+ GiB expected of a GPU's 0.000977 GiB; `latentline plan` .*", beyond[0][1])
    assert [level for level, _ in within] == ["ok"] * 2


@pytest.mark.soak
def test_a_trial_that_fails_says_what_it_said(root: Path, tmp_path: Path, tool: Callable[..., Answer]) -> None:
    shutil.copytree(root, tmp_path / "run")
    (tmp_path / "run" / "corpus" / "train-000001.tar").unlink()
    done = tool("plan", "--run.root", str(tmp_path / "run"))
    assert done.code == 2
    assert "train_vae failed in its trial with exit code" in done.stderr
    assert "train-000001.tar" in done.stderr


def test_a_trial_that_does_not_end_is_a_plan_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Mock(side_effect=subprocess.TimeoutExpired("words", 1800))
    monkeypatch.setattr("pipelines.tools.plan.subprocess.run", ended)
    stages = stage_configs(str(SMOKE), root="runs/none")
    with pytest.raises(ConfigError, match=r"train_vae: its trial did not end within 1800 s\. .* --trial false"):
        try_out("train_vae", stages.train_vae, str(SMOKE), run=stages.train_vae.run, devices=1)
