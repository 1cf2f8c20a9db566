"""Conditioning: the embedding and tokens that a conditioner gives to the network, and their combination."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Conditioning(NamedTuple):
    """A condition as the network takes it; None where there is no such part."""

    embedding: Tensor | None = None  # pooled condition (b d), added to the time embedding
    tokens: Tensor | None = None  # sequence (b s token_width), attended to
    token_mask: Tensor | None = None  # which tokens there are, bool (b s)


class TextFeatures(NamedTuple):
    """Features of captions by a text encoder."""

    tokens: Tensor  # (b s d), float32; zero where a caption has ended
    pooled: Tensor  # (b d), float32; about unit variance over d


def combine(parts: Sequence[Conditioning]) -> Conditioning:
    """Add the pooled embeddings and line up the tokens of several conditions."""
    embeddings = [part.embedding for part in parts if part.embedding is not None]
    tokens = [part.tokens for part in parts if part.tokens is not None]
    masks = [part.token_mask for part in parts if part.token_mask is not None]
    return Conditioning(
        embedding=sum(embeddings[1:], start=embeddings[0]) if embeddings else None,
        tokens=torch.cat(tokens, dim=1) if tokens else None,
        token_mask=torch.cat(masks, dim=1) if masks else None,
    )
