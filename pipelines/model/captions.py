"""Features of captions: stored beside latents by encoding, computed in training, and of prompts when images are drawn.

The text encoder is frozen, so the features of a caption are computed once, or anew in each batch where space is dearer
than time. A digest of the encoder's files goes with them to the U-Net, which accepts prompts of no other encoder.
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
from data.manifest import LatentsManifest, digest_of
from models.conditioning.text import TEXT_POOLED, TEXT_TOKENS, TextConditionerConfig
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig
from models.denoiser import DenoiserConfig
from models.latent_diffusion import LatentDiffusion
from pipelines.runtime.config.errors import ConfigError

MAX_KEPT_CAPTIONS = 1_024
FEATURES = (TEXT_TOKENS, TEXT_POOLED)


class NoTextConfig(BaseModel, frozen=True, extra="forbid"):
    """Captions are carried along, but no features of them are computed."""

    kind: Literal["none"] = "none"


class StoredFeaturesConfig(BaseModel, frozen=True, extra="forbid"):
    """Features are read from beside the latents."""

    kind: Literal["stored"] = "stored"  # needs encode_latents.captions


class ComputedFeaturesConfig(BaseModel, frozen=True, extra="forbid"):
    """Features are computed from the captions beside the latents, in every batch anew, by the conditioner's encoder."""

    kind: Literal["computed"] = "computed"  # needs no space for features, but the encoder's time


CaptionFeaturesConfig = Annotated[NoTextConfig | MiniLMConfig | PretrainedConfig, Field(discriminator="kind")]
FeatureSourceConfig = Annotated[StoredFeaturesConfig | ComputedFeaturesConfig, Field(discriminator="kind")]


