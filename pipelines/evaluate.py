"""Evaluation of a U-Net and its VAE: DDIM samples, grids, and metrics over a sweep of guidance scales.

    accelerate launch -m pipelines.evaluate --config pipelines/configs/demo.toml

Reads: ``runs/NAME/corpus/`` (reference images), ``runs/NAME/vae/``, ``runs/NAME/unet/``. Writes:
``runs/NAME/evaluation/`` with ``metrics.json``, ``samples.png``, ``guidance.png``, ``copies.png``, ``sweep.png`` and
sample shards.

Sample i has class i mod K, or with a text condition the caption of a validation image, and noise (seed, i); batches
have a fixed size and are composed by sample index; ranks take whole batches. So the number of processes changes neither
an image nor a metric.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from data.files import write_atomically, write_json
from data.manifest import EvaluationManifest, FileEntry, Parents, digest_of
from data.samples import image_members
from data.shards.writer import ShardWriter
from data.transforms import VIEW_REVISIONS
from models.diffusion.samplers import SamplerConfig
from pipelines.evaluation.figures import CALIBRATION, FIGURES, FigureMaker
from pipelines.evaluation.likelihood import TERMS, VariationalBoundConfig
from pipelines.evaluation.metrics import COPY_QUANTILE, Metrics, mean_metrics, sweep_plot
from pipelines.evaluation.samples import DrawConfig, ItemMaker, key_prefix
from pipelines.model.grids import grid_png
from pipelines.model.weights import check_latent_diffusion
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.stage.progress import progress_line
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.stage.work_items import make_items, results_of

GRID_ROWS = 8
MAX_GRID_COLUMNS = 12
VIEW_KEYS = ("fit", "resample", "background")  # of a corpus, besides the shape of its images
WRITTEN = ("metrics.json", "samples.png", "guidance.png", "copies.png", "sweep.png")  # besides the sample shards


class EvaluateConfig(DrawConfig):
    """Drawing, measuring and storing of samples."""

    fingerprint_ignores = frozenset({"name"})
    # Shards in place are viewed as they are read.
    revisions = (*VIEW_REVISIONS, "a byte order mark is no part of a caption")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""  # NAME writes evaluation-NAME/; empty evaluation/
    samples_per_shard: PositiveInt = 1_000  # samples of one tar


def main() -> None:
    config = config_from_command_line(EvaluateConfig, table="evaluate", about=__doc__)
    with running_stage(
        config,
        name="evaluate",
        precision=config.precision,
        tf32=config.tf32,
        check=lambda parents: check_inputs(config, parents),
        folder_name=f"evaluation-{config.name}" if config.name else None,
    ) as stage:
        evaluate(config, stage)


def check_inputs(config: EvaluateConfig, parents: Parents) -> None:
    """Refuse what cannot be compared, before any work.

    Raises:
        ConfigError: Another VAE than the U-Net's, other classes, another view, or no validation images.
    """
    # The model: its VAE, and the samplers that its process takes.
    samplers: dict[str, SamplerConfig] = {"evaluate.sampler": config.sampler}
    if isinstance(config.likelihood, VariationalBoundConfig):
        samplers["evaluate.likelihood"] = config.likelihood.sampler
    check_latent_diffusion(config.inputs, parents, samplers)

    # The images to compare with.
    corpus, unet = parents.corpus, parents.unet
    if corpus.classes != unet.classes:
        raise ConfigError(
            f"inputs.corpus has the classes {list(corpus.classes)}, inputs.unet was trained on {list(unet.classes)}. "
            "Point inputs.corpus at the corpus of the training, or at one with its classes in its order."
        )
    trained, found = getattr(parents.vae, "view", None), corpus.config["view"]
    if trained and (differing := [key for key in VIEW_KEYS if trained[key] != found[key]]):
        raise ConfigError(
            "inputs.corpus shows images in another way than the one that inputs.vae was trained on: "
            + ", ".join(f"view.{key} is {found[key]!r}, was {trained[key]!r}" for key in differing)
            + ". Prepare it with the view of the training: figures would compare two ways of cropping."
        )
    if not corpus.splits["val"]:
        raise ConfigError("inputs.corpus has no validation images to compare with. Prepare it with a validation split.")


def evaluate(config: EvaluateConfig, stage: Stage) -> None:
    """Draw every sample that is missing, then measure them all."""
    # The model, the real images, and the names of all batches.
    maker = ItemMaker(config, stage)
    names = maker.names
    for reason in dict.fromkeys(maker.absent.values()):
        which = ", ".join(name for name, why in maker.absent.items() if why == reason)
        stage.log.info(f"without {which}: {reason}")

    # Make the batches that are missing, each with its features; all ranks share the work.
    with progress_line("evaluate", total=len(names.own), unit="batches", is_main=stage.is_main) as line:
        make_items(stage, names.reference, maker.make_reference, folder=maker.reference_folder)
        make_items(stage, names.own, maker.make_own, after_each=lambda done, _, __: line.advance_to(done))

    # Measure each set of images, and write metrics, pictures and sample shards.
    figures = FigureMaker(maker)
    make_items(stage, [CALIBRATION], figures.make_calibration, folder=maker.reference_folder)
    make_items(stage, list(figures.names), figures.make)
    found = dict(zip(figures.names, results_of(stage, list(figures.names)), strict=True))
    files: list[FileEntry] = []
    if stage.is_main:
        measure(maker, figures, found)
        files = store_samples(maker, per_shard=config.samples_per_shard)
        files += [FileEntry.of(path) for name in WRITTEN if (path := stage.folder / name).exists()]

    # Commit.
    num_samples = len(config.scales) * config.num_samples
    stage.finish(
        EvaluationManifest,
        files=files,
        weights=stage.parents.unet.weights,
        vae=stage.parents.vae.weights,
        counts={"in": num_samples, "out": num_samples},
        classes=stage.parents.unet.classes,
        value_range=(0, 255),
    )


def measure(maker: ItemMaker, figures: FigureMaker, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Collect all figures and draw all pictures; on the main process."""
    config, stage, names = maker.config, maker.stage, maker.names
    folder, absent = stage.folder, maker.absent

    # What was found: of the samples, of what a perfect U-Net and a perfect model would draw, of the VAE.
    by_scale: dict[float, Metrics] = {scale: dict(found[f"{FIGURES}-{key_prefix(scale)}"]) for scale in config.scales}
    floor, real = (dict(found.get(f"{FIGURES}-{kind}", {})) for kind in ("floor", "real"))
    fidelity = [name for name in ("psnr", "ssim") if name not in absent]
    vae = mean_metrics({name: maker.read(names.reconstructions, name) for name in fidelity})
    bounds = names.bounds and "likelihood" not in absent
    likelihood = mean_metrics({name: maker.read(names.bounds, name) for name in TERMS}) if bounds else {}

    # Write them down with all that makes them comparable, and draw them.
    contract = contract_of(maker, figures)
    write_json(
        folder / "metrics.json",
        {
            "contract": contract,
            "real": real,
            "floor": floor,
            "vae": vae,
            **({"likelihood": likelihood} if likelihood else {}),
            **({"absent": absent} if absent else {}),
            "sweep": [{"guidance": scale, **by_scale[scale]} for scale in sorted(by_scale)],
            "default_guidance": config.guidance.scale,
        },
    )
    draw_pictures(maker, figures, by_scale, floor)

    # Send them to the tracker; print those of the default guidance.
    default = by_scale[config.guidance.scale]
    groups = {"eval": default, "eval/real": real, "eval/floor": floor, "eval/vae": vae, "eval/likelihood": likelihood}
    stage.tracker.log_metrics(
        {f"{group}/{name}": metric["value"] for group, metrics in groups.items() for name, metric in metrics.items()},
        step=0,
    )
    for scale, metrics in by_scale.items():
        sweep = {f"eval/sweep/{name}": metric["value"] for name, metric in metrics.items()}
        stage.tracker.log_metrics(sweep, step=round(100 * scale))
    stage.tracker.set_tags({"digest.evaluation_contract": digest_of(contract)})
    for name in ("metrics.json", "sweep.png"):
        stage.tracker.log_artifact(folder / name)
    shown = {**default, **vae, **likelihood}
    stage.log.info(", ".join(f"{name} {metric['value']:.4g}" for name, metric in shown.items()))
    stage.log.info(f"{folder / 'samples.png'}, {folder / 'metrics.json'}")


