"""Corpus of WebDataset shards from an image source: ``png``, ``cls``, ``txt`` and ``json``, split into train and val.

    accelerate launch -m pipelines.prepare_corpus --config pipelines/configs/demo.toml

Reads: the source. Writes: ``runs/NAME/corpus/`` with shards, their indexes, ``manifest.json`` and, when samples were
set aside, ``quarantine.jsonl``.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
from pydantic import Field, PositiveInt

from data.files import read_json, write_atomically, write_json
from data.loading import ImageShards
from data.manifest import CorpusManifest, FileEntry, ImageShape, samples_by_split
from data.samples import BadSample, ImageSample, Split, image_members
from data.shards.index import ShardIndex
from data.shards.keys import check_unique
from data.shards.writer import ShardWriter
from data.sources import (
    SCANS_AT_ONCE,
    Corpus,
    FashionMNISTConfig,
    ScanSharing,
    Source,
    SourceConfig,
    UnionConfig,
    WebDataset,
    WebDatasetConfig,
    corpora_of,
    listing_digest,
)
from data.sources.in_place import index_in_place
from data.sources.source import said_left_out
from data.transforms import DEFAULT_MAX_PIXELS, FILTER_REASONS, VIEW_REVISIONS, ImageViewConfig, MaxPixels, view_sample
from pipelines.model.experiment import CorpusFacts, check_later_stages
from pipelines.model.grids import grid_png
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.config.errors import ConfigError, config_error_at
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.launch import json_from_main
from pipelines.runtime.stage.progress import progress_line
from pipelines.runtime.stage.quarantine import REPORTED, BadSamplePolicy, files_and_counts, settle_quarantine
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.stage.work_items import Result, finished_items, make_items, results_of

LISTING_NAME = "listing.json"
LISTED_AT_ONCE = ("synthetic", "fashion_mnist", "emoji", "image_folder")  # sources that need not read their images
CAPTIONS_LOOKED_AT = 100  # training images without a caption, after which the corpus is taken to have none
EXAMPLE_ROWS = 4
MAX_EXAMPLE_COLUMNS = 12


class PrepareCorpusConfig(StageConfig):
    """Source, view of each image, and size of a shard."""

    fingerprint_ignores = frozenset({"bad_samples", "max_bad_fraction"})
    revisions = (
        *VIEW_REVISIONS,
        "members of shards that nothing reads are left out",
        "members of a sample may lie apart, and a byte order mark is no part of a caption",
        "more formats of images are read, and folders without training images are no classes",
    )

    source: SourceConfig = FashionMNISTConfig()  # where the images come from
    view: ImageViewConfig = ImageViewConfig()  # how they become squares of one size
    samples_per_shard: PositiveInt = 1_000  # a shard is the unit of work of encoding; 1,000 to 10,000 on clusters
    bad_samples: BadSamplePolicy = "strict"  # stop at the first bad sample, or count it and go on
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001  # of all samples, but at least 5; more stop the stage
    max_pixels: MaxPixels = DEFAULT_MAX_PIXELS  # larger images are bad samples, refused before decoding


def main() -> None:
    config = config_from_command_line(PrepareCorpusConfig, table="prepare_corpus", about=__doc__)
    with running_stage(
        config,
        name="prepare_corpus",
        check=lambda parents: check_later_stages(config, stage="prepare_corpus", corpus=corpus_facts(config)),
        when_done=lambda folder: report_changed_source(config, folder),
    ) as stage:
        prepare(config, stage)


def prepare(config: PrepareCorpusConfig, stage: Stage) -> None:
    """Write every shard that is missing, then account for every sample."""
    # What to store.
    with config_error_at("prepare_corpus.source"):
        source = open_source(config, stage)
    if not source.count("train"):
        raise ConfigError("prepare_corpus.source: it holds no training image. Look at its path and its split.")
    # One rank reads for all: a remote shard would be fetched by each of them.
    facts = corpus_facts(config, source, captions_at_most=CAPTIONS_LOOKED_AT if stage.is_main else 0)
    check_later_stages(config, stage="prepare_corpus", corpus=facts)
    check_listing(source, stage)

    # Write the shards that are missing.
    make = shard_makers(config, source, stage.folder)
    start = len(finished_items(stage, list(make)))
    with progress_line("prepare_corpus", total=len(make), unit="shards", start=start, is_main=stage.is_main) as line:
        make_items(stage, list(make), lambda name: make[name](), after_each=lambda done, _, __: line.advance_to(done))

    # Account for every sample, and show some.
    given, results = sum(source.count(split) for split in get_args(Split)), results_of(stage, list(make))
    bad = settle_quarantine(stage, results, num_in=given, max_bad_fraction=config.max_bad_fraction, free=FILTER_REASONS)
    files, counts = files_and_counts(results, bad, num_in=given, left_out=source.left_out)
    content: dict[str, Any] = {
        "counts": counts,
        "splits": samples_by_split(files),
        **by_corpus(files),
        "classes": source.classes,
        "value_range": (0, 255),
        "image": {"resolution": config.view.resolution, "channels": config.view.channels},
        **(view_at_reading(config) if any(entry.url for entry in files) else {}),
    }
    if stage.is_main:
        with config_error_at("prepare_corpus.source"):
            check_unique(stage.folder, files)
            grid = example_grid(stage.folder, CorpusManifest(files=tuple(files), **content))
        write_atomically(stage.folder / "examples.png", grid)
    stage.tracker.log_image("corpus/examples", stage.folder / "examples.png", step=0)
    stage.tracker.log_metrics({"corpus/samples": counts["out"], "corpus/quarantined": bad.total()}, step=0)

    # Commit.
    stage.finish(CorpusManifest, files=files, **content)
    stage.log.info(
        f"{counts['out']} images in {len(files)} shards, {bad.total()} quarantined, {len(source.classes)} classes"
        f"{said_left_out(source.left_out)}"
    )


def corpus_facts(
    config: PrepareCorpusConfig, source: Source | None = None, *, captions_at_most: int = 0
) -> CorpusFacts:
    """Return what later stages need to know of the corpus, as far as its opened ``source`` promises it.

    Whether it has captions shows only by reading: ``captions_at_most`` images, of which bad ones say nothing.
    """
    image = ImageShape(resolution=config.view.resolution, channels=config.view.channels)
    if source is None:
        return CorpusFacts(image=image)
    captions: set[bool] = set()
    for index in range(min(source.count("train"), captions_at_most)):
        if True not in captions:
            with suppress(BadSample):
                captions.add(bool(source.read("train", index).caption))
    # A few bad images, or none that were read, leave it open.
    has_captions = any(captions) if captions else None
    has_validation = bool(source.count("val"))
    return CorpusFacts(image=image, classes=source.classes, has_validation=has_validation, has_captions=has_captions)


def open_source(config: PrepareCorpusConfig, stage: Stage) -> Source:
    """Open the source; shards that others wrote are scanned once by all ranks, for all experiments beside this one."""
    if not isinstance(config.source, (WebDatasetConfig, UnionConfig)):
        return config.source.open()

    # Scans are work items in a folder that outlives the stage.
    folder = Path(config.run.root).parent / "cache" / "scans"

    def scan_each(names: Sequence[str], scan: Callable[[str], Result]) -> None:
        with progress_line("prepare_corpus", total=len(names), unit="scans", is_main=stage.is_main) as line:
            make_items(
                stage,
                names,
                scan,
                folder=folder,
                at_once=SCANS_AT_ONCE,
                after_each=lambda done, _, __: line.advance_to(done),
            )

    return config.source.open(ScanSharing(folder, partial(json_from_main, accelerator=stage.accelerator), scan_each))


def by_corpus(files: list[FileEntry]) -> dict[str, Any]:
    """Return the number of samples of each corpus and split; nothing when there is only one corpus."""
    names = dict.fromkeys(entry.corpus for entry in files if entry.corpus)
    sizes = {name: samples_by_split([entry for entry in files if entry.corpus == name]) for name in names}
    return {"corpora": sizes} if sizes else {}


def check_listing(source: Source, stage: Stage) -> None:
    """Refuse to go on with a source whose listing has changed: the shards that are done were cut from another one.

    A collective: the main process compares, and no rank begins a shard before it knows the answer.

    Raises:
        ConfigError: On every rank, when it has changed.
    """

    def compare_or_write() -> None:
        # Of shards also what they are, which ``report_changed_source`` can ask for without a look into them.
        path, found = stage.folder / LISTING_NAME, {"sha256": listing_digest(source.listing())}
        if isinstance(source, WebDataset):
            found["shards"] = listing_digest(islice(source.listing(), len(source.urls)))

        # Compare it with what the folder was begun with, if anything.
        if not path.exists():
            write_json(path, found)
            return
        before = read_json(path, mend=f"Restore it, choose another run.root, or move {stage.folder} away.")
        if before.get("sha256") != found["sha256"]:
            raise ValueError(
                f"its files are not those that {stage.folder} was begun with, so an image could be stored twice or not "
                "at all. Bring them back, choose another run.root, or move the folder away."
            )

    with config_error_at("prepare_corpus.source"):
        json_from_main(compare_or_write, stage.accelerator)


def report_changed_source(config: PrepareCorpusConfig, folder: Path) -> None:
    """Say that a source lists other files than when its corpus was finished; it may also be gone, which is no matter.

    Shards are only listed: to look through them again would take as long as their corpus took.
    """
    with suppress(OSError, ValueError):
        # What is there now.
        if isinstance(config.source, WebDatasetConfig):
            key, lines = "shards", config.source.shards_now()
        elif config.source.kind in LISTED_AT_ONCE:
            key, lines = "sha256", config.source.open().listing()
        else:
            return

        # What the corpus was made of.
        before = read_json(folder / LISTING_NAME, mend="")
        if key in before and before[key] != listing_digest(lines):
            logging.getLogger("latentline.prepare_corpus").warning(
                f"prepare_corpus.source lists other files now than those that {folder} was made of, which stays as it "
                "is. For a corpus of what is there now choose another run.root, or move this folder and those of the "
                "later stages away."
            )


def shard_makers(config: PrepareCorpusConfig, source: Source, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the maker of each shard of the corpus: file name -> a function that returns its result.

    No shard holds samples of two corpora, and those of one corpus follow each other.
    """
    make: dict[str, Callable[[], dict[str, Any]]] = {}
    for split in get_args(Split):
        number = 0
        for corpus in corpora_of(source):
            for part in parts_of(corpus.source, split, size=config.samples_per_shard):
                path = folder / f"{split}-{number:06}.tar"
                if isinstance(part, range):
                    make[path.name] = partial(write_shard, config, corpus, path, split, part)
                else:
                    make[path.name] = partial(index_shard, config, corpus, path, split, part)
                number += 1
    return make


