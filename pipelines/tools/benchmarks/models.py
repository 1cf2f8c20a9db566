"""Training, encoding and sampling: our stages, the bare network in a plain loop, and diffusers with the same weights.

A training runs as it is, with its data, guards, records and their sender, in a thread that makes some updates at a
time. All sides are checked to compute the same before they are timed.

The plain loop has the stage's optimizer, clipping, learning rate and average, and batches in memory with all that is
drawn for them; so what the stage costs beside the network is reading and drawing these, guards, records and their
sender. The start of the sender, seconds of a run, is left out. All share a process, and with it the allocator that the
stage sets up.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import webdataset
from torch import Tensor, nn

from data.loading import ImageShards
from data.transforms import to_unit_range
from models.diffusion.guidance import GuidanceConfig
from models.diffusion.samplers import DDIMConfig
from models.latent_diffusion import LatentDiffusion, Normalisation
from pipelines import train_unet, train_vae
from pipelines.encode_latents import SHARDS_AT_ONCE, EncodeLatentsConfig, encode_shard
from pipelines.evaluate import EvaluateConfig
from pipelines.model.captions import CaptionFeatures, blank_features
from pipelines.model.decoded import finite_levels
from pipelines.model.device import Device
from pipelines.model.noise import noise_of
from pipelines.runtime.stage.launch import json_from_main, set_float32, start_accelerator
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.stage.work_items import make_items
from pipelines.runtime.tracking.identity import OFFLINE
from pipelines.runtime.tracking.sender import POLL_SECONDS
from pipelines.runtime.tracking.spool import METRICS, Sent, unsent
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.ema import decay_at
from pipelines.runtime.training.flops import known_peak_flops
from pipelines.runtime.training.optim import learning_rate
from pipelines.tools.benchmarks import peers
from pipelines.tools.benchmarks.paired_timing import Comparison, Job, compare
from pipelines.tools.benchmarks.shards import CLASSES, NUM_SHARDS, write_images, write_latents
from pipelines.tools.benchmarks.stages import Setup, Turns, stage_of, without_zeros
from pipelines.tools.export import arguments_in_diffusers

NEVER = "1000000000"
EAGER = "diffusers eager"  # beside the compiled one

# ----------------------------------------------------------------------------------------------------------- training


def unet(setup: Setup) -> Comparison:
    """Update of the U-Net."""
    # Latents, with features of captions where the model reads them, and an autoencoder to show a sample.
    words = ("--grid.rows", "1", "--grid.max_columns", "1", "--grid.sampler.num_steps", "1")
    config = setup.config(train_unet.TrainUNetConfig, "train_unet", *_words(setup), *words)
    network = setup.build_denoiser()
    features = {name: tuple(field.shape[1:]) for name, field in blank_features(config.denoiser).items()}
    write_latents(
        setup.folder / "latents",
        shape=network.latent_shape,
        per_shard=max(1, config.global_batch // NUM_SHARDS) * 8,
        features=features,
    )
    peers.theirs(setup.build_vae(), setup.image.resolution).save_pretrained(config.inputs.vae)
    stage = stage_of(setup, config, "train_unet", in_turns=True)
    captions = CaptionFeatures(
        config.captions, config.denoiser, latents=stage.parents.latents, device=torch.device("cpu")
    )
    maker = train_unet.BatchMaker(config, stage, network, captions)
    batches = [maker.make(index) for index in range(setup.updates)]

    def of_theirs(draw: train_unet.LatentDraw) -> dict[str, Tensor]:
        arguments = arguments_in_diffusers(network, draw.conditions, draw.dropped[:, 0])
        return {"x0": draw.x0, "noise": draw.noise, "times": draw.times, **arguments}

    def loss_of(bare: nn.Module, draw: train_unet.LatentDraw) -> Tensor:
        return bare(draw.x0, draw.noise, draw.times, draw.conditions, draw.dropped).loss.mean()

    with torch.no_grad():
        theirs = [of_theirs(draw) for draw in batches]
    train = partial(train_unet.train, config, stage)
    flops = train_unet.flops_per_image(network, batches[0])
    return _trainings(setup, stage, train, network, batches, loss_of, theirs, peers.unet_loss(network), flops)


def vae(setup: Setup) -> Comparison:
    """Update of the VAE."""
    config, image = setup.config(train_vae.TrainVAEConfig, "train_vae", *_words(setup)), setup.autoencoder_image
    write_images(setup.folder / "corpus", image, per_shard=max(1, config.global_batch // NUM_SHARDS) * 8)
    stage, network = stage_of(setup, config, "train_vae", in_turns=True), setup.build_vae()
    maker, kl_weight = train_vae.BatchMaker(config, stage), config.objective.kl_weight
    batches = [maker.make(index) for index in range(setup.updates)]

    def loss_of(bare: nn.Module, batch: train_vae.VAEBatch) -> Tensor:
        reconstruction, posterior = bare(batch.images, batch.noise)
        kl = posterior.kl().mean() / batch.images[0].numel()
        return (batch.images - reconstruction).abs().mean() + kl_weight * kl

    theirs = [{"images": batch.images, "noise": batch.noise} for batch in batches]
    train = partial(train_vae.train, config, stage)
    flops = train_vae.flops_per_image(network, resolution=image.resolution)
    return _trainings(setup, stage, train, network, batches, loss_of, theirs, peers.vae_loss(kl_weight), flops)


def _words(setup: Setup) -> tuple[str, ...]:
    """Return the options of both trainings: no checkpoint, no validation but the first, and AdamW as all have it."""
    never = tuple(f"--{key}={NEVER}" for key in ("updates", "validate_every", "checkpoint.every_updates"))
    return (
        *never,
        "--optim.algorithm=adamw",
        f"--log_every={setup.updates}",
        f"--compile={str(setup.compiled).lower()}",
    )


def _trainings(
    setup: Setup,
    stage: Stage,
    train: Callable[[], None],
    network: nn.Module,
    batches: Sequence[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    their_batches: Sequence[Mapping[str, Tensor]],
    their_loss: peers.LossOf,
    flops: float,
) -> Comparison:
    """Check that all three compute the same losses, then time them; ``flops`` are those of an image.

    Several processes are compared with the plain loop alone: diffusers' examples train an autoencoder past the wrapper
    that averages gradients.
    """
    config, turns, accelerator = stage.config, stage.stop, stage.accelerator
    assert isinstance(config, TrainingConfig)
    assert isinstance(turns, Turns)
    network = Device(accelerator.device).place(network)
    if setup.compiled:
        network.compile()

    def loss_in_precision(bare: nn.Module, batch: Any) -> Tensor:
        with accelerator.autocast():
            return loss_of(bare, batch)

    several = accelerator.num_processes > 1
    bare = network
    if several:  # wrapped as our trainings are
        bare = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True, broadcast_buffers=False)
    plain = PlainLoop(bare, loss_in_precision, [_placed(batch, accelerator.device) for batch in batches], config)
    turns.begin(train)
    try:
        # The stage's losses are the plain loop's, after a rehearsal that changes nothing.
        if several:
            turns.make(1)
        turns.make(setup.updates)
        plain.make(setup.updates)
        expected = accelerator.reduce(torch.stack(plain.losses), "mean").cpu()
        jobs: dict[str, Callable[[int], None]] = {"ours": turns.make, "plain loop": plain.make}

        def check() -> None:
            stage.tracker.flush()
            records = [json.loads(line) for line in (stage.folder / METRICS).read_text().splitlines()]
            losses = torch.tensor([record["train/loss"] for record in records if "update" in record])
            check_close(losses, expected, within=setup.rounding, what="The stage's loss")

        json_from_main(check, accelerator)

        # So is that of diffusers' network with the weights that this loop has now.
        if not several:
            with torch.no_grad(), accelerator.autocast():
                expected = loss_of(network, _placed(batches[0], accelerator.device))
            jobs |= _their_trainings(setup, stage, network, their_batches, their_loss, expected)
        units = setup.updates * config.global_batch

        # The sender's start is no part of an update: it imports MLflow and makes the database, for some seconds.
        while (
            accelerator.is_main_process
            and config.run.tracking_uri != OFFLINE
            and unsent(stage.folder, Sent.read(stage.folder))
        ):
            time.sleep(POLL_SECONDS)
        return compare(
            {
                name: Job(partial(make, setup.updates), units, has_children=name == "ours")
                for name, make in jobs.items()
            },
            rounds=setup.rounds,
            peak=known_peak_flops(str(accelerator.device), setup.precision, tf32=setup.tf32) / flops,
        )
    finally:
        turns.end()
        stage.tracker.close("KILLED")


def _their_trainings(
    setup: Setup,
    stage: Stage,
    network: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    loss_of: peers.LossOf,
    expected: Tensor,
) -> dict[str, Callable[[int], None]]:
    """Check that diffusers' network with these weights has the ``expected`` loss, and let it go its own way."""
    config, accelerator = stage.config, stage.accelerator
    assert isinstance(config, TrainingConfig)
    theirs = peers.theirs(network, setup.image.resolution)
    with torch.no_grad(), accelerator.autocast():
        found = loss_of(theirs, _placed(dict(batches[0]), accelerator.device))
    check_close(found, expected, within=setup.rounding, what="The loss of diffusers' network")
    others = {"diffusers": theirs}
    if setup.compiled:  # beside the one that is not
        others[EAGER] = peers.theirs(network, setup.image.resolution)
        peers.compile_parts(theirs)
    samples = [
        {name: field[row] for name, field in each.items() if name not in peers.DRAWN}
        for each in batches
        for row in range(config.global_batch)
    ]
    return {
        name: peers.TheirTraining(other, loss_of, samples, config, accelerator).make for name, other in others.items()
    }


