"""Experiment as a whole: what a later stage would refuse is said by the first one that can know it.

Each stage checks its own table against its inputs. This module compares the parts of all tables that must suit each
other and the corpus, and looks for the extras, weights and encoders that any of them needs. It stands below the stages,
which know no other stage.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from data.manifest import CorpusManifest, ImageShape, read_input
from data.order.order import FullShuffleConfig, OrderConfig, WeightedConfig
from models.autoencoder.objective import LPIPSTerm, VAEObjectiveConfig
from models.autoencoder.perceptual import check_weights_file
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from models.conditioning.text import TextConditionerConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.likelihood import BoundConfig, NoBoundConfig, VariationalBoundConfig
from models.diffusion.objective import check_sampling_start
from models.diffusion.samplers import DDIMConfig, SamplerConfig
from models.features import FeatureExtractorConfig
from models.features.scattering import ScatteringConfig
from pipelines.model.captions import (
    CaptionFeaturesConfig,
    ComputedFeaturesConfig,
    FeatureSourceConfig,
    NoTextConfig,
    StoredFeaturesConfig,
    check_features,
    encoders_of,
    text_conditioners,
)
from pipelines.model.start import RandomStart, StartConfig, check_start
from pipelines.model.validation import GridConfig
from pipelines.model.weights import check_sampler_suits
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import changed_on_command_line, given_experiment, load_config, merged_tree
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, CommandConfig, StageConfig


class StageTable(CommandConfig, extra="ignore"):
    """Keys of a stage's table that another table, the corpus or this machine must suit."""

    inputs: Mapping[str, str] = {}


class TrainVAETable(StageTable):
    """Those of [train_vae]."""

    network: VAEConfig = VAEConfig()
    start: StartConfig = RandomStart()
    objective: VAEObjectiveConfig = VAEObjectiveConfig()
    order: OrderConfig = FullShuffleConfig()
    extractor: FeatureExtractorConfig = ScatteringConfig()


class EncodeLatentsTable(StageTable):
    """Those of [encode_latents]."""

    flipped: bool = False
    captions: CaptionFeaturesConfig = NoTextConfig()


class TrainUNetTable(StageTable):
    """Those of [train_unet]."""

    denoiser: DenoiserConfig = DenoiserConfig()
    start: StartConfig = RandomStart()
    order: OrderConfig = FullShuffleConfig()
    captions: FeatureSourceConfig = StoredFeaturesConfig()
    flip_probability: float = 0.0
    grid: GridConfig = GridConfig()
    validate_samples: int = 0
    extractor: FeatureExtractorConfig = ScatteringConfig()


class EvaluateTable(StageTable):
    """Those of [evaluate]."""

    sampler: SamplerConfig = DDIMConfig(num_steps=50)
    extractor: FeatureExtractorConfig = ScatteringConfig()
    likelihood: BoundConfig = NoBoundConfig()


COMPARES = "it compares with validation images, and the corpus has none"
TABLES: Mapping[str, type[StageTable]] = {
    "train_vae": TrainVAETable,
    "encode_latents": EncodeLatentsTable,
    "train_unet": TrainUNetTable,
    "evaluate": EvaluateTable,
}


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """Facts of a corpus that later stages depend on; None is not known yet."""

    image: ImageShape
    classes: Sequence[str] | None = None
    has_validation: bool | None = None
    has_captions: bool | None = None

    @classmethod
    def of(cls, corpus: CorpusManifest) -> "CorpusFacts":
        """Return those of a finished corpus."""
        return cls(image=corpus.image, classes=corpus.classes, has_validation=bool(corpus.splits.get("val")))


