"""Exports: what diffusers makes of them, by the lines of their own model card, and call by call."""

import contextlib
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import pytest
import torch
from conftest import SMOKE, Run, run_here
from safetensors.torch import load_file

from data.manifest import FileEntry, Parents, read_input, read_manifest, write_manifest
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.conditioning.text_encoder import MiniLMConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import scheduler_config_to_diffusers
from models.diffusion.objective import ObjectiveConfig
from models.diffusion.samplers import DDIMConfig
from models.diffusion.schedule import FlowMatchingConfig, ScaledLinearScheduleConfig
from models.latent_diffusion import LatentDiffusion, Normalisation
from models.unet import UNetConfig
from pipelines.model.device import Device
from pipelines.model.weights import ModelInputs, load_latent_diffusion
from pipelines.tools import export
from pipelines.tools.export import ExportConfig, compute_example
from pipelines.tools.model_card import model_card


@pytest.fixture(scope="module")
def exported(two_process_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("export") / "smoke"
    done = run_here(
        *("export", "--run.root", str(two_process_run.root), "--format", "diffusers", "--output", str(output)),
        *("--num_inference_steps", "10"),
    )
    assert done.returncode == 0, done.stderr
    return output


def lines_of_card(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    return code


def figures_in(said: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split() for line in said.splitlines())}


def test_the_lines_of_the_model_card_reproduce_our_samples(exported: Path) -> None:
    """As a reader runs them: without anything of ours."""
    said, ours = io.StringIO(), dict.fromkeys(("pipelines", "models", "data"))
    with contextlib.chdir(exported), contextlib.redirect_stdout(said), mock.patch.dict(sys.modules, ours):
        exec(lines_of_card(exported), {})
    metrics = figures_in(said.getvalue())
    assert set(metrics) == {"latents", "images"}
    assert max(metrics.values()) < 1e-3


def test_each_call_of_the_exported_networks_is_ours(exported: Path, two_process_run: Run) -> None:
    unet = diffusers.UNet2DModel.from_pretrained(exported / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(exported / "vae")
    folders = {name: two_process_run.root / name for name in ("vae", "unet")}
    parents = Parents({name: read_input(name, folder) for name, folder in folders.items()})
    inputs = ModelInputs(vae=str(folders["vae"]), unet=str(folders["unet"]))
    ours = load_latent_diffusion(inputs, parents, device=Device(torch.device("cpu")))
    example = load_file(exported / "example.safetensors")
    times = torch.tensor([0, 250, 700, 999])
    with torch.no_grad():
        for labels in (example["class_labels"], example["null_class_labels"]):
            dropped = (labels == 4)[:, None]
            expected = ours.denoiser.output(example["noise"], times, {"labels": labels}, dropped)
            found = unet(example["noise"], times, class_labels=labels).sample
            assert (found - expected).norm() / expected.norm() < 1e-5
        restored = ours.normalisation.restore(example["latents"])
        scaling_factor = vae.config.scaling_factor
        found, expected = vae.decode(example["latents"] / scaling_factor).sample, ours.autoencoder.decode(restored)
        assert (found - expected).norm() / expected.norm() < 1e-5
        posterior = vae.encode(expected.clamp(-1, 1)).latent_dist
        encoded = ours.encode(expected.clamp(-1, 1))
        assert (posterior.mean * scaling_factor - encoded).norm() / encoded.norm() < 1e-5


def test_an_export_holds_what_others_need_to_check_it(exported: Path) -> None:
    example = load_file(exported / "example.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {
        "noise": (4, 4, 4, 4),
        "class_labels": (4,),
        "null_class_labels": (4,),
        "guidance_scale": (),
        "num_inference_steps": (),
        "latents": (4, 4, 4, 4),
        "images": (4, 3, 16, 16),
    }
    assert example["class_labels"].tolist() == [0, 1, 2, 3]
    assert example["null_class_labels"].tolist() == [4] * 4
    assert example["images"].dtype == example["latents"].dtype == torch.float32
    assert (exported / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert not (exported / "model_index.json").exists()


def test_exporting_again_gives_the_same_bytes_and_other_folders_are_left_alone(
    exported: Path, two_process_run: Run, tmp_path: Path
) -> None:
    words = ["--run.root", str(two_process_run.root), "--num_inference_steps", "10"]
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert run_here("export", *words, "--output", str(exported)).returncode == 0
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before
    (tmp_path / "thesis.txt").write_text("mine")
    refused = run_here("export", *words, "--output", str(tmp_path))
    assert refused.returncode == 2
    assert "a folder with other things in it" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_model_of_another_architecture_is_no_single_file(two_process_run: Run, tmp_path: Path) -> None:
    words = ["--run.root", str(two_process_run.root), "--output", str(tmp_path / "export")]
    refused = run_here("export", *words, "--format", "single_file")
    assert refused.returncode == 2
    assert "does not fit into a file of Stable Diffusion's: unet._class_name = 'UNet2DModel'" in refused.stderr
    assert not list(tmp_path.glob("export/*"))


def test_a_single_file_holds_what_the_folders_beside_it_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TextConditionerConfig(width=12, use="tokens", encoder=MiniLMConfig(max_tokens=5))
    network = UNetConfig(
        channels=(32, 32), blocks=(1, 1), attention=(False, True), heads=(8, 8), transformer_depth=(1, 1)
    ).model_copy(update={"time_injection": "shift"})
    velocity = DenoiserConfig(network=network, conditioners=(text,), schedule=ScaledLinearScheduleConfig())
    described = velocity.model_copy(update={"objective": ObjectiveConfig(prediction="eps")})
    model = LatentDiffusion(
        autoencoder=AutoencoderKL(VAEConfig(latent_channels=4, channels=(32, 32)), image_channels=3).eval(),
        denoiser=Denoiser(described, latent_channels=4, latent_size=4, num_classes=0).eval(),
        normalisation=Normalisation(mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 2.0, 3.0, 4.0)),
    )
    model.autoencoder.to(memory_format=torch.channels_last)
    parents = SimpleNamespace(unet=SimpleNamespace(classes=(), weights=""), vae=SimpleNamespace(weights=""))
    tokens = {"text_tokens": torch.randn(4, 5, 12), "labels": torch.full((4,), -1)}
    for name, found in (
        ("read_parents", parents),
        ("check_latent_diffusion", None),
        ("denoiser_config", described),
        ("load_latent_diffusion", model),
        ("example_conditions", tokens),
    ):
        monkeypatch.setattr(export, name, lambda *_, found=found, **__: found)
    words = ["--config", str(SMOKE), "--num_inference_steps", "2", "--output", str(tmp_path)]
    assert export.main([*words, "--format", "single_file"]) == 0
    for name, kind in (("vae", diffusers.AutoencoderKL), ("unet", diffusers.UNet2DConditionModel)):
        options = {"config": str(tmp_path), "subfolder": name, "local_files_only": True}
        read = kind.from_single_file(str(tmp_path / "model.safetensors"), **options).state_dict()
        expected = kind.from_pretrained(tmp_path / name).state_dict()
        assert read.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in read.items())
    assert export.main(words) == 0
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.setattr(export, "denoiser_config", lambda *_: velocity)
    model = replace(model, denoiser=Denoiser(velocity, latent_channels=4, latent_size=4, num_classes=0).eval())
    monkeypatch.setattr(export, "load_latent_diffusion", lambda *_, **__: model)
    assert export.main([*words, "--format", "single_file"]) == 2
    assert "scheduler.prediction_type = 'v_prediction' (only epsilon)" in capsys.readouterr().err


def test_what_diffusers_cannot_hold_is_refused_before_anything_is_written(two_process_run: Run, tmp_path: Path) -> None:
    words = ["--run.root", str(two_process_run.root), "--output", str(tmp_path / "export")]
    refused = run_here("export", *words, "--num_inference_steps", "30")
    assert refused.returncode == 2
    assert "cannot follow 30 steps" in refused.stderr
    refused = run_here("export", *words, "--num_inference_steps", "2000")
    assert refused.returncode == 2
    assert "export.num_inference_steps: a sampler of num_steps = 2000 cannot take more" in refused.stderr
    unet = tmp_path / "unet"
    unet.mkdir()
    for name in ("manifest.json", "unet.safetensors", "config.json"):
        (unet / name).write_bytes((two_process_run.root / "unet" / name).read_bytes())
    config = json.loads((unet / "config.json").read_bytes())
    config["denoiser"] |= {
        "schedule": {"kind": "flow_matching"},
        "objective": config["denoiser"]["objective"] | {"prediction": "x0"},
    }
    (unet / "config.json").write_text(json.dumps(config))
    manifest = read_manifest(unet)
    kept = [entry for entry in manifest.files if entry.name != "config.json"]
    write_manifest(unet, manifest.model_copy(update={"files": (*kept, FileEntry.of(unet / "config.json"))}))
    refused = run_here("export", *words, "--inputs.unet", str(unet))
    assert refused.returncode == 2
    assert "cannot be exported to diffusers: its flow matching cannot read a prediction of 'x0'" in refused.stderr
    assert not list(tmp_path.glob("export/*"))


@pytest.mark.parametrize("kind", ["text", "text_and_class", "unconditional", "flow"])
def test_cards_of_other_conditions_reproduce_their_samples_too(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = TextConditionerConfig(width=12, encoder=MiniLMConfig(max_tokens=5))
    conditioners = {
        "text": (text,),
        "text_and_class": (text.model_copy(update={"use": "tokens"}), ClassConditionerConfig()),
        "unconditional": (),
        "flow": (ClassConditionerConfig(),),
    }[kind]
    network = UNetConfig(
        channels=(16, 32), blocks=(1, 1), attention=(False, True), heads=(1, 4), transformer_depth=(1, 1), norm_groups=8
    )
    described = DenoiserConfig(network=network, conditioners=conditioners)
    if kind == "flow":
        changes = {"schedule": FlowMatchingConfig(), "objective": ObjectiveConfig(prediction="velocity")}
        described = described.model_copy(update=changes)
    denoiser = Denoiser(described, latent_channels=3, latent_size=4, num_classes=3).eval()
    for parameter in denoiser.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    vae = AutoencoderKL(VAEConfig(latent_channels=3, channels=(8, 8), norm_groups=4), image_channels=1).eval()
    normalisation = Normalisation(mean=(0.1, -0.2, 0.3), std=(1.5, 0.7, 1.1))
    model = LatentDiffusion(autoencoder=vae, denoiser=denoiser, normalisation=normalisation)
    tokens = torch.randn(4, 5, 12)
    tokens[1, 3:] = 0
    conditions = {
        "labels": torch.tensor([0, 1, 2, 0]),
        "text_tokens": tokens,
        "text_pooled": torch.randn(4, 12),
    }
    config = ExportConfig(inputs=ModelInputs(vae="", unet=""), num_inference_steps=10, guidance_scale=2.5)
    sampler = DDIMConfig(num_steps=10)
    if kind == "unconditional":
        config = config.model_copy(update={"guidance_scale": 1.0})
    example = compute_example(config, model, sampler=sampler, conditions=conditions)
    scheduler = scheduler_config_to_diffusers(denoiser.config, sampler)
    configs, weights = export.in_diffusers(model, scheduler, num_classes=3)
    export.write_export(tmp_path, configs, weights, example)
    card = model_card(
        unet_class=configs["unet"]["_class_name"],
        scheduler_class=scheduler["_class_name"],
        **{"example": example, "classes": ("a", "b", "c"), "digests": {}, "experiment": "x"},
    )
    (tmp_path / "README.md").write_text(card)
    assert example["latents"].std() > 0.1
    said = io.StringIO()
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(said):
        exec(lines_of_card(tmp_path), {})
    assert max(figures_in(said.getvalue()).values()) < 1e-3
