"""Forecast of an experiment: what of it is done, parameters, FLOPs, bytes, memory, device-hours, end time.

    python -m pipelines.tools.plan --config pipelines/configs/demo.toml [--devices 8] [--memory_gb 80] [--json]

Reads: the experiment, and what of it lies under ``run.root``. Writes nothing there. For devices of a given memory it
chooses micro-batch, sharding and checkpointed levels of each training. For each training stage whose inputs are
finished it also trains five updates in a temporary folder, on one device: the first is saved, a second process loads
it, goes on and draws a sample. So a plan that ends well has run everything once. ``--trial false`` leaves that out.
Exit code 0, or 2 when the experiment cannot run.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, get_type_hints

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from data.manifest import (
    MANIFEST_NAME,
    AnyManifest,
    CorpusManifest,
    ImageShape,
    LatentShape,
    LatentsManifest,
    Parents,
    read_input,
    read_manifest,
)
from models.autoencoder.discriminator import Discriminator
from models.autoencoder.objective import PatchAdversary
from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser
from pipelines import encode_latents, evaluate, prepare_corpus, train_unet, train_vae
from pipelines.model.captions import NoTextConfig, blank_features
from pipelines.model.experiment import CorpusFacts, misfits
from pipelines.model.weights import vae_config_of
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.experiment import experiment_path, load_config
from pipelines.runtime.config.stage_config import INPUT_FOLDERS, STAGE_FOLDERS, RunConfig, StageConfig
from pipelines.runtime.stage.fingerprint import begun_with, differing_keys, fingerprint_of, inputs_of, keys_at_default
from pipelines.runtime.stage.progress import duration
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.flops import peak_flops
from pipelines.runtime.training.memory import FLOAT_BYTES, HEADROOM, Sketch, device_memory, gib

MAKERS = {folder: stage for stage, folder in STAGE_FOLDERS.items()}
TRIAL_UPDATES = 5
TRIAL_SECONDS = 1_800.0
# At most four tar members a sample (array, class, caption and origin), each with a header and padded to 512 bytes.
BYTES_BESIDE_THE_ARRAYS = 4 * 1024


class StageConfigs(NamedTuple):
    """The configurations of an experiment's stages, in their order."""

    prepare_corpus: prepare_corpus.PrepareCorpusConfig
    train_vae: train_vae.TrainVAEConfig
    encode_latents: encode_latents.EncodeLatentsConfig
    train_unet: train_unet.TrainUNetConfig
    evaluate: evaluate.EvaluateConfig


class PlanConfig(StageConfig):
    """Devices to plan for, and the source of their speed."""

    devices: PositiveInt = 1  # processes that will train
    memory_gb: NonNegativeFloat = 0.0  # of a device, times 2^30 bytes; 0 is that of the GPU here, if there is one
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.35  # of a device's peak, where no trial measures it
    trial: bool = True  # run five updates, a save, a load and a sample of each training stage


@dataclass(kw_only=True)
class StagePlan:
    """Forecast of one stage. Bytes and hours are of the whole stage, memory is of one device."""

    stage: str
    state: str  # absent, begun, done, stale or not needed
    why: list[str] = field(default_factory=list)
    parameters: int = 0
    flops_per_image: float = 0.0  # of one training step
    disk_bytes: int = 0
    memory_bytes: int = 0  # at its peak, with the present settings
    averages_bytes: int = 0  # of it
    device_bytes: int = 0  # that there are; 0 if it is not known
    settings: dict[str, int] = field(default_factory=dict)  # and their peaks, cheapest first; the last may fit
    images: int = 0  # trained on, counting repeats
    images_per_second: float = 0.0  # of one device
    measured: bool = False  # by a trial
    guide_images: float = 0.0  # as many take as long as the training of the guide that is to come
    device_hours: float = 0.0  # with it
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(
        PlanConfig, lambda config: whole_plan(config, experiment_path(argv)), table="plan", about=__doc__, argv=argv
    )


def whole_plan(config: PlanConfig, path: str) -> Answer:
    """Plan every stage, and tell when the training ends."""
    plans = plan(config, path)
    hours = sum(one.device_hours for one in plans) / config.devices
    ends = time.time() + 3600 * hours
    last = (
        f"training: {duration(3600 * hours)} on {config.devices} device(s), until "
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(ends))} if it begins now"
    )
    found = {"stages": [asdict(one) for one in plans], "hours": hours, "ends": ends, "devices": config.devices}
    return Answer(found, "\n".join([*map(as_text, plans), last]))


