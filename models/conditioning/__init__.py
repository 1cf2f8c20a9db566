"""Conditioners: inputs of the U-Net besides latents and time.

Read ``conditioning`` (the interface), then ``class_label`` and ``text``; ``text_encoder`` is the union of the frozen
text encoders, ``sentence_encoder`` with ``wordpiece`` and ``pretrained_encoder``, the door of transformers. Of the rest
of ours ``models.attention`` alone is imported.

A conditioner is one file here and one name in ``ConditionerConfig``. Its config has a ``drop_probability`` and builds a
module that maps the fields of a batch, and a mask of samples that go without them, to a ``Conditioning``.
"""

from typing import Annotated

from pydantic import Field

from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig

ConditionerConfig = Annotated[ClassConditionerConfig | TextConditionerConfig, Field(discriminator="kind")]
