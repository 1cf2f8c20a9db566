"""Sources of images: one file a source; its config in the union below is its registration.

Read ``source`` (the protocol) and ``synthetic`` (the shortest) first; ``union`` joins several sources, ``webdataset``
reads shards that others wrote, with ``scan_cache`` to scan them once for all processes and ``in_place`` to use them
without a copy. May import ``data.samples``, ``data.shards``, ``data.files``, ``data.manifest`` and ``data.randomness``.
"""

from typing import Annotated

from pydantic import Field

from data.sources.emoji import EmojiConfig
from data.sources.fashion_mnist import FashionMNISTConfig
from data.sources.image_folder import ImageFolderConfig
from data.sources.scan_cache import SCANS_AT_ONCE, ScanSharing
from data.sources.source import Source, listing_digest
from data.sources.synthetic import SyntheticConfig
from data.sources.union import Corpus, SingleSourceConfig, UnionConfig, corpora_of
from data.sources.webdataset import WebDataset, WebDatasetConfig

SourceConfig = Annotated[SingleSourceConfig | UnionConfig, Field(discriminator="kind")]

__all__ = [
    "SCANS_AT_ONCE",
    "Corpus",
    "EmojiConfig",
    "FashionMNISTConfig",
    "ImageFolderConfig",
    "ScanSharing",
    "Source",
    "SourceConfig",
    "SyntheticConfig",
    "UnionConfig",
    "WebDataset",
    "WebDatasetConfig",
    "corpora_of",
    "listing_digest",
]
