"""Captions as a condition: tokens to attend to, a pooled vector to add, or both."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from models.conditioning.conditioning import Conditioning, TextFeatures
from models.conditioning.text_encoder import MiniLMConfig, TextEncoderConfig

TEXT_TOKENS, TEXT_POOLED = "text_tokens", "text_pooled"  # what features of captions are called in a batch


class TextConditionerConfig(BaseModel, frozen=True, extra="forbid"):
    """Condition on the caption of the image, by the features of a frozen text encoder."""

    kind: Literal["text"] = "text"
    drop_probability: Annotated[float, Field(ge=0, le=1)] = 0.1  # per sample: train without the caption, for guidance
    width: PositiveInt = 384  # of the encoder's features; 384 for MiniLM
    use: Literal["tokens", "pooled", "both"] = "both"  # tokens are attended to, the pooled vector is added
    null: Literal["learned", "empty_caption"] = "learned"  # what stands for no caption
    encoder: TextEncoderConfig = MiniLMConfig()  # what turns captions into features

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a batch that it reads."""
        return {"tokens": (TEXT_TOKENS,), "pooled": (TEXT_POOLED,), "both": (TEXT_TOKENS, TEXT_POOLED)}[self.use]

    @property
    def token_width(self) -> int:
        """Width of the tokens that it gives, 0 if it gives none."""
        return self.width if self.use in ("tokens", "both") else 0

    def build(self, *, num_classes: int, embedding_width: int) -> "TextConditioner":
        """The conditioner, whose pooled vector becomes one of ``embedding_width``; classes do not matter to it.

        An empty caption needs the encoder here, so this loads it; otherwise the features of a batch are enough.
        """
        conditioner = TextConditioner(self, embedding_width=embedding_width)
        if self.null == "empty_caption":
            with torch.device("cpu"):  # real numbers, also where the network is only sketched on the meta device
                features = self.encoder.build().encode([""])
            conditioner.set_null(features)
        return conditioner


class TextConditioner(nn.Module):
    """Features of captions, computed by the encoder beforehand, to a ``Conditioning``.

    Reads ``text_tokens`` (b s width), zero where a caption has ended, and ``text_pooled`` (b width). An image without a
    caption has zeros everywhere and gets the null, as one whose caption is dropped.
    """

    null_tokens: Tensor
    null_pooled: Tensor

    def __init__(self, config: TextConditionerConfig, *, embedding_width: int) -> None:
        super().__init__()
        self.uses_tokens = config.use in ("tokens", "both")
        self.uses_pooled = config.use in ("pooled", "both")
        if self.uses_pooled:
            self.project = nn.Linear(config.width, embedding_width)
        # A learned null is one token, repeated: attending to copies is attending to one.
        length = config.encoder.max_tokens if config.null == "empty_caption" else 1
        shapes = {"null_tokens": (length, config.width)} if self.uses_tokens else {}
        shapes |= {"null_pooled": (1, config.width)} if self.uses_pooled else {}
        for name, shape in shapes.items():
            if config.null == "learned":
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.02))
            else:
                self.register_buffer(name, torch.zeros(shape))

    def set_null(self, features: TextFeatures) -> None:
        """Let the features of one caption, (1 s width) and (1 width), stand for no caption."""
        for name, feature in (("null_tokens", features.tokens[0]), ("null_pooled", features.pooled)):
            if not hasattr(self, name):
                continue
            if feature.shape[1] != getattr(self, name).shape[1]:
                raise ValueError(
                    f"The text encoder gives features of width {feature.shape[1]}, but the text conditioner has "
                    f"width = {getattr(self, name).shape[1]}. Set its width to {feature.shape[1]}."
                )
            getattr(self, name).copy_(feature)

    def forward(self, conditions: Mapping[str, Tensor], dropped: Tensor) -> Conditioning:
        """Fields of a batch, and which samples (b,) bool go without their caption."""
        embedding, tokens, token_mask = None, None, None
        if self.uses_pooled:
            embedding = self.project(self.pooled(conditions, dropped))  # (b embedding_width)
        if self.uses_tokens:
            given = conditions[TEXT_TOKENS].to(self.null_tokens.dtype)
            absent = dropped | (given == 0).flatten(1).all(dim=1)
            tokens = torch.where(absent[:, None, None], self.null_tokens, given)  # (b s width)
            token_mask = (tokens != 0).any(dim=-1)
        return Conditioning(embedding=embedding, tokens=tokens, token_mask=token_mask)

    def pooled(self, conditions: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Input of the projection: the pooled vectors (b width), the null's among them; arguments as in ``forward``."""
        given = conditions[TEXT_POOLED].to(self.null_pooled.dtype)
        absent = dropped | (given == 0).all(dim=1)
        return torch.where(absent[:, None], self.null_pooled, given)
