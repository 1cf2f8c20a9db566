"""Captions to features: what encoding stores beside a latent, and what a prompt becomes when images are drawn.

The text encoder is frozen, so the features of a caption are computed once. A digest of the encoder's files goes with
them from the latents to the U-Net: a prompt of another encoder would mean nothing to it.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from data.commit import sha256_of
from data.manifest import digest_of
from models.conditioning import TextConditionerConfig
from models.conditioning.text import TEXT_POOLED, TEXT_TOKENS
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig
from models.denoiser import DenoiserConfig

MAX_KEPT_CAPTIONS = 1_024
FEATURES = (TEXT_TOKENS, TEXT_POOLED)


class NoTextConfig(BaseModel, frozen=True, extra="forbid"):
    """Captions are carried along, but no features of them are computed."""

    kind: Literal["none"] = "none"


CaptionFeaturesConfig = Annotated[NoTextConfig | MiniLMConfig | PretrainedConfig, Field(discriminator="kind")]


class CaptionEncoder:
    """A frozen text encoder that works in batches of one size and remembers recent captions.

    Args:
        config: The encoder.
        device: Where it computes.
        batch_size: Captions of one forward pass; fewer are filled up, since bits may depend on it.

    Raises:
        ValueError: The encoder's files are not there, or not what they should be.
    """

    def __init__(self, config: MiniLMConfig | PretrainedConfig, *, device: torch.device, batch_size: int = 32) -> None:
        self._encoder = config.build().to(device)
        self._batch_size = batch_size
        self._of_thread = threading.local()  # shards are encoded at once, and none may see what another has kept
        #: What a manifest says of the features: the encoder's digest, and their sizes.
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
    """Refuse a text conditioner that cannot read the features which the latents hold.

    Args:
        denoiser: The model.
        about: What the latents' manifest says of their captions' features; None when they have none.

    Raises:
        ValueError: There are none, or they have another width or length.
    """
    for conditioner in text_conditioners(denoiser):
        if about is None:
            raise ValueError(
                "a conditioner of kind 'text' needs the features of captions, and inputs.latents holds none. Set "
                'encode_latents.captions = { kind = "minilm" } and encode again, or remove the conditioner.'
            )
        encoder = conditioner.encoder
        asked = {"kind": encoder.kind, "width": conditioner.width, "tokens": encoder.max_tokens}
        if wrong := {name: size for name, size in asked.items() if about[name] != size}:
            held = ", ".join(f"{name} = {about[name]}" for name in wrong)
            given = ", ".join(f"{name} = {size}" for name, size in wrong.items())
            raise ValueError(
                f"the text conditioner has {given}, but the features in inputs.latents have {held}. Give the "
                "conditioner the encoder (and its max_tokens) that encode_latents.captions has, and that width."
            )


def prompt_encoder(
    denoiser: DenoiserConfig, about: Mapping[str, Any] | None, *, device: torch.device
) -> CaptionEncoder | None:
    """Return the encoder of a trained model's prompts, None for a model that reads no text.

    Args:
        denoiser: The model.
        about: What its manifest says of the features that it was trained on.
        device: Where the encoder computes.

    Raises:
        ValueError: The encoder is not there, or is another one than that of the training.
    """
    conditioners = text_conditioners(denoiser)
    if not conditioners or about is None:
        return None
    encoder = CaptionEncoder(conditioners[0].encoder, device=device)
    if encoder.about != about:
        raise ValueError(
            f"the text encoder here is {encoder.about}, but the U-Net was trained on features of {dict(about)}. A "
            "prompt of another encoder means nothing to it: restore the encoder that was used."
        )
    return encoder


def as_tensors(features: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return features as fields of a batch."""
    return {name: torch.from_numpy(values) for name, values in features.items()}
