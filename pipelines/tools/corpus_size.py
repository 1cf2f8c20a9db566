"""Size of a corpus, asked of its source before it is made."""

from dataclasses import dataclass

from data.sources import SourceConfig
from data.transforms import ImageViewConfig

# To count the samples of somebody's shards means to read all of them: that is prepare_corpus itself.
COUNTED_AT_ONCE = ("synthetic", "fashion_mnist", "emoji", "image_folder")
# Four tar members a sample: picture, class, caption and origin, each with a header and padded to 512 bytes.
BYTES_BESIDE_THE_PICTURE = 4 * 1024


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """What a source promises."""

    samples: int
    classes: tuple[str, ...]
    disk_bytes: int  # at most: as if no picture could be compressed


def promised_corpus(source_config: SourceConfig, view: ImageViewConfig) -> CorpusSize:
    """Ask a source how large its corpus will be.

    Raises:
        ValueError: Nobody can say yet, or the source cannot be opened.
    """
    if source_config.kind not in COUNTED_AT_ONCE:
        raise ValueError("not counted: what the shards hold is known when prepare_corpus has read them")
    try:
        source = source_config.open()
    except OSError as error:
        raise ValueError(f"its source cannot be opened: {error}") from None
    samples = source.count("train") + source.count("val")
    picture = view.resolution**2 * view.channels
    return CorpusSize(
        samples=samples, classes=source.classes, disk_bytes=samples * (picture + BYTES_BESIDE_THE_PICTURE)
    )