def check_later_stages(config: StageConfig, *, stage: str, corpus: CorpusFacts | None) -> None:
    """Check what the stages behind ``stage`` would refuse, as the experiment file has them.

    What the file alone says is refused. Where the command line has changed the stage's own table, it may change theirs
    as well, so that what does not fit is a warning. Tables that the file lacks are of nobody's concern.

    Args:
        config: Of the stage.
        stage: Its name.
        corpus: What is known of the corpus; None leaves out what depends on it.

    Raises:
        ConfigError: With all that does not fit.
    """
    path = given_experiment()
    if path is None:  # called from Python
        return
    later = list(STAGE_FOLDERS)[list(STAGE_FOLDERS).index(stage) + 1 :]
    tables: dict[str, Any] = {stage: config}
    found = []
    for name in later:
        words = ["--config", path]
        try:
            if merged_tree(TABLES[name], table=name, argv=words)[1]:  # keys that the file gives
                tables[name] = load_config(TABLES[name], table=name, argv=words)
        except ConfigError as error:
            found.append(str(error))
    found += [line for line in misfits(tables, corpus) if line.startswith(tuple(later))]
    if not found:
        return
    text = "a later stage would refuse this experiment:\n    " + "\n    ".join(found)
    if not changed_on_command_line():
        raise ConfigError(f"{text}\n  Mend it now: the stages before it would work for nothing.")
    # From one rank alone, since all find the same.
    logging.getLogger(f"latentline.{stage}").info(f"warning: {text}\n  unless its own command line changes that")


def misfits(tables: Mapping[str, Any], corpus: CorpusFacts | None) -> Iterator[str]:
    """Yield "STAGE.KEY: why and what to do" for all that does not fit.

    Args:
        tables: Table by stage: the one of ``TABLES``, or the stage's whole configuration. What needs one that is
            absent is left out, and so is what depends on inputs that a table takes from elsewhere.
        corpus: What is known of the corpus.
    """
    for key, check in _checks(tables, corpus):
        try:
            check()
        except (ValueError, OSError) as error:
            yield f"{key}: {error}"


