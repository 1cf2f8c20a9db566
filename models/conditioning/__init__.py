"""Conditioners: what the U-Net is told besides latents and time.

A conditioner is one file here and one name in ``ConditionerConfig``. Its config has a ``drop_probability`` and builds a
module that maps the fields of a batch, and which samples go without them, to a ``Conditioning``.
"""

from typing import Annotated

from pydantic import Field

from models.conditioning.class_label import ClassConditioner, ClassConditionerConfig
from models.conditioning.conditioning import Conditioning
from models.conditioning.text import TextConditioner, TextConditionerConfig

ConditionerConfig = Annotated[ClassConditionerConfig | TextConditionerConfig, Field(discriminator="kind")]

__all__ = [
    "ClassConditioner",
    "ClassConditionerConfig",
    "ConditionerConfig",
    "Conditioning",
    "TextConditioner",
    "TextConditionerConfig",
]
