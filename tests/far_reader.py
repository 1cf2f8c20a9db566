"""Read a corpus that is far away, step by step: ``python tests/far_reader.py FOLDER URLS...``.

Before each step its name is printed and a file of that name awaited, so that a test can look at what the network
carried meanwhile.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from manifests import commit_corpus

from data.files import write_json
from data.loading import ImageShards
from data.order.order import BlockedShuffleConfig, FullShuffleConfig
from data.shards.remote import Cache
from data.sources import Corpus, ScanSharing, WebDatasetConfig
from data.sources.in_place import index_in_place
from data.transforms import ImageViewConfig

BATCH = 6
FEW_SAMPLES = 12


def step(name: str) -> None:
    print(name, flush=True)
    while not Path(sys.argv[1], f"{name}.go").exists():
        time.sleep(0.005)


def digest(shards: ImageShards, indices: np.ndarray) -> str:
    batch = shards.read(indices)
    return hashlib.sha256(batch.images.tobytes() + "".join([*batch.keys, *batch.captions]).encode()).hexdigest()


def copies() -> list[Path]:
    return [*Cache.of_environment().folder.glob("*")]


def forget_copies() -> None:
    for path in copies():
        path.unlink()


def shared_scans(folder: Path) -> ScanSharing:
    """The scans of one process that keeps them for its next start."""

    def scan_each(names: Sequence[str], scan: Callable[[str], Any]) -> None:
        folder.mkdir(exist_ok=True)
        for name in names:
            if not (folder / f"{name}.json").exists():
                write_json(folder / f"{name}.json", scan(name))

    return ScanSharing(folder, lambda find: find(), scan_each)


def main() -> None:
    folder, urls = Path(sys.argv[1]), sys.argv[2:]
    step("prepare")
    config, sharing = WebDatasetConfig(urls=tuple(urls[:-1]), val_urls=(urls[-1],)), shared_scans(folder / "scans")
    source = config.open(sharing)
    corpus, entries = Corpus.alone(source), []
    for number in range(len(source.urls)):
        split = "train" if number < len(source.urls) - 1 else "val"
        path = folder / f"{split}-{number:06}.tar"
        entries.append(index_in_place(corpus, number, split, path, is_good=lambda found: True))
    view = ImageViewConfig(resolution=16).model_dump(mode="json")
    commit_corpus(folder, entries, resolution=16, view=view, max_pixels=10**7)
    forget_copies()
    step("listed again")  # as a restart does
    again = config.open(sharing)
    assert [*again.listing()] == [*source.listing()]
    assert [again.holds(number, "train") for number in range(len(urls))] == [True] * (len(urls) - 1) + [False]

    def opened(*, scattered: bool) -> ImageShards:
        return ImageShards(folder, split="train", scattered=scattered, cache_bytes=0)

    step("scattered")
    shards = opened(scattered=True)
    order = shards.order(FullShuffleConfig(), seed=1, global_batch=BATCH)
    ranged = [digest(shards, order.indices(first, BATCH)) for first in range(0, FEW_SAMPLES, BATCH)]
    spent = len(copies())
    step("streams")
    shards = opened(scattered=False)
    streams = shards.order(BlockedShuffleConfig(canonical_nodes=1, window=8), seed=1, global_batch=BATCH)
    for first in range(0, len(shards), BATCH):
        digest(shards, streams.indices(first, BATCH))
    step("held")  # the copies are there now, and are preferred
    shards = opened(scattered=True)
    whole = [digest(shards, order.indices(first, BATCH)) for first in range(0, FEW_SAMPLES, BATCH)]
    step("end")
    print(f"same {ranged == whole} copies {spent} samples {len(shards)}", flush=True)


if __name__ == "__main__":
    main()
