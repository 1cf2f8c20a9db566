"""Feature extractors for metrics: images to vectors whose distances mean something.

Read ``extractor`` (the interface), then ``scattering``, ``efficientnet_lite0`` and ``inception``. A new
extractor is one file with a config that has ``build()``, and its name in the union below.
"""

from typing import Annotated

from pydantic import Field

from models.features.efficientnet_lite0 import EfficientNetLite0Config
from models.features.inception import InceptionConfig
from models.features.scattering import ScatteringConfig

FeatureExtractorConfig = Annotated[
    ScatteringConfig | EfficientNetLite0Config | InceptionConfig, Field(discriminator="kind")
]
