"""Several corpora as one: apart in shards, united in classes, mixed exactly in training."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_stage
from PIL import Image
from pydantic import ValidationError

from data.loading import ImageShards, LatentShards
from data.manifest import FileEntry, read_manifest
from data.order.mixture import slots_of
from data.order.order import Order, WeightedConfig
from data.samples import check_key
from data.sources import SyntheticConfig, UnionConfig, WebDatasetConfig
from data.sources.source import safe_key
from data.transforms import decode_image
from pipelines.prepare_corpus import PrepareCorpusConfig
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import load_config

SIZES = {"photos": 600, "toys": 77, "maps": 9}


def picture(number: int, side: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_photos(folder: Path, *, count: int = 40, side: int = 24) -> None:
    """Shards of others: circles and stars, in folders, so that their keys are not allowed as they are."""
    folder.mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(count), 3)):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in numbers.tolist():
                for suffix, payload in (("png", picture(number, side)), ("cls", b"%d" % (number % 2))):
                    header = tarfile.TarInfo(f"n{number % 3}/{number:04d}.{suffix}")
                    header.size = len(payload)
                    tar.addfile(header, io.BytesIO(payload))


def photos(folder: Path, *, copied: bool = False) -> WebDatasetConfig:
    return WebDatasetConfig(
        urls=(f"{folder}/*.tar",), classes=("star", "circle"), val_fraction=0.2, captions="ignored", copied=copied
    )


# --- the source


def test_classes_are_united_by_name_and_keys_begin_with_the_corpus(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    toys = SyntheticConfig(resolution=16, num_train=12, num_val=3)
    union = UnionConfig(corpora={"photos": photos(tmp_path / "photos"), "toys": toys}).open()
    assert union.classes == ("star", "circle", "square", "triangle", "cross")
    theirs, ours = union.corpora
    assert union.count("train") == theirs.source.count("train") + 12
    assert union.count("val") == theirs.source.count("val") + 3
    keys = set()
    for corpus in (theirs, ours):
        for index in range(corpus.source.count("train")):
            sample, own = corpus.read("train", index), corpus.source.read("train", index)
            assert union.classes[sample.label] == corpus.source.classes[own.label]
            assert sample.key == f"{corpus.name}-{own.key}"
            keys.add(check_key(sample.key))
    assert len(keys) == union.count("train")
    first_toy = union.read("train", theirs.source.count("train"))
    assert (first_toy.key, union.classes[first_toy.label]) == ("toys-train-000000", "circle")
    with pytest.raises(IndexError):
        union.read("val", union.count("val"))


def test_a_long_key_stays_unique_in_a_union() -> None:
    (corpus,) = UnionConfig(corpora={"c" * 32: SyntheticConfig()}).open().corpora
    sample = corpus.source.read("train", 0)
    keys = [("a" * 80), ("a" * 79), ("b" + "a" * 79), safe_key("é" * 90)]
    adopted = [corpus.adopted(sample.__class__(**{**vars(sample), "key": key})).key for key in keys]
    assert len({check_key(key) for key in adopted}) == len(keys)
    assert all(key.startswith("c" * 32 + "-") for key in adopted)


def test_a_corpus_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(ValueError, match=r"corpora\.photos: .*names no file"):
        UnionConfig(corpora={"photos": WebDatasetConfig(urls=("/nowhere/*.tar",))}).open()
    for name in ("a-b", "", "a/b", "x" * 33):
        with pytest.raises(ValidationError):
            UnionConfig(corpora={name: SyntheticConfig()})
    with pytest.raises(ValidationError):
        UnionConfig(corpora={})
    with pytest.raises(ValidationError):  # no union of unions
        UnionConfig(corpora={"a": UnionConfig(corpora={"b": SyntheticConfig()})})


def test_mistakes_below_a_corpus_are_named_with_their_key(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        "[prepare_corpus.source]\n"
        'kind = "union"\n'
        'corpora.toys = { kind = "synthetic", num_trian = 3 }\n'
        'corpora.more = { kind = "synthetik" }\n'
    )
    with pytest.raises(ConfigError) as error:
        load_config(PrepareCorpusConfig, table="prepare_corpus", argv=["--config", str(path)])
    assert "prepare_corpus.source.corpora.toys.num_trian = 3" in str(error.value)
    assert "did you mean num_train?" in str(error.value)
    assert "prepare_corpus.source.corpora.more.kind = 'synthetik'" in str(error.value)
    path.write_text('[prepare_corpus.source]\nkind = "union"\ncorpora.toys = { kind = "synthetic" }\n')
    words = [
        "--config",
        str(path),
        "--source.corpora.toys.num_train",
        "7",
        "--source.corpora.more.kind",
        "image_folder",
    ]
    config = load_config(
        PrepareCorpusConfig, table="prepare_corpus", argv=[*words, "--source.corpora.more.path", "2024"]
    )
    assert isinstance(config.source, UnionConfig)
    assert config.source.corpora["toys"] == SyntheticConfig(num_train=7)
    assert config.source.corpora["more"].path == Path("2024")  # type: ignore[union-attr]


# --- the order


def of_corpus(stream: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(list(SIZES.values())), stream, side="right")


def mixed(weights: dict[str, float], *, seed: int = 3) -> Order:
    config = WeightedConfig(by="corpus", weights=weights)
    return Order(config, num_samples=sum(SIZES.values()), seed=seed, corpora=SIZES)


@pytest.mark.parametrize(
    ("weights", "cycle"),
    [
        ({"photos": 3.0}, {0: 3, 1: 1, 2: 1}),
        ({"photos": 0.1, "toys": 0.25, "maps": 0.05}, {0: 2, 1: 5, 2: 1}),
        ({}, {0: 1, 1: 1, 2: 1}),
    ],
)
def test_every_cycle_holds_each_corpus_in_its_exact_share(weights: dict[str, float], cycle: dict[int, int]) -> None:
    order, length = mixed(weights), sum(cycle.values())
    for first in (0, 1, 10**6, 10**12):
        for corpora in of_corpus(order.indices(first * length, 50 * length)).reshape(50, length):
            assert Counter(corpora.tolist()) == cycle


def test_each_corpus_is_gone_through_in_turns_of_its_own_and_any_position_is_known_alone() -> None:
    order = mixed({"photos": 3.0})
    stream = order.indices(0, 5 * 700)
    for corpus, (first, size) in enumerate(zip((0, 600, 677), SIZES.values(), strict=True)):
        taken = stream[of_corpus(stream) == corpus]
        for turn in range(len(taken) // size):
            assert sorted(taken[turn * size : (turn + 1) * size].tolist()) == list(range(first, first + size))
    # Ranks take slices, a restart begins anywhere: nothing is carried over.
    for first, count in ((0, 1), (17, 40), (3210, 200)):
        assert np.array_equal(mixed({"photos": 3.0}).indices(first, count), stream[first : first + count])
    assert not np.array_equal(mixed({"photos": 3.0}, seed=4).indices(0, 200), stream[:200])


def test_shares_are_whole_numbers_where_they_can_be() -> None:
    assert slots_of(np.array([0.3, 0.1])).tolist() == [3, 1]
    assert slots_of(np.array([2.0, 2.0])).tolist() == [1, 1]
    assert slots_of(np.ones(5000)).tolist() == [1] * 5000
    odd = slots_of(np.array([2**0.5, 1.0]))
    assert odd.sum() == 4096
    assert abs(odd[0] / 4096 - 2**0.5 / (1 + 2**0.5)) < 1 / 4096


@pytest.mark.parametrize(
    ("corpora", "weights", "message"),
    [
        (SIZES, {"cats": 2.0}, "order.weights names 'cats', but the corpora are photos, toys, maps"),
        ({"": 686}, {}, r"needs several corpora: name them in a source of kind \"union\""),
        (SIZES, {"maps": 1e-9}, "weighs less than 1 in 4096"),
    ],
)
def test_corpora_that_cannot_be_mixed_are_named(corpora: dict[str, int], weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(WeightedConfig(by="corpus", weights=weights), num_samples=686, seed=0, corpora=corpora)


# --- the pipeline


def experiment(folder: Path, *, copied: bool) -> Path:
    path = folder / "mine.toml"
    path.write_text(
        f'[run]\nroot = "{folder}/run"\n'
        "[prepare_corpus]\nsamples_per_shard = 20\nview = { resolution = 16 }\n"
        '[prepare_corpus.source]\nkind = "union"\n'
        f'corpora.photos = {{ kind = "webdataset", urls = ["{folder}/photos/*.tar"], classes = ["star", "circle"], '
        f'val_fraction = 0.2, captions = "ignored", copied = {str(copied).lower()} }}\n'
        'corpora.toys = { kind = "synthetic", resolution = 24, num_train = 50, num_val = 10 }\n'
        "[train_vae]\nupdates = 6\nglobal_batch = 8\nimages_per_device = 8\nlog_every = 2\nvalidate_every = 6\n"
        'order = { kind = "weighted", by = "corpus", weights = { photos = 3, toys = 1 } }\n'
        "checkpoint = { every_updates = 3 }\n"
        "network = { latent_channels = 4, channels = [16, 32], blocks_per_level = 1, mid_attention = false, "
        "norm_groups = 8 }\n"
        "[encode_latents]\nbatch_size = 16\n"
        "[train_unet]\nupdates = 6\nglobal_batch = 8\nimages_per_device = 8\nlog_every = 2\nvalidate_every = 6\n"
        'order = { kind = "weighted", by = "corpus", weights = { photos = 3, toys = 1 } }\n'
        "checkpoint = { every_updates = 3 }\ngrid = { rows = 1, sampler = { kind = 'ddim', num_steps = 2 } }\n"
        '[[train_unet.denoiser.conditioners]]\nkind = "class"\n'
        "[train_unet.denoiser.network]\nchannels = [32]\nblocks = [1]\nattention = [false]\nheads = [1]\n"
        "transformer_depth = [1]\nnorm_groups = 8\n"
    )
    return path


def check_united(folder: Path, *, in_place: bool) -> None:
    manifest = read_manifest(folder)
    assert manifest.classes == ("star", "circle", "square", "triangle", "cross")
    assert manifest.corpora["toys"] == {"train": 50, "val": 10}
    found: Counter[str] = Counter()
    for split in ("train", "val"):
        images = ImageShards(folder, split=split)
        assert images.corpora() == {n: s[split] for n, s in manifest.corpora.items()}
        for part in images.shards:
            batch = images.read(part.indices)
            assert {key.partition("-")[0] for key in batch.keys} == {part.entry.corpus}
            assert bool(part.entry.url) == (in_place and part.entry.corpus == "photos")
            found[part.entry.corpus] += len(batch.keys)
            for key, image, label in zip(batch.keys, batch.images, batch.labels.tolist(), strict=True):
                if part.entry.corpus == "photos":
                    number = int(key.split("-")[2])
                    assert label == number % 2
                    assert image.shape == (16, 16, 3)
                    assert np.abs(image.astype(int).mean() - decode_image(picture(number, 24)).mean()) < 3
    assert found == {"photos": 40, "toys": 60}


def test_copied_corpora_are_one_corpus_of_finished_squares(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    done = run_stage("prepare_corpus", config=experiment(tmp_path, copied=True))
    assert done.returncode == 0, done.stderr
    check_united(tmp_path / "run" / "corpus", in_place=False)


def test_corpora_are_mixed_through_the_whole_pipeline(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    config = experiment(tmp_path, copied=False)
    for stage in ("prepare_corpus", "train_vae", "encode_latents", "train_unet"):
        done = run_stage(stage, config=config)
        assert done.returncode == 0, done.stderr
    check_united(tmp_path / "run" / "corpus", in_place=True)
    corpus, latents = ImageShards(tmp_path / "run/corpus", split="train"), tmp_path / "run/latents"
    shards = LatentShards(latents, split="train")
    assert shards.corpora() == corpus.corpora()
    assert sorted(shards.keys(np.arange(len(shards)))) == sorted(corpus.keys(np.arange(len(corpus))))
    every = np.arange(len(shards))
    assert shards.read(every).labels.tolist() == corpus.read(every).labels.tolist()
    order = shards.order(WeightedConfig(by="corpus", weights={"photos": 3}), seed=0, global_batch=8)
    assert Counter(key.partition("-")[0] for key in shards.keys(order.indices(0, 400))) == {"photos": 300, "toys": 100}
    entries = [FileEntry(**entry) for entry in json.loads((latents / "manifest.json").read_bytes())["content"]["files"]]
    assert [entry.corpus for entry in entries] == [entry.corpus for entry in read_manifest(corpus.folder).files]
    assert not any(entry.url for entry in entries)
