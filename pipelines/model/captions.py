"""Features of captions: stored beside latents by encoding, computed in training, and of prompts when images are drawn.

Text encoders are frozen, so the features of a caption are computed once, or anew in each batch where space is dearer
than time. A digest of the encoder's files goes with them to the U-Net, which accepts prompts of no other encoder.
Features are stored and read by the name of their conditioner, ``NAME_tokens`` and ``NAME_pooled``.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from data.files import sha256_of
from data.loading import LatentBatch
from data.manifest import CaptionFeaturesInfo, LatentsManifest, captions_by_name, digest_of
from models.conditioning.text import FeatureName, TextConditionerConfig, tokens_and_pooled
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig, TextEncoderConfig
from models.denoiser import DenoiserConfig
from models.latent_diffusion import LatentDiffusion
from pipelines.runtime.config.errors import ConfigError

MAX_KEPT_CAPTIONS = 1_024


class NoTextConfig(BaseModel, frozen=True, extra="forbid"):
    """Captions are carried along, but no features of them are computed."""

    kind: Literal["none"] = "none"


class NamedEncodersConfig(BaseModel, frozen=True, extra="forbid"):
    """Several text encoders, each with the name of the text conditioner that reads its features."""

    kind: Literal["named"] = "named"  # a single encoder by itself has the name "text"
    encoders: Annotated[Mapping[FeatureName, TextEncoderConfig], Field(min_length=1)]  # name -> encoder


class StoredFeaturesConfig(BaseModel, frozen=True, extra="forbid"):
    """Features are read from beside the latents."""

    kind: Literal["stored"] = "stored"  # needs encode_latents.captions


class ComputedFeaturesConfig(BaseModel, frozen=True, extra="forbid"):
    """Features are computed from the captions beside the latents, in every batch anew, by the conditioner's encoder."""

    kind: Literal["computed"] = "computed"  # needs no space for features, but the encoder's time


CaptionFeaturesConfig = Annotated[
    NoTextConfig | MiniLMConfig | PretrainedConfig | NamedEncodersConfig, Field(discriminator="kind")
]
FeatureSourceConfig = Annotated[StoredFeaturesConfig | ComputedFeaturesConfig, Field(discriminator="kind")]


class CaptionEncoder:
    """A frozen text encoder that computes in batches of one size and keeps the features of recent captions.

    Args:
        config: The encoder.
        device: Its device.
        name: Name of the features.
        batch_size: Captions of one forward pass; fewer are filled up, since bits may depend on it.

    Raises:
        ValueError: The encoder's files are not there, or not what they should be.
    """

    def __init__(
        self, config: TextEncoderConfig, *, device: torch.device, name: str = "text", batch_size: int = 32
    ) -> None:
        self._encoder = config.build().to(device)
        self._tokens, self._pooled = tokens_and_pooled(name)
        self._batch_size = batch_size
        self._of_thread = threading.local()  # shards are encoded at once, and none may see what another has kept
        info = CaptionFeaturesInfo(
            kind=config.kind,
            encoder=digest_of({path.name: sha256_of(path) for path in self._encoder.files}),
            tokens=self._encoder.max_tokens,
            width=self._encoder.width,
            padding=self._encoder.padding,
            pooled=self._encoder.pooled,
        )
        #: The features in a manifest: the encoder's digest, their sizes, and what they are.
        self.about: dict[str, Any] = info.model_dump(exclude_defaults=True)

    @property
    def _kept(self) -> dict[str, dict[str, np.ndarray]]:
        kept: dict[str, dict[str, np.ndarray]] = self._of_thread.__dict__.setdefault("kept", {})
        return kept

    def forget(self) -> None:
        """Start anew, so that what comes next does not depend on what came before, not even in its last bits."""
        self._kept.clear()

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Return ``NAME_tokens`` (n s d) and ``NAME_pooled`` (n d), float32; zeros for an empty caption."""
        if len(self._kept) > MAX_KEPT_CAPTIONS:
            self.forget()
        new = [caption for caption in dict.fromkeys(captions) if caption and caption not in self._kept]
        for first in range(0, len(new), self._batch_size):
            self._encode(new[first : first + self._batch_size])
        nothing = {
            self._tokens: np.zeros((self._encoder.max_tokens, self._encoder.width), dtype=np.float32),
            self._pooled: np.zeros(self._encoder.width, dtype=np.float32),
        }
        rows = [self._kept[caption] if caption else nothing for caption in captions]
        return {name: np.stack([row[name] for row in rows]) for name in nothing}

    def _encode(self, captions: list[str]) -> None:
        found = self._encoder.encode((captions * self._batch_size)[: self._batch_size])
        tokens, pooled = found.tokens.cpu().numpy(), found.pooled.cpu().numpy()
        for row, caption in enumerate(captions):
            self._kept[caption] = {self._tokens: tokens[row], self._pooled: pooled[row]}


class CaptionEncoders:
    """Text encoders by the name of their features.

    Args:
        configs: The encoders by name.
        device: Their device.

    Raises:
        ValueError: An encoder's files are not there, or not what they should be.
    """

    def __init__(self, configs: Mapping[str, TextEncoderConfig], *, device: torch.device) -> None:
        self._encoders = {name: CaptionEncoder(config, device=device, name=name) for name, config in configs.items()}
        abouts = {name: encoder.about for name, encoder in self._encoders.items()}
        #: The features in a manifest: by name, or those of the name "text" alone.
        self.about: dict[str, Any] = abouts["text"] if abouts.keys() == {"text"} else abouts

    def forget(self) -> None:
        """Start anew; see ``CaptionEncoder.forget``."""
        for encoder in self._encoders.values():
            encoder.forget()

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the features of all encoders by name, as ``CaptionEncoder`` does."""
        return {name: rows for encoder in self._encoders.values() for name, rows in encoder(captions).items()}

    def pooled(self, captions: Sequence[str]) -> np.ndarray:
        """Return the pooled features of all encoders side by side, float32 (n d); zeros for an empty caption."""
        self.forget()
        found = self(captions)
        return np.concatenate([rows for name, rows in found.items() if name.endswith("_pooled")], axis=1)