def stage_configs(path: str, *, root: str) -> StageConfigs:
    """Read every stage's configuration of an experiment.

    Raises:
        ConfigError: One of them is wrong.
    """
    words = ["--config", path, "--run.root", root]
    models = get_type_hints(StageConfigs)
    encoding = load_config(encode_latents.EncodeLatentsConfig, table="encode_latents", argv=words)
    # Where a VAE is given, none is trained, and its table may be missing.
    unused = {"train_vae": ["--updates", "1", "--global_batch", "1"]} if vae_is_given(encoding) else {}
    return StageConfigs(
        **{name: load_config(model, table=name, argv=words + unused.get(name, [])) for name, model in models.items()}
    )


def vae_is_given(encoding: encode_latents.EncodeLatentsConfig) -> bool:
    """Return whether latents are made by a VAE of another place, so that none is trained here."""
    return Path(inputs_of(encoding)["vae"]) != Path(encoding.run.root) / STAGE_FOLDERS["train_vae"]


def trainings_of(configs: StageConfigs) -> dict[str, TrainingConfig]:
    """Return the trainings that are needed, by stage."""
    found = {"train_vae": configs.train_vae, "train_unet": configs.train_unet}
    return {"train_unet": configs.train_unet} if vae_is_given(configs.encode_latents) else found


def plan(config: PlanConfig, path: str) -> list[StagePlan]:
    """Plan every stage."""
    configs = stage_configs(path, root=config.run.root)
    if wrong := list(misfits(configs._asdict(), facts_of(configs))):
        raise ConfigError("the experiment cannot run:\n    " + "\n    ".join(wrong))
    plans: dict[str, StagePlan] = {}
    for stage, one in configs._asdict().items():
        plans[stage] = state_of(stage, one, plans)
    sketches = forecast(configs, plans, guide_of(configs.train_unet, path))
    memory = round(2**30 * config.memory_gb) or device_memory()
    for stage, training in trainings_of(configs).items():
        found = plans[stage]
        found.images = training.updates * training.global_batch if found.state != "done" else 0
        add_memory(found, sketches[stage], devices=config.devices, memory=memory)
        too_large = found.memory_bytes > (device_memory() or math.inf)
        if config.trial and not too_large and not any(why.startswith("waits for") for why in found.why):
            found.images_per_second = try_out(stage, training, path, run=config.run, devices=config.devices)
            found.measured = True
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            found.images_per_second = (
                config.utilisation * peak_flops(device, training.precision, tf32=training.tf32) / found.flops_per_image
            )
        found.device_hours = (found.images + found.guide_images) / found.images_per_second / 3600
    return list(plans.values())


def guide_of(unet: train_unet.TrainUNetConfig, path: str) -> train_unet.TrainUNetConfig | None:
    """Return the training of the U-Net that the file has under ``train_unet.named.guide``, if it has one."""
    words = ["--config", path, "--run.root", unet.run.root, "--name", "guide"]
    guide = load_config(train_unet.TrainUNetConfig, table="train_unet", argv=words)
    return None if guide.model_copy(update={"name": unet.name}) == unet else guide


def state_of(stage: str, config: StageConfig, before: Mapping[str, StagePlan]) -> StagePlan:
    """Say how far a stage is, and why what it holds may no longer be what is asked for."""
    folder = Path(config.run.root) / STAGE_FOLDERS[stage]
    parents = Parents()
    why = []
    for name, place in inputs_of(config).items():
        try:
            parents[name] = read_input(name, place)
        except (OSError, ValueError):
            why.append(f"waits for {place}")
        maker = before.get(MAKERS.get(name, ""))
        if maker is not None and maker.state == "stale" and Path(place) == Path(config.run.root) / name:
            why.append(f"its input {name} is stale")
    finished = (folder / MANIFEST_NAME).is_file()
    begun = None if finished else begun_with(folder, stage)
    if not finished and begun is None:
        return StagePlan(stage=stage, state="absent", why=why)
    if not why:
        request = fingerprint_of(stage, config, parents)
        with config_error_at(str(folder)):
            held = begun or read_manifest(folder).content
        revisions = None if finished else config.revisions
        found = differing_keys(
            held,
            request,
            fingerprint_ignores=config.fingerprint_ignores,
            at_default=keys_at_default(config),
            revisions=revisions,
        )
        why = [line for _, line in found]
    return StagePlan(stage=stage, state="stale" if why else "done" if finished else "begun", why=why)


