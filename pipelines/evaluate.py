"""Evaluation of a U-Net and its VAE: DDIM samples, grids, and metrics over a sweep of guidance scales.

    accelerate launch -m pipelines.evaluate --config pipelines/configs/demo.toml

Reads: ``runs/NAME/corpus/`` (reference images), ``runs/NAME/vae/``, ``runs/NAME/unet/`` and, for the error budget,
``runs/NAME/latents/``. Writes: ``runs/NAME/evaluation/`` with ``metrics.json``, ``samples.png``, ``guidance.png``,
``sweep.png``, ``error_budget.png``, ``copies.png``, sample shards, and the features of each set of images.

Sample i has class i mod K, or with a text condition the caption of a validation image, and noise (seed, i); batches
have a fixed size and are composed by sample index; ranks take whole batches. So the number of processes changes neither
an image nor a metric.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Annotated, Any, get_args

from pydantic import Field, PositiveInt

from data.files import read_json, write_json
from data.manifest import EvaluationManifest, FileEntry, Parents
from data.samples import image_members
from data.shards.writer import ShardWriter
from data.transforms import VIEW_REVISIONS
from models.diffusion.likelihood import TERMS, VariationalBoundConfig
from models.diffusion.samplers import SamplerConfig
from pipelines.evaluation.contract import contract_digest, contract_of
from pipelines.evaluation.error_budget import REAL, STEPS
from pipelines.evaluation.figures import FigureMaker, features_name
from pipelines.evaluation.metrics import Metrics, log_scores, mean_metrics, metrics_of_samples
from pipelines.evaluation.pictures import draw_pictures
from pipelines.evaluation.real_images import RealSet
from pipelines.evaluation.samples import DrawConfig, ItemMaker, key_prefix
from pipelines.evaluation.training_weights import TrainingWeights
from pipelines.model.weights import check_latent_diffusion, weights_of_samples
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.stage.progress import progress_line
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.stage.work_items import make_items, results_of
from pipelines.runtime.tracking.pages import SHORT_DIGEST

WRITTEN_IF_THERE = ("likelihood", "absent", "curve")  # parts of metrics.json
VIEW_KEYS = ("fit", "resample", "background")  # of a corpus, besides the shape of its images


class EvaluateConfig(DrawConfig):
    """Drawing, measuring and storing of samples."""

    fingerprint_ignores = frozenset({"name"})
    # Shards in place are viewed as they are read.
    revisions = (
        *VIEW_REVISIONS,
        "a byte order mark is no part of a caption",
        "images and their features are stored apart",
        "where real images are copies, distances to training images have no other unit",
    )

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
        ConfigError: Another VAE than the U-Net's, checkpoints that were not kept, other classes, another view, or no
            validation images.
    """
    # The model: its VAE, and the samplers that its process takes.
    samplers: dict[str, SamplerConfig] = {"evaluate.sampler": config.sampler}
    if isinstance(config.likelihood, VariationalBoundConfig):
        samplers["evaluate.likelihood"] = config.likelihood.sampler
    check_latent_diffusion(config.inputs, parents, samplers)

    # The points of its training.
    TrainingWeights(config.inputs.unet, parents.unet).check(config.curve)

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
    names = [name for batches in maker.batches.values() for name in batches]
    stage.log.info(f"guidance leads away from {config.inputs.guide or 'no condition'}")
    for reason in dict.fromkeys(maker.absent.values()):
        which = ", ".join(name for name, why in maker.absent.items() if why == reason)
        stage.log.info(f"without {which}: {reason}")

    # Make the batches that are missing, each with its features; all ranks share the work.
    with progress_line("evaluate", total=len(names), unit="batches", is_main=stage.is_main) as line:
        of_real = [batch for name in get_args(RealSet) for batch in maker.real.batches(name)]
        make_items(stage, of_real, maker.real.make_features, folder=maker.real.folder)
        of_texts = [batch for batches in maker.text_batches.values() for batch in batches]
        make_items(stage, of_texts, maker.make_texts, folder=maker.real.folder)
        make_items(stage, names, maker.make, after_each=lambda done, _, __: line.advance_to(done))

    # Measure each set of images, and write metrics, pictures and sample shards.
    figures = FigureMaker(maker)
    make_items(stage, [maker.calibration], figures.make_calibration, folder=maker.real.folder)
    make_items(stage, figures.names, figures.make)
    found = dict(zip(figures.sets, results_of(stage, figures.names), strict=True))
    files: list[FileEntry] = []
    if stage.is_main:
        written = measure(maker, figures, found)
        files = store_samples(maker, per_shard=config.samples_per_shard)
        files += [FileEntry.of(stage.folder / name) for name in written]

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
    if stage.is_main:
        maker.discard_tensors()