class PlainLoop:
    """The same updates by the bare network: batches on the device, used in turn; fused AdamW, one average."""

    def __init__(
        self,
        network: nn.Module,
        loss_of: Callable[[nn.Module, Any], Tensor],
        batches: Sequence[Any],
        config: TrainingConfig,
    ) -> None:
        self._network, self._loss_of, self._batches, self._config = network, loss_of, batches, config
        self._parameters, self.losses = list[Tensor](network.parameters()), list[Tensor]()
        self._average = [parameter.detach().clone() for parameter in self._parameters]
        optim = config.optim
        betas, decay = (optim.beta1, optim.beta2), optim.weight_decay
        self._adamw = torch.optim.AdamW(
            self._parameters, betas=betas, eps=optim.epsilon, weight_decay=decay, fused=True
        )

    def make(self, updates: int) -> None:
        """Make so many updates."""
        config = self._config
        for _ in range(updates):
            loss = self._loss_of(self._network, self._batches[len(self.losses) % len(self._batches)])
            self.losses.append(loss.detach())
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, config.optim.max_grad_norm, foreach=True)
            update = len(self.losses)
            for group in self._adamw.param_groups:
                group["lr"] = learning_rate(config.optim, update=update, total_updates=config.updates)
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, 1 - decay_at(config.averages[0], update=update))


