"""Shards that others wrote, used where they lie: only an index is made, of the samples that are good."""

from collections.abc import Callable
from pathlib import Path

from data.commit import sha256_of
from data.manifest import FileEntry
from data.remote import local_path
from data.samples import BadSample, ImageSample, Split
from data.shards import ShardIndex, index_path
from data.sources.webdataset import WebDataset


def index_in_place(
    source: WebDataset, number: int, split: Split, path: Path, *, is_good: Callable[[ImageSample | BadSample], bool]
) -> FileEntry:
    """Index the good samples of one shard that belong to ``split``, and return its entry.

    Args:
        source: The opened source.
        number: Which of its shards.
        split: Which of its samples.
        path: What the shard is called in the corpus; its index is kept beside that, no file of this name is made.
        is_good: Told of each sample, or of what is wrong with it.
    """
    good = [
        (raw, found.label)
        for raw, found in source.samples_of(number, split)
        if is_good(found) and isinstance(found, ImageSample)
    ]
    url = source.urls[number]
    file = local_path(url)
    entry = FileEntry(name=path.name, bytes=file.stat().st_size, sha256=sha256_of(file), samples=len(good), url=url)
    labels = [label for _, label in good]
    index = ShardIndex.of_samples([raw for raw, _ in good], labels=labels, layouts={}, entry=entry)
    index.save(index_path(path))
    return entry