def parts_of(source: Source, split: Split, *, size: int) -> list[range] | list[int]:
    """Return the source indices of each shard; of shards that are used in place, their numbers."""
    if isinstance(source, WebDataset) and not source.copied:
        return [number for number in range(len(source.urls)) if source.holds(number, split)]
    total = source.count(split)
    return [range(first, min(first + size, total)) for first in range(0, total, size)]


def view_at_reading(config: PrepareCorpusConfig) -> dict[str, Any]:
    """Return how readers of shards in place view their images, which are stored as they were found."""
    return {"view": config.view.model_dump(mode="json"), "max_pixels": config.max_pixels}


def write_shard(
    config: PrepareCorpusConfig, corpus: Corpus, path: Path, split: Split, indices: range
) -> dict[str, Any]:
    """Write one shard; return the file's entry and the samples that were set aside."""
    # A sample is stored, or set aside with its reason.
    quarantined = []
    with ShardWriter(path) as writer:
        for index in indices:
            try:
                sample = corpus.read(split, index)
                image = view_sample(sample, config.view, max_pixels=config.max_pixels)
                members = image_members(
                    sample.key, image, label=sample.label, caption=sample.caption, metadata=sample.metadata
                )
                writer.add(sample.key, members)
            except BadSample as error:
                quarantined.append(set_aside(config, error.at(shard=path.name)))
    assert writer.entry is not None
    return {"entry": replace(writer.entry, corpus=corpus.name).as_json(), "quarantined": quarantined}


