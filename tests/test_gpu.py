"""What is written for GPUs: marked tests run there, and without one on the processor where their law has a sense there.

The others show on any machine that nothing of a model waits for its device, and that it is compiled once.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import TIMEOUT_SECONDS, environment, free_port, rank_environment, run_here, stage_command
from test_benchmark import CLASS, TEXT, setup_of
from test_ranks import PROGRAM
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import attend
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig, DDPMConfig, DPMSolverConfig, EulerConfig, HeunConfig, SamplerConfig
from pipelines import train_unet
from pipelines.model.captions import blank_features
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.launch import Precision, start_accelerator
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.ema import Averages, ExponentialAverage
from pipelines.runtime.training.optim import LossScale, OptimConfig, Optimizer
from pipelines.runtime.training.trainable import Trainable
from pipelines.tools.benchmarks import models, peers
from pipelines.tools.benchmarks.paired_timing import Job
from pipelines.tools.benchmarks.shards import write_latents
from pipelines.tools.benchmarks.stages import SIZES, Setup, Turns, stage_of
from pipelines.train_vae import TrainVAEConfig

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
META = torch.device("meta")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="no NVIDIA GPU here, and a processor has nothing of the kind")


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave nothing of a test to the next: accelerate's arithmetic, graphs, TF32, threads, deterministic kernels.

    Without a GPU, networks are traced and not compiled, which would take minutes.
    """
    threads, tf32 = torch.get_num_threads(), (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    if not ON_GPU:
        compile_network = nn.Module.compile
        monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_network(self, backend="eager"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    counters.clear()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def batch_of(network: Any, count: int, to: torch.device) -> tuple[Any, ...]:
    """Latents, noise, times, conditions and drops, drawn on the host and passed as in a training."""
    x0 = torch.randn(count, *network.latent_shape)
    blank = blank_features(network.config).items()
    conditions = {name: torch.randn(count, *field.shape[1:]).to(to) for name, field in blank}
    conditions["labels"] = (torch.arange(count) % 10).to(to)
    times, dropped = torch.randint(0, 1000, (count,)), torch.zeros(count, len(network.conditioners), dtype=torch.bool)
    latents = (each.to(to, memory_format=torch.channels_last) for each in (x0, torch.randn_like(x0)))
    return *latents, times.to(to), conditions, dropped.to(to)


# -------------------------------------------------------------------------------------------------- on any machine


def test_a_model_neither_waits_for_its_device_nor_mixes_it_with_the_host(tmp_path: Path) -> None:
    """On the meta device no number can be read, and no tensor of the host meets one of the device."""
    network = setup_of(tmp_path, TEXT).build_denoiser().to(META)
    batch = batch_of(network, 4, META)
    losses = network(*batch)
    losses.loss.mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    samplers: tuple[SamplerConfig, ...] = (
        DDIMConfig(num_steps=2, eta=1.0),
        *(kind(num_steps=2) for kind in (DDPMConfig, EulerConfig, HeunConfig, DPMSolverConfig)),
    )
    for sampler in samplers:
        guidance = GuidanceConfig(scale=2.0, rescale=0.5)
        found = network.sample(
            batch[1], batch[3], sampler=sampler, guidance=guidance, fresh_noise=lambda step: batch[1]
        )
        assert found.device == META


def test_a_compiled_model_in_training_is_one_graph_that_is_compiled_once(tmp_path: Path) -> None:
    """On another device than the host's: what its first pass moves there would change what a graph was compiled for."""
    accelerator = start_accelerator(RunConfig(threads=1), precision="bf16")
    accelerator.device_placement = False
    setup = setup_of(tmp_path, CLASS)
    config = setup.config(train_unet.TrainUNetConfig, "train_unet", "--compile", "true")
    network = setup.build_denoiser().to(META)
    wrapped = Trainable(network, config, accelerator).wrapped
    for _ in range(3):
        wrapped(*batch_of(network, 4, META))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# ----------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mode",
    [
        "float32",
        "bf16",
        "float32-compiled",
        "bf16-compiled",
        *(pytest.param(mode, marks=needs_gpu) for mode in ("tf32", "tf32-compiled")),
    ],
)
@pytest.mark.parametrize("measure", [models.unet, models.vae, models.encoding, models.sampling])
def test_stage_plain_loop_and_diffusers_compute_the_same_in_each_arithmetic(
    measure: Callable[[Setup], Any], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of a stage, its plain loop and diffusers; latents; images: each is compared before it is timed."""
    precision, _, compiled = mode.partition("-")
    setup = replaced(
        setup_of(tmp_path),
        precision="bf16" if precision == "bf16" else "float32",
        tf32=precision != "float32",
        compiled=bool(compiled),
        updates=3,
    )

    def compare(jobs: Mapping[str, Job], **_: Any) -> list[str]:
        for job in jobs.values():
            job.run()
        return list(jobs)

    monkeypatch.setattr(models, "compare", compare)
    assert measure(setup)[0] == "ours"  # type: ignore[index]


def replaced(setup: Setup, **changes: Any) -> Setup:
    return Setup(**{**vars(setup), **changes})


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_products_and_convolutions_in_float32_are_in_tf32_where_that_is_asked_for(precision: Precision) -> None:
    images, kernel, a, b = (torch.randn(*shape) for shape in ((4, 64, 32, 32), (64, 64, 3, 3), (512, 512), (512, 512)))
    work: tuple[tuple[Callable[..., Tensor], Tensor, Tensor], ...] = ((F.conv2d, images, kernel), (torch.mm, a, b))
    for call, x, y in work:
        exact, errors = call(x.double(), y.double()), []
        for tf32 in (False, True):
            AcceleratorState._reset_state(reset_partial_state=True)
            start_accelerator(RunConfig(), precision=precision, tf32=tf32)
            errors.append(float((call(x.cuda(), y.cuda()).cpu().double() - exact).norm() / exact.norm()))
        assert errors[0] < 1e-5 < 1e-4 < errors[1]


@pytest.mark.gpu
def test_an_overflow_in_fp16_changes_nothing_but_the_scale_which_a_restart_keeps() -> None:
    torch.manual_seed(0)
    accelerator = start_accelerator(RunConfig(threads=1), precision="fp16" if ON_GPU else "bf16")
    if not ON_GPU:
        accelerator.scaler = torch.amp.GradScaler("cpu")
    assert accelerator.scaler is not None
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3)).to(DEVICE)
    optimizer = Optimizer(network, OptimConfig(warmup_updates=0), accelerator=accelerator)
    wrapped = accelerator.prepare_model(network)
    images = torch.randn(4, 3, 8, 8, device=DEVICE)

    def step(factor: float) -> Tensor:
        accelerator.backward((wrapped(images) * factor).square().mean())
        norm = optimizer.clip()
        optimizer.apply(update=1, total_updates=9, refused=(~torch.isfinite(norm)).float())
        accelerator.scaler.update()
        return norm

    assert torch.isfinite(step(0.1))
    before = [tensor.clone() for tensor in (*network.parameters(), *optimizer.tensors().values())]
    scale = accelerator.scaler.get_scale()
    assert not torch.isfinite(step(1e30))
    assert all(map(torch.equal, before, (*network.parameters(), *optimizer.tensors().values())))
    assert accelerator.scaler.get_scale() == scale / 2
    LossScale(twin := torch.amp.GradScaler(DEVICE.type)).load(LossScale(accelerator.scaler).tensors())
    assert twin.get_scale() == scale / 2
    assert torch.isfinite(step(0.1))
    assert not any(map(torch.equal, before, network.parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_each_kernel_of_sdpa_is_the_formula_in_values_and_gradients(
    kernel: str, masked: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 3, length, 64, device=DEVICE, dtype=dtype) for length in (64, 77, 77)]
    mask = torch.arange(77, device=DEVICE).expand(2, 77) < torch.tensor([[77], [9]], device=DEVICE) if masked else None
    results = []
    for backend in ("sdpa", "math"):
        inputs = [x.clone().requires_grad_() for x in given]
        with sdpa_kernel(SDPBackend.__members__[kernel] if backend == "sdpa" else SDPBackend.MATH):
            try:
                out = attend(*inputs, mask=mask, backend=backend)
            except RuntimeError as error:
                pytest.skip(f"{kernel} does not take {dtype}, mask {masked} here: {error}")
            results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------------------------- an update


@pytest.mark.gpu
def test_a_refused_update_of_weights_and_averages_changes_no_bit_and_the_next_is_the_plain_one() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)).to(DEVICE).to(memory_format=torch.channels_last)
    accelerator = start_accelerator(RunConfig(threads=1))
    optimizer = Optimizer(network, OptimConfig(warmup_updates=0, weight_decay=0.1), accelerator=accelerator)
    averages = Averages(network, (ExponentialAverage(decay=0.75, warmup=False),))
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)).double().cpu()
    plain.load_state_dict(network.state_dict())
    groups = [{"params": [p for p in plain.parameters() if (p.ndim > 1) == flag]} for flag in (True, False)]
    groups[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    average = [parameter.detach().clone() for parameter in plain.parameters()]
    images = torch.randn(4, 3, 8, 8)

    for update, refused in enumerate((0.0, 1.0, 0.0, 1.0), start=1):
        before = [tensor.clone() for tensor in (*network.parameters(), *averages.tensors().values())]
        network(images.to(DEVICE)).square().mean().backward()
        if refused:
            next(network.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        optimizer.clip()
        flag = torch.tensor(refused, device=DEVICE)
        optimizer.apply(update=update, total_updates=9, refused=flag)
        averages.update(network, update=update, refused=flag)
        after = (*network.parameters(), *averages.tensors().values())
        assert all(map(torch.equal, before, after)) == bool(refused)
        if not refused:
            plain(images.double()).square().mean().backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad()
            average = [0.75 * a + 0.25 * p.detach() for a, p in zip(average, plain.parameters(), strict=True)]
    found = (*network.parameters(), *averages.first.parameters())
    for ours, theirs in zip(found, (*plain.parameters(), *average), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=1e-4, atol=2e-6)


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Make whatever waits for the GPU an error, copies from memory that is not page-locked among it."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("measure", [models.unet, models.vae])
def test_no_update_between_two_flushes_waits_for_the_gpu(
    measure: Callable[[Setup], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def compare(jobs: Mapping[str, Job], **_: Any) -> None:
        with nothing_waits():
            made.append(jobs["ours"].run.func(5))  # type: ignore[attr-defined]

    monkeypatch.setattr(models, "compare", compare)
    measure(replaced(setup_of(tmp_path), updates=10, precision="bf16", tf32=True))
    assert made == [None]


@pytest.mark.gpu
def test_updates_of_a_compiled_model_and_by_cuda_graphs_are_the_plain_ones(tmp_path: Path) -> None:
    """Neither gradients nor metrics of an update may be written over, nor those of a term differentiated by itself."""
    found = []
    for how in ("false", "true", "reduce-overhead"):
        torch.manual_seed(0)
        accelerator = start_accelerator(RunConfig(threads=1))
        setup = setup_of(tmp_path)
        config = setup.config(train_unet.TrainUNetConfig, "train_unet", "--compile", how, "--optim.warmup_updates", "0")
        unet = Trainable(setup.build_denoiser().to(DEVICE), config, accelerator)
        averages, refused, losses = Averages(unet.network, config.averages), torch.zeros((), device=DEVICE), []
        torch.manual_seed(1)
        for update in range(1, 11):
            loss = unet.wrapped(*batch_of(unet.network, 4, DEVICE)).loss.mean()
            if update in (1, 6):  # as the replica check does
                gradients = torch.autograd.grad(loss, unet.optimizer.parameters, retain_graph=True, allow_unused=True)
                assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)
            accelerator.backward(loss)
            losses.append(loss.detach() * 1)
            unet.optimizer.clip()
            unet.optimizer.apply(update=update, total_updates=10, refused=refused)
            averages.update(unet.network, update=update, refused=refused)
        found.append([torch.stack(losses), *(tensor.clone() for tensor in averages.tensors().values())])
    for plain, compiled, graphs in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(graphs, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_the_memory_of_a_training_is_the_one_that_was_planned(tmp_path: Path) -> None:
    words = ("--run.root", str(tmp_path / "none"), "--json")
    planned = json.loads(run_here("plan", *words, config=SIZES["small"]).stdout)
    (expected,) = (stage["memory_bytes"] for stage in planned["stages"] if stage["stage"] == "train_unet")

    # The stage by itself, without its validation.
    setup = Setup(folder=tmp_path, rounds=1, experiment=SIZES["small"], updates=3, tracking_uri="offline")
    words = ("--updates=9", "--log_every=3", "--grid.rows", "1", "--grid.max_columns", "1")
    config = setup.config(train_unet.TrainUNetConfig, "train_unet", *words)
    write_latents(tmp_path / "latents", shape=setup.build_denoiser().latent_shape, per_shard=32)
    peers.theirs(setup.build_vae(), setup.image.resolution).save_pretrained(config.inputs.vae)
    stage = stage_of(setup, config, "train_unet", in_turns=True)
    turns = stage.stop
    assert isinstance(turns, Turns)
    turns.begin(partial(train_unet.train, config, stage))
    try:
        torch.cuda.reset_peak_memory_stats()
        turns.make(3)
        peak = torch.cuda.max_memory_allocated()
    finally:
        turns.end()
        stage.tracker.close("KILLED")
    assert expected == pytest.approx(peak, rel=0.15)


def test_graphs_that_would_write_over_gradients_are_refused() -> None:
    fields = {"updates": 1, "global_batch": 4, "compile": "reduce-overhead"}
    assert TrainingConfig.model_validate(fields).compile == "reduce-overhead"
    with pytest.raises(ValueError, match="needs images_per_device = 0: passes overwrite gradients"):
        TrainingConfig.model_validate({**fields, "images_per_device": 2})
    with pytest.raises(ValueError, match="compile\n.*valid boolean"):  # the discriminator comes after the next pass
        TrainVAEConfig.model_validate(fields)


# ------------------------------------------------------------------------------------------------- whole processes


def on_device(**extra: str) -> dict[str, str]:
    return environment(ACCELERATE_USE_CPU=str(not ON_GPU).lower(), **extra)


def run_on_device(stage: str, *words: str) -> str:
    command = stage_command(stage, *words)
    done = subprocess.run(command, env=on_device(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_resumed_training_ends_in_the_same_bits_with_deterministic_kernels(precision: str, tmp_path: Path) -> None:
    root = ("--run.root", str(tmp_path))
    run_on_device("prepare_corpus", *root)
    words = ("--precision", precision, "--run.deterministic", "true", "--optim.rate.kind", "constant")
    for stage, before in (("train_vae", ""), ("train_unet", "encode_latents")):
        if before:
            run_on_device(before, *root)
        folder = tmp_path / {"train_vae": "vae", "train_unet": "unet"}[stage]
        run_on_device(stage, *root, *words, "--updates", "16")
        said = run_on_device(stage, *root, *words, "--allow-changed", "updates")
        assert "continuing after update 16" in said
        resumed = next(folder.glob("*.safetensors")).read_bytes()
        shutil.rmtree(folder)
        run_on_device(stage, *root, *words)
        assert next(folder.glob("*.safetensors")).read_bytes() == resumed, stage


@pytest.mark.gpu
@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="NCCL needs two GPUs, here is one")
def test_two_devices_skip_the_same_updates_and_hold_the_same_bits(tmp_path: Path) -> None:
    config = {"on_bad_update": {"policy": "skip"}}
    recipes: tuple[dict[str, Any], ...] = (
        {"config": {"updates": 20, "replica_check_every": 5}},
        {"faults": {3: "data", 6: "loss", 9: "gradient"}, "on_rank": 1, "config": config},
        {"faults": {3: "data", 6: "loss", 9: "gradient"}, "on_rank": 1, "config": {**config, "shard_optimizer": True}},
        {"leave_out": [3, 6, 9]},
    )
    port = free_port()
    command = [sys.executable, str(PROGRAM), str(tmp_path), *map(json.dumps, recipes)]
    ranks = [
        subprocess.Popen(command, env=on_device(**rank_environment(rank, 2, port)), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=TIMEOUT_SECONDS)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    found = [
        [json.loads((tmp_path / f"{number}-rank-{rank}.json").read_bytes()) for rank in range(2)]
        for number in range(len(recipes))
    ]
    assert [[rank["ended"] for rank in both] for both in found] == [["done", "done"]] * len(recipes)
    assert all(first["sum"] == second["sum"] for first, second in (*found[:2], found[3]))
    assert found[1][0]["sum"] == found[3][0]["sum"]
    skipped, sharded, left_out = ({row["batch"]: row["train/loss"] for row in both[0]["rows"]} for both in found[1:])
    assert skipped == sharded == left_out
