"""Shards in place: those that others wrote are used where they are, and only their good samples are indexed."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from data.manifest import FileEntry
from data.samples import BadSample, ImageSample, Split
from data.shards.index import ShardIndex, index_path
from data.shards.remote import is_remote
from data.shards.verification import mark_verified
from data.sources.union import Corpus
from data.sources.webdataset import WebDataset


def index_in_place(
    corpus: Corpus, number: int, split: Split, path: Path, *, is_good: Callable[[ImageSample | BadSample], bool]
) -> FileEntry:
    """Index the good samples of one shard that belong to ``split``, and return its entry.

    Args:
        corpus: The opened source, which is a ``WebDataset``.
        number: Number of the shard in the source.
        split: The split to index.
        path: The shard's name in the corpus; its index is kept beside that, no file of this name is made.
        is_good: Called with each sample, or with its fault; False leaves it out.
    """
    source = corpus.source
    assert isinstance(source, WebDataset)
    good, labels = [], []
    for raw, found in source.samples_of(number, split):
        if is_good(found) and isinstance(found, ImageSample):
            adopted = corpus.adopted(found)
            good.append(replace(raw, key=adopted.key))
            labels.append(adopted.label)
    url = source.urls[number]
    with source.opened(number) as file:
        seen = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = FileEntry(name=path.name, bytes=seen.st_size, sha256=digest, samples=len(good), url=url, corpus=corpus.name)
    index = ShardIndex.of_samples(good, labels=labels, layouts={}, entry=entry)
    index.save(index_path(path))
    if not is_remote(url):
        mark_verified(path.parent, entry, seen)
    return entry