class CaptionFeatures:
    """The features of captions that a denoiser reads in training; a part of the checkpoint when it computes them.

    Computed features are those that encoding would have stored, in the same dtype. They are computed from nothing but
    the batch, in batches of one size, so that a restart gives the same bits.

    Args:
        source: Origin of the features.
        denoiser: The model; its text conditioners name the encoders.
        latents: Manifest of the latents.
        device: Device of an encoder.

    Raises:
        ValueError: The latents lack the features, or there is no such encoder, or it has another width.
    """

    optional = True  # absent where the training began with stored features

    def __init__(
        self,
        source: FeatureSourceConfig,
        denoiser: DenoiserConfig,
        *,
        latents: LatentsManifest,
        device: torch.device,
    ) -> None:
        self._encoders: CaptionEncoders | None = None  # where features are computed
        self._dtype = np.dtype(latents.dtype)
        self._read = tuple(dict.fromkeys(field for each in text_conditioners(denoiser) for field in each.fields))
        about = latents.model_dump(mode="json", include={"text"}, exclude_unset=True).get("text")
        if isinstance(source, ComputedFeaturesConfig) and self._read:
            self._encoders = CaptionEncoders(encoders_of(denoiser), device=device)
            about = self._encoders.about
        check_features(denoiser, about)
        #: The features in a manifest; None without any.
        self.about: Mapping[str, Any] | None = about
        #: True where the denoiser reads captions at all.
        self.are_read = bool(self._read)
        #: True where captions are read with each latent, and names of the arrays that are read with it elsewhere.
        self.computes = self._encoders is not None
        self.stored = () if self.computes else self._read

    def of(self, batch: LatentBatch) -> dict[str, Tensor]:
        """Return the features of a batch's captions by field, in the dtype of storage; (n ...)."""
        if self._encoders is None:
            return as_tensors(batch.features)
        self._encoders.forget()
        found = self._encoders(batch.captions)
        return as_tensors({name: found[name].astype(self._dtype) for name in self._read})

    def tensors(self) -> dict[str, Tensor]:
        """The digests of the encoders that compute here: the same on every rank and after every restart."""
        assert self._encoders is not None
        return {
            "encoder" if name == "text" else f"encoder_{name}": torch.tensor(
                list(bytes.fromhex(info.encoder)), dtype=torch.uint8
            )
            for name, info in captions_by_name(self._encoders.about).items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Refuse a checkpoint of another encoder.

        Raises:
            ConfigError: Naming both.
        """
        for name, mine in self.tensors().items():
            if not tensors[name].equal(mine):
                before, now = (bytes(each.tolist()).hex()[:12] for each in (tensors[name], mine))
                raise ConfigError(
                    f"train_unet.captions: training began with the text encoder {before}, the one here is {now}, whose "
                    "features mean nothing to the U-Net. Restore the encoder's files, or train anew."
                )


def text_conditioners(denoiser: DenoiserConfig) -> list[TextConditionerConfig]:
    """Return the conditioners that read captions."""
    return [each for each in denoiser.conditioners if isinstance(each, TextConditionerConfig)]


def encoders_of(config: CaptionFeaturesConfig | DenoiserConfig) -> dict[str, TextEncoderConfig]:
    """Return the encoders that compute features of captions by name: those to store, or those that a model reads."""
    if isinstance(config, DenoiserConfig):
        return {conditioner.name: conditioner.encoder for conditioner in text_conditioners(config)}
    if isinstance(config, NoTextConfig):
        return {}
    return dict(config.encoders) if isinstance(config, NamedEncodersConfig) else {"text": config}


def blank_features(denoiser: DenoiserConfig) -> dict[str, Tensor]:
    """Return the features of one image without a caption, as the model reads them: zeros of their shapes."""
    features: dict[str, Tensor] = {}
    for conditioner in text_conditioners(denoiser):
        tokens, pooled = tokens_and_pooled(conditioner.name)
        features[tokens] = torch.zeros(1, conditioner.encoder.max_tokens, conditioner.width)
        features[pooled] = torch.zeros(1, conditioner.width)
    return features


def check_features(denoiser: DenoiserConfig, about: Mapping[str, Any] | None) -> None:
    """Refuse a text conditioner that cannot read the features that there are.

    Args:
        denoiser: The model.
        about: The features as in the latents' manifest; None when there are none.

    Raises:
        ValueError: There are none, or they have another width or length, or are of another kind.
    """
    found = captions_by_name(about)
    for conditioner in text_conditioners(denoiser):
        if not found:
            raise ValueError(
                "a conditioner of kind 'text' needs the features of captions, and inputs.latents holds none. Set "
                'encode_latents.captions = { kind = "minilm" } and encode again, have them computed with '
                'train_unet.captions = { kind = "computed" }, or remove the conditioner.'
            )
        if conditioner.name not in found:
            raise ValueError(
                f"the text conditioner reads the features named {conditioner.name!r}, but there are those of "
                f"{sorted(found)}. Change its name, or give encode_latents.captions of kind 'named' an encoder of it "
                "and encode again."
            )
        encoder, info = conditioner.encoder, found[conditioner.name]
        asked: dict[str, Any] = {"kind": encoder.kind, "width": conditioner.width, "tokens": encoder.max_tokens}
        if isinstance(encoder, PretrainedConfig):
            # A null that the encoder computes must be of the same features; else "auto" follows those that there are.
            encoder = encoder.resolved() if conditioner.null == "empty_caption" else encoder
            options = {"padding": encoder.padding, "pooled": encoder.pooled}
            asked |= {key: value for key, value in options.items() if value != "auto"}
        if wrong := {key: value for key, value in asked.items() if getattr(info, key) != value}:
            held = ", ".join(f"{key} = {getattr(info, key)}" for key in wrong)
            given = ", ".join(f"{key} = {value}" for key, value in wrong.items())
            raise ValueError(
                f"the text conditioner has {given}, but its features have {held}. Give the conditioner the encoder "
                "(and its other keys) that encode_latents.captions has, and that width."
            )


def prompt_encoder(model: LatentDiffusion) -> CaptionEncoders | None:
    """Return the encoders of a trained model's prompts, None for a model that reads no text.

    Raises:
        ValueError: An encoder is not there, or is another one than that of the training.
    """
    configs, about = encoders_of(model.denoiser.config), captions_by_name(model.caption_features)
    if not configs or not about:
        return None
    for name, config in configs.items():
        if isinstance(config, PretrainedConfig) and name in about:
            # As in training, also where an older version trained: "auto" was another choice then.
            configs[name] = config.model_copy(update=about[name].model_dump(include={"padding", "pooled"}))
    encoders = CaptionEncoders(configs, device=model.device)
    for name, info in captions_by_name(encoders.about).items():
        if info != about.get(name):
            raise ValueError(
                f"the text encoder here is {info}, but the U-Net was trained on features of {about.get(name)}. A "
                "prompt of another encoder means nothing to it: restore the encoder that was used."
            )
    return encoders


def as_tensors(features: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return features as fields of a batch."""
    return {name: torch.from_numpy(values) for name, values in features.items()}
