"""Networks published in the format of diffusers: as the VAE of a run, and as the start of a training."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from conftest import SMOKE, Run, run_here, run_stage, unrendered
from safetensors.torch import load_file, save_file
from torch import nn

from data.files import sha256_of
from data.loading import ImageShards, LatentShards
from data.manifest import DiffusersVAEManifest, LatentShape, read_input
from data.transforms import to_unit_range
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.conditioning.text_encoder import PretrainedConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import scheduler_config_to_diffusers
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig
from models.latent_diffusion import LatentDiffusion, Normalisation
from models.unet import UNetConfig
from pipelines.model.captions import CaptionEncoder, as_tensors
from pipelines.model.device import Device
from pipelines.model.start import DiffusersStart, RandomStart, RunStart, check_start, encoder_at, load_start
from pipelines.model.weights import ModelInputs, check_same_vae, load_vae
from pipelines.runtime.config.experiment import load_config
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.tools.export import (
    ExportConfig,
    compute_example,
    example_conditions,
    in_diffusers,
    write_export,
    write_pipeline,
)
from pipelines.tools.plan import PlanConfig, plan, unet_sketch
from pipelines.train_unet import TrainUNetConfig

MADE_BEFORE = Path(__file__).with_name("made_by_0_1")
NETWORK = UNetConfig(
    channels=(16, 32), blocks=(1, 1), attention=(False, True), heads=(1, 2), transformer_depth=(1, 1), norm_groups=8
)


def build_vae(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    shape = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "norm_num_groups": 4,
        "latent_channels": 3,
    }
    return diffusers.AutoencoderKL(**(shape | changes)).eval()


def build_unet(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    shape = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "attn_norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "num_class_embeds": 5,
    }
    return diffusers.UNet2DModel(**(shape | changes)).eval()


@pytest.fixture(scope="module")
def latents(two_process_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Latents of a published VAE, and its folder: (run, vae)."""
    folder = tmp_path_factory.mktemp("published")
    build_vae(scaling_factor=0.5, shift_factor=0.25).save_pretrained(folder / "vae")
    done = run_stage(
        *("encode_latents", "--run.root", str(folder / "run"), "--inputs.vae", str(folder / "vae")),
        *("--inputs.corpus", str(two_process_run.root / "corpus")),
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", folder / "vae"


def test_latents_of_a_published_vae_are_its_own_and_keep_its_scaling(
    latents: tuple[Path, Path], two_process_run: Run
) -> None:
    run, folder = latents
    theirs = diffusers.AutoencoderKL.from_pretrained(folder)
    images = ImageShards(two_process_run.root / "corpus", split="val").read(np.arange(16)).images
    stored = LatentShards(run / "latents", split="val").read(np.arange(16)).moments
    with torch.no_grad():
        posterior = theirs.encode(to_unit_range(images)).latent_dist
    expected = torch.stack([posterior.mean, posterior.logvar], dim=1)
    # Stored in half precision.
    torch.testing.assert_close(torch.from_numpy(stored).float(), expected, rtol=2e-3, atol=2e-3)
    statistics = read_input("latents", run / "latents").statistics
    assert statistics.mean == (0.25,) * 3  # (z - shift) * factor is (z - mean) / std
    assert statistics.std == (2.0,) * 3
    assert statistics.measured_mean != statistics.mean


def test_a_unet_is_trained_and_evaluated_on_a_published_vae_from_a_published_unet(
    latents: tuple[Path, Path], two_process_run: Run, tmp_path: Path
) -> None:
    run, vae = latents
    build_unet().save_pretrained(tmp_path / "unet")
    words = ["--run.root", str(run), "--inputs.vae", str(vae)]
    start = ["--start", f'{{ kind = "diffusers", folder = "{tmp_path / "unet"}" }}']
    network = ["--denoiser.network.channels", "[16, 32]", "--updates", "2", "--validate_every", "2", "--log_every", "1"]
    network += ["--validate_samples", "0"]
    done = run_stage("train_unet", *words, *start, *network)
    assert done.returncode == 0, done.stderr
    corpus = ["--inputs.corpus", str(two_process_run.root / "corpus")]
    short = ["--num_samples", "16", "--sweep", "[]", "--sampler.num_steps", "2", "--probe_images", "0"]
    with unrendered():
        done = run_here("evaluate", *words, *corpus, *short)
    assert done.returncode == 0, done.stderr
    # The start is in the weights: after two updates of warm-up they have hardly moved.
    weights = load_file(run / "unet" / "unet.safetensors")
    theirs = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    difference = (weights["network.conv_in.weight"] - theirs["conv_in.weight"]).abs().max()
    assert 0 < difference < 0.02 < theirs["conv_in.weight"].abs().max()


def test_a_plan_with_a_published_vae_has_its_latents_and_no_training_of_one(tmp_path: Path) -> None:
    build_vae().save_pretrained(tmp_path / "published")
    before, _, after = SMOKE.read_text().partition("[train_vae]")
    _, _, after = after.partition("[encode_latents]")
    given = f'[encode_latents]\ninputs.vae = "{tmp_path / "published"}"'
    (tmp_path / "mine.toml").write_text(before + given + after)
    planned = plan(PlanConfig(run=RunConfig(root=str(tmp_path)), trial=False), str(tmp_path / "mine.toml"))
    stages = {one.stage: one for one in planned}
    assert stages["train_vae"].state == f"not needed, {tmp_path / 'published'} is given"
    assert not stages["train_vae"].flops_per_image
    config = load_config(TrainUNetConfig, table="train_unet", argv=["--config", str(SMOKE)])
    sketch = unet_sketch(config, LatentShape(channels=3, size=8), num_classes=10)
    assert stages["train_unet"].flops_per_image == sketch.flops(sketch.levels)


def build_conditional_unet(**more: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        in_channels=3,
        out_channels=3,
        block_out_channels=[16, 32],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=[1, 2],
        norm_num_groups=8,
        cross_attention_dim=12,
        use_linear_projection=True,
        **more,
    ).eval()


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_start_computes_what_the_published_unet_computes(with_tokens: bool, tmp_path: Path) -> None:
    if with_tokens:
        theirs = build_conditional_unet(resnet_time_scale_shift="scale_shift")
        conditioners = (TextConditionerConfig(width=12, use="tokens"),)
    else:
        theirs, conditioners = build_unet(), (ClassConditionerConfig(),)
    theirs.save_pretrained(tmp_path)
    config, start = DenoiserConfig(network=NETWORK, conditioners=conditioners), DiffusersStart(folder=tmp_path)
    ours = Denoiser(config, latent_channels=3, latent_size=8, num_classes=4).eval()
    check_start(start, ours)
    assert len(load_start(start, ours) or "") == 64
    x, times = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    fields = {"labels": torch.tensor([1, 3]), "text_tokens": torch.randn(2, 6, 12)}
    asked = {"encoder_hidden_states": fields["text_tokens"]} if with_tokens else {"class_labels": fields["labels"]}
    with torch.no_grad():
        expected = theirs(x, times, **asked).sample
        found = ours.output(x, times, fields, torch.zeros(2, 1, dtype=torch.bool))
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert load_start(RandomStart(), ours) is None


def build_text_to_image(folder: Path) -> tuple[diffusers.StableDiffusionPipeline, Denoiser, PretrainedConfig]:
    """A pipeline of diffusers, and our denoiser and text encoder of its weights."""
    torch.manual_seed(0)
    words = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=9)
    shape = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        **{"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"max_position_embeddings": 9, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53},
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=build_vae(latent_channels=3),
        text_encoder=transformers.CLIPTextModel(shape).eval(),
        tokenizer=tokenizer,
        unet=build_conditional_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.text_encoder.save_pretrained(folder / "text")
    pipeline.tokenizer.save_pretrained(folder / "text")
    pipeline.unet.save_pretrained(folder / "unet")

    # Ours, as training and prompts meet it.
    encoder = PretrainedConfig(folder=folder / "text", max_tokens=9)
    text = TextConditionerConfig(width=12, use="tokens", null="empty_caption", encoder=encoder)
    network = NETWORK.model_copy(update={"time_injection": "shift"})
    config = DenoiserConfig(network=network, conditioners=(text,))
    ours = Denoiser(config, latent_channels=3, latent_size=8, num_classes=0).eval()
    load_start(DiffusersStart(folder=folder / "unet"), ours)
    return pipeline, ours, encoder


def test_conditions_and_outputs_are_those_of_a_published_text_to_image_pipeline(tmp_path: Path) -> None:
    """Stable Diffusion's: padding is attended to, in prompts and in the empty caption that stands for none."""
    pipeline, ours, encoder = build_text_to_image(tmp_path)
    captions = ["a cat", "dog", ""]
    features = as_tensors(CaptionEncoder(encoder, device=torch.device("cpu"))(captions))

    x, times = torch.randn(3, 3, 8, 8), torch.tensor([3, 400, 700])
    with torch.no_grad():
        cond, uncond = pipeline.encode_prompt(captions, "cpu", 1, do_classifier_free_guidance=True)
        torch.testing.assert_close(features["text_tokens"][:2], cond[:2], atol=1e-5, rtol=1e-5)
        for dropped, states in ((False, cond), (True, uncond)):
            expected = pipeline.unet(x, times, encoder_hidden_states=states).sample
            found = ours.output(x, times, features, torch.full((3, 1), dropped))
            assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("negative", ["a dog", ""])
def test_a_negative_prompt_leads_where_that_of_a_published_pipeline_leads(negative: str, tmp_path: Path) -> None:
    pipeline, ours, encoder = build_text_to_image(tmp_path)
    sampler = DDIMConfig(num_steps=5)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(scheduler_config_to_diffusers(ours.config, sampler))
    pipeline.set_progress_bar_config(disable=True)
    captions, noise = ["cat", "a pig"], torch.randn(2, 3, 8, 8)
    expected = pipeline(
        prompt=captions,
        negative_prompt=[negative] * 2,
        **{"latents": noise, "guidance_scale": 3.0, "num_inference_steps": 5, "output_type": "latent"},
        **{"height": 16, "width": 16},
    ).images
    features = CaptionEncoder(encoder, device=torch.device("cpu"))
    options = {"sampler": sampler, "guidance": GuidanceConfig(scale=3.0), "fresh_noise": torch.zeros_like}
    conditions, uncond = as_tensors(features(captions)), as_tensors(features([negative]))
    found = ours.sample(noise, conditions, uncond=uncond, **options)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    assert torch.allclose(ours.sample(noise, conditions, **options), found) == (negative == "")


@pytest.mark.parametrize(
    "changes", [{}, {"spacing": "leading"}, {"guidance_scale": 0.5}], ids=["", "leading", "below 1"]
)
def test_an_export_is_a_stock_pipeline_where_that_draws_its_example(changes: dict[str, Any], tmp_path: Path) -> None:
    _, denoiser, encoder = build_text_to_image(tmp_path)
    torch.manual_seed(0)
    model = LatentDiffusion(
        autoencoder=AutoencoderKL(
            VAEConfig(latent_channels=3, channels=(8, 8), norm_groups=4), image_channels=3
        ).eval(),
        denoiser=denoiser,
        normalisation=Normalisation(mean=(0.1, -0.2, 0.3), std=(1.5, 0.7, 1.1)),
        caption_features=CaptionEncoder(encoder, device=torch.device("cpu")).about,
    )
    given = {"guidance_scale": 2.5, "prompts": ("a cat", "dog"), "output": str(tmp_path / "export"), **changes}
    config = ExportConfig(inputs=ModelInputs(vae="", unet=""), num_inference_steps=10, **given)
    sampler = DDIMConfig(num_steps=10, spacing=config.spacing)
    configs, weights = in_diffusers(model, scheduler_config_to_diffusers(denoiser.config, sampler), num_classes=0)
    example = compute_example(config, model, sampler=sampler, conditions=example_conditions(config, model, ()))
    write_export(tmp_path / "export", configs, weights, example)
    write_pipeline(config, model, configs)
    assert (tmp_path / "export" / "model_index.json").is_file() == (not changes)
    if changes:
        return
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "export", local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    options = {"latents": example["noise"], "guidance_scale": 2.5, "num_inference_steps": 10, "output_type": "pt"}
    images = stock(prompt=["a cat", "dog", "a cat", "dog"], **options).images
    assert images.std() > 0.01
    torch.testing.assert_close(images, (example["images"] / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_a_start_of_another_shape_is_refused_with_every_difference(tmp_path: Path) -> None:
    build_unet(in_channels=4, layers_per_block=2).save_pretrained(tmp_path)
    config = DenoiserConfig(network=NETWORK, conditioners=(ClassConditionerConfig(),))
    with pytest.raises(ValueError, match=r"has blocks = \[2, 2\], not \[1, 1\]; latent channels = 4, not 3"):
        check_start(DiffusersStart(folder=tmp_path), Denoiser(config, latent_channels=3, latent_size=8, num_classes=4))


def test_a_published_vae_is_a_start_for_the_network_that_it_is(tmp_path: Path) -> None:
    theirs = build_vae()
    theirs.save_pretrained(tmp_path)
    config = VAEConfig(channels=(8, 16), latent_channels=3, blocks_per_level=1, norm_groups=4, quant_convs=True)
    ours, start = AutoencoderKL(config, image_channels=3).eval(), DiffusersStart(folder=tmp_path)
    check_start(start, ours)
    assert load_start(start, ours) == sha256_of(tmp_path / "diffusion_pytorch_model.safetensors")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(images).sample
        found = ours.decode(ours.encode(images).mode())
    assert (found - expected).norm() / expected.norm() < 1e-5
    wider = AutoencoderKL(config.model_copy(update={"channels": (8, 32)}), image_channels=3)
    with pytest.raises(ValueError, match=r"has channels = \[8, 16\], not \[8, 32\]"):
        check_start(start, wider)


def test_a_decoder_trained_alone_has_the_latents_of_the_published_vae(
    latents: tuple[Path, Path], two_process_run: Run, tmp_path: Path
) -> None:
    """Also where it is stopped and goes on with another number of ranks: with average, discriminator and all."""
    run, published = latents
    start = Path(shutil.copytree(published, tmp_path / "published"))
    words = [
        *("--inputs.corpus", str(two_process_run.root / "corpus"), "--freeze_encoder", "true"),
        *("--start", f'{{ kind = "diffusers", folder = "{start}" }}'),
        *("--network", "{ channels = [8, 16], latent_channels = 3, blocks_per_level = 1, norm_groups = 4 }"),
        *("--network.quant_convs", "true", "--optim.rate", '{ kind = "constant" }'),
        *("--objective.adversary", '{ kind = "patchgan", start = { kind = "update", update = 1 } }'),
        *("--objective.adversary.discriminator.downsamplings", "1"),
    ]

    def train(name: str, *more: str, processes: int = 1) -> str:
        place = ("--run.root", str(tmp_path / name))
        done = run_stage("train_vae", *place, *words, *more, processes=processes)
        return done.stderr if done.returncode else ""

    assert train("straight", "--updates", "4") == ""
    assert train("stopped", "--updates", "2") == ""
    assert train("stopped", "--updates", "4", "--allow-changed", "updates", processes=2) == ""
    straight, stopped = (tmp_path / name / "vae" for name in ("straight", "stopped"))
    theirs, weights, others = (
        load_vae(folder, read_input("vae", folder), device=Device(torch.device("cpu"))).state_dict()
        for folder in (start, straight, stopped)
    )
    moved = [name for name in weights if name.startswith(("decoder.", "post_quant_conv."))]
    assert all(torch.equal(weights[name], theirs[name]) for name in weights.keys() - set(moved))
    assert all(torch.equal(others[name], theirs[name]) for name in weights.keys() - set(moved))
    assert all(not torch.equal(weights[name], theirs[name]) for name in moved)
    there, here, beside = (torch.cat([of[name].flatten() for name in moved]) for of in (theirs, weights, others))
    assert (beside - here).norm() < 0.01 * (here - there).norm()  # a discriminator amplifies rounding

    # Latents of either are those of the other, also for a decoder that was trained from this one.
    made_by = read_input("latents", run / "latents").vae
    manifest = read_input("vae", straight)
    assert manifest.encoder == made_by == sha256_of(start / "diffusion_pytorch_model.safetensors") != manifest.weights
    check_same_vae(made_by, given=manifest, given_at="vae", user="latents")
    assert encoder_at(RunStart(folder=straight)) == made_by
    done = run_stage(
        *("encode_latents", "--run.root", str(tmp_path / "again"), "--inputs.vae", str(straight)),
        *("--inputs.corpus", str(two_process_run.root / "corpus")),
    )
    assert done.returncode == 0, done.stderr
    again = read_input("latents", tmp_path / "again" / "latents")
    assert again.vae == made_by
    assert again.files == read_input("latents", run / "latents").files

    # Without its start, or with another one in its place, it is not trained on.
    changed = load_file(start / "diffusion_pytorch_model.safetensors")
    changed["encoder.conv_in.bias"] += 1
    save_file(changed, start / "diffusion_pytorch_model.safetensors")
    refusal = train("stopped", "--updates", "9", "--allow-changed", "updates")
    assert "train_vae.start holds another encoder than this training began with" in refusal
    words[words.index("--start") + 1] = '{ kind = "random" }'
    assert "freeze_encoder = true needs an encoder that is trained" in train("none", "--updates", "6")


@pytest.mark.parametrize("name", ["vae", "unet"])
def test_a_start_from_a_run_has_its_weights_and_no_others(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MADE_BEFORE / name, tmp_path / name))
    start, config = RunStart(folder=folder), json.loads((folder / "config.json").read_bytes())

    def build(*, num_classes: int | None = None) -> AutoencoderKL | Denoiser:
        if name == "vae":
            return AutoencoderKL(VAEConfig(**config["network"]), image_channels=config["image_channels"])
        return Denoiser(
            DenoiserConfig.model_validate(config["denoiser"]),
            latent_channels=config["latent_channels"],
            latent_size=config["latent_size"],
            num_classes=num_classes or config["num_classes"],
        )

    network, stored = build(), load_file(folder / f"{name}.safetensors")
    check_start(start, network)
    assert load_start(start, network) == sha256_of(folder / f"{name}.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())

    # Other shapes, another stage's folder, weights that were changed, and a folder that is not finished.
    if name == "unet":
        with pytest.raises(ValueError, match=r"of another network: conditioners.* is \(.*\), not \(.*Number of cl"):
            check_start(start, build(num_classes=config["num_classes"] + 1))
    with pytest.raises(ValueError, match=rf"is the folder of .*, not of train_{name}"):
        check_start(RunStart(folder=MADE_BEFORE / ("unet" if name == "vae" else "vae")), network)
    first = next(iter(stored))
    save_file({**stored, first: stored[first] + 1}, folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match="sha256"):
        load_start(start, network)
    (folder / "manifest.json").unlink()
    with pytest.raises(OSError, match="has not finished"):
        check_start(start, network)


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    build_vae().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="read from safetensors only"):
        DiffusersVAEManifest.of(tmp_path)


def test_a_published_vae_that_was_changed_has_other_latents_and_is_refused(
    latents: tuple[Path, Path], tmp_path: Path
) -> None:
    run, folder = latents
    changed = tmp_path / "vae"
    changed.mkdir()
    (changed / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 1
    save_file(weights, changed / "diffusion_pytorch_model.safetensors")
    done = run_here(
        *("train_unet", "--run.root", str(tmp_path / "run"), "--inputs.vae", str(changed)),
        *("--inputs.latents", str(run / "latents")),
    )
    assert done.returncode == 2
    assert "A latent means nothing to another VAE" in done.stderr


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ({}, 0.0, 1 / 0.18215),  # Stable Diffusion 1 and 2 name no factor
        ({"scaling_factor": 0.13025}, 0.0, 1 / 0.13025),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1 / 1.5305),
        ({"scaling_factor": 2.0, "latents_mean": [1.0] * 4, "latents_std": [3.0] * 4}, 1.0, 1.5),
    ],
)
def test_scalings_of_published_vaes_are_read(given: dict, mean: float, std: float, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "latent_channels": 4, **given}))
    save_file({}, tmp_path / "diffusion_pytorch_model.safetensors")
    manifest = DiffusersVAEManifest.of(tmp_path)
    assert manifest is not None
    assert list(manifest.normalisation.mean) == pytest.approx([mean] * 4)
    assert list(manifest.normalisation.std) == pytest.approx([std] * 4)
