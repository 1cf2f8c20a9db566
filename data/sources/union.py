"""Several corpora as one: their images stay apart in shards of their own, so that an order can mix them by weight.

Classes are united by name: ``cat`` of two corpora is one class. A key is ``CORPUS-KEY``, so no two corpora share one.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from data.samples import MAX_KEY_CHARACTERS, ImageSample, Split, count_left_out
from data.sources.emoji import EmojiConfig
from data.sources.fashion_mnist import FashionMNISTConfig
from data.sources.image_folder import ImageFolderConfig
from data.sources.scan_cache import ScanSharing
from data.sources.source import Source, safe_key
from data.sources.synthetic import SyntheticConfig
from data.sources.webdataset import WebDatasetConfig

SingleSourceConfig = EmojiConfig | FashionMNISTConfig | ImageFolderConfig | SyntheticConfig | WebDatasetConfig
CorpusName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,32}$")]  # no dash: it ends the name in a key


class UnionConfig(BaseModel, frozen=True, extra="forbid"):
    """Several corpora as one, each a source with a name."""

    kind: Literal["union"] = "union"  # corpora that an order can mix: order = { kind = "weighted", by = "corpus" }
    corpora: Annotated[
        Mapping[CorpusName, Annotated[SingleSourceConfig, Field(discriminator="kind")]], Field(min_length=1)
    ]  # name -> source, in this order

    def open(self, sharing: ScanSharing | None = None) -> "Union":
        """Open every corpus, those of shards with what the processes share.

        Raises:
            ValueError: One of them cannot be opened; the message names it.
        """
        sources: dict[str, Source] = {}
        for name, config in self.corpora.items():
            try:
                sources[name] = config.open(sharing) if isinstance(config, WebDatasetConfig) else config.open()
            except (ValueError, OSError) as error:
                raise type(error)(f"corpora.{name}: {error}") from error
        return Union(sources)


@dataclass(frozen=True)
class Corpus:
    """A source as its shards hold it: alone, or as one of several.

    Args:
        name: Its name in the union; "" when it is alone.
        source: The source.
        labels: Label in the union of each of its own labels.
    """

    name: str
    source: Source
    labels: tuple[int, ...]

    @classmethod
    def alone(cls, source: Source) -> "Corpus":
        """Return a source that is the whole corpus."""
        return cls("", source, tuple(range(len(source.classes))))

    def adopted(self, sample: ImageSample) -> ImageSample:
        """Return a sample of the source under the key and label that it has here."""
        key, label = sample.key, self.labels[sample.label] if sample.label >= 0 else -1
        if self.name:
            room = MAX_KEY_CHARACTERS - len(self.name) - 1
            key = f"{self.name}-{key if len(key) <= room else safe_key(key)[-room:]}"
        return replace(sample, key=key, label=label)

    def read(self, split: Split, index: int) -> ImageSample:
        """As ``Source.read``, of this corpus's own samples."""
        return self.adopted(self.source.read(split, index))


class Union:
    """The samples of all corpora, one corpus after the other."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.classes = tuple(dict.fromkeys(name for source in sources.values() for name in source.classes))
        labels = {name: label for label, name in enumerate(self.classes)}
        self.left_out: Counter[str] = Counter()
        for source in sources.values():
            for name, count in source.left_out.items():
                count_left_out(self.left_out, name, number=count)
        self.corpora = tuple(
            Corpus(name, source, tuple(labels[own] for own in source.classes)) for name, source in sources.items()
        )

    def count(self, split: Split) -> int:
        """Return the number of samples of a split in all corpora."""
        return sum(corpus.source.count(split) for corpus in self.corpora)

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: that of each corpus."""
        for corpus in self.corpora:
            yield f"corpus {corpus.name}"
            yield from corpus.source.listing()

    def read(self, split: Split, index: int) -> ImageSample:
        """Return a sample of the corpus that ``index`` falls into."""
        for corpus in self.corpora:
            if index < (count := corpus.source.count(split)):
                return corpus.read(split, index)
            index -= count
        raise IndexError(f"The corpora have {self.count(split)} {split} samples in all.")


def corpora_of(source: Source) -> tuple[Corpus, ...]:
    """Return the corpora of a union, or the source as the only one."""
    return source.corpora if isinstance(source, Union) else (Corpus.alone(source),)