def measure(maker: ItemMaker, figures: FigureMaker, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Collect all figures and draw all pictures, on the main process; return the names of the files."""
    config, stage, batches = maker.config, maker.stage, maker.batches
    folder, absent = stage.folder, maker.absent

    # What was found: of each step that the samples depend on, and of the VAE.
    error_budget = {step: found[step] for step in (REAL, *STEPS) if step in found}
    fidelity = [name for name in ("psnr", "ssim") if name not in absent]
    vae = mean_metrics({name: maker.read(batches["reconstruction"], name) for name in fidelity})
    terms = TERMS if batches["bound"] and "likelihood" not in absent else ()
    likelihood = mean_metrics({name: maker.read(batches["bound"], name) for name in terms})

    # Write it down with the samples' and all that makes them comparable, and draw it.
    calibration = read_json(maker.real.folder / f"{maker.calibration}.json", mend="Remove it.")
    scores: dict[str, Any] = {
        "contract": contract_of(maker, figures, calibration=calibration, real=error_budget.get(REAL, {})),
        "error_budget": error_budget,
        "floor": error_budget.get("encoded", {}),
        "vae": vae,
        "likelihood": likelihood,
        "absent": absent,
        "sweep": [{"guidance": scale, **found[key_prefix(scale)]} for scale in sorted(config.scales)],
        "default_guidance": config.guidance.scale,
        "curve": [{**point, **found[name]} for name, point in config.curve.points.items()],
    }
    scores = {name: part for name, part in scores.items() if part or name not in WRITTEN_IF_THERE}
    write_json(folder / "metrics.json", scores)
    by_scale = {scale: found[key_prefix(scale)] for scale in config.scales}
    steps = error_budget | metrics_of_samples(by_scale, config.guidance.scale)
    pictures = draw_pictures(maker, figures, scores, steps)

    # Send them to the tracker; print those of the default guidance.
    log_scores(stage.tracker, scores)
    stage.tracker.set_tags({"contract": contract_digest(scores["contract"])[:SHORT_DIGEST]})
    stage.tracker.log_artifact(folder / "metrics.json")
    for line in table_of(steps):
        stage.log.info(line)
    shown = {f"{name} of validation images": metric for name, metric in vae.items()} | likelihood
    stage.log.info(", ".join(f"{name} {metric['value']:.4g}" for name, metric in shown.items()))
    stage.log.info(f"{folder / 'samples.png'}, {folder / 'metrics.json'}")
    return ["metrics.json", *pictures, *(features_name(kind) for kind in figures.sets if kind != REAL)]


def table_of(rows: Mapping[str, Metrics]) -> list[str]:
    """Return the lines of a table: a row a set of images, a column a figure that any of them has."""
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    wide = max(map(len, rows))
    lines = ["  ".join([" " * wide, *names])]
    for row, metrics in rows.items():
        values = [f"{metrics[name]['value']:.4g}" if name in metrics else "" for name in names]
        cells = [value.rjust(len(name)) for value, name in zip(values, names, strict=True)]
        lines.append("  ".join([row.ljust(wide), *cells]).rstrip())
    return lines


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

    origin = weights_of_samples(maker.stage.parents)

    # Keys are unique over all guidance scales: each begins with its scale.
    for scale in maker.config.scales:
        for number in range(len(maker.batches[key_prefix(scale)])):
            images = maker.images(key_prefix(scale), number)
            indices = range(number * size, number * size + len(images))
            labels, captions = maker.labels(indices).tolist(), maker.captions(indices)
            for index, image, label, caption in zip(indices, images, labels, captions, strict=True):
                key = f"{key_prefix(scale)}-{index:06}"
                metadata = {"seed": seed, "index": index, "guidance": scale, "steps": steps, **origin}
                yield key, image_members(key, image, label=label, caption=caption, metadata=metadata)


if __name__ == "__main__":
    main()
