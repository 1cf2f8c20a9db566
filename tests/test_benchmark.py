"""The measuring itself: a known ratio is found, a control holds 1, and sides that compute other things are refused."""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from clocks import quietest_round
from conftest import environment, stage_command
from torch import Tensor

from models.autoencoder.vae import AutoencoderKL
from models.diffusers.config import unet_config_from_diffusers
from pipelines.runtime.tracking.tracker import Tracker
from pipelines.tools import benchmark
from pipelines.tools.benchmarks import models, paired_timing, peers
from pipelines.tools.benchmarks.data import check_same
from pipelines.tools.benchmarks.paired_timing import CONTROL, PEAK, Comparison, Job, Ratio, compare
from pipelines.tools.benchmarks.stages import SIZES, Setup
from pipelines.train_unet import TrainUNetConfig

TINY = """
[prepare_corpus]
source = { kind = "synthetic", resolution = 16 }
view = { resolution = 16 }
[train_vae]
updates = 1
global_batch = 4
network = { latent_channels = 2, channels = [8, 8], blocks_per_level = 1, norm_groups = 4, mid_attention = false }
[encode_latents]
batch_size = 4
[train_unet]
updates = 1
global_batch = 4
[train_unet.denoiser]
conditioners = [CONDITIONER]
[train_unet.denoiser.network]
channels = [8, 16]
blocks = [1, 1]
attention = [false, true]
heads = [1, 1]
transformer_depth = [1, 1]
norm_groups = 4
[evaluate]
num_samples = 4
batch_size = 4
sampler = { kind = "ddim", num_steps = 2 }
guidance = { scale = 2.0 }
"""
ENCODER = '{ kind = "pretrained", folder = "none", max_tokens = 4 }'
CLASS, TEXT = '{ kind = "class" }', f'{{ kind = "text", width = 12, use = "tokens", encoder = {ENCODER} }}'


def setup_of(folder: Path, conditioner: str = CLASS) -> Setup:
    path = folder / "tiny.toml"
    path.write_text(TINY.replace("CONDITIONER", conditioner))
    return Setup(folder=folder, rounds=1, experiment=path, updates=1, tracking_uri="offline")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Mapping[str, Job]]]:
    """The jobs that would be timed: all checks have passed by then."""
    found: list[Mapping[str, Job]] = []
    monkeypatch.setattr(models, "compare", lambda jobs, **_: found.append(jobs))
    threads = torch.get_num_threads()
    yield found
    torch.set_num_threads(threads)


def test_a_known_ratio_is_found_and_the_control_holds_one() -> None:
    def sleep(seconds: float, units: float = 1) -> Job:
        return Job(lambda: time.sleep(seconds), units)

    def errors() -> list[float]:
        found = compare({"ours": sleep(0.01), "slow": sleep(0.03), "twice": sleep(0.01, units=0.5)}, rounds=5)
        wall = {name: clocks["wall"] for name, clocks in found.faster.items()}
        assert wall["slow"].low <= wall["slow"].median <= wall["slow"].high
        expected = {"slow": 3, "twice": 2, CONTROL: 1}
        return [abs(wall[name].median / ratio - 1) for name, ratio in expected.items()]

    assert max(quietest_round(errors, limit=0.3, rounds=5)) < 0.3


def test_sleeping_costs_no_processor_seconds_and_a_child_costs_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        sum(range(200_000))

    found = compare({"ours": Job(lambda: (time.sleep(0.03), work()), 1), "work": Job(work, 1)}, rounds=5)
    assert found.faster["work"]["processor"].median > 0.5
    seconds = iter(range(100))
    monkeypatch.setattr(paired_timing, "children_seconds", lambda: float(next(seconds)))
    found = compare({"ours": Job(work, 1), "parent": Job(work, 1, has_children=True)}, rounds=3)
    assert found.per_second["parent"]["processor"] == pytest.approx(1, rel=0.2)