def index_shard(config: PrepareCorpusConfig, corpus: Corpus, path: Path, split: Split, number: int) -> dict[str, Any]:
    """Index one shard in place after viewing every image; return the same as ``write_shard``."""
    # An image that cannot be viewed would stop its reader later.
    quarantined = []
    assert isinstance(corpus.source, WebDataset)
    url = corpus.source.urls[number]

    def is_good(found: ImageSample | BadSample) -> bool:
        try:
            if isinstance(found, BadSample):
                raise found
            view_sample(found, config.view, max_pixels=config.max_pixels)
        except BadSample as error:
            quarantined.append(set_aside(config, error.at(shard=url)))
            return False
        return True

    # The shard itself stays as it is.
    try:
        entry = index_in_place(corpus, number, split, path, is_good=is_good)
    except BadSample as error:  # of the shard, not of a sample
        raise ConfigError(
            f"prepare_corpus.source: {error}. A shard stays as it is while it is indexed: restore it and run the same "
            "command again, or remove this stage's folder and begin anew with what is there now."
        ) from error
    return {"entry": entry.as_json(), "quarantined": quarantined}


def set_aside(config: PrepareCorpusConfig, error: BadSample) -> dict[str, str]:
    """Return a bad sample's line of the report.

    Raises:
        ConfigError: The policy is to stop.
    """
    if config.bad_samples == "strict" and error.reason not in FILTER_REASONS:
        raise ConfigError(
            f"prepare_corpus.source: {error}. Mend or remove it, or set "
            'prepare_corpus.bad_samples = "quarantine" to count such samples and go on, up to max_bad_fraction.'
        ) from error
    return {name: getattr(error, name) for name in REPORTED}