def contract_of(maker: ItemMaker, figures: FigureMaker) -> dict[str, Any]:
    """Return everything two evaluations must share for their metrics to be comparable."""
    corpus, extractor = maker.stage.parents.corpus, maker.extractor
    settings = maker.config.model_dump(mode="json", exclude={"guidance": {"scale"}})
    of_samples = ("num_samples", "seed", "sampler", "guidance", "precision", "tf32", "likelihood")
    return {
        # the samples
        **{name: settings[name] for name in of_samples},
        # the features
        "extractor": {name: getattr(extractor, name) for name in ("name", "weights_sha256", "dimension", "resolution")},
        # the real images, and the probe fitted on them
        "image": corpus.image.model_dump(),
        "conditions": "validation captions" if maker.prompts is not None else "classes in turn",
        "reference": {"digest": corpus.digest, "split": "val", "num_images": len(maker.real_indices["val"])},
        "floor": {"split": "train", "num_images": len(maker.real_indices["floor"])},
        "copies": {"split": "train", "num_images": sum(figures.searched.values()), "quantile": COPY_QUANTILE},
        "probe": figures.reference.probe_contract,
    }


def draw_pictures(maker: ItemMaker, figures: FigureMaker, by_scale: Mapping[float, Metrics], floor: Metrics) -> None:
    """Draw the sample grid, the same samples at every guidance, and the metrics over guidance."""
    # A column a class, or a caption.
    config, folder = maker.config, maker.stage.folder
    in_turn = maker.stage.parents.unet.classes if maker.prompts is None else ()
    columns = min(len(in_turn), MAX_GRID_COLUMNS) if in_turn else min(10, config.num_samples)
    stride = len(in_turn) or columns
    heads = in_turn[:columns] if maker.prompts is None else maker.captions(range(columns))
    rows = max(1, min(GRID_ROWS, config.num_samples // stride))
    needed = -(-rows * stride // config.batch_size)

    def grid(scale: float, num_rows: int) -> np.ndarray:
        images = maker.read(maker.names.samples[scale][:needed], "images").numpy()
        places = [[row * stride + column for column in range(columns)] for row in range(num_rows)]
        return images[np.array(places) % len(images)]

    # Many samples of the default guidance.
    default, steps = config.guidance.scale, config.sampler.num_steps
    title = f"guidance {default:g}, {config.sampler.kind} with {steps} steps, seed {config.seed}"
    pictures = {"samples": grid_png(grid(default, rows), column_labels=in_turn[:columns], title=title)}

    # A few samples, and the metrics, of every guidance.
    scales = sorted(by_scale)
    across = np.concatenate([grid(scale, 1) for scale in scales])
    labels = [f"guidance {scale:g}" for scale in scales]
    pictures["guidance"] = grid_png(across, column_labels=heads, row_labels=labels)
    write_atomically(folder / "sweep.png", sweep_plot(by_scale, floor))

    # The samples that are closest to a training image, above it.
    if "copied" not in maker.absent:
        pictures["copies"] = figures.copies_picture(default)
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", picture)
        maker.stage.tracker.log_image(f"eval/{name}", folder / f"{name}.png", step=0)


def store_samples(maker: ItemMaker, *, per_shard: int) -> list[FileEntry]:
    """Write all samples into tars, those of the default guidance first; return the tars."""
    samples = stored_samples(maker)
    files: list[FileEntry] = []
    while shard := list(islice(samples, per_shard)):
        with ShardWriter(maker.stage.folder / f"samples-{len(files):06}.tar") as writer:
            for key, members in shard:
                writer.add(key, members)
        assert writer.entry is not None
        files.append(writer.entry)
    return files


def stored_samples(maker: ItemMaker) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members of every sample; one batch of images in memory at a time."""
    seed, size, steps = maker.config.seed, maker.config.batch_size, maker.config.sampler.num_steps

    # Keys are unique over all guidance scales: each begins with its scale.
    for scale, of_scale in maker.names.samples.items():
        for number, name in enumerate(of_scale):
            images = maker.read([name], "images").numpy()
            indices = range(number * size, number * size + len(images))
            labels, captions = maker.labels(indices).tolist(), maker.captions(indices)
            for index, image, label, caption in zip(indices, images, labels, captions, strict=True):
                key = f"{key_prefix(scale)}-{index:06}"
                metadata = {"seed": seed, "index": index, "guidance": scale, "steps": steps}
                yield key, image_members(key, image, label=label, caption=caption, metadata=metadata)


if __name__ == "__main__":
    main()
