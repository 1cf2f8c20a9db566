"""Our networks against diffusers' with the same weights, and the conversion of weights and configs both ways."""

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusers.config import (
    scheduler_config_to_diffusers,
    unet_config_from_diffusers,
    unet_config_to_diffusers,
    vae_config_from_diffusers,
    vae_config_to_diffusers,
)
from models.diffusers.single_file import to_single_file
from models.diffusers.weights import (
    denoiser_from_diffusers,
    denoiser_to_diffusers,
    scaled_vae,
    vae_from_diffusers,
    vae_to_diffusers,
)
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.objective import ObjectiveConfig
from models.diffusion.samplers import DDIMConfig, EulerConfig
from models.diffusion.schedule import (
    CosineScheduleConfig,
    FlowMatchingConfig,
    LinearScheduleConfig,
    ScaledLinearScheduleConfig,
)
from models.diffusion.spacing import sampling_moments
from models.latent_diffusion import Normalisation
from models.unet import UNet, UNetConfig

NETWORK = UNetConfig(
    channels=(16, 32), blocks=(2, 2), attention=(False, True), heads=(2, 4), transformer_depth=(1, 2), norm_groups=8
)
CLASS = ClassConditionerConfig()
TOKENS = TextConditionerConfig(width=12, use="tokens")
BOTH = TextConditionerConfig(width=12, use="both")
MODELS = {
    "class": DenoiserConfig(network=NETWORK, conditioners=(CLASS,)),
    "class_shift": DenoiserConfig(
        network=NETWORK.model_copy(update={"time_injection": "shift", "mid_attention": False}), conditioners=(CLASS,)
    ),
    "unconditional": DenoiserConfig(network=NETWORK.model_copy(update={"attention": (False, False)})),
    "text": DenoiserConfig(
        network=NETWORK.model_copy(update={"heads": (1, 4), "blocks": (1, 2)}), conditioners=(BOTH,)
    ),
    "text_class": DenoiserConfig(network=NETWORK, conditioners=(TOKENS, CLASS)),
}
VAES = {
    "plain": VAEConfig(latent_channels=3, channels=(8, 16, 16), blocks_per_level=1, norm_groups=4),
    "quant_convs": VAEConfig(latent_channels=4, channels=(8, 16), blocks_per_level=2, norm_groups=8, quant_convs=True),
    "no_attention": VAEConfig(latent_channels=2, channels=(8, 8), norm_groups=4, mid_attention=False),
}
NUM_CLASSES = 5


