"""Images of an evaluation: batches of samples, of reconstructions and of real images, with their features.

Every batch is a work item that any rank can make on its own, a pure function of its name: sample i has class i mod K,
or the caption and class of a validation image that i picks, and noise (seed, i); batches have a fixed size and are
composed by sample index.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.files import write_atomically
from data.loading import ImageShards
from data.manifest import CorpusManifest
from data.order.order import FullShuffleConfig, Order
from data.samples import Split
from data.transforms import VIEW_REVISIONS, to_unit_range
from models.diffusion.guidance import GuidanceConfig, GuidanceScale
from models.diffusion.samplers import DDIMConfig, SamplerConfig
from models.features import FeatureExtractorConfig
from models.features.extractor import FeatureExtractor
from models.features.scattering import ScatteringConfig
from models.latent_diffusion import LatentDiffusion
from models.metrics.fidelity import psnr, ssim
from pipelines.evaluation.likelihood import BoundConfig, NoBoundConfig, VariationalBoundConfig, measure_bound
from pipelines.evaluation.metrics import absent_figures
from pipelines.model.captions import as_tensors, prompt_encoder
from pipelines.model.decoded import finite_levels
from pipelines.model.device import device_of
from pipelines.model.noise import noise_of
from pipelines.model.weights import ModelInputs, load_latent_diffusion
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import Precision, cores_per_process
from pipelines.runtime.stage.stage import Stage


class EvaluateInputs(ModelInputs):
    """The trained model, and the images that its samples are compared with."""

    corpus: str  # folder of the image shards; its validation images are the reference, training ones make the floor


class DrawConfig(StageConfig):
    """Images that are drawn, their conditions, and the features that they are compared by."""

    inputs: EvaluateInputs  # where the stage reads
    seed: NonNegativeInt = 0  # of the samples' noise
    num_samples: PositiveInt = 1_000  # images at each guidance scale: classes, or validation captions, in turn
    batch_size: PositiveInt = 50  # images drawn at once; images of a batch may depend on it in their last bits
    sampler: SamplerConfig = DDIMConfig(num_steps=50)  # how samples are drawn
    guidance: GuidanceConfig = GuidanceConfig(scale=2.0)  # the default guidance, which is shown and stored first
    sweep: tuple[GuidanceScale, ...] = (1.0, 1.5, 2.0, 3.0)  # guidance scales compared; the default's is added
    extractor: FeatureExtractorConfig = ScatteringConfig()  # features that metrics compare
    probe_images: NonNegativeInt = 10_000  # training images that the class probe is fitted on, at most; 0 is no probe
    likelihood: BoundConfig = NoBoundConfig()  # how probable the model finds validation latents
    precision: Precision = "float32"  # what the networks compute in
    tf32: bool = False  # float32 products and convolutions by TF32 on GPUs that have it: faster, 10 bits of fraction

    @model_validator(mode="after")
    def _whole_batches(self) -> Self:
        if self.num_samples % self.batch_size:
            raise ValueError(
                f"num_samples = {self.num_samples} is not a multiple of batch_size = {self.batch_size}: batches have "
                f"one size, so that each image has the same bits on any number of processes"
            )
        return self

    @property
    def scales(self) -> tuple[float, ...]:
        """All guidance scales, the default first."""
        return (self.guidance.scale, *sorted(set(self.sweep) - {self.guidance.scale}))


@dataclass(frozen=True, kw_only=True)
class ItemNames:
    """Names of all work items."""

    reference: list[str]
    reconstructions: list[str]
    floor: list[str]
    bounds: list[str]
    samples: dict[float, list[str]]

    @property
    def own(self) -> list[str]:
        """Items of this evaluation; those of the reference are shared by all of one corpus."""
        return [
            *self.reconstructions,
            *self.floor,
            *self.bounds,
            *(name for names in self.samples.values() for name in names),
        ]


class ItemMaker:
    """Work items of an evaluation: a batch of images each, with their features; a pure function of the item's name."""

    def __init__(self, config: DrawConfig, stage: Stage) -> None:
        self.config, self.stage = config, stage

        # The model, and what prompts and images are encoded by.
        device = device_of(stage)
        self.model = load_latent_diffusion(config.inputs, stage.parents, device=device)
        with config_error_at("inputs.corpus"):
            check_shape(stage.parents.corpus, self.model)
        with config_error_at("inputs.unet"):
            self.prompts = prompt_encoder(self.model)
        with config_error_at("evaluate.extractor"):
            self.extractor: FeatureExtractor = config.extractor.build().to(device.torch)

        # Real images: all validation images, and training images that are drawn for the floor and for the probe. Of
        # so few that the floor would take more than half of them, the probe takes all.
        corpus = stage.parents.corpus
        with config_error_at("inputs.corpus"):
            threads = cores_per_process()
            self.images: dict[str, ImageShards] = {
                split: ImageShards(
                    config.inputs.corpus, split=split, manifest=corpus, scattered=split == "train", threads=threads
                )
                for split in get_args(Split)
            }
        num_train = len(self.images["train"])
        in_floor = config.num_samples if 2 * config.num_samples <= num_train else 0
        num_drawn = min(in_floor + config.probe_images, num_train)
        drawn = Order(FullShuffleConfig(), num_samples=num_train, seed=0).indices(0, num_drawn)
        self.real_indices = {
            "train": np.sort(drawn[in_floor:]),
            "val": np.arange(len(self.images["val"])),
            "floor": np.sort(drawn[:in_floor]),
        }
        name = f"{corpus.digest[:16]}-{self.extractor.name}-{self.extractor.weights_sha256[:16]}"
        shape = f"{in_floor}-{len(self.real_indices['train'])}-{config.batch_size}"
        if corpus.view is not None:  # shards in place are viewed as they are read
            shape += f"-{len(VIEW_REVISIONS)}"
        self.reference_folder = Path(config.run.root).parent / "cache" / "features" / f"{name}-{shape}"

    @cached_property
    def names(self) -> ItemNames:
        """Names of every item: what it holds, and the number of its batch."""
        size = self.config.batch_size
        batches = {split: -(-len(indices) // size) for split, indices in self.real_indices.items()}
        return ItemNames(
            reference=[f"{split}-{number:06}" for split in batches for number in range(batches[split])],
            reconstructions=[f"reconstruction-{number:06}" for number in range(batches["val"])],
            floor=[f"floor-{number:06}" for number in range(batches["floor"])],
            bounds=[f"bound-{number:06}" for number in range(-(-self._num_bounds() // size))],
            samples={
                scale: [f"{key_prefix(scale)}-{number:06}" for number in range(self.config.num_samples // size)]
                for scale in self.config.scales
            },
        )

    @cached_property
    def absent(self) -> dict[str, str]:
        """Figures that the corpus or the configuration does not allow, each with its reason."""
        reference, probed = (
            torch.from_numpy(self.images[split].labels_at(self.real_indices[split])) for split in ("val", "train")
        )
        return absent_figures(
            samples=self.labels(range(self.config.num_samples)),
            reference=reference,
            probed=probed,
            classes=self.stage.parents.unet.classes,
            dimension=self.extractor.dimension,
            num_floor=len(self.real_indices["floor"]),
            num_bounds=self._num_bounds(),
        )

    def make_reference(self, name: str) -> dict[str, Any]:
        """Extract the features of one batch of real images."""
        split, number = name.rsplit("-", 1)
        images, labels = self._real(split, int(number))
        write_atomically(
            self.reference_folder / f"{name}.safetensors",
            save({"features": self._features(images), "labels": labels}),
        )
        return {"samples": len(labels)}

    def make_own(self, name: str) -> dict[str, Any]:
        """Reconstruct one batch of real images or measure its likelihood, or draw one batch of samples."""
        kind, number = name.rsplit("-", 1)
        match kind:
            case "reconstruction":
                tensors = self._fidelity(int(number))
            case "floor":
                tensors = self._floor(int(number))
            case "bound":
                tensors = self._bounds(int(number))
            case _:
                tensors = self._samples(kind, int(number))
        write_atomically(self.stage.folder / "parts" / f"{name}.safetensors", save(tensors))
        return {"samples": len(next(iter(tensors.values())))}

    def read(self, names: Sequence[str], key: str) -> Tensor:
        """Return one tensor of all named items of this evaluation, concatenated."""
        return read_items(self.stage.folder / "parts", names, key)

    def read_real(self, split: str, key: str) -> Tensor:
        """Return one tensor of the real images of ``train``, ``val`` or ``floor``: features (n d), labels (n,)."""
        of_split = [name for name in self.names.reference if name.startswith(f"{split}-")]
        return read_items(self.reference_folder, of_split, key)

    def labels(self, indices: range) -> Tensor:
        """Classes of samples: in turn, so that all are equally frequent, or the captions'; -1 for none."""
        if self.prompts is not None:
            return torch.from_numpy(self._captioned(indices)[0])
        num_classes = len(self.stage.parents.unet.classes)
        return torch.tensor([index % num_classes if num_classes else -1 for index in indices])

    def captions(self, indices: range) -> list[str]:
        """Captions that samples are drawn for; "" where the model reads none."""
        return self._captioned(indices)[1] if self.prompts is not None else [""] * len(indices)

    def _captioned(self, indices: range) -> tuple[np.ndarray, list[str]]:
        """Labels and captions of the validation images that samples are drawn for; each image once before any twice."""
        order = Order(FullShuffleConfig(), num_samples=len(self.images["val"]), seed=0)
        return self.images["val"].labels_and_captions(order.indices(indices.start, len(indices)))

    def _conditions(self, labels: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        if self.prompts is None:
            return {"labels": labels}
        self.prompts.forget()  # An item depends on its name alone.
        return {"labels": labels, **as_tensors(self.prompts(captions))}

    def _noise(self, indices: Sequence[int], *, latent_size: int) -> Callable[[str], Tensor]:
        shape = (self.model.denoiser.latent_shape[0], latent_size, latent_size)
        return noise_of(self.config.seed, indices, shape=shape, device=self.model.device)

    def _real(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        size = self.config.batch_size
        images = self.images["train" if split == "floor" else split]
        batch = images.read(self.real_indices[split][number * size : (number + 1) * size])
        return torch.from_numpy(batch.images), torch.from_numpy(batch.labels)

    def _fidelity(self, number: int) -> dict[str, Tensor]:
        """How well one batch of validation images is reconstructed."""
        real, _ = self._real("val", number)
        found, expected = self._reconstructed(real, "validation image").movedim(-1, 1), real.movedim(-1, 1)
        return {"psnr": psnr(found, expected), "ssim": ssim(found, expected)}

    def _floor(self, number: int) -> dict[str, Tensor]:
        """What an evaluation of a perfect U-Net would find: reconstructions of images that are not in the reference."""
        real, labels = self._real("floor", number)
        return {"features": self._features(self._reconstructed(real, "training image")), "labels": labels}

    @torch.no_grad()
    def _reconstructed(self, real: Tensor, kind: str) -> Tensor:
        # Filled up by repetition: a batch has one size.
        size = self.config.batch_size
        whole = torch.cat([real] * -(-size // len(real)))[:size]
        autoencoder = self.model.autoencoder
        with self.stage.accelerator.autocast():
            posterior = autoencoder.encode(to_unit_range(whole).to(self.model.device))
            decoded = autoencoder.decode(posterior.mode())
        return self._levels(decoded, [f"{kind} {row} of its batch" for row in range(size)])[: len(real)]

    def _levels(self, decoded: Tensor, names: Sequence[object]) -> Tensor:
        return torch.from_numpy(
            finite_levels(decoded, names=names, stage=self.stage.name, precision=self.config.precision)
        )

    def _num_bounds(self) -> int:
        likelihood = self.config.likelihood
        if isinstance(likelihood, NoBoundConfig):
            return 0
        return min(likelihood.num_images, len(self.images["val"]))

    def _bounds(self, number: int) -> dict[str, Tensor]:
        """The likelihood of one batch of validation images with their own conditions."""
        likelihood, size = self.config.likelihood, self.config.batch_size
        assert isinstance(likelihood, VariationalBoundConfig)
        first, last = number * size, min((number + 1) * size, self._num_bounds())

        # Filled up by repetition: a batch has one size.
        indices = np.resize(np.arange(first, last), size)
        batch = self.images["val"].read(indices)
        conditions = self._conditions(torch.from_numpy(batch.labels), batch.captions)
        latent_size = batch.images.shape[1] // self.model.autoencoder.factor
        noise = self._noise(indices.tolist(), latent_size=latent_size)

        with self.stage.accelerator.autocast():
            terms = measure_bound(likelihood, self.model, to_unit_range(batch.images), conditions, noise=noise)
        return {name: values[: last - first].contiguous() for name, values in terms.items()}

    def _samples(self, kind: str, number: int) -> dict[str, Tensor]:
        scale = next(scale for scale in self.config.scales if key_prefix(scale) == kind)
        indices = range(number * self.config.batch_size, (number + 1) * self.config.batch_size)
        conditions = self._conditions(self.labels(indices), self.captions(indices))
        noise = self._noise(indices, latent_size=self.model.denoiser.latent_shape[1])
        with self.stage.accelerator.autocast():
            images = self.model.sample(
                noise("sample"),
                conditions,
                sampler=self.config.sampler,
                guidance=self.config.guidance.model_copy(update={"scale": scale}),
                fresh_noise=lambda step: noise(f"sample/{step}"),
            )
        levels = self._levels(images, [f"{kind}-{index:06}" for index in indices])
        return {"images": levels, "features": self._features(levels)}

    def _features(self, levels: Tensor) -> Tensor:
        return self.extractor(levels.movedim(-1, 1).contiguous()).cpu()


def read_items(folder: Path, names: Sequence[str], key: str) -> Tensor:
    """Return one tensor of several work items' files, concatenated.

    Raises:
        ConfigError: A file is damaged; its item is then made again by the next start.
    """

    def tensor(path: Path) -> Tensor:
        try:
            return load_file(path)[key]
        except (SafetensorError, OSError) as error:
            path.with_suffix(".json").unlink(missing_ok=True)
            raise ConfigError(f"{path} is damaged ({error}). The same command makes it again.") from None

    return torch.cat([tensor(folder / f"{name}.safetensors") for name in names])


def check_shape(corpus: CorpusManifest, model: LatentDiffusion) -> None:
    """Refuse real images of another size or number of channels than the samples.

    Raises:
        ValueError: They differ.
    """
    side, channels = model.denoiser.latent_shape[1] * model.autoencoder.factor, model.autoencoder.image_channels
    if (corpus.image.resolution, corpus.image.channels) != (side, channels):
        raise ValueError(
            f"its images have {corpus.image.resolution} pixels a side and {corpus.image.channels} channel(s), samples "
            f"have {side} and {channels}. Prepare a corpus of that size: distances across sizes mean nothing."
        )


def key_prefix(scale: float) -> str:
    """Return the beginning of a sample's key, which names its guidance scale exactly; keys hold no dot."""
    return f"guidance_{scale!r}".removesuffix(".0").replace(".", "p")
