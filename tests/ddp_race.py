"""Our training step against a plain loop with torch's DDP: the same network, batches and optimizer, in turns.

A program: one rank of two, started by a test. The plain loop is what one writes who trusts every machine: forward,
backward, clipped and fused AdamW, averaged weights. Ours also agrees on bad updates and on stopping, takes metrics,
writes them out and compares the ranks when that is due. DDP has the same settings in both.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from conftest import SMOKE
from torch import Tensor, nn

from data.files import FolderLock
from data.manifest import LatentShape, Parents
from data.prefetch import Loaded
from data.randomness import SampleDraws
from models.denoiser import Denoiser
from pipelines.model.device import device_of
from pipelines.runtime.config.experiment import load_config
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.launch import StopSignal, start_accelerator
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.tracking.tracker import SilentTracker
from pipelines.runtime.training.config import BatchShare
from pipelines.runtime.training.ema import Averages
from pipelines.runtime.training.loop import Training
from pipelines.runtime.training.optim import learning_rate
from pipelines.runtime.training.trainable import Trainable, joined
from pipelines.tools.benchmarks.paired_timing import CONTROL, Job, compare
from pipelines.train_unet import LatentDraw, TrainUNetConfig, build_denoiser, one_update

CHANNELS, SIZE, CLASSES = 4, 16, 10
UPDATES_A_TURN = 5
WORDS = (
    *("--config", str(SMOKE), "--run.root", "-", "--inputs.latents", "-", "--inputs.vae", "-"),
    *("--updates", "1000000", "--global_batch", "16", "--images_per_device", "8", "--denoiser.network.channels"),
    *("[64, 128]", "--log_every", str(UPDATES_A_TURN), "--validate_every", "1000000"),
    *("--checkpoint.every_updates", "1000000"),
)


class Ours:
    """The stage's own loop, an update at a time."""

    def __init__(self, config: TrainUNetConfig, stage: Stage, network: nn.Module, batches: list[LatentDraw]) -> None:
        rank, world_size = stage.accelerator.process_index, stage.accelerator.num_processes
        self.network, self.batches = network, batches
        self.unet = Trainable(network, config, stage.accelerator)
        self.averages = Averages(network, config.averages)
        self.training = Training(
            stage,
            config,
            share=BatchShare.of(config, table="train_unet", rank=rank, world_size=world_size),
            keys=lambda batch, positions: [],
            parts={**self.unet.parts("unet"), "unet_averages": self.averages},
        )
        self.training.rehearse(
            lambda batch: one_update(self.training, self.unet, batch), lambda index: batches[index % len(batches)]
        )
        self.updates = self.training.updates(self.from_index)

    def from_index(self, start: int) -> Iterator[Loaded[LatentDraw]]:
        while True:
            yield Loaded(start, self.batches[start % len(self.batches)], 0.0)
            start += 1

    def turn(self) -> None:
        for _ in range(UPDATES_A_TURN):
            one_update(self.training, self.unet, next(self.updates))
            self.averages.update(self.network, update=self.training.update, refused=self.training.refused)
        dist.barrier()


class Plain:
    """The textbook's loop."""

    def __init__(self, config: TrainUNetConfig, ddp: nn.Module, network: nn.Module, batches: list[LatentDraw]) -> None:
        self.config, self.ddp, self.network, self.batches = config, ddp, network, batches
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            betas=(config.optim.beta1, config.optim.beta2),
            weight_decay=config.optim.weight_decay,
            fused=True,
        )
        self.average = [parameter.detach().clone() for parameter in network.parameters()]
        self.update = 0

    def turn(self) -> None:
        for _ in range(UPDATES_A_TURN):
            self.update += 1
            batch = self.batches[self.update % len(self.batches)]
            x0, noise = (x.to(memory_format=torch.channels_last) for x in (batch.x0, batch.noise))
            losses = self.ddp(x0, noise, batch.times, batch.conditions, batch.dropped)
            losses.loss.mean().backward()
            parameters = list(self.network.parameters())
            nn.utils.clip_grad_norm_(parameters, self.config.optim.max_grad_norm, foreach=True)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optim, update=self.update, total_updates=self.config.updates)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(self.average, parameters, 0.05)
        dist.barrier()


def calls_of_a_turn(turn: Callable[[], None]) -> int:
    """Collectives that a turn asks for by name, besides those within DDP."""
    with ExitStack() as stack:
        spies = [
            stack.enter_context(patch.object(dist, name, wraps=getattr(dist, name)))
            for name in ("all_reduce", "all_gather", "broadcast", "barrier")
        ]
        turn()
    return sum(spy.call_count for spy in spies)


def draws(denoiser: Denoiser, rank: int) -> Iterator[LatentDraw]:
    """A few batches' shares of one rank."""
    shape = (CHANNELS, SIZE, SIZE)
    for index in range(4):
        positions = range(8 * rank, 8 * rank + 8)
        of = SampleDraws(0, index, positions)

        def normals(purpose: str, of: SampleDraws = of) -> Tensor:
            return torch.from_numpy(of.normals(purpose, shape))

        labels = torch.from_numpy(of.uniforms("label") * CLASSES).long()
        dropped = torch.from_numpy(of.uniforms("drop", (1,)) < 0.1)
        uniforms = torch.from_numpy(of.uniforms("time"))
        times = denoiser.times(uniforms, batch=index, positions=torch.tensor(positions), global_batch=16)
        yield LatentDraw(normals("x0"), normals("noise"), times, {"labels": labels}, dropped)


def main() -> None:
    folder, report = Path(sys.argv[1]), Path(sys.argv[2])
    rounds = int(sys.argv[3]) if len(sys.argv) > 3 else 40
    config = load_config(TrainUNetConfig, table="train_unet", argv=list(WORDS))
    accelerator = start_accelerator(RunConfig(threads=1))
    folder.mkdir(parents=True, exist_ok=True)
    stage = Stage(
        name="train_unet",
        folder=folder,
        config=config,
        parents=Parents(),
        accelerator=accelerator,
        tracker=SilentTracker(),
        stop=StopSignal(folder, accelerator),
        lock=FolderLock(folder),
    )
    latent = LatentShape(channels=CHANNELS, size=SIZE)
    device, networks = device_of(stage), []
    for _ in range(2):
        torch.manual_seed(0)
        networks.append(device.place(build_denoiser(config, latent, num_classes=CLASSES)))
    batches = list(draws(networks[0], accelerator.process_index))
    ours = Ours(config, stage, networks[0], batches)
    plain = Plain(config, joined(networks[1], accelerator, compiles=False), networks[1], batches)
    asked = [calls_of_a_turn(job) for _ in range(2) for job in (ours.turn, plain.turn)][-2:]  # the first ones warm up
    jobs = {"ours": Job(ours.turn, UPDATES_A_TURN), "plain": Job(plain.turn, UPDATES_A_TURN)}
    found = compare(jobs, rounds=rounds)
    if accelerator.is_main_process:
        metrics = {
            "ours/plain": asdict(found.faster["plain"]["wall"]),
            "control": asdict(found.faster[CONTROL]["wall"]),
            "updates per second": [found.per_second[name]["wall"] for name in jobs],
            "collectives an update beside DDP": [(calls - 1) / UPDATES_A_TURN for calls in asked],
            "parameters": sum(parameter.numel() for parameter in networks[0].parameters()),
        }
        report.write_text(json.dumps(metrics))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