def example_grid(folder: Path, corpus: CorpusManifest) -> bytes:
    """Draw training images of each class, as the corpus has them, those of several corpora in turn; PNG."""
    # Room for a column a class, or for all of one class.
    num_classes = min(len(corpus.classes), MAX_EXAMPLE_COLUMNS)
    wanted = EXAMPLE_ROWS if num_classes else EXAMPLE_ROWS * MAX_EXAMPLE_COLUMNS
    images = ImageShards(folder, split="train", manifest=corpus, cache_bytes=0, scattered=True)
    labels = range(num_classes) if num_classes else (-1,)

    # The first of each class in each corpus, by the indexes of as few shards as it takes.
    found = {(label, name): list[int]() for label in labels for name in images.corpora()}
    for part in images.shards:
        missing = [label for label in labels if len(found[label, part.entry.corpus]) < wanted]
        if not missing:
            continue
        index = ShardIndex.of(folder / part.entry.name, entry=part.entry)
        for label in missing:
            places = found[label, part.entry.corpus]
            rows = np.flatnonzero(index.labels == label)[: wanted - len(places)]
            places += (part.first + rows).tolist()
    columns = []
    for label in labels:
        in_turn = zip_longest(*(places for (of, _), places in found.items() if of == label))
        columns.append([place for turn in in_turn for place in turn if place is not None][:wanted])
    if not num_classes:
        side = max(1, -(-len(columns[0]) // EXAMPLE_ROWS))
        columns = [columns[0][first::side] for first in range(side)]

    # Filled up with white.
    cells = np.full((EXAMPLE_ROWS, len(columns), *images.image_shape), 255, dtype=np.uint8)
    for column, places in enumerate(columns):
        cells[: len(places), column] = images.read(np.array(places, dtype=np.int64)).images
    return grid_png(cells, column_labels=corpus.classes[:num_classes])


if __name__ == "__main__":
    main()
