"""Frozen text encoders: captions to a feature for each token, and one for the whole.

An encoder is one file here and one name in ``TextEncoderConfig``. Its config builds a module with ``width`` d and
``max_tokens`` s that has ``encode(captions) -> TextFeatures``.
"""

from typing import Annotated

from pydantic import Field

from models.conditioning.pretrained_encoder import PretrainedConfig, PretrainedEncoder
from models.conditioning.sentence_encoder import MiniLMConfig, SentenceEncoder

TextEncoderConfig = Annotated[MiniLMConfig | PretrainedConfig, Field(discriminator="kind")]
TextEncoder = SentenceEncoder | PretrainedEncoder

__all__ = [
    "MiniLMConfig",
    "PretrainedConfig",
    "PretrainedEncoder",
    "SentenceEncoder",
    "TextEncoder",
    "TextEncoderConfig",
]