def _placed(value: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on the device, images channels last."""
    if isinstance(value, dict):
        return {name: _placed(field, device) for name, field in value.items()}
    if isinstance(value, Tensor):
        return value.to(device, memory_format=torch.channels_last if value.ndim == 4 else torch.preserve_format)
    if not value:  # a VAE's latents are not augmented here
        return value
    return replace(value, **_placed(vars(value), device))


# ----------------------------------------------------------------------------------------------- encoding and sampling


def encoding(setup: Setup) -> Comparison:
    """Encoding, shards to shards.

    The bare encoder has the same batches in memory and as many threads as the stage has, one at a time: in the main
    thread alone it takes longer.
    """
    # Shards, the stage, and one autoencoder on both sides.
    config = setup.config(EncodeLatentsConfig, "encode_latents", "--dtype", "float32")
    size, corpus, image = config.batch_size, setup.folder / "corpus", setup.autoencoder_image
    # A GPU is not to be done before it has begun.
    write_images(corpus, image, per_shard=(16 if torch.cuda.is_available() else 2) * size)
    images = ImageShards(corpus, split="train", cache_bytes=0)
    without_zeros(network := setup.build_vae())
    peers.theirs(network, image.resolution).save_pretrained(config.inputs.vae)
    stage = stage_of(setup, config, "encode_latents", in_turns=False)
    device, autocast = stage.accelerator.device, stage.accelerator.autocast
    network = Device(device).place(network)
    theirs = peers.theirs(network, image.resolution)
    if setup.compiled:
        peers.compile_parts(network, theirs)
    shards, turn, runs = {part.entry.name: part for part in images.shards}, Lock(), itertools.count()
    starts = range(0, len(images), size)
    tensors = [to_unit_range(images.read(np.arange(at, at + size)).images).to(device) for at in starts]

    def ours() -> None:
        make_items(
            stage,
            list(shards),
            lambda name: encode_shard(config, stage, network, None, images, shards[name], turn),
            folder=setup.folder / f"records-{next(runs)}",
            at_once=SHARDS_AT_ONCE,
        )

    @torch.no_grad()
    def encode(tensor: Tensor) -> None:
        with turn, autocast():
            network.encode(tensor)

    def bare() -> None:
        with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
            list(pool.map(encode, tensors))

    @torch.no_grad()
    def loop() -> None:
        stream = webdataset.WebDataset(sorted(map(str, corpus.glob("*.tar"))), shardshuffle=False).decode("rgb8")
        with webdataset.TarWriter(str(setup.folder / "theirs.tar")) as writer:
            for keys, pixels in stream.to_tuple("__key__", "png").batched(size):
                batch = torch.from_numpy(np.stack(pixels)[..., : image.channels]).permute(0, 3, 1, 2)
                with autocast():
                    posterior = theirs.encode(batch.float().div(127.5).sub(1).to(device)).latent_dist
                rows = torch.stack([posterior.mean, posterior.logvar], dim=1).float().cpu().numpy()
                for key, row in zip(keys, rows, strict=True):
                    writer.write({"__key__": key, "latent.npy": row})

    # Equal latents.
    ours()
    loop()
    stored, expected = (_latents(paths) for paths in (stage.folder.glob("*.tar"), [setup.folder / "theirs.tar"]))
    check_close(stored, expected, within=setup.rounding, what="The latents of diffusers' encoder")
    jobs = {"ours": ours, "bare network": bare, "diffusers": loop}
    return compare({name: Job(run, len(images)) for name, run in jobs.items()}, rounds=setup.rounds)


def _latents(paths: Iterable[Path]) -> Tensor:
    """Return the latents of shards in the order of their keys."""
    stream = webdataset.WebDataset(sorted(map(str, paths)), shardshuffle=False).decode()
    rows = dict(stream.to_tuple("__key__", "latent.npy"))
    return torch.from_numpy(np.stack([rows[key] for key in sorted(rows)]))


def sampling(setup: Setup) -> Comparison:
    """Sampling by DDIM with guidance, from noise to pixels."""
    # One model on both sides.
    config = setup.config(EvaluateConfig, "evaluate")
    sampler = DDIMConfig(num_steps=config.sampler.num_steps, spacing=config.sampler.spacing)
    guidance = GuidanceConfig(scale=config.guidance.scale)  # at all steps, as in diffusers' loop
    rows, steps, scale = range(config.batch_size), sampler.num_steps, config.guidance.scale
    accelerator = start_accelerator(config.run, precision=setup.precision, tf32=setup.tf32)
    device, autocast = accelerator.device, accelerator.autocast
    for network in (denoiser := setup.build_denoiser().eval(), decoder := setup.build_vae().eval()):
        without_zeros(network)
    blank = blank_features(denoiser.config).items()
    conditions = {name: torch.randn(len(rows), *field.shape[1:]) for name, field in blank}
    conditions["labels"] = torch.arange(len(rows)) % len(CLASSES)
    nothing = torch.zeros(len(rows), dtype=torch.bool)
    branches = [arguments_in_diffusers(denoiser, conditions, dropped) for dropped in (~nothing, nothing)]
    arguments = _placed({name: torch.cat([branch[name] for branch in branches]) for name in branches[0]}, device)
    model = LatentDiffusion(
        autoencoder=Device(device).place(decoder),
        denoiser=Device(device).place(denoiser),
        normalisation=Normalisation([0.0], [1.0]).to(device),
    )
    # A second copy stays as it is where the first is compiled.
    copies = [
        [peers.theirs(network, setup.image.resolution) for network in (denoiser, decoder)]
        for _ in range(2 if setup.compiled else 1)
    ]
    unet, vae = copies[0]
    scheduler = peers.scheduler_of(denoiser, sampler)

    def noise() -> Tensor:
        return noise_of(0, rows, shape=denoiser.latent_shape, device=device)("sample")

    def ours(arithmetic: Any = autocast) -> np.ndarray:
        with arithmetic():
            images = model.sample(
                noise(), conditions, sampler=sampler, guidance=guidance, fresh_noise=lambda step: noise()
            )
        return finite_levels(images, names=rows, stage="benchmark", precision=setup.precision)

    latents = noise()
    twice, times = torch.cat([latents] * 2), torch.full((2 * len(rows),), 500.0, device=device)
    both = _placed({name: torch.cat([field] * 2) for name, field in conditions.items()}, device)
    dropped = torch.cat([nothing, ~nothing]).to(device)[:, None].expand(-1, len(denoiser.conditioners))

    @torch.no_grad()
    def bare() -> None:
        with autocast():
            for _ in range(steps):
                denoiser.output(twice, times, both, dropped)
            decoder.decode(latents)

    def loop(unet: Any, vae: Any, arithmetic: Any = autocast) -> Tensor:
        with arithmetic():
            return peers.samples(unet, vae, scheduler, latents, arguments, scale=scale, steps=steps)

    # Equal pixels in float32; and in fewer bits, whose rounding drifts apart over the steps, an equal step.
    set_float32(tf32=False)
    images = torch.from_numpy(ours(nullcontext))
    check_close(images, loop(unet, vae, nullcontext), within=0.02, what="An image of diffusers' loop")
    set_float32(tf32=setup.tf32)
    if setup.compiled:
        peers.compile_parts(denoiser.network, decoder.decoder, unet, vae)
    with torch.no_grad(), autocast():
        # The time as their loop passes it: another shape would be compiled for itself.
        uncond, cond = unet(twice, torch.tensor(500, device=device), **arguments, return_dict=False)[0].chunk(2)
        step = denoiser.output(twice, times, both, dropped)
    check_close(step, torch.cat([cond, uncond]), within=setup.rounding, what="A step of diffusers' network")
    jobs: dict[str, Callable[[], object]] = {"ours": ours, "bare network": bare}
    jobs |= {name: partial(loop, *copy) for name, copy in zip(("diffusers", EAGER), copies, strict=False)}
    return compare({name: Job(run, len(rows)) for name, run in jobs.items()}, rounds=setup.rounds)


def check_close(found: Tensor, expected: Tensor, *, within: float, what: str) -> None:
    """Refuse to time two sides whose outputs differ by more than ``within`` of their size (L2)."""
    found, expected = found.float(), expected.float()
    apart = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    if not apart <= within:
        raise ValueError(f"{what} differs by {apart:.2g} of its size, at most {within:g} is allowed.")
