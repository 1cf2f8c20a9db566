"""Draw images from a trained run: for a class, a number, a guidance scale, steps and a seed.

    python -m pipelines.sample --config pipelines/configs/demo.toml --class_name sneaker --number 16 --guidance.scale 3

Reads: ``runs/NAME/vae/``, ``runs/NAME/unet/``. Writes: ``OUTPUT/KEY.png`` for each image, and ``OUTPUT/grid.png``.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt

from data.commit import write_atomically
from data.panels import panel_png
from data.samples import encode_png
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig, SamplerConfig
from pipelines.config import ConfigError, StageConfig, config_from_command_line
from pipelines.published import check_same_vae, check_sampler_suits, denoiser_config, load_denoiser, load_vae
from pipelines.runtime.progress import progress_line
from pipelines.runtime.stage import blaming, read_parents
from pipelines.sampling import ImageSampler

GRID_COLUMNS = 8


class SampleInputs(BaseModel, frozen=True, extra="forbid"):
    """The trained model."""

    vae: str  # folder of the autoencoder
    unet: str  # folder of the U-Net


class SampleConfig(StageConfig):
    """Which images to draw, and how."""

    inputs: SampleInputs  # where the weights are
    class_name: str = "all"  # a class of the corpus by name or number, or "all" in turn
    number: PositiveInt = 16  # images
    seed: NonNegativeInt = 0  # image i depends on (seed, i) only
    sampler: SamplerConfig = DDIMConfig(num_steps=50)  # how they are drawn; --sampler.num_steps N
    guidance: GuidanceConfig = GuidanceConfig(scale=2.0)  # how strongly the class pulls; --guidance.scale S
    batch_size: PositiveInt = 50  # images drawn at once
    output: str = "samples"  # folder to write to


def main() -> None:
    config = config_from_command_line(SampleConfig, table="sample", about=__doc__)
    try:
        draw(config)
    except ConfigError as error:
        print(f"sample: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def draw(config: SampleConfig) -> None:
    """Draw the images and write them."""
    parents = read_parents(config, {"vae": "train_vae", "unet": "train_unet"})
    unet = parents["unet"]
    with blaming("inputs"):
        check_same_vae(unet.content["vae"], given=parents["vae"], given_at=config.inputs.vae, user=config.inputs.unet)
        check_sampler_suits(config.sampler, denoiser_config(config.inputs.unet))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        vae = load_vae(config.inputs.vae, parents["vae"], device=device)
        published = load_denoiser(config.inputs.unet, unet, device=device)
    labels = labels_of(config, unet.classes)
    sampler = ImageSampler(
        published.network,
        published.normalisation,
        vae.network,
        latent_shape=(published.latent_channels, published.latent_size, published.latent_size),
        seed=config.seed,
    )

    images: list[np.ndarray] = []
    with progress_line("sample", total=config.number, unit="images") as line:
        for first in range(0, config.number, config.batch_size):
            indices = range(first, min(first + config.batch_size, config.number))
            conditions = {"labels": torch.tensor([labels[index] for index in indices])}
            images.extend(sampler.draw(indices, conditions, sampler=config.sampler, guidance=config.guidance))
            line.advance_to(len(images))

    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        name = unet.classes[labels[index]].replace(" ", "_").replace("/", "_") if unet.classes else "image"
        write_atomically(output / f"{index:06}-{name}-seed{config.seed}.png", encode_png(image))
    columns = (
        min(GRID_COLUMNS, len(images)) if config.class_name != "all" else min(len(unet.classes) or GRID_COLUMNS, 12)
    )
    rows = max(1, len(images) // columns)
    shown = np.stack((images * columns)[: rows * columns]).reshape(rows, columns, *images[0].shape)
    heads = unet.classes[:columns] if config.class_name == "all" else ()
    title = (
        f"{config.class_name}, guidance {config.guidance.scale:g}, {config.sampler.num_steps} steps, seed {config.seed}"
    )
    write_atomically(output / "grid.png", panel_png(shown, column_labels=heads, title=title))
    print(f"sample: {len(images)} images and grid.png in {output}")


def labels_of(config: SampleConfig, classes: tuple[str, ...]) -> list[int]:
    """Return the class of each image.

    Raises:
        ConfigError: There is no such class.
    """
    if not classes:
        return [-1] * config.number
    if config.class_name == "all":
        return [index % len(classes) for index in range(config.number)]
    if config.class_name in classes:
        return [classes.index(config.class_name)] * config.number
    if config.class_name.isdigit() and int(config.class_name) < len(classes):
        return [int(config.class_name)] * config.number
    raise ConfigError(
        f"class_name = {config.class_name!r} is no class of {config.inputs.unet}. Classes are "
        f"{', '.join(classes)}, their numbers from 0, or 'all'."
    )


if __name__ == "__main__":
    main()
