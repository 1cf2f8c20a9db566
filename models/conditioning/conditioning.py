"""Conditioning: the output of a conditioner, and of a text encoder."""

from typing import NamedTuple

from torch import Tensor


class Conditioning(NamedTuple):
    """A condition as the network takes it; None where there is no such part."""

    embedding: Tensor | None = None  # pooled condition (b d), added to the time embedding
    tokens: Tensor | None = None  # sequence (b s token_width), attended to
    token_mask: Tensor | None = None  # which tokens there are, bool (b s)


class TextFeatures(NamedTuple):
    """Features of captions by a text encoder."""

    tokens: Tensor  # (b s d), float32; zero where there is no token to attend to
    pooled: Tensor  # (b d), float32; about unit variance over d
