"""Images of an evaluation: batches of samples, of reconstructions and of real images, with their features.

Every batch is a work item that any rank can make on its own, a pure function of its name: sample i has class i mod K,
or the caption and class of a validation image that i picks, and noise (seed, i); batches have a fixed size and are
composed by sample index.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, model_validator
from safetensors.torch import save
from torch import Tensor

from data.files import write_atomically
from data.manifest import CorpusManifest, digest_of
from data.order.order import FullShuffleConfig, Order
from data.samples import Split
from data.transforms import to_unit_range
from models.diffusion.guidance import GuidanceConfig, GuidanceScale
from models.diffusion.likelihood import BoundConfig, NoBoundConfig, VariationalBoundConfig
from models.diffusion.samplers import DDIMConfig, SamplerConfig
from models.features import FeatureExtractorConfig
from models.features.extractor import FeatureExtractor
from models.features.scattering import ScatteringConfig
from models.latent_diffusion import LatentDiffusion
from models.metrics.fidelity import SSIM_WINDOW, psnr, ssim
from pipelines.evaluation.error_budget import FixedBatches, HeldOutImages
from pipelines.evaluation.metrics import absent_figures
from pipelines.evaluation.real_images import RealImages, RealSet, read_items
from pipelines.evaluation.training_weights import CurveConfig, TrainingWeights
from pipelines.model.captions import as_tensors, prompt_encoder
from pipelines.model.decoded import finite_levels
from pipelines.model.device import device_of
from pipelines.model.noise import noise_of
from pipelines.model.weights import GuidedInputs, load_latent_diffusion
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import Precision
from pipelines.runtime.stage.stage import Stage


class EvaluateInputs(GuidedInputs):
    """The trained model, and the images that its samples are compared with."""

    corpus: str  # folder of the image shards; one split is the reference, held-out images of the other make the floor
    latents: str = ""  # folder of the latents that the U-Net was trained on, for the error budget; "" leaves it out


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
    reference: Split = "val"  # split that samples are compared with; of the training split, ``probe_images`` at most
    probe_images: NonNegativeInt = 10_000  # training images that are read, and that the class probe is fitted on
    curve: CurveConfig = CurveConfig()  # checkpoints and widths of averages that are evaluated, too
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

        # The weights besides the published ones, by their sets of samples.
        self._scales = {key_prefix(scale): scale for scale in config.scales}
        #: Sets of samples: of the sweep, by ``key_prefix``, then of the curve, by the point's name.
        self.sampled = (*self._scales, *config.curve.points)
        self._training = TrainingWeights(config.inputs.unet, stage.parents.unet)
        self._loaded = ""  # point of the curve whose weights the denoiser has; "" for the published ones

        # The real images, and what the error budget makes of them.
        self.real = RealImages(
            config.inputs.corpus,
            stage.parents.corpus,
            self.extractor,
            reference=config.reference,
            num_floor=config.num_samples,
            num_train=config.probe_images,
            batch_size=config.batch_size,
            root=config.run.root,
        )
        autoencoder = self.model.autoencoder
        self.autoencoder = FixedBatches(
            autoencoder, batch_size=config.batch_size, stage=stage, precision=config.precision
        )
        self.held_out = HeldOutImages(
            self.real, config.inputs.latents, stage.parents, self.autoencoder, seed=config.seed
        )

    @cached_property
    def batches(self) -> dict[str, list[str]]:
        """Names of all items by what they hold; those of the real images' features are shared by all of a corpus."""
        size, num_samples = self.config.batch_size, self.config.num_samples
        counts = {
            "reconstruction": len(self.real.batches("val")),
            **dict.fromkeys(self.held_out.steps, len(self.real.batches("floor"))),
            "bound": -(-self._num_bounds // size),
            **dict.fromkeys(self.sampled, num_samples // size),
        }
        return {kind: [f"{kind}-{number:06}" for number in range(count)] for kind, count in counts.items()}

    @cached_property
    def absent(self) -> dict[str, str]:
        """Figures that the corpus or the configuration does not allow, each with its reason."""
        absent = absent_figures(
            samples=self.labels(range(self.config.num_samples)),
            reference=self.real.labels(self.config.reference),
            validation=self.real.labels("val"),
            probed=self.real.labels("train"),
            classes=self.stage.parents.unet.classes,
            dimension=self.extractor.dimension,
            num_held_out=len(self.real.indices["floor"]),
            num_bounds=self._num_bounds,
        )
        if self.prompts is not None and min(len(set(self.real.captions(each)) - {""}) for each in ("train", "val")) < 3:
            absent["retrieval"] = "fewer than 3 different captions in a split"
        if (side := self.stage.parents.corpus.image.resolution) < SSIM_WINDOW:
            absent["ssim"] = f"images of {side} pixels a side are smaller than its {SSIM_WINDOW}x{SSIM_WINDOW} windows"
        return absent | {step: why for step, why in self.held_out.absent.items() if step != "transformed"}

    def make(self, name: str) -> dict[str, Any]:
        """Reconstruct one batch of real images or measure its likelihood, or draw one batch of samples."""
        kind, number = name.rsplit("-", 1)
        if kind == "reconstruction":
            tensors = self._fidelity(int(number))
        elif kind == "bound":
            tensors = self._bounds(int(number))
        else:
            of_samples = kind not in self.held_out.steps
            tensors = self._samples(kind, int(number)) if of_samples else self.held_out.after(kind, int(number))
            images = tensors.pop("images")
            tensors["features"] = self.real.features_of(images)
            if of_samples:
                write_atomically(self._parts / f"{name}.images.safetensors", save({"images": images}))
        write_atomically(self._parts / f"{name}.safetensors", save(tensors))
        return {"samples": len(next(iter(tensors.values())))}

    @cached_property
    def text_batches(self) -> dict[RealSet, list[str]]:
        """Names of the items that hold text features of real images' captions; none for a model that reads no text."""
        if self.prompts is None:
            return {}
        return {name: [f"{self._encoder}-{batch}" for batch in self.real.batches(name)] for name in get_args(RealSet)}

    @property
    def calibration(self) -> str:
        """Name of the item of what is fitted to real images, beside their features."""
        return f"fitted-{self._encoder}"

    @cached_property
    def _encoder(self) -> str:
        return f"text_{digest_of(self.prompts.about)[:16]}" if self.prompts is not None else "images"

    def make_texts(self, item: str) -> dict[str, Any]:
        """Compute and store the text features of one batch of captions."""
        assert self.prompts is not None
        kind, number = item.split("-")[1:]
        name: RealSet = next(each for each in get_args(RealSet) if each == kind)
        captions = self.real.captions(name)[self.real.batch(int(number))]
        texts = torch.from_numpy(self.prompts.pooled(captions))
        write_atomically(self.real.folder / f"{item}.safetensors", save({"texts": texts}))
        return {"samples": len(captions)}

    def texts(self, name: RealSet) -> tuple[Tensor, list[str]]:
        """Return text features (n k) and captions of a set of real images."""
        return read_items(self.real.folder, self.text_batches[name], "texts"), self.real.captions(name)

    def read(self, names: Sequence[str], key: str) -> Tensor:
        """Return one tensor of all named items, concatenated."""
        return read_items(self._parts, names, key)

    def images(self, kind: str, number: int) -> np.ndarray:
        """Return one batch of a set of samples, uint8 (b h w c)."""
        return read_items(self._parts, [f"{self.batches[kind][number]}.images"], "images").numpy()

    def discard_tensors(self) -> None:
        """Remove the tensors of all items, once images and features are stored elsewhere."""
        for path in self._parts.glob("*.safetensors"):
            path.unlink()

    @property
    def _parts(self) -> Path:
        return self.stage.folder / "parts"

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
        return self.real.shards["val"].labels_and_captions(self.prompted(indices))

    def prompted(self, indices: range) -> np.ndarray:
        """Return the validation images whose captions samples are drawn for; each image once before any twice."""
        order = Order(FullShuffleConfig(), num_samples=len(self.real.shards["val"]), seed=0)
        return order.indices(indices.start, len(indices))

    def _conditions(self, labels: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        if self.prompts is None:
            return {"labels": labels}
        self.prompts.forget()  # An item depends on its name alone.
        return {"labels": labels, **as_tensors(self.prompts(captions))}

    def _noise(self, indices: Sequence[int], *, latent_size: int) -> Callable[[str], Tensor]:
        shape = (self.model.denoiser.latent_shape[0], latent_size, latent_size)
        return noise_of(self.config.seed, indices, shape=shape, device=self.model.device)

    def _fidelity(self, number: int) -> dict[str, Tensor]:
        """How well one batch of validation images is reconstructed."""
        real, _ = self.real.read("val", number)
        decoded = self.autoencoder.decode(self.autoencoder.encode(real).mode())
        found, expected = decoded.movedim(-1, 1), real.movedim(-1, 1)
        fidelity = {"psnr": psnr(found, expected)}
        return fidelity if "ssim" in self.absent else fidelity | {"ssim": ssim(found, expected)}

    @property
    def _num_bounds(self) -> int:
        likelihood = self.config.likelihood
        if isinstance(likelihood, NoBoundConfig):
            return 0
        return min(likelihood.num_images, len(self.real.shards["val"]))

    def _bounds(self, number: int) -> dict[str, Tensor]:
        """The likelihood of one batch of validation images with their own conditions."""
        self._load("")
        likelihood, size = self.config.likelihood, self.config.batch_size
        assert isinstance(likelihood, VariationalBoundConfig)
        first, last = number * size, min((number + 1) * size, self._num_bounds)

        # Filled up by repetition: a batch has one size.
        indices = np.resize(np.arange(first, last), size)
        batch = self.real.shards["val"].read(indices)
        conditions = self._conditions(torch.from_numpy(batch.labels), batch.captions)
        latent_size = batch.images.shape[1] // self.model.autoencoder.factor
        noise = self._noise(indices.tolist(), latent_size=latent_size)

        with self.stage.accelerator.autocast():
            terms = self.model.bound(to_unit_range(batch.images), conditions, config=likelihood, noise=noise)
        return {name: values[: last - first].contiguous() for name, values in terms.items()}

    def _samples(self, kind: str, number: int) -> dict[str, Tensor]:
        self._load(kind if kind in self.config.curve.points else "")
        guidance = self.config.guidance.model_copy(update={"scale": self._scales.get(kind, self.config.guidance.scale)})
        indices = range(number * self.config.batch_size, (number + 1) * self.config.batch_size)
        conditions = self._conditions(self.labels(indices), self.captions(indices))
        noise = self._noise(indices, latent_size=self.model.denoiser.latent_shape[1])
        with self.stage.accelerator.autocast():
            images = self.model.sample(
                noise("sample"),
                conditions,
                sampler=self.config.sampler,
                guidance=guidance,
                fresh_noise=lambda step: noise(f"sample/{step}"),
            )
        levels = finite_levels(
            images,
            names=[f"{kind}-{index:06}" for index in indices],
            stage=self.stage.name,
            precision=self.config.precision,
        )
        return {"images": torch.from_numpy(levels), "labels": self.labels(indices)}

    def _load(self, point: str) -> None:
        """Give the denoiser the weights of a point of the curve; "" for the published ones."""
        if point != self._loaded:
            weights = self._training.at(self.config.curve.points[point]) if point else self._training.published()
            self.model.denoiser.load_state_dict(weights)
            self._loaded = point


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