def randomise(network: nn.Module) -> None:
    """Numbers everywhere, of a size that keeps the outputs near one."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.2)


def build_pair(name: str) -> tuple[Denoiser, nn.Module]:
    """Our model and theirs, built from our config and given our weights."""
    config = MODELS[name]
    ours = Denoiser(config, latent_channels=4, latent_size=8, num_classes=NUM_CLASSES)
    randomise(ours)
    described = unet_config_to_diffusers(config, latent_channels=4, latent_size=8, num_classes=NUM_CLASSES)
    theirs = getattr(diffusers, described["_class_name"]).from_config(described).eval()
    theirs.load_state_dict(denoiser_to_diffusers(ours.state_dict(), config))  # strict: no key missing, none left over
    return ours.eval(), theirs


def conditions(batch: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, 4, 12, generator=draw)
    tokens[0, 3:] = 0
    return {
        "labels": torch.tensor([1, 4, 0])[:batch],
        "text_tokens": tokens,
        "text_pooled": torch.randn(batch, 12, generator=draw),
    }


def ask_theirs(name: str, theirs: nn.Module, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
    given = conditions(len(x))
    told = {"class_labels": given["text_pooled"] if name == "text" else labels}
    if name.startswith("text"):
        told |= {"encoder_hidden_states": given["text_tokens"]}
        told |= {"encoder_attention_mask": (given["text_tokens"] != 0).any(dim=-1)}
    return theirs(x, time, **({} if name == "unconditional" else told)).sample


@pytest.mark.parametrize("name", MODELS)
def test_a_unet_of_ours_computes_the_same_in_diffusers(name: str) -> None:
    ours, theirs = build_pair(name)
    x, time = torch.randn(3, 4, 8, 8), torch.tensor([0, 37, 999])
    dropped = torch.zeros(3, len(ours.conditioners), dtype=torch.bool)
    with torch.no_grad():
        expected = ours.output(x, time, conditions(), dropped)
        found = ask_theirs(name, theirs, x, time, conditions()["labels"])
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_a_unet_has_as_many_parameters_as_that_of_diffusers(name: str) -> None:
    ours, theirs = build_pair(name)
    only_ours = sum(p.numel() for key, p in ours.named_parameters() if ".null_" in key)
    assert sum(p.numel() for p in ours.parameters()) - only_ours == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_unet_comes_back_from_diffusers_as_it_went(name: str) -> None:
    ours, theirs = build_pair(name)
    returned = denoiser_from_diffusers(theirs.state_dict(), MODELS[name])
    left_here = {key for key in ours.state_dict() if ".null_" in key}
    assert set(returned) == set(ours.state_dict()) - left_here
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in returned.items())
    read = unet_config_from_diffusers(dict(theirs.config))
    expected = MODELS[name].network
    if MODELS[name].token_width == 0:  # UNet2DModel has no depth, and one width of heads for all levels
        expected = expected.model_copy(update={"transformer_depth": (1, 1), "heads": read.network.heads})
        assert name == "unconditional" or read.network.heads[1] == 4
    assert read.network == expected
    assert (read.in_channels, read.out_channels) == (4, 4)
    assert read.token_width == MODELS[name].token_width


def test_the_null_class_is_the_last_class_embedding() -> None:
    ours, theirs = build_pair("class")
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
    with torch.no_grad():
        expected = ours.output(x, time, conditions(2), torch.ones(2, 1, dtype=torch.bool))
        found = theirs(x, time, class_labels=torch.full((2,), NUM_CLASSES)).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VAES)
def test_a_vae_of_ours_computes_the_same_in_diffusers_and_comes_back(name: str) -> None:
    config = VAES[name]
    ours = AutoencoderKL(config, image_channels=1)
    randomise(ours)
    described = vae_config_to_diffusers(config, image_channels=1, sample_size=16)
    theirs = diffusers.AutoencoderKL.from_config(described)
    theirs.load_state_dict(vae_to_diffusers(ours.state_dict(), config))
    images = torch.rand(2, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        here, there = ours.encode(images), theirs.encode(images).latent_dist
        pairs = [(here.mean, there.mean), (here.log_variance, there.logvar)]
        pairs += [(ours.decode(here.mean), theirs.decode(here.mean).sample), (here.kl(), there.kl())]
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert vae_config_from_diffusers(dict(theirs.config)) == (config, 1)
    returned = vae_from_diffusers(theirs.state_dict(), config)
    assert all(torch.equal(returned[key], tensor) for key, tensor in ours.state_dict().items())


def test_a_vae_published_before_the_attention_was_renamed_is_read_too() -> None:
    config = VAES["plain"]
    ours = AutoencoderKL(config, image_channels=1)
    aged = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in vae_to_diffusers(ours.state_dict(), config).items():
        if "attentions" in name:
            for new, old in aged.items():
                name = name.replace(new, old)
            # The oldest files hold the projections as 1x1 convolutions.
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        weights[name] = tensor
    returned = vae_from_diffusers(weights, config)
    assert all(torch.equal(returned[key], tensor) for key, tensor in ours.state_dict().items())


SCHEDULES = {
    "cosine": (CosineScheduleConfig(), "v"),
    "odd_cosine": (CosineScheduleConfig(num_steps=100, offset=0.02, zero_terminal_snr=True), "v"),
    "linear": (LinearScheduleConfig(num_steps=200), "eps"),
    "zero_snr": (ScaledLinearScheduleConfig(zero_terminal_snr=True), "x0"),
}


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_their_scheduler_and_unet_make_our_samples(name: str, spacing: str) -> None:
    schedule, prediction = SCHEDULES[name]
    ours, theirs = build_pair("class")
    config = MODELS["class"].model_copy(
        update={"schedule": schedule, "objective": ObjectiveConfig(prediction=prediction)}
    )
    model = Denoiser(config, latent_channels=4, latent_size=8, num_classes=NUM_CLASSES).eval()
    model.load_state_dict(ours.state_dict())
    sampler, scale = DDIMConfig(num_steps=5, spacing=spacing), 2.0
    noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 3])
    expected = model.sample(
        noise,
        {"labels": labels},
        sampler=sampler,
        guidance=GuidanceConfig(scale=scale),
        fresh_noise=lambda index: torch.zeros_like(noise),
    )
    # What a user of the export writes.
    scheduler = diffusers.DDIMScheduler.from_config(scheduler_config_to_diffusers(config, sampler))
    scheduler.set_timesteps(sampler.num_steps)
    latents = noise
    with torch.no_grad():
        for step in scheduler.timesteps:
            told = theirs(latents, step, class_labels=labels).sample
            untold = theirs(latents, step, class_labels=torch.full_like(labels, NUM_CLASSES)).sample
            latents = scheduler.step(untold + scale * (told - untold), step, latents).prev_sample
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3 * expected.std().item())


def test_their_flow_scheduler_and_unet_make_our_samples() -> None:
    ours, theirs = build_pair("class")
    changes = {"schedule": FlowMatchingConfig(), "objective": ObjectiveConfig(prediction="velocity")}
    config = MODELS["class"].model_copy(update=changes)
    model = Denoiser(config, latent_channels=4, latent_size=8, num_classes=NUM_CLASSES).eval()
    model.load_state_dict(ours.state_dict())
    noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 3])
    for num_steps in (1, 7):
        expected = model.sample(
            noise,
            {"labels": labels},
            sampler=EulerConfig(num_steps=num_steps),
            guidance=GuidanceConfig(scale=1.0),
            fresh_noise=torch.zeros_like,
        )
        described = scheduler_config_to_diffusers(config, DDIMConfig(num_steps=num_steps))
        scheduler = getattr(diffusers, described["_class_name"]).from_config(described)
        moments = sampling_moments(model.process, num_steps=num_steps, spacing="trailing")
        scheduler.set_timesteps(sigmas=[float(moment.level.sigma) for moment in moments])
        latents = noise
        with torch.no_grad():
            for step in scheduler.timesteps:
                latents = scheduler.step(theirs(latents, step, class_labels=labels).sample, step, latents).prev_sample
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4 * expected.std().item())


@pytest.mark.parametrize("mean", [(0.0,) * 3, (0.3, -0.2, 0.0)], ids=["factor", "channels"])
@pytest.mark.parametrize("quant_convs", [False, True])
def test_one_number_scales_the_latents_of_an_exported_vae(quant_convs: bool, mean: tuple[float, ...]) -> None:
    config = VAES["plain"].model_copy(update={"quant_convs": quant_convs})
    ours = AutoencoderKL(config, image_channels=1)
    randomise(ours)
    std = (2.0, 2.0, 2.0) if not any(mean) else (2.0, 0.5, 1.3)
    weights, scaled, factor = scaled_vae(ours.state_dict(), config, mean=torch.tensor(mean), std=torch.tensor(std))
    described = vae_config_to_diffusers(scaled, image_channels=1, sample_size=16, scaling_factor=factor)
    theirs = diffusers.AutoencoderKL.from_config(described)
    theirs.load_state_dict(vae_to_diffusers(weights, scaled))
    assert (factor, scaled == config) == ((0.18215, quant_convs) if any(mean) else (0.5, True))
    images, latents, normalisation = torch.rand(2, 1, 16, 16) * 2 - 1, torch.randn(2, 3, 4, 4), Normalisation(mean, std)
    with torch.no_grad():
        here, there = ours.encode(images), theirs.encode(images).latent_dist
        pairs = [(normalisation.draw_normalised(here), there.mean * factor)]
        noise = torch.randn_like(here.mean)
        pairs += [(normalisation.draw_normalised(here, noise), (there.mean + there.std * noise) * factor)]
        pairs += [
            (ours.decode(normalisation.restore(latents)), theirs.decode(latents / theirs.config.scaling_factor).sample)
        ]
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# --------------------------------------------------------------------------------------- one file of Stable Diffusion's

SD_NETWORK = UNetConfig(
    channels=(64, 128, 128),
    blocks=(2, 2, 2),
    attention=(False, True, False),
    heads=(8, 8, 8),
    transformer_depth=(1, 1, 1),
    time_injection="shift",
)
SD_MODEL = DenoiserConfig(
    network=SD_NETWORK,
    conditioners=(TOKENS,),
    schedule=ScaledLinearScheduleConfig(),
    objective=ObjectiveConfig(prediction="eps"),
)
SD_VAE = VAEConfig(latent_channels=4, channels=(32, 32, 64), blocks_per_level=1, quant_convs=True)


def described_for_one_file(config: DenoiserConfig, vae: VAEConfig, scaling_factor: float = 0.18215) -> dict:
    return {
        "unet": unet_config_to_diffusers(config, latent_channels=4, latent_size=8, num_classes=NUM_CLASSES),
        "vae": vae_config_to_diffusers(vae, image_channels=3, sample_size=32, scaling_factor=scaling_factor),
        "scheduler": scheduler_config_to_diffusers(config, DDIMConfig()),
    }


@pytest.mark.parametrize("heads", [(8, 8, 8), (1, 2, 2)], ids=["sd1", "sd2"])
def test_diffusers_reads_our_single_file_as_the_same_networks(heads: tuple[int, ...], tmp_path: Path) -> None:
    """By our own configs and offline; the projections of version 1 are convolutions, those of 2 linear maps."""
    config = SD_MODEL.model_copy(update={"network": SD_NETWORK.model_copy(update={"heads": heads})})
    ours = Denoiser(config, latent_channels=4, latent_size=8, num_classes=0).eval()
    vae = AutoencoderKL(SD_VAE, image_channels=3)
    randomise(ours)
    randomise(vae)
    configs = described_for_one_file(config, SD_VAE)
    weights = {
        "unet": denoiser_to_diffusers(ours.state_dict(), config),
        "vae": vae_to_diffusers(vae.state_dict(), SD_VAE),
    }
    path, read = tmp_path / "model.safetensors", {}
    save_file({name: tensor.contiguous() for name, tensor in to_single_file(configs, weights).items()}, path)
    for name, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(configs[name]))
        read[name] = kind.from_single_file(str(path), config=str(tmp_path), subfolder=name, local_files_only=True)
    projection = load_file(path)["model.diffusion_model.input_blocks.4.1.proj_in.weight"]
    assert projection.dim() == (4 if heads[0] == 8 else 2)

    x, time, given = torch.randn(3, 4, 8, 8), torch.tensor([0, 37, 999]), conditions()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = ours.output(x, time, given, torch.zeros(3, 1, dtype=torch.bool))
        mask = (given["text_tokens"] != 0).any(dim=-1)
        found = read["unet"](x, time, given["text_tokens"], encoder_attention_mask=mask).sample
        pairs = [(expected, found), (vae.encode(images).mean, read["vae"].encode(images).latent_dist.mean)]
        pairs += [(vae.decode(x), read["vae"].decode(x).sample)]
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_single_file_of_the_size_of_sd15_has_its_names() -> None:
    read, (vae_config, channels) = unet_config_from_diffusers(SD15_UNET), vae_config_from_diffusers(SD15_VAE)
    text = TextConditionerConfig(width=read.token_width, use="tokens")
    config = SD_MODEL.model_copy(update={"network": read.network, "conditioners": (text,)})
    with torch.device("meta"):
        ours = Denoiser(config, latent_channels=4, latent_size=64, num_classes=0)
        vae = AutoencoderKL(vae_config, image_channels=channels)
    weights = {
        "unet": denoiser_to_diffusers(ours.state_dict(), config),
        "vae": vae_to_diffusers(vae.state_dict(), vae_config),
    }
    shapes = {
        name: tuple(t.shape) for name, t in to_single_file(described_for_one_file(config, vae_config), weights).items()
    }
    # Of v1-5-pruned-emaonly.safetensors, less its text encoder and the tables of its schedule.
    assert sum(name.startswith("model.diffusion_model.") for name in shapes) == 686
    assert sum(name.startswith("first_stage_model.") for name in shapes) == 248
    for name, shape in (
        ("model.diffusion_model.time_embed.0.weight", (1280, 320)),
        ("model.diffusion_model.input_blocks.1.1.proj_in.weight", (320, 320, 1, 1)),
        ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (320, 768)),
        ("model.diffusion_model.input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("model.diffusion_model.input_blocks.4.0.skip_connection.weight", (640, 320, 1, 1)),
        ("model.diffusion_model.middle_block.1.norm.weight", (1280,)),
        ("model.diffusion_model.middle_block.2.out_layers.3.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.2.1.conv.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.5.2.conv.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.8.0.emb_layers.1.weight", (640, 1280)),
        ("model.diffusion_model.output_blocks.11.1.proj_out.bias", (320,)),
        ("model.diffusion_model.out.2.weight", (4, 320, 3, 3)),
        ("first_stage_model.encoder.down.1.block.0.nin_shortcut.weight", (256, 128, 1, 1)),
        ("first_stage_model.encoder.down.2.downsample.conv.weight", (512, 512, 3, 3)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("first_stage_model.decoder.mid.attn_1.proj_out.weight", (512, 512, 1, 1)),
        ("first_stage_model.decoder.mid.block_2.norm1.weight", (512,)),
        ("first_stage_model.decoder.up.3.upsample.conv.weight", (512, 512, 3, 3)),
        ("first_stage_model.decoder.up.0.block.2.conv2.weight", (128, 128, 3, 3)),
        ("first_stage_model.decoder.norm_out.weight", (128,)),
        ("first_stage_model.quant_conv.weight", (8, 8, 1, 1)),
    ):
        assert shapes[name] == shape, name


@pytest.mark.parametrize(
    ("model", "vae", "factor", "reason"),
    [
        ({"conditioners": ()}, {}, 0.18215, r"unet._class_name = 'UNet2DModel' \(only 'UNet2DConditionModel'\)"),
        ({"conditioners": (TOKENS, CLASS)}, {}, 0.18215, r"unet.num_class_embeds = 6 \(only None\)"),
        ({"schedule": CosineScheduleConfig()}, {}, 0.18215, r"scheduler.beta_schedule = 'squaredcos_cap_v2'"),
        ({}, {"norm_groups": 16}, 0.18215, r"vae.norm_num_groups = 16 \(only 32\)"),
        ({}, {"mid_attention": False}, 0.18215, r"vae.mid_block_add_attention = False"),
        ({}, {}, 0.13025, r"vae.scaling_factor = 0.13025 \(only 0.18215\)"),
        ({"heads": (8, 4, 8)}, {}, 0.18215, r"unet.attention_head_dim = \[8, 4, 8\] \(only 8 heads each, or"),
        ({"blocks": (2, 1, 2)}, {}, 0.18215, r"unet.layers_per_block = \[2, 1, 2\] \(only one number"),
        ({"norm_groups": 16}, {}, 0.18215, r"unet.norm_num_groups = 16"),
    ],
)
def test_what_a_single_file_does_not_say_must_be_stable_diffusions(
    model: dict, vae: dict, factor: float, reason: str
) -> None:
    of_network = {key: value for key, value in model.items() if key in UNetConfig.model_fields}
    of_model = {key: value for key, value in model.items() if key not in of_network}
    config = SD_MODEL.model_copy(update={**of_model, "network": SD_NETWORK.model_copy(update=of_network)})
    described = described_for_one_file(config, SD_VAE.model_copy(update=vae), factor)
    with pytest.raises(ValueError, match=f"does not fit into a file of Stable Diffusion's: .*{reason}"):
        to_single_file(described, {"unet": {}, "vae": {}})


# ------------------------------------------------------------------------------------- published configs, on no device

SD15_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SD2_VAE = SD15_VAE | {"_diffusers_version": "0.8.0", "norm_num_groups": 32, "sample_size": 768}
SDXL_VAE = SD15_VAE | {
    "_diffusers_version": "0.20.0.dev0",
    "force_upcast": True,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
SD15_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}


def check_shapes(ours: nn.Module, converted: dict[str, Tensor], theirs: nn.Module) -> None:
    assert {key: tensor.shape for key, tensor in converted.items()} == {
        key: tensor.shape for key, tensor in ours.state_dict().items()
    }
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("published", [SD15_VAE, SD2_VAE, SDXL_VAE], ids=["sd15", "sd2", "sdxl"])
def test_published_autoencoders_fit_without_a_key_too_many_or_too_few(published: dict) -> None:
    config, image_channels = vae_config_from_diffusers(published)
    with torch.device("meta"):
        ours, theirs = (
            AutoencoderKL(config, image_channels=image_channels),
            diffusers.AutoencoderKL.from_config(published),
        )
        check_shapes(ours, vae_from_diffusers(theirs.state_dict(), config), theirs)


def test_a_unet_of_the_size_of_sd15_fits_without_a_key_too_many_or_too_few() -> None:
    read = unet_config_from_diffusers(SD15_UNET)
    with torch.device("meta"):
        ours = UNet(
            read.network, in_channels=read.in_channels, out_channels=read.out_channels, token_width=read.token_width
        )
        theirs = diffusers.UNet2DConditionModel.from_config(SD15_UNET)
        config = DenoiserConfig(
            network=read.network, conditioners=(TextConditionerConfig(width=read.token_width, use="tokens"),)
        )
        converted = denoiser_from_diffusers(theirs.state_dict(), config)
        check_shapes(ours, {key.removeprefix("network."): tensor for key, tensor in converted.items()}, theirs)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network": NETWORK.model_copy(update={"block": "convnext"})}, "it has no ConvNeXt blocks"),
        ({"schedule": FlowMatchingConfig()}, r"its flow matching cannot read a prediction of 'v', only \['velocity'\]"),
        ({"objective": ObjectiveConfig(prediction="velocity")}, "cannot read a prediction of 'velocity'"),
        ({"objective": ObjectiveConfig(variance="learned")}, "cannot read a learned variance"),
        ({"conditioners": (TextConditionerConfig(width=12, use="pooled"),)}, "takes no pooled text vector"),
        ({"conditioners": (BOTH, CLASS)}, "these conditioners give several"),
        ({"conditioners": (TOKENS, TOKENS)}, "take one sequence of tokens"),
        ({"network": NETWORK.model_copy(update={"blocks": (1, 2)})}, r"as many blocks in every level, not \[1, 2\]"),
        (
            {"network": NETWORK.model_copy(update={"attention": (True, True), "heads": (4, 4)})},
            r"heads of one width, not \[4, 8\]",
        ),
        (
            {"network": NETWORK.model_copy(update={"mid_attention": False}), "conditioners": (TOKENS,)},
            "always attends at the lowest resolution",
        ),
    ],
)
def test_what_diffusers_cannot_hold_is_refused_with_the_reason(changes: dict, reason: str) -> None:
    config = MODELS["class"].model_copy(update=changes)
    with pytest.raises(ValueError, match=f"cannot be exported to diffusers: .*{reason}"):
        unet_config_to_diffusers(config, latent_channels=4, latent_size=8, num_classes=NUM_CLASSES)


def test_samplers_that_their_scheduler_cannot_follow_are_refused() -> None:
    for sampler in (DDIMConfig(num_steps=50, spacing="linspace"), DDIMConfig(num_steps=30)):
        with pytest.raises(ValueError, match=r"cannot follow .* a number of steps that divides it"):
            scheduler_config_to_diffusers(MODELS["class"], sampler)
    flow = MODELS["class"].model_copy(update={"schedule": FlowMatchingConfig()})
    with pytest.raises(ValueError, match="its flow matching cannot read a prediction of 'v'"):
        scheduler_config_to_diffusers(flow, DDIMConfig())


def test_foreign_networks_with_parts_that_ours_lack_are_refused() -> None:
    sdxl = SD15_UNET | {"addition_embed_type": "text_time", "act_fn": "gelu"}
    with pytest.raises(ValueError, match=r"act_fn = 'gelu' \(only 'silu'\), addition_embed_type = 'text_time'"):
        unet_config_from_diffusers(sdxl)
    blocks = {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": (32, 64),
        "attention_head_dim": None,  # one head as wide as its level
    }
    theirs = diffusers.UNet2DModel(**blocks)
    assert unet_config_from_diffusers(dict(theirs.config)).network.heads == (1, 1)
    assert theirs.mid_block.attentions[0].heads == 1
    with pytest.raises(ValueError, match=r"attn_norm_num_groups = 8 \(only 32\)"):
        unet_config_from_diffusers(SD15_UNET | {"attn_norm_num_groups": 8})
    odd = SD15_VAE | {"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]}
    with pytest.raises(ValueError, match="parts that ours lack: down_block_types"):
        vae_config_from_diffusers(odd)


def test_weights_of_another_network_are_refused_by_name() -> None:
    config = VAES["plain"]
    weights = vae_to_diffusers(AutoencoderKL(config, image_channels=1).state_dict(), config)
    weights["encoder.extra.weight"] = weights.pop("encoder.conv_in.weight")
    with pytest.raises(
        ValueError, match=r"1 missing \['encoder.conv_in.weight'\], 1 left over \['encoder.extra.weight'\]"
    ):
        vae_from_diffusers(weights, config)
