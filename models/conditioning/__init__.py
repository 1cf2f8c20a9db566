"""Conditioners: inputs of the U-Net besides latents and time.

Read ``conditioning`` (the interface), then ``class_label`` and ``text``, and ``text_encoder``: the frozen text
encoders, the door of transformers. It imports nothing else of ours.

A conditioner is one file here and one name in ``ConditionerConfig``. Its config has a ``drop_probability`` and builds a
module that maps the fields of a batch, and a mask of samples that go without them, to a ``Conditioning``.
"""

from typing import Annotated

from pydantic import Field

from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig

ConditionerConfig = Annotated[ClassConditionerConfig | TextConditionerConfig, Field(discriminator="kind")]