class CaptionEncoder:
    """A frozen text encoder that computes in batches of one size and keeps the features of recent captions.

    Args:
        config: The encoder.
        device: Its device.
        batch_size: Captions of one forward pass; fewer are filled up, since bits may depend on it.

    Raises:
        ValueError: The encoder's files are not there, or not what they should be.
    """

    def __init__(self, config: MiniLMConfig | PretrainedConfig, *, device: torch.device, batch_size: int = 32) -> None:
        self._encoder = config.build().to(device)
        self._batch_size = batch_size
        self._of_thread = threading.local()  # shards are encoded at once, and none may see what another has kept
        #: The features in a manifest: the encoder's digest, and their sizes.
        self.about: dict[str, Any] = {
            "kind": config.kind,
            "encoder": digest_of({path.name: sha256_of(path) for path in self._encoder.files}),
            "tokens": self._encoder.max_tokens,
            "width": self._encoder.width,
        }

    @property
    def _kept(self) -> dict[str, dict[str, np.ndarray]]:
        kept: dict[str, dict[str, np.ndarray]] = self._of_thread.__dict__.setdefault("kept", {})
        return kept

    def forget(self) -> None:
        """Start anew, so that what comes next does not depend on what came before, not even in its last bits."""
        self._kept.clear()

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Return ``text_tokens`` (n s d) and ``text_pooled`` (n d), float32; zeros for an empty caption."""
        if len(self._kept) > MAX_KEPT_CAPTIONS:
            self.forget()
        new = [caption for caption in dict.fromkeys(captions) if caption and caption not in self._kept]
        for first in range(0, len(new), self._batch_size):
            self._encode(new[first : first + self._batch_size])
        nothing = {
            TEXT_TOKENS: np.zeros((self._encoder.max_tokens, self._encoder.width), dtype=np.float32),
            TEXT_POOLED: np.zeros(self._encoder.width, dtype=np.float32),
        }
        rows = [self._kept[caption] if caption else nothing for caption in captions]
        return {name: np.stack([row[name] for row in rows]) for name in FEATURES}

    def _encode(self, captions: list[str]) -> None:
        found = self._encoder.encode((captions * self._batch_size)[: self._batch_size])
        tokens, pooled = found.tokens.cpu().numpy(), found.pooled.cpu().numpy()
        for row, caption in enumerate(captions):
            self._kept[caption] = {TEXT_TOKENS: tokens[row], TEXT_POOLED: pooled[row]}


class CaptionFeatures:
    """The features of captions that a denoiser reads in training; a part of the checkpoint when it computes them.

    Computed features are those that encoding would have stored, in the same dtype. They are computed from nothing but
    the batch, in batches of one size, so that a restart gives the same bits.

    Args:
        source: Origin of the features.
        denoiser: The model; its text conditioners name the encoder.
        latents: Manifest of the latents.
        device: Device of an encoder.

    Raises:
        ValueError: The latents do not have the features, or there is no such encoder, or it has another width.
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
        self._encoder: CaptionEncoder | None = None  # where features are computed
        self._dtype = np.dtype(latents.dtype)
        self._read = tuple(field for field in denoiser.fields if field in FEATURES)
        about = latents.text.model_dump() if latents.text else None
        if isinstance(source, ComputedFeaturesConfig) and self._read:
            self._encoder = CaptionEncoder(text_conditioners(denoiser)[0].encoder, device=device)
            about = self._encoder.about
        check_features(denoiser, about)
        #: The features in a manifest; None without any.
        self.about: Mapping[str, Any] | None = about
        #: True where the denoiser reads captions at all.
        self.are_read = bool(self._read)
        #: True where captions are read with each latent, and names of the arrays that are read with it elsewhere.
        self.computes = self._encoder is not None
        self.stored = () if self.computes else self._read

    def of(self, batch: LatentBatch) -> dict[str, Tensor]:
        """Return the features of a batch's captions by field, in the dtype of storage; (n ...)."""
        if self._encoder is None:
            return as_tensors(batch.features)
        self._encoder.forget()
        found = self._encoder(batch.captions)
        return as_tensors({name: found[name].astype(self._dtype) for name in self._read})

    def tensors(self) -> dict[str, Tensor]:
        """The digest of the encoder that computes here: it must be the same on every rank and after every restart."""
        assert self._encoder is not None
        return {"encoder": torch.tensor(list(bytes.fromhex(self._encoder.about["encoder"])), dtype=torch.uint8)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Refuse a checkpoint of another encoder.

        Raises:
            ConfigError: Naming both.
        """
        mine = self.tensors()["encoder"]
        if not tensors["encoder"].equal(mine):
            before, now = (bytes(each.tolist()).hex()[:12] for each in (tensors["encoder"], mine))
            raise ConfigError(
                f"train_unet.captions: training began with the text encoder {before}, the one here is {now}, whose "
                "features mean nothing to the U-Net. Restore the encoder's files, or train anew."
            )


def text_conditioners(denoiser: DenoiserConfig) -> list[TextConditionerConfig]:
    """Return the conditioners that read captions."""
    return [each for each in denoiser.conditioners if isinstance(each, TextConditionerConfig)]


def blank_features(denoiser: DenoiserConfig) -> dict[str, Tensor]:
    """Return the features of one image without a caption, as the model reads them: zeros of their shapes."""
    features: dict[str, Tensor] = {}
    for conditioner in text_conditioners(denoiser):
        features[TEXT_TOKENS] = torch.zeros(1, conditioner.encoder.max_tokens, conditioner.width)
        features[TEXT_POOLED] = torch.zeros(1, conditioner.width)
    return features


def check_features(denoiser: DenoiserConfig, about: Mapping[str, Any] | None) -> None:
    """Refuse a text conditioner that cannot read the features that there are.

    Args:
        denoiser: The model.
        about: The features as in the latents' manifest; None when there are none.

    Raises:
        ValueError: There are none, or they have another width or length.
    """
    for conditioner in text_conditioners(denoiser):
        if about is None:
            raise ValueError(
                "a conditioner of kind 'text' needs the features of captions, and inputs.latents holds none. Set "
                'encode_latents.captions = { kind = "minilm" } and encode again, have them computed with '
                'train_unet.captions = { kind = "computed" }, or remove the conditioner.'
            )
        encoder = conditioner.encoder
        asked = {"kind": encoder.kind, "width": conditioner.width, "tokens": encoder.max_tokens}
        if wrong := {name: size for name, size in asked.items() if about[name] != size}:
            held = ", ".join(f"{name} = {about[name]}" for name in wrong)
            given = ", ".join(f"{name} = {size}" for name, size in wrong.items())
            raise ValueError(
                f"the text conditioner has {given}, but its features have {held}. Give the conditioner the encoder "
                "(and its max_tokens) that encode_latents.captions has, and that width."
            )


def prompt_encoder(model: LatentDiffusion) -> CaptionEncoder | None:
    """Return the encoder of a trained model's prompts, None for a model that reads no text.

    Raises:
        ValueError: The encoder is not there, or is another one than that of the training.
    """
    conditioners, about = text_conditioners(model.denoiser.config), model.caption_features
    if not conditioners or about is None:
        return None
    encoder = CaptionEncoder(conditioners[0].encoder, device=model.device)
    if encoder.about != about:
        raise ValueError(
            f"the text encoder here is {encoder.about}, but the U-Net was trained on features of {dict(about)}. A "
            "prompt of another encoder means nothing to it: restore the encoder that was used."
        )
    return encoder


def as_tensors(features: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return features as fields of a batch."""
    return {name: torch.from_numpy(values) for name, values in features.items()}