def test_the_interval_is_narrow_for_steady_ratios_and_wide_for_restless_ones() -> None:
    steady, restless = Ratio.of([2.0] * 9), Ratio.of([1.0, 9.0, 2.0, 5.0, 3.0])
    assert (steady.low, steady.median, steady.high) == (2, 2, 2)
    assert restless.low < restless.median < restless.high


def test_a_goal_is_reached_by_the_whole_interval_and_a_steady_control_only() -> None:
    goal = benchmark.Goal("unet", "demo", "float32", "plain", "wall", 0.9)
    good, wide, off = Ratio(1.0, 0.95, 1.05), Ratio(1.0, 0.85, 1.2), Ratio(1.2, 1.1, 1.3)

    def reached(ratio: Ratio, control: Ratio) -> bool:
        return benchmark.reached(goal, {"plain": {"wall": ratio}, CONTROL: {"wall": control}})

    assert reached(good, good)
    assert not reached(wide, good)
    assert not reached(good, off)
    assert not benchmark.reached(goal, {CONTROL: {"wall": good}}), "a device of which no peak is known"


def test_every_goal_is_one_of_a_measure_that_there_is() -> None:
    measures = {measure.__name__ for measures in benchmark.MEASURES.values() for measure in measures}
    assert {goal.measure for goal in benchmark.GOALS} == measures
    assert {goal.size for goal in benchmark.GOALS} == {*SIZES, ""}
    assert {goal.mode for goal in benchmark.GOALS} <= {*get_args(benchmark.ModeName), ""}


def test_the_start_of_the_sender_is_not_timed(
    tmp_path: Path, seen: list[Mapping[str, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    records_left = iter((7, 2, 0))
    monkeypatch.setattr(models, "unsent", lambda folder, sent: next(records_left), raising=False)
    monkeypatch.setattr(models, "POLL_SECONDS", 0.0, raising=False)
    monkeypatch.setattr(Tracker, "start_sending", lambda self: None)
    models.unet(replace(setup_of(tmp_path), tracking_uri=f"sqlite:///{tmp_path}/mlflow.db"))
    assert seen
    assert next(records_left, None) is None, "timed before all was sent"


def test_ours_against_the_peak_is_its_share_of_it() -> None:
    found = compare({"ours": Job(lambda: time.sleep(0.01), 2)}, rounds=3, peak=1000.0)
    assert found.faster[PEAK]["wall"].median == pytest.approx(found.per_second["ours"]["wall"] / 1000)
    assert PEAK not in compare({"ours": Job(lambda: None, 2)}, rounds=3).faster


def test_all_of_a_gpu_begins_with_the_goals_of_the_largest_model_and_of_a_cpu_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = benchmark.BenchmarkConfig(subjects=("all",))
    measures = {measure.__name__ for measures in benchmark.MEASURES.values() for measure in measures}
    data = {measure.__name__ for measure in benchmark.MEASURES["data"]}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pieces = benchmark.pieces_of(config)
    assert pieces[:2] == [("unet", "sd", "bf16-compiled"), ("sampling", "sd", "bf16-compiled")]
    assert {goal[:3] for goal in benchmark.GOALS} <= set(pieces)
    assert {piece[:2] for piece in pieces} == {
        *((name, size) for name in measures - data for size in SIZES),
        *((name, "") for name in data),
    }
    assert len(pieces) == len(set(pieces))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {piece[1:] for piece in benchmark.pieces_of(config)} == {("small", "float32"), ("demo", "float32"), ("", "")}
    asked = benchmark.BenchmarkConfig(subjects=("encode",), sizes=("sd",), modes=("bf16",))
    assert benchmark.pieces_of(asked) == [("encoding", "sd", "bf16")]


@pytest.fixture
def fake_pieces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measures that were made, each of 100 seconds by the tool's clock; ``vae`` fails."""
    made, seconds = list[str](), 0.0

    def unet(setup: Setup) -> Comparison:
        """Update."""
        nonlocal seconds
        made.append("vae" if setup.precision == "bf16" else "unet")
        seconds += 100
        if made[-1] == "vae":
            raise torch.OutOfMemoryError("too large")
        one = Ratio(1.0, 0.9, 1.1)
        faster = {name: {"processor": one, "wall": one} for name in ("plain loop", "diffusers", CONTROL)}
        return Comparison(faster, {"ours": {"processor": 2.0, "wall": 3.0}})  # type: ignore[arg-type]

    monkeypatch.setattr(models, "unet", unet)
    monkeypatch.setattr(benchmark, "MEASURES", {"train": (unet,)})
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: seconds))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return made


def benchmarked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    level = logging.getLogger("latentline").level
    try:
        code = benchmark.main(words)
    finally:
        logging.getLogger("latentline").setLevel(level)
    return code, *capsys.readouterr()


def test_a_benchmark_goes_on_with_the_pieces_that_its_file_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_pieces: list[str]
) -> None:
    words = ("train", "--sizes", "demo,small,sd", "--output", str(tmp_path / "f.json"), "--minutes", "3.4")
    for left in (1, 0, 0):
        code, out, _ = benchmarked(capsys, *words)
        assert code == (75 if left else 0)
        assert (f"{left} pieces are left" in out) == bool(left)
    assert len(fake_pieces) == 3
    head, line, *rows = out.splitlines()
    assert {row.count("|") for row in (head, line, *rows)} == {len(benchmark.HEAD) + 1}, "a table in Markdown"
    assert [row.split(" | ")[1] for row in rows] == ["demo float32", "small float32", "sd float32"]
    assert rows[0].split(" | ")[2:6] == ["2", "1.00 [0.90, 1.10]", "1.00 [0.90, 1.10]", ""]

    code, _, said = benchmarked(capsys, *words, "--rounds", "3")
    assert code == 2
    assert said.startswith(f"benchmark: benchmark.output: {tmp_path}/f.json has figures of ")
    assert ", 11 rounds, not of " in said
    assert said.endswith(f", torch {torch.__version__}, 3 rounds: give another file\n")


