"""Forecast of an experiment: what of it is done, parameters, FLOPs, bytes, memory, device-hours, end time.

    python -m pipelines.tools.plan --config pipelines/configs/demo.toml [--devices 8] [--json]

Reads: the experiment, and what of it lies under ``run.root``. Writes nothing there. For each training stage whose
inputs are finished it also trains five updates in a temporary folder, on one device: the first is saved, a second
process loads it, goes on and draws a sample. So a plan that ends well has run everything once. ``--trial false`` leaves
that out.
Exit code 0, or 2 when the experiment cannot run.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PositiveInt
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
from models.denoiser import DenoiserConfig
from pipelines import encode_latents, evaluate, prepare_corpus, train_unet, train_vae
from pipelines.model.captions import NoTextConfig, blank_features
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import experiment_path, load_config
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, RunConfig, StageConfig
from pipelines.runtime.stage.fingerprint import differing_keys, fingerprint_of, inputs_of
from pipelines.runtime.stage.progress import duration
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.flops import peak_flops
from pipelines.tools.corpus_size import promised_corpus

CONFIGS: dict[str, type[StageConfig]] = {
    "prepare_corpus": prepare_corpus.PrepareCorpusConfig,
    "train_vae": train_vae.TrainVAEConfig,
    "encode_latents": encode_latents.EncodeLatentsConfig,
    "train_unet": train_unet.TrainUNetConfig,
    "evaluate": evaluate.EvaluateConfig,
}
MAKERS = {folder: stage for stage, folder in STAGE_FOLDERS.items()}
TRIAL_UPDATES = 5
TRIAL_SECONDS = 1_800.0
FLOAT_BYTES = 4


class PlanConfig(StageConfig):
    """What to plan for."""

    devices: PositiveInt = 1  # processes that will train
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.35  # of a device's peak, where no trial measures it
    trial: bool = True  # run five updates, a save, a load and a sample of each training stage


@dataclass(kw_only=True)
class StagePlan:
    """What is known of one stage beforehand. Bytes and hours are of the whole stage, memory is of one device."""

    stage: str
    state: str  # absent, begun, done or stale
    why: list[str] = field(default_factory=list)
    parameters: int = 0
    flops_per_image: float = 0.0  # of one training step
    disk_bytes: int = 0
    memory_bytes: int = 0  # weights, gradients, moments, averages, and float32 activations of one forward pass
    images: int = 0  # trained on, counting repeats
    images_per_second: float = 0.0  # of one device
    measured: bool = False  # by a trial
    device_hours: float = 0.0
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


def stage_configs(path: str, *, root: str) -> dict[str, StageConfig]:
    """Read every stage's configuration of an experiment.

    Raises:
        ConfigError: One of them is wrong.
    """
    words = ["--config", path, "--run.root", root]
    return {stage: load_config(model, table=stage, argv=words) for stage, model in CONFIGS.items()}


def plan(config: PlanConfig, path: str) -> list[StagePlan]:
    """Plan every stage."""
    configs = stage_configs(path, root=config.run.root)
    plans: dict[str, StagePlan] = {}
    for stage, one in configs.items():
        plans[stage] = state_of(stage, one, plans)
    forecast(configs, plans, devices=config.devices)
    for stage in ("train_vae", "train_unet"):
        training, found = configs[stage], plans[stage]
        assert isinstance(training, TrainingConfig)
        found.images = training.updates * training.global_batch if found.state != "done" else 0
        if config.trial and not any(why.startswith("waits for") for why in found.why):
            found.images_per_second = try_out(stage, training, path, run=config.run, devices=config.devices)
            found.measured = True
        else:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            found.images_per_second = (
                config.utilisation * peak_flops(device, training.precision) / found.flops_per_image
            )
        found.device_hours = found.images / found.images_per_second / 3600
    return list(plans.values())


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
    if not finished and not (folder / "request.json").is_file():
        return StagePlan(stage=stage, state="absent", why=why)
    if not why:
        request = fingerprint_of(stage, config, parents)
        held = read_manifest(folder).content if finished else json.loads((folder / "request.json").read_bytes())
        why = [line for _, line in differing_keys(held, request, fingerprint_ignores=config.fingerprint_ignores)]
    return StagePlan(stage=stage, state="stale" if why else "done" if finished else "begun", why=why)


def forecast(configs: Mapping[str, StageConfig], plans: Mapping[str, StagePlan], *, devices: int) -> None:
    """Fill in parameters, FLOPs, memory and bytes: of what is there as it is, of what is not as its inputs promise."""
    corpus_config, vae_config = configs["prepare_corpus"], configs["train_vae"]
    encode_config, unet_config = configs["encode_latents"], configs["train_unet"]
    assert isinstance(corpus_config, prepare_corpus.PrepareCorpusConfig)
    assert isinstance(vae_config, train_vae.TrainVAEConfig)
    assert isinstance(encode_config, encode_latents.EncodeLatentsConfig)
    assert isinstance(unet_config, train_unet.TrainUNetConfig)
    corpus = manifest_or_none(inputs_of(vae_config)["corpus"], CorpusManifest)
    samples, known = 0, ["?"]  # of the corpus
    if corpus is not None:
        samples, known = corpus.counts.out, list(corpus.classes)
        plans["prepare_corpus"].disk_bytes = sum(entry.bytes for entry in corpus.files)
    else:
        try:
            promised = promised_corpus(corpus_config.source, corpus_config.view)
        except ValueError as error:
            plans["prepare_corpus"].notes.append(str(error))
            plans["train_unet"].notes.append("counted with one class: the corpus is not made yet")
        else:
            samples, known = promised.samples, list(promised.classes)
            plans["prepare_corpus"].disk_bytes = promised.disk_bytes
    view = corpus_config.view
    image = corpus.image if corpus else ImageShape(resolution=view.resolution, channels=view.channels)
    with torch.device("meta"):
        vae = AutoencoderKL(vae_config.network, image_channels=image.channels)
        discriminator: nn.Module | None = None
        if isinstance(vae_config.objective.adversary, PatchAdversary):
            discriminator = Discriminator(vae_config.objective.adversary.discriminator, image_channels=image.channels)
    _costs(
        plans["train_vae"],
        vae_config,
        [vae, *([discriminator] if discriminator is not None else [])],
        flops=lambda: train_vae.flops_per_image(vae, resolution=image.resolution),
        devices=devices,
    )
    latents = manifest_or_none(inputs_of(unet_config)["latents"], LatentsManifest)
    promised_shape = LatentShape(
        channels=vae_config.network.latent_channels, size=image.resolution // vae_config.network.factor
    )
    shape = latents.latent if latents else promised_shape
    num_classes = len(latents.classes if latents else known)
    with torch.device("meta"):
        denoiser = train_unet.build_denoiser(unet_config, shape, num_classes=num_classes)
    _costs(
        plans["train_unet"],
        unet_config,
        [denoiser],
        flops=lambda: train_unet.flops_per_image(denoiser, _one_draw(shape, unet_config.denoiser)),
        devices=devices,
    )
    numbers = 2 * promised_shape.channels * promised_shape.size**2 * (2 if encode_config.flipped else 1)
    if not isinstance(encode_config.captions, NoTextConfig):
        # Of the encoder that the U-Net expects: to ask the encoder itself would mean to load it.
        numbers += sum(field.numel() for field in blank_features(unet_config.denoiser).values())
    width = {"float16": 2, "float32": 4}[encode_config.dtype]
    # A tar member costs a header and is padded to 512 bytes; each sample has its class beside the arrays.
    plans["encode_latents"].disk_bytes = samples * (numbers * width + 4 * 1024)
    evaluation = configs["evaluate"]
    assert isinstance(evaluation, evaluate.EvaluateConfig)
    drawn = len(evaluation.scales) * evaluation.num_samples
    plans["evaluate"].disk_bytes = drawn * (image.resolution**2 * image.channels + 4 * 1024)


def manifest_or_none(folder: str, kind: type[AnyManifest]) -> AnyManifest | None:
    """Read a manifest of a kind that may not be there."""
    try:
        found = read_manifest(folder)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None


def _one_draw(shape: LatentShape, denoiser: DenoiserConfig) -> train_unet.LatentDraw:
    x0 = torch.zeros(1, shape.channels, shape.size, shape.size)
    return train_unet.LatentDraw(
        x0=x0,
        noise=x0,
        times=torch.full((1,), 0.5),
        conditions={"labels": torch.zeros(1, dtype=torch.int64), **blank_features(denoiser)},
        dropped=torch.zeros(1, len(denoiser.conditioners), dtype=torch.bool),
    )


def _costs(plan: StagePlan, config: TrainingConfig, networks: list[nn.Module], *, flops: Any, devices: int) -> None:
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no storage has another's number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        plan.flops_per_image = flops()
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    plan.parameters = sum(counts)
    activations = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) - FLOAT_BYTES * counts[0]
    num_averages = len(config.averages)
    checkpoint = FLOAT_BYTES * (3 * plan.parameters + num_averages * counts[0])
    # One more than stay is there while the newest is written, and the published weights come on top.
    best = int(config.checkpoint.best.kind != "none")
    plan.disk_bytes = checkpoint * (config.checkpoint.keep_last + 1 + best) + FLOAT_BYTES * counts[0]
    share = config.images_per_device or -(-config.global_batch // devices)
    plan.memory_bytes = checkpoint + FLOAT_BYTES * plan.parameters + max(0, activations) * share


def try_out(stage: str, config: TrainingConfig, path: str, *, run: RunConfig, devices: int) -> float:
    """Train five updates of a stage on one device, in two processes with a checkpoint between; return images/s.

    Raises:
        ConfigError: It did not end well; holds what it said.
    """
    share = max(config.global_batch // devices, config.images_per_device, 1)
    share -= share % (config.images_per_device or 1)
    inputs = [word for name, folder in inputs_of(config).items() for word in (f"--inputs.{name}", folder)]
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
            done = subprocess.run(
                words, env=_one_process(), capture_output=True, text=True, timeout=TRIAL_SECONDS, check=False
            )
            if done.returncode != expected:
                last = "\n    ".join(done.stderr.strip().splitlines()[-8:])
                raise ConfigError(f"{stage} failed in its trial with exit code {done.returncode}:\n    {last}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = {line["update"]: line["perf/images_per_s"] for line in lines if "perf/images_per_s" in line}
    return float(speeds[TRIAL_UPDATES - 1])  # the first ones warm up, the last draws a sample


def _one_process() -> dict[str, str]:
    """The environment without what a launcher may have set: the trial runs alone."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), kept.get("PYTHONPATH")]))}


def as_text(plan: StagePlan) -> str:
    """Return a stage's plan for people."""
    lines = [f"{plan.stage}: {plan.state}", *(f"    {why}" for why in plan.why), *(f"    {n}" for n in plan.notes)]
    if plan.parameters:
        how = "measured" if plan.measured else "estimated"
        lines += [
            f"    {plan.parameters / 1e6:.2f} M parameters, {plan.flops_per_image / 1e9:.3g} GFLOP an image and step",
            f"    {plan.memory_bytes / 2**30:.2f} GiB on a device",
            f"    {plan.images:,} images at {plan.images_per_second:.4g}/s a device ({how}): "
            f"{plan.device_hours:.3g} device-hours",
        ]
    if plan.disk_bytes:
        lines.append(f"    {plan.disk_bytes / 2**30:.3f} GiB on the disk")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
