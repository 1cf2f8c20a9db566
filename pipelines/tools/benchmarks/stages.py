"""Stages to measure: the networks and batches of an experiment, on an empty folder, some updates at a time."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from data.files import FolderLock
from data.manifest import ImageShape, LatentShape
from models.autoencoder.vae import AutoencoderKL
from models.denoiser import Denoiser
from pipelines.prepare_corpus import PrepareCorpusConfig
from pipelines.runtime.config.experiment import load_config
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.fingerprint import read_parents
from pipelines.runtime.stage.launch import Precision, StopSignal, start_accelerator
from pipelines.runtime.stage.stage import Stage, start_tracker
from pipelines.runtime.tracking.tracker import SilentTracker, Tracker
from pipelines.tools.benchmarks.shards import CLASSES
from pipelines.train_unet import TrainUNetConfig, build_denoiser
from pipelines.train_vae import TrainVAEConfig

SIZES = {
    "demo": Path(__file__).parents[2] / "configs" / "demo.toml",
    "small": Path(__file__).with_name("small.toml"),
    "sd": Path(__file__).with_name("sd.toml"),
}
# Diffusers' training recipe and loop are those of the chain; what is computed for an image is the same on any path.
CHAIN = (
    "--denoiser.schedule.kind=cosine",
    "--denoiser.objective.prediction=v",
    "--denoiser.objective.times.kind=uniform",
)
Config = TypeVar("Config", bound=StageConfig)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of one measurement."""

    folder: Path  # an empty one, for shards and stages
    rounds: int
    experiment: Path = SIZES["demo"]  # its networks and batches are measured
    precision: Precision = "float32"
    tf32: bool = False
    compiled: bool = False
    threads: int = 1
    updates: int = 25  # of a training at a time, and between two flushes of its metrics
    tracking_uri: str = ""  # of trainings; a database in the folder by default

    def config(self, model: type[Config], table: str, *words: str) -> Config:
        """Return the experiment's configuration of a stage, whose inputs and results lie in the folder."""
        uri = self.tracking_uri or f"sqlite:///{self.folder}/mlflow.db"
        run = ["--run.root", str(self.folder), "--run.threads", str(self.threads), "--run.tracking_uri", uri]
        words = ("--precision", self.precision, *words) if "precision" in model.model_fields else words
        words = (*CHAIN, *words) if model is TrainUNetConfig else words
        words = ("--tf32", str(self.tf32).lower(), *words) if "tf32" in model.model_fields else words
        return load_config(model, table=table, argv=["--config", str(self.experiment), *run, *words])

    @property
    def image(self) -> ImageShape:
        """Shape of the images."""
        view = self.config(PrepareCorpusConfig, "prepare_corpus").view
        return ImageShape(resolution=view.resolution, channels=view.channels)

    @property
    def autoencoder_image(self) -> ImageShape:
        """Shape of the images that the autoencoder is trained on, and measured with: 256 pixels at most."""
        return self.image.model_copy(update={"resolution": min(self.image.resolution, 256)})

    @property
    def rounding(self) -> float:
        """Difference that two ways to compute one thing may have, as a fraction of its size."""
        return 1e-4 if self.precision == "float32" and not self.tf32 else 5e-2

    def build_vae(self) -> AutoencoderKL:
        """Build the autoencoder as its training does."""
        config = self.config(TrainVAEConfig, "train_vae")
        torch.manual_seed(config.seed)
        return AutoencoderKL(config.network, image_channels=self.image.channels)

    def build_denoiser(self) -> Denoiser:
        """Build the U-Net as its training does."""
        config, vae = self.config(TrainUNetConfig, "train_unet"), self.config(TrainVAEConfig, "train_vae").network
        shape = LatentShape(channels=vae.latent_channels, size=self.image.resolution // vae.factor)
        torch.manual_seed(config.seed)
        return build_denoiser(config, shape, num_classes=len(CLASSES))


def stage_of(setup: Setup, config: StageConfig, name: str, *, in_turns: bool) -> Stage:
    """Open a stage on an empty folder as ``running_stage`` does, but for signals and outcome."""
    (folder := setup.folder / name).mkdir()
    accelerator = start_accelerator(config.run, precision=setup.precision, tf32=setup.tf32)
    stop, parents = StopSignal(folder, accelerator), read_parents(config)
    tracker: Tracker | SilentTracker = SilentTracker()
    if in_turns:
        (folder / "config.toml").touch()
        stop = Turns(folder, accelerator)
        if accelerator.is_main_process:
            tracker = start_tracker(config, name=name, folder=folder, parents=parents, accelerator=accelerator)
    return Stage(
        name=name,
        folder=folder,
        config=config,
        parents=parents,
        accelerator=accelerator,
        tracker=tracker,
        stop=stop,
        lock=FolderLock(folder),
    )


class Turns(StopSignal):
    """A training in a thread of its own, which makes as many updates as it is asked for: it looks once in each."""

    def begin(self, train: Callable[[], None]) -> None:
        """Start the training, up to its first update."""
        self._turns: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._left = 0

        def work() -> None:
            try:
                train()
            except BaseException as error:
                self._ended.put(error)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        self._wait()

    def make(self, updates: int) -> None:
        """Make so many updates, and wait for them."""
        self._turns.put(updates)
        self._wait()

    def end(self) -> None:
        """End the training between two updates, without a checkpoint."""
        self._turns.put(0)
        self._thread.join()

    def _wait(self) -> None:
        if (error := self._ended.get()) is not None:
            raise error

    def requested(self, *, look: bool = True) -> bool:
        """Wait for the next turn where the last one is over."""
        if self._left == 0:
            self._ended.put(None)
            self._left = self._turns.get()
            if self._left == 0:
                raise EndOfTurns
        self._left -= 1
        return False


class EndOfTurns(Exception):
    """The end of a training that is measured."""


def without_zeros(network: nn.Module) -> None:
    """Draw the weights that start at zero, so that every part of a network shows in its output."""
    for parameter in network.requires_grad_(False).parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