def test_models_are_not_measured_without_what_they_are_compared_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert benchmark.main(["train"]) == 2
    assert "models are compared with diffusers; install it with" in capsys.readouterr().err


def test_a_piece_that_fails_is_named_costs_no_other_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_pieces: list[str]
) -> None:
    words = ("train", "--modes", "bf16,float32", "--output", str(tmp_path / "f.json"), "--goals", "true")
    for _ in range(2):
        code, out, said = benchmarked(capsys, *words)
        assert code == 1
        assert "unet demo bf16 failed" in said
        assert "OutOfMemoryError: too large" in said
        assert "MISSED: 0.952 of plain loop (processor)" in out
    assert fake_pieces == ["vae", "unet", "vae"]


def test_modes_are_measured_one_after_the_other_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate refuses a second arithmetic in one process."""
    (experiment := tmp_path / "tiny.toml").write_text(TINY.replace("CONDITIONER", CLASS))
    monkeypatch.setattr(benchmark, "SIZES", {"demo": experiment})
    config = benchmark.BenchmarkConfig(subjects=("sample",), rounds=1, threads=1)
    figures = [benchmark.measured(("sampling", "demo", mode), config) for mode in ("float32", "bf16")]
    assert [figure.piece[2] for figure in figures] == ["float32", "bf16"]
    assert all(figure.faster["bare network"]["wall"].median > 0 for figure in figures)


def test_sides_that_read_different_samples_are_not_timed() -> None:
    one = {"a": np.zeros(3, dtype=np.uint8), "b": np.ones(3, dtype=np.uint8)}
    check_same(one, {key: value.copy() for key, value in one.items()})
    with pytest.raises(ValueError, match="different samples: 2 and 1"):
        check_same(one, {"a": one["a"]})
    with pytest.raises(ValueError, match="b differs by 1 on average"):
        check_same(one, {**one, "b": np.full(3, 2, dtype=np.uint8)})
    check_same(one, {**one, "b": np.full(3, 2, dtype=np.uint8)}, within=1.0)


def test_the_largest_size_is_stable_diffusion_2(tmp_path: Path) -> None:
    published = {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "in_channels": 4,
        "out_channels": 4,
    }
    setup = Setup(folder=tmp_path, rounds=1, experiment=SIZES["sd"])
    denoiser = setup.config(TrainUNetConfig, "train_unet").denoiser
    theirs = unet_config_from_diffusers(published)
    assert denoiser.network == theirs.network
    assert denoiser.token_width == theirs.token_width
    assert (setup.image.resolution, setup.image.channels) == (512, 3)


@pytest.mark.soak
def test_trainings_of_two_processes_are_compared_with_the_plain_loop_alone(tmp_path: Path) -> None:
    launch = stage_command("tools.benchmark", processes=2)
    words = ("train", "--rounds", "1", "--threads", "1", "--goals", "true", "--output", str(tmp_path / "figures.json"))
    command = [*launch[: launch.index("--config")], *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert "float32 failed" not in done.stderr, done.stderr
    assert done.stdout.count("Update of the U-Net") == 1, "one rank speaks"
    known = benchmark.Figures.model_validate_json((tmp_path / "figures.json").read_bytes())
    assert "2 processes, 1 threads" in known.about
    assert [(figure.piece[0], figure.processes) for figure in known.figures] == [("unet", 2), ("vae", 2)]
    assert all({*figure.faster} - {PEAK} == {"plain loop", CONTROL} for figure in known.figures)
    assert {goal.against for figure in known.figures for goal in figure.goals} == {"plain loop"}


def test_a_training_the_plain_loop_and_diffusers_compute_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(jobs: Mapping[str, Job], **_: Any) -> Any:
        for job in jobs.values():
            job.run()  # while the training still waits for its turn
        return list(jobs)

    monkeypatch.setattr(models, "compare", compare)
    assert models.unet(setup_of(tmp_path, TEXT)) == ["ours", "plain loop", "diffusers"]


def test_sides_that_compute_other_losses_are_not_timed(
    tmp_path: Path, seen: list[Mapping[str, Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    their_loss = peers.vae_loss
    monkeypatch.setattr(peers, "vae_loss", lambda weight: lambda *given: 1.01 * their_loss(weight)(*given))
    # By as much as was changed, and no more.
    with pytest.raises(ValueError, match=r"The loss of diffusers' network differs by 0.01 of its size"):
        models.vae(setup_of(tmp_path))
    assert not seen


def test_our_images_are_those_of_diffusers_loop(tmp_path: Path, seen: list[Mapping[str, Job]]) -> None:
    models.sampling(setup_of(tmp_path))
    assert len(seen) == 1


def test_the_bare_network_encodes_the_same_batches_in_as_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[Mapping[str, Job]]
) -> None:
    """Else the whole with reading and writing can be "faster" than the network in it."""
    calls: list[tuple[int, float]] = []
    at_once, most_at_once = 0, 0

    def encode(network: AutoencoderKL, images: Tensor) -> Any:
        nonlocal at_once, most_at_once
        at_once += 1
        most_at_once = max(most_at_once, at_once)
        calls.append((threading.get_ident(), float(images.double().sum())))
        time.sleep(0.03)  # so that each thread gets its turn
        posterior = original(network, images)
        at_once -= 1
        return posterior

    def called_by(work: Callable[[], object]) -> tuple[int, list[float]]:
        calls.clear()
        work()
        assert threading.get_ident() not in {thread for thread, _ in calls}
        return len({thread for thread, _ in calls}), sorted(total for _, total in calls)

    original = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    models.encoding(setup_of(tmp_path))
    assert called_by(seen[0]["ours"].run) == called_by(seen[0]["bare network"].run)
    assert most_at_once == 1
