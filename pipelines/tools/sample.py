"""Images from a trained run: for a class or a prompt, with a guidance scale, a number of steps and a seed.

    python -m pipelines.tools.sample --config pipelines/configs/demo.toml --class_name sneaker --guidance.scale 3
    python -m pipelines.tools.sample --config pipelines/configs/demo.toml --class_name bag --interpolate true --number 8
    python -m pipelines.tools.sample --config pipelines/configs/emoji.toml --prompt "cat face" --negative_prompt crying

Reads: ``runs/NAME/vae/``, ``runs/NAME/unet/``. Writes: ``OUTPUT/KEY.png`` for each image as soon as it is drawn, and
``OUTPUT/grid.png``. Other images of these names stay: the new ones are ``KEY-2.png`` and ``grid-2.png`` then.
"""

import json
import logging
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from data.files import make_folder, write_beside
from data.manifest import AnyVAEManifest, VAEManifest
from data.samples import PNG_KEYWORD, encode_png
from data.transforms import ImageViewConfig, to_unit_range, view_image
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig, SamplerConfig, slerp
from models.latent_diffusion import LatentDiffusion
from models.metrics.fidelity import psnr
from pipelines.model.captions import as_tensors, prompt_encoder
from pipelines.model.decoded import finite_levels
from pipelines.model.device import Device, attention_on
from pipelines.model.grids import grid_png
from pipelines.model.noise import noise_of
from pipelines.model.weights import GuidedInputs, check_latent_diffusion, load_latent_diffusion, weights_of_samples
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import Name, StageConfig
from pipelines.runtime.stage.fingerprint import read_parents
from pipelines.runtime.stage.launch import set_float32
from pipelines.runtime.stage.progress import progress_line

log = logging.getLogger("latentline.sample")

GRID_COLUMNS = 8


class SampleConfig(StageConfig):
    """Images to draw: their conditions, number, seed and sampler."""

    inputs: GuidedInputs  # where the weights are
    prompt: str = ""  # what to draw, in words, for a model with a text condition; empty for anything
    negative_prompt: str = ""  # what not to draw: guidance leads away from it, not from no caption
    class_name: str = "all"  # a class of the corpus by name or number, "all" in turn, or "none" for any
    number: PositiveInt = 16  # images
    seed: NonNegativeInt = 0  # image i depends on (seed, i) only
    sampler: SamplerConfig = DDIMConfig(num_steps=50)  # from noise to latents; --sampler.num_steps N
    guidance: GuidanceConfig = GuidanceConfig(scale=2.0)  # weight of class and prompt; --guidance.scale S
    invert: Path | None = None  # picture whose noise, by DDIM inversion, all images start from; one a condition
    invert_as: str = ""  # that picture's prompt, or its class where the model reads no text; empty for none
    interpolate: bool = False  # images on the arc from the first one's noise to the last one's, both included
    batch_size: PositiveInt = 50  # images drawn at once
    tile: NonNegativeInt = 0  # decode in tiles of so many latent pixels a side, for large images; 0 decodes at once
    output: Name = "samples"  # folder to write to

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.negative_prompt and self.guidance.scale == 1:
            raise ValueError("negative_prompt does nothing at guidance.scale = 1, which draws by the prompt alone")
        if self.negative_prompt and self.inputs.guide:
            raise ValueError(
                f"negative_prompt and inputs.guide = {self.inputs.guide!r} are two things to lead away from; "
                "--inputs.guide '' goes without a guide"
            )
        if self.interpolate and self.invert is not None:
            raise ValueError("interpolate needs the noise of two images, and invert gives one: choose one of them")
        if self.invert_as and self.invert is None:
            raise ValueError("invert_as describes the picture of invert, which is not given")
        if self.invert is not None and (self.sampler.kind == "ddpm" or getattr(self.sampler, "eta", 0.0) > 0.0):
            raise ValueError("invert needs a sampler without fresh noise, which would lead away from the picture")
        return self


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(SampleConfig, draw, table="sample", about=__doc__, argv=argv)


