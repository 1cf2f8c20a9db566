"""Export of a trained run for diffusers: VAE, U-Net, scheduler, and an example to check them by.

    python -m pipelines.tools.export --config pipelines/configs/demo.toml --format diffusers --output exports/demo

Reads: ``runs/NAME/vae/`` and ``runs/NAME/unet/``; a guide has no place in stock pipelines. Writes to
``OUTPUT``: ``vae/``, ``unet/`` and ``scheduler/`` as diffusers loads them, ``example.safetensors``, ``grid.png`` and a
model card ``README.md``, whose few lines reproduce the example; and ``model_index.json``, ``text_encoder/`` and
``tokenizer/`` where a stock pipeline does. ``--format single_file`` writes the networks once more, into
``model.safetensors`` under the names of Stable Diffusion, if they are of its architecture.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors.torch import save
from torch import Tensor

from data.files import make_folder, write_atomically, write_json
from data.manifest import captions_by_name
from data.transforms import to_levels
from models.conditioning.class_label import ClassConditioner
from models.conditioning.text import TextConditioner, TextConditionerConfig
from models.conditioning.text_encoder import PretrainedConfig
from models.denoiser import Denoiser
from models.diffusers.config import scheduler_config_to_diffusers, unet_config_to_diffusers, vae_config_to_diffusers
from models.diffusers.single_file import to_single_file
from models.diffusers.weights import denoiser_to_diffusers, scaled_vae, vae_to_diffusers
from models.diffusion.guidance import GuidanceConfig, GuidanceScale
from models.diffusion.samplers import DDIMConfig
from models.diffusion.spacing import sampling_moments
from models.latent_diffusion import LatentDiffusion
from pipelines.model.captions import as_tensors, prompt_encoder
from pipelines.model.device import Device
from pipelines.model.grids import grid_png
from pipelines.model.noise import noise_of
from pipelines.model.weights import ModelInputs, check_latent_diffusion, denoiser_config, load_latent_diffusion
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import Name, StageConfig
from pipelines.runtime.stage.fingerprint import read_parents
from pipelines.tools.model_card import model_card

EXAMPLE_SAMPLES = 4
ON_CPU = Device(torch.device("cpu"))  # in float32, so that the example is the same for whoever checks it


class ExportConfig(StageConfig):
    """Export of a trained model: its format, its folder, and an example."""

    inputs: ModelInputs  # where the weights are
    format: Literal["diffusers", "single_file"] = "diffusers"  # single_file adds one file of Stable Diffusion's names
    output: Name = "export"  # folder to write to
    prompts: tuple[str, ...] = ()  # captions of the example's samples, for a model that reads text; none: class names
    guidance_scale: GuidanceScale = 2.0  # of the example
    num_inference_steps: PositiveInt = 50  # DDIM steps of the example; divides the schedule's steps
    spacing: Literal["trailing", "leading"] = "trailing"  # of those steps, as the scheduler will have it
    seed: NonNegativeInt = 0  # of the example's noise


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(ExportConfig, export, table="export", about=__doc__, argv=argv)


def export(config: ExportConfig) -> Answer:
    """Write the folder; the card comes last."""
    parents = read_parents(config)
    output, classes = Path(config.output), parents.unet.classes
    with config_error_at("export.output"):
        make_folder(output)
    if any(output.iterdir()) and not (output / "example.safetensors").is_file():
        raise ConfigError(f"output = {config.output!r} is a folder with other things in it. Give a new one.")

    # What cannot be exported is refused before any weight is read.
    sampler = DDIMConfig(num_steps=config.num_inference_steps, spacing=config.spacing)
    check_latent_diffusion(config.inputs, parents, {"export.num_inference_steps": sampler})
    with config_error_at("inputs"):
        scheduler = scheduler_config_to_diffusers(denoiser_config(config.inputs.unet, parents.unet), sampler)
    model = load_latent_diffusion(config.inputs, parents, device=ON_CPU)
    with config_error_at("inputs"):
        configs, weights = in_diffusers(model, scheduler, num_classes=len(classes))
        single_file = to_single_file(configs, weights) if config.format == "single_file" else None
        conditions = example_conditions(config, model, classes)
    example = compute_example(config, model, sampler=sampler, conditions=conditions)

    for name in ("model_index.json", "model.safetensors"):  # of an earlier export to this folder
        (output / name).unlink(missing_ok=True)
    write_export(output, configs, weights, example)
    write_pipeline(config, model, configs)
    if single_file is not None:
        write_weights(output / "model.safetensors", single_file)
    write_atomically(output / "grid.png", grid_png(to_levels(example["images"])[None]))
    unet_class = configs["unet"]["_class_name"]
    card = model_card(
        unet_class=unet_class,
        scheduler_class=scheduler["_class_name"],
        example=example,
        classes=classes,
        digests={"VAE": parents.vae.weights, "U-Net": parents.unet.weights},
        experiment=config.run.experiment,
    )
    write_atomically(output / "README.md", card.encode())
    text = f"export: {output} holds vae/, unet/, scheduler/, example.safetensors and README.md, which shows its use"
    return Answer({"output": str(output), "format": config.format, "unet_class": unet_class}, text)


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    write_atomically(path, save({key: tensor.contiguous() for key, tensor in weights.items()}, {"format": "pt"}))


def write_export(
    output: Path, configs: Mapping[str, Any], weights: Mapping[str, Mapping[str, Tensor]], example: Mapping[str, Tensor]
) -> None:
    """Write the folders that diffusers loads, and the example."""
    for name, renamed in weights.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        write_weights(output / name / "diffusion_pytorch_model.safetensors", renamed)
        write_json(output / name / "config.json", configs[name])
    (output / "scheduler").mkdir(exist_ok=True)
    write_json(output / "scheduler" / "scheduler_config.json", configs["scheduler"])
    write_atomically(output / "example.safetensors", save(dict(example)))


def write_pipeline(config: ExportConfig, model: LatentDiffusion, configs: Mapping[str, Any]) -> None:
    """Write what else ``StableDiffusionPipeline`` needs, where it draws the example: for the tokens of a CLIP alone.

    It attends to padding, takes the empty caption for none, steps from the last time on, and draws multiples of 8.
    """
    match model.denoiser.config.conditioners:
        case (TextConditionerConfig(use="tokens", null="empty_caption", encoder=PretrainedConfig()) as conditioner,):
            encoder = conditioner.encoder.build()
        case _:
            return
    attends = captions_by_name(model.caption_features)[conditioner.name].padding == "attended"
    steps = config.spacing == "trailing" and configs["scheduler"]["_class_name"] == "DDIMScheduler"
    fits = attends and steps and config.guidance_scale >= 1 and configs["vae"]["sample_size"] % 8 == 0
    if fits and type(encoder.model).__name__ == "CLIPTextModel":
        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
        index |= dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None))
        index |= {name: ("diffusers", part["_class_name"]) for name, part in configs.items()}
        write_json(Path(config.output) / "model_index.json", index | encoder.save(Path(config.output)))


def in_diffusers(
    model: LatentDiffusion, scheduler: dict[str, Any], *, num_classes: int
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    """Return the configs of U-Net, VAE and scheduler by folder, and the weights of the networks.

    Raises:
        ValueError: The model has parts that diffusers lacks.
    """
    denoiser, vae, normalisation = model.denoiser, model.autoencoder, model.normalisation
    channels, latent_size, _ = denoiser.latent_shape
    mean, std = normalisation.mean.flatten(), normalisation.std.flatten()
    scaled, vae_config, factor = scaled_vae(vae.state_dict(), vae.config, mean=mean, std=std)
    configs = {
        "unet": unet_config_to_diffusers(
            denoiser.config, latent_channels=channels, latent_size=latent_size, num_classes=num_classes
        ),
        "vae": vae_config_to_diffusers(
            vae_config, image_channels=vae.image_channels, sample_size=latent_size * vae.factor, scaling_factor=factor
        ),
        "scheduler": scheduler,
    }
    return configs, {
        "unet": denoiser_to_diffusers(denoiser.state_dict(), denoiser.config),
        "vae": vae_to_diffusers(scaled, vae_config),
    }


def example_conditions(config: ExportConfig, model: LatentDiffusion, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the fields that the example's samples are conditioned on: classes, and prompts, in turn."""
    numbers = range(EXAMPLE_SAMPLES)
    conditions = {"labels": torch.tensor([index % len(classes) if classes else -1 for index in numbers])}
    encoder = prompt_encoder(model)
    if encoder is None:
        if config.prompts:
            raise ValueError("the model reads no text, so prompts cannot be drawn. Remove export.prompts.")
        return conditions
    prompts = config.prompts or classes or ("",)
    return conditions | as_tensors(encoder([prompts[index % len(prompts)] for index in numbers]))


