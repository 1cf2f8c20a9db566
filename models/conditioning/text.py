"""Captions as a condition: tokens to attend to, a pooled vector to add, or both."""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from models.conditioning.conditioning import Conditioning, TextFeatures
from models.conditioning.text_encoder import MiniLMConfig, TextEncoderConfig

FeatureName = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")]


def tokens_and_pooled(name: str) -> tuple[str, str]:
    """Return what the features of captions for the conditioner ``name`` are called in a batch and in a shard."""
    return f"{name}_tokens", f"{name}_pooled"


class TextConditionerConfig(BaseModel, frozen=True, extra="forbid"):
    """Condition on the caption of the image, by the features of a frozen text encoder."""

    kind: Literal["text"] = "text"
    name: FeatureName = "text"  # of the features that it reads; another one for each encoder
    drop_probability: Annotated[float, Field(ge=0, le=1)] = 0.1  # per sample: train without the caption, for guidance
    width: PositiveInt = 384  # of the encoder's features; 384 for MiniLM
    use: Literal["tokens", "pooled", "both"] = "both"  # tokens are attended to, the pooled vector is added
    null: Literal["learned", "empty_caption"] = "learned"  # what stands for no caption
    encoder: TextEncoderConfig = MiniLMConfig()  # what turns captions into features

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a batch that it reads."""
        tokens, pooled = tokens_and_pooled(self.name)
        return {"tokens": (tokens,), "pooled": (pooled,), "both": (tokens, pooled)}[self.use]

    @property
    def token_width(self) -> int:
        """Width of the tokens that it reads, 0 if it gives none."""
        return self.width if self.use in ("tokens", "both") else 0

    def build(self, *, num_classes: int, embedding_width: int, token_width: int = 0) -> "TextConditioner":
        """The conditioner; classes do not matter to it.

        Its pooled vector becomes one of ``embedding_width``, and its tokens are projected to ``token_width`` where they
        have another; 0 keeps their own. An empty caption needs the encoder here, so this loads it; otherwise the
        features of a batch are enough.
        """
        conditioner = TextConditioner(self, embedding_width=embedding_width, token_width=token_width)
        if self.null == "empty_caption":
            with torch.device("cpu"):  # real numbers, also where the network is only sketched on the meta device
                features = self.encoder.build().encode([""])
            conditioner.set_null(features)
        return conditioner


class TextConditioner(nn.Module):
    """Features of captions, computed by the encoder beforehand, to a ``Conditioning``.

    Reads ``NAME_tokens`` (b s width), zero where there is no token, and ``NAME_pooled`` (b width). An image without a
    caption has zeros everywhere and gets the null, as one whose caption is dropped.
    """

    null_tokens: Tensor
    null_pooled: Tensor

    def __init__(self, config: TextConditionerConfig, *, embedding_width: int, token_width: int = 0) -> None:
        super().__init__()
        self.tokens_name, self.pooled_name = tokens_and_pooled(config.name)
        self.uses_tokens = config.use in ("tokens", "both")
        self.uses_pooled = config.use in ("pooled", "both")
        if self.uses_pooled:
            self.project = nn.Linear(config.width, embedding_width)
        self.project_tokens: nn.Module = nn.Identity()
        if self.uses_tokens and token_width not in (0, config.width):
            self.project_tokens = nn.Linear(config.width, token_width)
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
            given = conditions[self.tokens_name].to(self.null_tokens.dtype)
            absent = dropped | (given == 0).flatten(1).all(dim=1)
            tokens = torch.where(absent[:, None, None], self.null_tokens, given)  # (b s width)
            token_mask = (tokens != 0).any(dim=-1)
            tokens = self.project_tokens(tokens)  # (b s token_width)
        return Conditioning(embedding=embedding, tokens=tokens, token_mask=token_mask)

    def pooled(self, conditions: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """Input of the projection: the pooled vectors (b width), the null's among them; arguments as in ``forward``."""
        given = conditions[self.pooled_name].to(self.null_pooled.dtype)
        absent = dropped | (given == 0).all(dim=1)
        return torch.where(absent[:, None], self.null_pooled, given)
