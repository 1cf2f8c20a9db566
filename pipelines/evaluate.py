"""From a U-Net and its VAE to DDIM samples, grids, and metrics over a sweep of guidance scales.

    accelerate launch -m pipelines.evaluate --config pipelines/configs/demo.toml

Reads: ``runs/NAME/corpus/`` (reference images), ``runs/NAME/vae/``, ``runs/NAME/unet/``. Writes:
``runs/NAME/evaluation/`` with ``metrics.json``, ``samples.png``, ``guidance.png``, ``sweep.png`` and sample shards.

Sample i has class i mod K, or with a text condition the caption of a validation image, and noise (seed, i); batches
have a fixed size and are composed by sample index; ranks take whole batches. So the number of processes changes neither
an image nor a figure.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt
from torch import Tensor

from data.files import write_atomically, write_json
from data.manifest import EvaluationManifest, FileEntry, Parents, digest_of
from data.samples import Split, image_members
from data.shards.writer import ShardWriter
from pipelines.evaluation.likelihood import TERMS, bound_metrics, check_bound
from pipelines.evaluation.metrics import Reference, distribution_metrics, fidelity_metrics, sweep_plot
from pipelines.evaluation.samples import DrawConfig, PartMaker, Plan, key_prefix
from pipelines.model.grids import grid_png
from pipelines.model.weights import check_same_vae, check_sampler_suits, denoiser_config
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.stage.progress import progress_line
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.stage.work_items import make_items

GRID_ROWS = 8
MAX_GRID_COLUMNS = 12


class EvaluateConfig(DrawConfig):
    """How samples are drawn, judged and stored."""

    fingerprint_ignores = frozenset({"name"})

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""  # NAME writes evaluation-NAME/; empty evaluation/
    samples_per_shard: PositiveInt = 1_000  # samples of one tar


def main() -> None:
    config = config_from_command_line(EvaluateConfig, table="evaluate", about=__doc__)
    with running_stage(
        config,
        name="evaluate",
        precision=config.precision,
        check=lambda parents: check_request(config, parents),
        folder_name=f"evaluation-{config.name}" if config.name else None,
    ) as stage:
        evaluate(config, stage)


def check_request(config: EvaluateConfig, parents: Parents) -> None:
    """Refuse what cannot be compared, before any work.

    Raises:
        ConfigError: Another VAE than the U-Net's, other classes, or no validation images.
    """
    with config_error_at("inputs.vae"):
        check_same_vae(
            parents.unet.vae,
            given=parents.vae,
            given_at=config.inputs.vae,
            user=f"inputs.unet = {config.inputs.unet!r}",
        )
    with config_error_at("evaluate.sampler"):
        check_sampler_suits(config.sampler, denoiser_config(config.inputs.unet))
    with config_error_at("evaluate.likelihood"):
        check_bound(config.likelihood, denoiser_config(config.inputs.unet))
    corpus, unet = parents.corpus, parents.unet
    if corpus.classes != unet.classes:
        raise ConfigError(
            f"inputs.corpus has the classes {list(corpus.classes)}, inputs.unet was trained on {list(unet.classes)}. "
            "Point inputs.corpus at the corpus of the training, or at one with its classes in its order."
        )
    if not corpus.splits["val"]:
        raise ConfigError("inputs.corpus has no validation images to compare with. Prepare it with a validation split.")


def evaluate(config: EvaluateConfig, stage: Stage) -> None:
    """Draw every sample that is missing, then judge them all."""
    maker = PartMaker(config, stage)
    parts = maker.plan()
    with progress_line("evaluate", total=len(parts.own), unit="batches", is_main=stage.is_main) as line:
        make_items(stage, parts.reference, maker.make_reference, folder=maker.reference_folder)
        make_items(
            stage,
            parts.own,
            maker.make_own,
            after_each=lambda done, _, __: line.advance_to(done),
        )
    if stage.is_main:
        judge(config, stage, maker, parts)
    stage.finish(
        EvaluationManifest,
        files=[
            FileEntry.of(path, samples=samples_in(config, path))
            for path in [
                *sorted(stage.folder.glob("samples-*.tar")),
                *(stage.folder / name for name in ("metrics.json", "samples.png", "guidance.png", "sweep.png")),
            ]
        ]
        if stage.is_main
        else [],
        weights=stage.parents.unet.weights,
        vae=stage.parents.vae.weights,
        counts={"in": len(config.scales) * config.num_samples, "out": len(config.scales) * config.num_samples},
        classes=stage.parents.unet.classes,
        value_range=(0, 255),
    )


def judge(config: EvaluateConfig, stage: Stage, maker: PartMaker, parts: Plan) -> None:
    """Compute all metrics, draw all pictures, store all samples; on the main process."""
    folder, classes = stage.folder, stage.parents.unet.classes

    def real(split: Split) -> tuple[Tensor, Tensor]:
        names = [name for name in parts.reference if name.startswith(split)]
        features = maker.read(names, "features", folder=maker.reference_folder)
        return features, maker.read(names, "labels", folder=maker.reference_folder)

    reference = Reference.of(train=real("train"), validation=real("val"), num_classes=len(classes))
    labels = maker.labels(range(config.num_samples))
    by_scale = {
        scale: distribution_metrics(maker.read(names, "features"), labels, reference)
        for scale, names in parts.samples.items()
    }
    floor = distribution_metrics(maker.read(parts.reconstructions, "features"), reference.labels, reference)
    vae = fidelity_metrics(*(maker.read(parts.reconstructions, name) for name in ("psnr", "ssim")))
    likelihood = bound_metrics({name: maker.read(parts.bounds, name) for name in TERMS}) if parts.bounds else {}
    contract = contract_of(config, stage, maker, reference)
    write_json(
        folder / "metrics.json",
        {
            "contract": contract,
            "floor": floor,
            "vae": vae,
            **({"likelihood": likelihood} if likelihood else {}),
            "sweep": [{"guidance": scale, **by_scale[scale]} for scale in sorted(by_scale)],
            "default_guidance": config.guidance.scale,
        },
    )
    draw_pictures(config, stage, maker, parts, by_scale, floor)
    store_samples(config, stage, maker, parts)

    flat = {f"eval/{name}": metric["value"] for name, metric in by_scale[config.guidance.scale].items()}
    flat |= {f"eval/floor/{name}": metric["value"] for name, metric in floor.items()}
    flat |= {f"eval/vae/{name}": metric["value"] for name, metric in vae.items()}
    flat |= {f"eval/likelihood/{name}": metric["value"] for name, metric in likelihood.items()}
    stage.tracker.log_metrics(flat, step=0)
    for scale, metrics in by_scale.items():
        sweep = {f"eval/sweep/{name}": metric["value"] for name, metric in metrics.items()}
        stage.tracker.log_metrics(sweep, step=round(100 * scale))
    stage.tracker.set_tags({"digest.evaluation_contract": digest_of(contract)})
    for name in ("metrics.json", "sweep.png"):
        stage.tracker.log_artifact(folder / name)
    shown = {**by_scale[config.guidance.scale], **vae, **likelihood}
    stage.log.info(", ".join(f"{name} {metric['value']:.4g}" for name, metric in shown.items()))
    stage.log.info(f"{folder / 'samples.png'}, {folder / 'metrics.json'}")


def contract_of(config: EvaluateConfig, stage: Stage, maker: PartMaker, reference: Reference) -> dict[str, Any]:
    """Return everything two evaluations must share for their metrics to be comparable."""
    corpus, extractor = stage.parents.corpus, maker.extractor
    return {
        "num_samples": config.num_samples,
        "seed": config.seed,
        "sampler": config.sampler.model_dump(mode="json"),
        "guidance": config.guidance.model_dump(mode="json", exclude={"scale"}),
        "precision": config.precision,
        "likelihood": config.likelihood.model_dump(mode="json"),
        "extractor": {
            "name": extractor.name,
            "weights_sha256": extractor.weights_sha256,
            "dimension": extractor.dimension,
            "resolution": extractor.resolution,
        },
        "image": corpus.image.model_dump(),
        "conditions": "validation captions" if maker.prompts is not None else "classes in turn",
        "reference": {"digest": corpus.digest, "split": "val", "num_images": len(reference.features)},
        "probe": reference.probe_contract(),
    }


def draw_pictures(
    config: EvaluateConfig,
    stage: Stage,
    maker: PartMaker,
    parts: Plan,
    by_scale: Mapping[float, Mapping[str, Any]],
    floor: Mapping[str, Any],
) -> None:
    """Draw the sample grid, the same samples at every guidance, and the metrics over guidance."""
    folder, classes, default = stage.folder, stage.parents.unet.classes, config.guidance.scale
    in_turn = classes if maker.prompts is None else ()
    columns = min(len(in_turn), MAX_GRID_COLUMNS) if in_turn else min(10, config.num_samples)
    stride = len(in_turn) or columns
    heads = in_turn[:columns] if maker.prompts is None else maker.captions(range(columns))
    rows = max(1, min(GRID_ROWS, config.num_samples // stride))
    needed = -(-rows * stride // config.batch_size)

    def grid(scale: float, num_rows: int) -> np.ndarray:
        images = maker.read(parts.samples[scale][:needed], "images").numpy()
        places = [[row * stride + column for column in range(columns)] for row in range(num_rows)]
        return images[np.array(places) % len(images)]

    steps = config.sampler.num_steps
    title = f"guidance {default:g}, {config.sampler.kind} with {steps} steps, seed {config.seed}"
    write_atomically(
        folder / "samples.png", grid_png(grid(default, rows), column_labels=in_turn[:columns], title=title)
    )
    scales = sorted(by_scale)
    across = np.concatenate([grid(scale, 1) for scale in scales])
    labels = [f"guidance {scale:g}" for scale in scales]
    write_atomically(folder / "guidance.png", grid_png(across, column_labels=heads, row_labels=labels))
    write_atomically(folder / "sweep.png", sweep_plot(by_scale, floor))
    stage.tracker.log_image("eval/samples", folder / "samples.png", step=0)
    stage.tracker.log_image("eval/guidance", folder / "guidance.png", step=0)


def samples_in(config: EvaluateConfig, path: Path) -> int:
    """Return how many samples a file of the evaluation holds."""
    if path.suffix != ".tar":
        return 0
    first = int(path.stem.removeprefix("samples-")) * config.samples_per_shard
    return min(config.samples_per_shard, len(config.scales) * config.num_samples - first)


def store_samples(config: EvaluateConfig, stage: Stage, maker: PartMaker, parts: Plan) -> None:
    """Write all samples into tars, those of the default guidance first; one batch in memory at a time."""
    batches = [(scale, name) for scale, names in parts.samples.items() for name in names]
    pending: list[tuple[str, dict[str, bytes]]] = []
    number = 0

    def write(count: int) -> None:
        nonlocal number
        with ShardWriter(stage.folder / f"samples-{number:06}.tar") as writer:
            for key, members in pending[:count]:
                writer.add(key, members)
        del pending[:count]
        number += 1

    for scale, name in batches:
        images = maker.read([name], "images").numpy()
        first = int(name.rsplit("-", 1)[1]) * config.batch_size
        indices = range(first, first + len(images))
        labels, captions = maker.labels(indices).tolist(), maker.captions(indices)
        for offset, (image, label, caption) in enumerate(zip(images, labels, captions, strict=True)):
            key = f"{key_prefix(scale)}-{first + offset:06}"
            metadata = {
                "seed": config.seed,
                "index": first + offset,
                "guidance": scale,
                "steps": config.sampler.num_steps,
            }
            pending.append((key, image_members(key, image, label=label, caption=caption, metadata=metadata)))
        while len(pending) >= config.samples_per_shard:
            write(config.samples_per_shard)
    if pending:
        write(len(pending))


if __name__ == "__main__":
    main()