@torch.no_grad()
def compute_example(
    config: ExportConfig, model: LatentDiffusion, *, sampler: DDIMConfig, conditions: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Draw a few samples by our own code, in float32; with all that another program needs to draw them again."""
    denoiser = model.denoiser
    noise = noise_of(config.seed, range(EXAMPLE_SAMPLES), shape=denoiser.latent_shape, device=model.device)("sample")
    latents = denoiser.sample(
        noise,
        conditions,
        sampler=sampler,
        guidance=GuidanceConfig(scale=config.guidance_scale),
        fresh_noise=lambda step: torch.zeros_like(noise),
    )
    moments = sampling_moments(denoiser.process, num_steps=sampler.num_steps, spacing=sampler.spacing)
    nothing = torch.zeros(EXAMPLE_SAMPLES, dtype=torch.bool)
    cond, uncond = (arguments_in_diffusers(denoiser, conditions, dropped) for dropped in (nothing, ~nothing))
    example = {
        "noise": noise,
        **cond,
        **{f"null_{name}": argument for name, argument in uncond.items()},
        "guidance_scale": torch.tensor(config.guidance_scale),
        "num_inference_steps": torch.tensor(config.num_inference_steps),
        **({"sigmas": torch.stack([moment.level.sigma for moment in moments])} if denoiser.process.straight else {}),
        "latents": latents,
        "images": model.decode(latents),
    }
    return {name: tensor.contiguous() for name, tensor in example.items()}


def arguments_in_diffusers(network: Denoiser, conditions: Mapping[str, Tensor], dropped: Tensor) -> dict[str, Tensor]:
    """Return the keyword arguments of the exported U-Net for these conditions, each (n ...)."""
    arguments: dict[str, Tensor] = {}
    for conditioner in network.conditioners:
        if isinstance(conditioner, ClassConditioner):
            arguments["class_labels"] = conditioner.rows(conditions, dropped)
        elif isinstance(conditioner, TextConditioner):
            cond = conditioner(conditions, dropped)
            if conditioner.uses_pooled:
                arguments["class_labels"] = conditioner.pooled(conditions, dropped)
            if cond.tokens is not None and cond.token_mask is not None:
                arguments |= {"encoder_hidden_states": cond.tokens, "encoder_attention_mask": cond.token_mask}
    return arguments


if __name__ == "__main__":
    sys.exit(main())