def forecast(
    configs: StageConfigs, plans: Mapping[str, StagePlan], guide: train_unet.TrainUNetConfig | None = None
) -> dict[str, Sketch]:
    """Fill in parameters, FLOPs and bytes: of what is there as it is, of what is not as its inputs promise.

    Returns:
        The networks of the trainings, by which their memory is known.
    """
    vae_config, unet_config = configs.train_vae, configs.train_unet
    encoding, evaluation = configs.encode_latents, configs.evaluate
    view = configs.prepare_corpus.view

    # The corpus that is there, else as its source promises it.
    corpus = manifest_or_none(inputs_of(vae_config)["corpus"], CorpusManifest)
    size = CorpusSize(samples=0, classes=("?",), disk_bytes=0)
    try:
        size = corpus_size(configs.prepare_corpus, corpus)
    except ValueError as error:
        plans["prepare_corpus"].notes.append(str(error))
        plans["train_unet"].notes.append("counted with one class: the corpus is not made yet")
    plans["prepare_corpus"].disk_bytes = size.disk_bytes
    image = corpus.image if corpus else ImageShape(resolution=view.resolution, channels=view.channels)

    # The networks.
    sketches, network = {"train_vae": vae_sketch(vae_config, image)}, vae_config.network
    if vae_is_given(encoding):
        place, parents = inputs_of(encoding)["vae"], Parents()
        plans["train_vae"].state, plans["train_vae"].why = f"not needed, {place} is given", []
        del sketches["train_vae"]
        with suppress(OSError, ValueError):  # it is not there yet: counted as one by default
            parents["vae"] = read_input("vae", place)
            network = vae_config_of(place, parents.vae)
    promised_shape = LatentShape(channels=network.latent_channels, size=image.resolution // network.factor)
    latents = manifest_or_none(inputs_of(unet_config)["latents"], LatentsManifest)
    shape = latents.latent if latents else promised_shape
    num_classes = len(latents.classes if latents else size.classes)
    sketches["train_unet"] = unet_sketch(unet_config, shape, num_classes=num_classes)
    for stage, sketch in sketches.items():
        add_costs(plans[stage], sketch)
    if guide is not None:
        weaker, found = unet_sketch(guide, shape, num_classes=num_classes), plans["train_unet"]
        add_costs(costs := StagePlan(stage="train_unet", state="absent"), weaker)
        found.disk_bytes += costs.disk_bytes
        if not (Path(guide.run.root) / INPUT_FOLDERS["guide"] / MANIFEST_NAME).is_file():
            found.guide_images = guide.updates * guide.global_batch * costs.flops_per_image / found.flops_per_image
            share = found.guide_images / (unet_config.updates * unet_config.global_batch)
            found.notes.append(f"its guide, train_unet --name guide, takes {share:.0%} more")

    # Bytes of the stages that only write samples.
    numbers = 2 * promised_shape.channels * promised_shape.size**2 * (2 if encoding.flipped else 1)
    if not isinstance(encoding.captions, NoTextConfig):
        # Of the encoder that the U-Net expects: to ask the encoder itself would mean to load it.
        numbers += sum(field.numel() for field in blank_features(unet_config.denoiser).values())
    width = {"float16": 2, "float32": 4}[encoding.dtype]
    plans["encode_latents"].disk_bytes = size.samples * (numbers * width + BYTES_BESIDE_THE_ARRAYS)
    drawn = len(evaluation.scales) * evaluation.num_samples
    plans["evaluate"].disk_bytes = drawn * (image.resolution**2 * image.channels + BYTES_BESIDE_THE_ARRAYS)
    return sketches


def facts_of(configs: StageConfigs) -> CorpusFacts:
    """Return what is known of the corpus: of the one that is there, else as its source promises it."""
    corpus = manifest_or_none(inputs_of(configs.train_vae)["corpus"], CorpusManifest)
    if corpus is not None:
        return CorpusFacts.of(corpus)
    source = None
    if configs.prepare_corpus.source.kind in prepare_corpus.LISTED_AT_ONCE:
        with suppress(OSError, ValueError):  # which the forecast notes
            source = configs.prepare_corpus.source.open()
    return prepare_corpus.corpus_facts(configs.prepare_corpus, source)


class CorpusSize(NamedTuple):
    """Size of a corpus."""

    samples: int
    classes: Sequence[str]
    disk_bytes: int  # at most, for one that is not made yet: as if no picture could be compressed


def corpus_size(config: prepare_corpus.PrepareCorpusConfig, corpus: CorpusManifest | None = None) -> CorpusSize:
    """Return the size of the corpus that is there, else of the one that the source promises.

    Raises:
        ValueError: The size is known only after reading the shards, or the source cannot be opened.
    """
    if corpus is not None:
        return CorpusSize(
            corpus.counts.out, corpus.classes, sum(entry.bytes for entry in corpus.files if not entry.url)
        )
    if config.source.kind not in prepare_corpus.LISTED_AT_ONCE:
        raise ValueError("not counted: what the shards hold is known when prepare_corpus has read them")
    try:
        source = config.source.open()
    except OSError as error:
        raise ValueError(f"its source cannot be opened: {error}") from None
    samples = source.count("train") + source.count("val")
    picture = config.view.resolution**2 * config.view.channels
    return CorpusSize(samples, source.classes, samples * (picture + BYTES_BESIDE_THE_ARRAYS))


def manifest_or_none(folder: str, kind: type[AnyManifest]) -> AnyManifest | None:
    """Read a manifest of a kind that may not be there."""
    try:
        found = read_manifest(folder)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None


def vae_sketch(config: train_vae.TrainVAEConfig, image: ImageShape) -> Sketch:
    """Return the networks of a VAE's training, without a perceptual one."""
    present, adversary = config.network, config.objective.adversary

    def build(levels: tuple[int, ...]) -> nn.ModuleList:
        network = present.model_copy(update={"checkpointed": bool(levels)})
        vae = AutoencoderKL(network, image_channels=image.channels)
        vae.encoder.requires_grad_(not config.freeze_encoder)
        vae.quant_conv.requires_grad_(not config.freeze_encoder)
        networks = nn.ModuleList([vae])
        if isinstance(adversary, PatchAdversary):
            networks.append(Discriminator(adversary.discriminator, image_channels=image.channels))
        return networks

    def run(networks: nn.ModuleList, images: int) -> Tensor:
        side = image.resolution // present.factor
        noise = torch.zeros(images, present.latent_channels, side, side)
        found, _ = networks[0](torch.zeros(images, image.channels, image.resolution, image.resolution), noise)
        return sum([network(found).sum() for network in networks[1:]], start=found.sum())

    return Sketch(config, build, run, checkpointed=("network.checkpointed", (0,) * present.checkpointed, 1))


def unet_sketch(config: train_unet.TrainUNetConfig, shape: LatentShape, *, num_classes: int) -> Sketch:
    """Return the network of a denoiser's training."""
    denoiser, present = config.denoiser, config.denoiser.network

    def build(levels: tuple[int, ...]) -> nn.ModuleList:
        network = present.model_copy(update={"checkpointed_levels": levels})
        changed = config.model_copy(update={"denoiser": denoiser.model_copy(update={"network": network})})
        return nn.ModuleList([train_unet.build_denoiser(changed, shape, num_classes=num_classes)])

    def run(networks: nn.ModuleList, images: int) -> Tensor:
        [network] = networks
        assert isinstance(network, Denoiser)
        features = {name: field.expand(images, *field.shape[1:]) for name, field in blank_features(denoiser).items()}
        conditions = {"labels": torch.zeros(images, dtype=torch.int64), **features}
        dropped = torch.zeros(images, len(denoiser.conditioners), dtype=torch.bool)
        x0 = torch.zeros(images, shape.channels, shape.size, shape.size)
        return network.output(x0, torch.full((images,), 0.5), conditions, dropped).sum()

    key = "denoiser.network.checkpointed_levels"
    return Sketch(config, build, run, checkpointed=(key, present.checkpointed_levels, len(present.channels)))


def add_costs(plan: StagePlan, sketch: Sketch) -> None:
    """Fill in the costs of a training but its memory."""
    plan.flops_per_image, plan.parameters = sketch.flops(sketch.levels), sketch.weights // FLOAT_BYTES
    # One more than stay is there while the newest is written, and the published weights come on top.
    kept = sketch.config.checkpoint.keep_last + 1 + int(sketch.config.checkpoint.best.kind != "none")
    checkpoint = sketch.weights + sketch.optimizer(1) + sketch.averages
    plan.disk_bytes = kept * checkpoint + sketch.averages // len(sketch.config.averages)


def add_memory(plan: StagePlan, sketch: Sketch, *, devices: int, memory: int) -> None:
    """Fill in the memory of a training, and the settings for devices of ``memory`` bytes, where that is not 0."""
    plan.memory_bytes = sketch.peak(sketch.present(devices=devices), devices=devices)
    plan.averages_bytes, plan.device_bytes = sketch.averages, memory
    if plan.memory_bytes > memory > 0:
        plan.notes.append(f"warning: it needs {gib(plan.memory_bytes)} on a device, which has {gib(memory)}")
    if sketch.config.global_batch % devices:
        plan.notes.append(f"global_batch = {sketch.config.global_batch} does not split over {devices} devices")
    elif memory:
        found = sketch.choose(devices=devices, limit=(1 - HEADROOM) * memory)
        plan.settings = {sketch.options(settings): peak for settings, peak in found.items()}


def try_out(stage: str, config: TrainingConfig, path: str, *, run: RunConfig, devices: int) -> float:
    """Train five updates of a stage on one device, in two processes with a checkpoint between; return images/s.

    Raises:
        ConfigError: It did not end well; holds what it said.
    """
    share = max(config.global_batch // devices, config.images_per_device, 1)
    share -= share % (config.images_per_device or 1)
    inputs = [word for name, folder in inputs_of(config).items() for word in (f"--inputs.{name}", folder)]
    # The trial runs alone: without the variables that a launcher may have set.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    with tempfile.TemporaryDirectory(prefix="plan-") as root:
        folder = Path(root) / STAGE_FOLDERS[stage]
        folder.mkdir()
        (folder / "stop").touch()  # the first process commits its first update and ends
        words = [
            *(sys.executable, "-m", f"pipelines.{stage}", "--config", path, "--run.root", root, *inputs),
            *("--run.tracking_uri", "offline", "--run.num_processes", "1", "--run.threads", str(run.threads)),
            *("--run.deterministic", str(run.deterministic).lower(), "--run.attention", run.attention),
            *("--updates", str(TRIAL_UPDATES)),
            *("--global_batch", str(share), "--log_every", "1", "--validate_every", "1000000"),
        ]
        for expected in (75, 0):
            try:
                done = subprocess.run(
                    words, env=environment, capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
                )
            except subprocess.TimeoutExpired:
                raise ConfigError(
                    f"{stage}: its trial did not end within {TRIAL_SECONDS:g} s. Plan without it: --trial false."
                ) from None
            if done.returncode != expected:
                last = "\n    ".join(done.stderr.strip().splitlines()[-8:])
                raise ConfigError(f"{stage} failed in its trial with exit code {done.returncode}:\n    {last}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = {line["update"]: line["perf/images_per_s"] for line in lines if "perf/images_per_s" in line}
    return float(speeds[TRIAL_UPDATES - 1])  # the first ones warm up, the last draws a sample


def memory_lines(plan: StagePlan) -> Iterator[str]:
    """Yield the cheapest settings that fit the device, and the next cheaper ones, which do not."""
    limit = (1 - HEADROOM) * plan.device_bytes
    for options, peak in [*plan.settings.items()][-4:]:
        yield f"    {'fits' if peak <= limit else 'too large'}: {options} ({gib(peak)} of {gib(limit)})"
    if min(plan.settings.values(), default=0) > limit:
        yield "    nothing fits: take more or larger devices, or a smaller network"


def as_text(plan: StagePlan) -> str:
    """Return a stage's plan for people."""
    lines = [f"{plan.stage}: {plan.state}", *(f"    {why}" for why in plan.why), *(f"    {n}" for n in plan.notes)]
    if plan.parameters:
        how = "measured" if plan.measured else "estimated"
        lines += [
            f"    {plan.parameters / 1e6:.2f} M parameters, {plan.flops_per_image / 1e9:.3g} GFLOP an image and step",
            f"    {gib(plan.memory_bytes)} on a device, of which averages {gib(plan.averages_bytes)}",
            *memory_lines(plan),
            f"    {plan.images:,} images at {plan.images_per_second:.4g}/s a device ({how}): "
            f"{plan.device_hours:.3g} device-hours",
        ]
    if plan.disk_bytes:
        lines.append(f"    {plan.disk_bytes / 2**30:.3f} GiB on the disk")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