def draw(config: SampleConfig) -> Answer:
    """Draw the images and write them."""
    # The folder, the model, and the device.
    with config_error_at("sample.output"):
        output = make_folder(config.output)
    parents = read_parents(config)
    check_latent_diffusion(config.inputs, parents, {"sampler": config.sampler})
    set_float32(tf32=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = attention_on(device, config.run)
    log.info(f"on {device}, attention by {attention.name}: {attention.reason}")
    model = load_latent_diffusion(config.inputs, parents, device=Device(device, attention.name))

    # The conditions.
    classes = parents.unet.classes
    known = classes if "labels" in model.denoiser.config.fields else ()
    labels = labels_of(config, known)
    with config_error_at("inputs.unet"):
        encoder = prompt_encoder(model)
    for key, text in (("prompt", config.prompt), ("negative_prompt", config.negative_prompt)):
        if text and encoder is None:
            raise ConfigError(f"{key} = {text!r}, but {config.inputs.unet} was not trained on captions.")

    def fields_of(caption: str, labels: Sequence[int]) -> dict[str, Tensor]:
        text = as_tensors(encoder([caption] * len(labels))) if encoder is not None else {}
        return {"labels": torch.tensor(labels), **text}

    # The noise of a picture, from which there is one image a condition.
    start, errors, said = None, dict[str, float](), ""
    if config.invert is not None:
        labels = list(dict.fromkeys(labels))
        config = config.model_copy(update={"number": len(labels)})
        described = config.model_copy(update={"class_name": config.invert_as or "none", "number": 1})
        if (named := encoder is None) and config.invert_as == "all":
            raise ConfigError("invert_as = 'all', but a picture has one class: name it.")
        source = fields_of(config.invert_as, labels_of(described, known) if named else [-1])
        start, errors = inverted(config, model, source, parents.vae)
        said = ", {psnr:.1f} dB from its noise back to the picture, {vae_psnr:.1f} dB by the VAE alone".format(**errors)

    # Batch by batch.
    names = [classes[label] if label >= 0 else "" for label in labels]
    origin = {"prompt": config.prompt, **weights_of_samples(parents)}
    origin |= {key: str(value) for key in ("negative_prompt", "invert", "invert_as") if (value := getattr(config, key))}
    images, paths = list[np.ndarray](), list[Path]()
    with progress_line("sample", total=config.number, unit="images") as line:
        for first in range(0, config.number, config.batch_size):
            indices = range(first, min(first + config.batch_size, config.number))
            conditions = fields_of(config.prompt, [labels[index] for index in indices])
            drawn = draw_batch(config, model, indices, conditions, fields_of(config.negative_prompt, [-1]), start)
            for index, image in zip(indices, drawn, strict=True):
                images.append(image)
                about = {"seed": config.seed, "index": index, "guidance": config.guidance.scale, **origin}
                content = encode_png(image, texts={PNG_KEYWORD: json.dumps(about)})
                paths.append(write_beside(output / image_name(config, index, names[index]), content))
            line.advance_to(len(images))
    grid = write_beside(output / "grid.png", grid_of(config, images, names))
    found = {"grid": str(grid), "images": list(map(str, paths)), "classes": names, **errors}
    return Answer(found, f"sample: {len(images)} images and {grid.name} in {output}{said}")


def inverted(
    config: SampleConfig, model: LatentDiffusion, source: Mapping[str, Tensor], vae: AnyVAEManifest
) -> tuple[Tensor, dict[str, float]]:
    """Return the noise (1 c h w) of ``config.invert`` under the conditions ``source``, and the PSNR of the way back."""
    # The picture as the training would see it.
    assert config.invert is not None
    view = (vae.view if isinstance(vae, VAEManifest) else None) or {}
    size, channels = model.denoiser.latent_shape[1] * model.autoencoder.factor, model.autoencoder.image_channels
    with config_error_at("sample.invert"):
        shown = ImageViewConfig.model_validate({**view, "resolution": size, "channels": channels})
        image = to_unit_range(np.stack([view_image(config.invert.read_bytes(), shown)]))
        noise = model.invert(image, source, sampler=config.sampler)

    # The way back, and that through the autoencoder alone.
    redrawn = model.sample(
        noise, source, sampler=config.sampler, guidance=GuidanceConfig(), fresh_noise=lambda step: noise * 0
    )
    found = {"psnr": redrawn, "vae_psnr": model.decode(model.encode(image))}
    return noise, {name: float(psnr(back.cpu().clamp(-1, 1), image)) for name, back in found.items()}


def draw_batch(
    config: SampleConfig,
    model: LatentDiffusion,
    indices: Sequence[int],
    conditions: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    start: Tensor | None = None,
) -> np.ndarray:
    """Draw the images ``indices``, all from the noise ``start`` (1 c h w) where it is given; uint8 (n h w C)."""
    noise = noise_of(config.seed, indices, shape=model.denoiser.latent_shape, device=model.device)
    images = model.sample(
        start_of(config, model, indices) if start is None else torch.cat([start] * len(indices)),
        conditions,
        sampler=config.sampler,
        guidance=config.guidance,
        fresh_noise=lambda step: noise(f"sample/{step}"),
        uncond=uncond,
        tile=config.tile,
    )
    return finite_levels(images, names=indices, stage="sample", precision="float32")


def start_of(config: SampleConfig, model: LatentDiffusion, indices: Sequence[int]) -> Tensor:
    """Return the noise that the images start from: their own, or their places on the arc; (n c h w)."""
    last = config.number - 1
    arc = config.interpolate and last > 0
    ends_or_all = [0, last] if arc else indices
    noise = noise_of(config.seed, ends_or_all, shape=model.denoiser.latent_shape, device=model.device)("sample")
    return torch.cat([slerp(noise[:1], noise[1:], index / last) for index in indices]) if arc else noise


def image_name(config: SampleConfig, index: int, name: str) -> str:
    """Return the file's name of the image ``index`` of the class ``name``, "" for none."""
    # Letters of any script; composed, as most file systems expect them.
    readable = unicodedata.normalize("NFC", name or config.prompt)
    readable = re.sub(r"[^\w-]+", "_", readable)[:40].strip("_") or "image"
    return f"{index:06}-{readable}-seed{config.seed}.png"


def grid_of(config: SampleConfig, images: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Return all images in one, as PNG; ``names`` are their classes, "" for none."""
    heads = list(dict.fromkeys(names)) if config.class_name == "all" and any(names) else []
    columns = min(len(heads) if 0 < len(heads) <= 12 else GRID_COLUMNS, len(images))
    rows = -(-len(images) // columns)
    blank = np.full_like(images[0], 255)
    shown = np.stack([*images, *[blank] * (rows * columns - len(images))]).reshape(rows, columns, *blank.shape)
    parts = [config.prompt, f"not {config.negative_prompt}" if config.negative_prompt else ""]
    what = ", ".join(part for part in (*parts, config.class_name if any(names) else "") if part) or "any"
    title = f"{what}, guidance {config.guidance.scale:g}, {config.sampler.num_steps} steps, seed {config.seed}"
    return grid_png(shown, column_labels=heads if len(heads) == columns else [], title=title)


def labels_of(config: SampleConfig, classes: tuple[str, ...]) -> list[int]:
    """Return the class of each image.

    Raises:
        ConfigError: There is no such class.
    """
    if config.class_name == "none" or (not classes and config.class_name == "all"):
        return [-1] * config.number
    if config.class_name == "all":
        return [index % len(classes) for index in range(config.number)]
    if config.class_name in classes:
        return [classes.index(config.class_name)] * config.number
    if config.class_name.isdigit() and int(config.class_name) < len(classes):
        return [int(config.class_name)] * config.number
    if not classes:
        raise ConfigError(f"class_name = {config.class_name!r}, but {config.inputs.unet} reads no class.")
    raise ConfigError(
        f"class_name = {config.class_name!r} is no class of {config.inputs.unet}. Classes are "
        f"{', '.join(classes)}, their numbers from 0, 'all' or 'none'."
    )


if __name__ == "__main__":
    sys.exit(main())