def _checks(tables: Mapping[str, Any], corpus: CorpusFacts | None) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each check with the key that it is about; it raises ValueError."""
    vae, latents, unet, evaluation = (tables.get(stage) for stage in TABLES)
    image = corpus.image if corpus is not None else None

    # The autoencoder, on the corpus's images.
    if vae is not None:
        if image is not None:
            yield "train_vae.network.channels", lambda: check_levels(vae.network, image.resolution)
            yield "train_vae.start", lambda: check_start(vae.start, _autoencoder(vae.network, image))
            sizes = {"resolution": image.resolution, "latent_size": image.resolution // vae.network.factor}
            yield "train_vae.objective", lambda: vae.objective.check_sizes(**sizes)
        yield "train_vae.extractor", vae.extractor.check
        yield "train_vae.order", lambda: _check_order(vae.order, corpus)
        if isinstance(vae.objective.perceptual, LPIPSTerm):
            yield "train_vae.objective.perceptual", lambda: check_weights_file(vae.objective.perceptual.weights)

    # The latents, and the features of their captions.
    if latents is not None:
        for encoder in encoders_of(latents.captions).values():
            yield "encode_latents.captions", encoder.check
        if folder := _given_input(latents, "vae"):  # such as a published one
            yield "encode_latents.inputs.vae", lambda: read_input("vae", folder)

    # The U-Net, on those.
    if unet is not None:
        yield "train_unet.denoiser", lambda: _check_denoiser(unet, vae, corpus)
        yield "train_unet.denoiser.conditioners", lambda: _check_captions(unet, latents, corpus)
        yield "train_unet.flip_probability", lambda: _check_flips(unet, latents)
        yield "train_unet.order", lambda: _check_order(unet.order, corpus)
        yield "train_unet.grid.sampler", lambda: check_sampler_suits(unet.grid.sampler, unet.denoiser)
        if unet.validate_samples:
            yield "train_unet.extractor", unet.extractor.check
            if corpus is not None and corpus.has_validation is False:
                yield "train_unet.validate_samples", lambda: _refuse(COMPARES)

    # The samples, and the images and features that they are compared by.
    if evaluation is not None:
        yield "evaluate.extractor", evaluation.extractor.check
        if unet is not None and not _given_input(evaluation, "unet"):
            yield "evaluate.sampler", lambda: check_sampler_suits(evaluation.sampler, unet.denoiser)
            if isinstance(bound := evaluation.likelihood, VariationalBoundConfig):
                yield "evaluate.likelihood", lambda: check_sampler_suits(bound.sampler, unet.denoiser)
        if corpus is not None and corpus.has_validation is False and not _given_input(evaluation, "corpus"):
            yield "evaluate", lambda: _refuse(COMPARES)


def check_levels(network: VAEConfig, resolution: int) -> None:
    """Refuse images that the autoencoder cannot halve as often as it has levels.

    Raises:
        ValueError: Naming resolutions that it can.
    """
    factor = network.factor
    if resolution % factor:
        raise ValueError(
            f"there are {len(network.channels)} levels, so images shrink to 1/{factor}; {resolution} pixels are no "
            f"multiple of {factor}. Use fewer levels, or prepare the corpus at "
            f"{resolution // factor * factor or factor} or {-(-resolution // factor) * factor} pixels."
        )


def _check_order(order: OrderConfig, corpus: CorpusFacts | None) -> None:
    if isinstance(order, WeightedConfig) and order.by == "class" and corpus is not None and corpus.classes is not None:
        if not corpus.classes:
            _refuse("a weighted order needs classes, and the corpus has none. Use another order")
        if unknown := sorted(set(order.weights) - set(corpus.classes)):
            _refuse(f"weights names {unknown[0]!r}, but the classes are {', '.join(corpus.classes)}")


def _check_denoiser(unet: Any, vae: Any, corpus: CorpusFacts | None) -> None:
    """Build the denoiser without numbers, as far as its latents and the number of its classes are known."""
    if corpus is None or vae is None or any(_given_input(unet, name) for name in ("latents", "vae")):
        return
    conditioners = tuple(
        # An empty caption as the null would load the encoder.
        each.model_copy(update={"null": "learned"}) if isinstance(each, TextConditionerConfig) else each
        for each in unet.denoiser.conditioners
    )
    if (size := corpus.image.resolution // vae.network.factor) < 1:
        return  # which is the autoencoder's mistake
    with torch.device("meta"):
        denoiser = Denoiser(
            unet.denoiser.model_copy(update={"conditioners": conditioners}),
            latent_channels=vae.network.latent_channels,
            latent_size=size,
            num_classes=1 if corpus.classes is None else len(corpus.classes),
        )
    check_sampling_start(unet.denoiser.objective, denoiser.process)
    # Shapes of weights depend on the number of classes and on what the null of a caption is.
    known = corpus.classes is not None and conditioners == unet.denoiser.conditioners
    check_start(unet.start, denoiser, shapes=known)


def _check_captions(unet: Any, latents: Any, corpus: CorpusFacts | None) -> None:
    """Refuse text conditioners whose features nobody will compute, and those of a corpus without captions."""
    conditioners = text_conditioners(unet.denoiser)
    if not conditioners or _given_input(unet, "latents"):
        return
    if corpus is not None and corpus.has_captions is False:
        _refuse(
            "a conditioner of kind 'text' needs captions, and the first images of the corpus have none. Use a source "
            "with captions, or remove the conditioner"
        )
    if isinstance(unet.captions, ComputedFeaturesConfig):
        for encoder in encoders_of(unet.denoiser).values():
            encoder.check()
    elif latents is not None:
        stored = encoders_of(latents.captions)
        if not stored:
            check_features(unet.denoiser, None)
        if lacking := sorted({each.name for each in conditioners} - stored.keys()):
            _refuse(
                f"the text conditioner reads the features named {lacking[0]!r}, but encode_latents.captions stores "
                f"those of {sorted(stored)}. Give both one name"
            )


def _check_flips(unet: Any, latents: Any) -> None:
    if unet.flip_probability and latents is not None and not latents.flipped and not _given_input(unet, "latents"):
        _refuse(
            f"it is {unet.flip_probability}, but encode_latents.flipped = false stores no mirrored latents. Set that "
            "to true, or the probability to 0"
        )


def _autoencoder(network: VAEConfig, image: ImageShape) -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL(network, image_channels=image.channels)


def _given_input(table: Any, name: str) -> str:
    """Return the folder of an input where a table takes it from elsewhere than its own run; else empty."""
    if isinstance(table.inputs, BaseModel):
        folder = str(getattr(table.inputs, name, ""))
        return "" if Path(folder) == Path(table.run.root) / name else folder
    return str(table.inputs.get(name, ""))


def _refuse(why: str) -> None:
    raise ValueError(f"{why}.")
