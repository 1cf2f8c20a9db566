"""What ``run.attention`` and ``tf32`` ask for, is said, is recorded, and reaches every network of a stage."""

import contextlib
import importlib
import json
import types
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from conftest import Run, run_here, run_stage

from models import attention
from models.attention import RequestedBackend, SelfAttention
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.unet import UNet, UNetConfig
from pipelines.model.device import Device, attention_on, device_of
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.launch import start_accelerator
from pipelines.runtime.training.flops import known_peak_flops
from pipelines.tools import sample

CPU = torch.device("cpu")


def backends_of(network: torch.nn.Module) -> set[str]:
    return {module.backend for module in network.modules() if isinstance(module, SelfAttention)}


def test_the_command_line_knows_the_backends_that_there_are() -> None:
    assert get_args(RunConfig.model_fields["attention"].annotation) == get_args(RequestedBackend)


def test_every_network_that_is_placed_attends_by_the_chosen_backend() -> None:
    device = Device(CPU, "math")
    unet = UNetConfig(channels=(8,), blocks=(1,), attention=(True,), heads=(1,), transformer_depth=(1,), norm_groups=4)
    vae = VAEConfig(channels=(8, 8), blocks_per_level=1, norm_groups=4, mid_attention=True)
    for network in (UNet(unet, in_channels=4, out_channels=4), AutoencoderKL(vae, image_channels=3)):
        assert backends_of(network) == {"sdpa"}
        assert backends_of(device.place(network)) == {"math"}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_backend_is_tried_in_the_dtype_that_networks_compute_in(
    precision: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[torch.dtype] = []
    monkeypatch.setattr(attention, "probe_backend", lambda backend, device, dtype: tried.append(dtype) or "")
    attention_on(CPU, RunConfig(attention="math"), precision=precision)
    assert tried == [dtype]
    monkeypatch.setattr(attention, "probe_backend", lambda *_, **__: "no")
    with pytest.raises(ConfigError, match=r"^run.attention: attention backend 'math' .* on cpu in b?float\d\d \(no\)"):
        attention_on(CPU, RunConfig(attention="math"), precision=precision)


def test_a_stage_says_what_it_picked_and_why_and_tags_its_run() -> None:
    said, tags = [], {}
    stage: Any = types.SimpleNamespace(
        accelerator=types.SimpleNamespace(device=CPU, mixed_precision="no"),
        config=types.SimpleNamespace(run=RunConfig(attention="math")),
        log=types.SimpleNamespace(info=said.append),
        tracker=types.SimpleNamespace(set_tags=tags.update),
    )
    assert device_of(stage) == Device(CPU, "math")
    assert said == ["attention by math: asked for; forward and backward ran"]
    assert tags == {"attention": "math"}


def test_all_stages_with_networks_say_it_once_for_all_processes(two_process_run: Run) -> None:
    for stage in ("train_vae", "encode_latents", "train_unet", "evaluate"):
        line = f"{stage}[0/2] attention by sdpa: first to run forward and backward on cpu"
        assert two_process_run.output[stage].count(line) == 1, stage
    assert "attention by" not in two_process_run.output["prepare_corpus"]


def test_a_backend_that_cannot_run_ends_a_stage_before_any_work(two_process_run: Run, tmp_path: Any) -> None:
    inputs = (word for name in ("latents", "vae") for word in (f"--inputs.{name}", str(two_process_run.root / name)))
    done = run_stage("train_unet", "--run.root", str(tmp_path), "--run.attention", "xformers", *inputs)
    assert done.returncode == 2
    assert "run.attention: attention backend 'xformers' does not run on cpu in float32 (" in done.stderr
    assert "Use 'auto' or 'sdpa'" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "unet" / "outcome.json").read_bytes())["exit_code"] == 2
    assert not (tmp_path / "unet" / "checkpoints").exists()


def test_the_sample_tool_honours_it_too(two_process_run: Run, tmp_path: Any) -> None:
    inputs = {name: str(two_process_run.root / name) for name in ("vae", "unet")}
    config = sample.SampleConfig.model_validate(
        {"inputs": inputs, "run": {"attention": "xformers"}, "output": str(tmp_path / "out")}
    )
    with pytest.raises(ConfigError, match="run.attention: "):
        sample.draw(config)
    assert not list(tmp_path.glob("out/*"))


@pytest.fixture
def float32_kept() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("float32_kept")
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_set_for_products_and_convolutions_alike(tf32: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = not tf32, not tf32
    start_accelerator(RunConfig(threads=1), tf32=tf32)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)


@pytest.mark.usefixtures("float32_kept")
@pytest.mark.parametrize(
    ("stage", "expected"), [("train_vae", True), ("encode_latents", False), ("train_unet", True), ("evaluate", False)]
)
def test_float32_is_what_its_name_says_where_figures_and_latents_are_made(
    stage: str, expected: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    module = importlib.import_module(f"pipelines.{stage}")

    @contextlib.contextmanager
    def running_stage(config: Any, **words: Any) -> Iterator[None]:
        found.append(words["tf32"])
        raise SystemExit(0)
        yield

    monkeypatch.setattr(module, "running_stage", running_stage)
    run_here(stage, "--run.root", str(tmp_path))
    run_here(stage, "--run.root", str(tmp_path), "--tf32", str(not expected).lower())
    assert found == [expected, not expected]


def test_the_peak_is_that_of_what_float32_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-40GB")
    peaks = [known_peak_flops("cuda:0", precision, tf32=tf32) / 1e12 for precision, tf32 in
             (("float32", False), ("float32", True), ("bf16", False), ("bf16", True))]  # fmt: skip
    assert peaks == [19.5, 156, 312, 312]  # the data sheet's


def test_another_backend_is_no_other_request(two_process_run: Run) -> None:
    done = run_here("train_vae", "--run.root", str(two_process_run.root), "--run.attention", "math")
    assert done.returncode == 0
    assert "already finished" in done.stdout
