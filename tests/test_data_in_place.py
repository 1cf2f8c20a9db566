"""Shards of others, used where they lie: on disk and in an object store, img2dataset's failed samples included."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Run, run_stage
from PIL import Image

from data.files import sha256_of
from data.loading import ImageShards
from data.manifest import read_manifest
from data.samples import BadSample
from data.shards import remote
from data.shards.remote import Cache, check_address, local_path, matches
from data.shards.verification import verify_shard
from data.sources import Corpus, WebDatasetConfig
from data.sources.in_place import index_in_place
from data.transforms import ImageViewConfig, view_image
from pipelines.prepare_corpus import PrepareCorpusConfig, index_shard
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.experiment import load_config

SECRET = "wJalrXUtnFEMIsecretEXAMPLE"
BUCKET_HOST = "127.0.0.1"


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((40 + number % 3, 48)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def img2dataset_shard(numbers: range) -> bytes:
    """As img2dataset writes it: jpg, txt and json; where a download failed, the jpg is missing and the json says so."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in numbers:
            failed = number % 10 == 9
            members = {} if failed else {"jpg": jpeg(number)}
            about = {"key": f"{number:09d}", "status": "failed_to_download" if failed else "success"}
            members |= {"json": json.dumps(about).encode(), "txt": b"picture %d" % number}
            for suffix, payload in members.items():
                header = tarfile.TarInfo(f"{number:09d}.{suffix}")
                header.size, header.mtime = len(payload), 1_700_000_000 + number
                tar.addfile(header, io.BytesIO(payload))
    return buffer.getvalue()


def write_foreign(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    shards = {f"{number:05d}.tar": img2dataset_shard(range(number * 20, number * 20 + 20)) for number in range(4)}
    for name, payload in shards.items():
        (folder / name).write_bytes(payload)
    return shards


def experiment(folder: Path, source: str, *, resolution: int = 16) -> Path:
    path = folder / "mine.toml"
    path.write_text(
        f'[run]\nroot = "{folder}/run"\ntracking_uri = "sqlite:///{folder}/mlflow.db"\n'
        f'[prepare_corpus]\nsource = {{ kind = "webdataset", val_fraction = 0.3, {source} }}\n'
        f"view = {{ resolution = {resolution} }}\n"
        'bad_samples = "quarantine"\nmax_bad_fraction = 0.2\n'
        "[train_vae]\nupdates = 3\nglobal_batch = 8\nimages_per_device = 8\nlog_every = 1\nvalidate_every = 3\n"
        "network = { latent_channels = 4, channels = [16, 32], blocks_per_level = 1, mid_attention = false, "
        "norm_groups = 8 }\n"
        "[encode_latents]\nbatch_size = 16\n"
    )
    return path


def check_corpus(folder: Path, *, prefix: str, resolution: int = 16) -> None:
    """Every good sample is there, seen through the view, and the failed ones are counted."""
    manifest = read_manifest(folder)
    assert manifest.content["counts"] == {"in": 80, "out": 72, "quarantined": {"missing_image": 8}}
    assert {entry.url for entry in manifest.files} == {f"{prefix}/{number:05d}.tar" for number in range(4)}
    assert not list(folder.rglob("*.tar"))
    reports = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(report["key"] for report in reports) == [f"{number:09d}" for number in range(9, 80, 10)]
    assert all("its json says 'failed_to_download'" in report["detail"] for report in reports)
    found = {}
    for split in ("train", "val"):
        images = ImageShards(folder, split=split)
        batch = images.read(np.arange(len(images)))
        found |= {k: (i, c) for k, i, c in zip(batch.keys, batch.images, batch.captions, strict=True)}
    assert len(found) == 72
    for key, (image, caption) in found.items():
        number = int(key)
        assert caption == f"picture {number}"
        assert np.array_equal(image, view_image(jpeg(number), ImageViewConfig(resolution=resolution)))


def test_shards_of_others_are_indexed_where_they_lie_and_encoded(tmp_path: Path, one_process_run: Run) -> None:
    shards = write_foreign(tmp_path / "theirs")
    side = one_process_run.manifest("prepare_corpus")["content"]["image"]["resolution"]
    config = experiment(tmp_path, f'urls = ["{tmp_path}/theirs/{{00000..00003}}.tar"]', resolution=side)
    done = run_stage("prepare_corpus", config=config)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == shards
    check_corpus(tmp_path / "run" / "corpus", prefix=f"{tmp_path}/theirs", resolution=side)
    done = run_stage("encode_latents", "--inputs.vae", str(one_process_run.folder("train_vae")), config=config)
    assert done.returncode == 0, done.stderr
    latents = read_manifest(tmp_path / "run" / "latents")
    assert latents.content["counts"] == {"in": 72, "out": 72, "quarantined": {}}
    assert all(sha256_of(tmp_path / "run" / "latents" / entry.name) == entry.sha256 for entry in latents.files)

    # A shard that changes later is named, never read as if nothing had happened.
    (tmp_path / "theirs" / "00001.tar").write_bytes(shards["00001.tar"] + bytes(512))
    with pytest.raises(BadSample, match="shard_changed"):
        ImageShards(tmp_path / "run" / "corpus", split="train").read(np.arange(40))


def test_a_shard_that_was_changed_without_changing_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_foreign(tmp_path / "theirs")
    corpus = Corpus.alone(WebDatasetConfig(urls=(f"{tmp_path}/theirs/*.tar",), val_fraction=0.3).open())
    folder = tmp_path / "corpus"
    entry = index_in_place(corpus, 1, "train", folder / "train-000001.tar", is_good=lambda found: True)
    shard = Path(entry.url)
    with monkeypatch.context() as patch:
        patch.setattr("data.shards.verification.verify_file", lambda *_, **__: pytest.fail("it was read again"))
        verify_shard(folder, entry)
    shard.touch()
    verify_shard(folder, entry)  # read again, and still the same
    raw = bytearray(shard.read_bytes())
    raw[5000] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, (1, 1))
    with pytest.raises(ValueError, match=rf"{shard} has sha256 .* its content was changed"):
        verify_shard(folder, entry)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard} is missing, but its manifest lists it"):
        verify_shard(folder, entry)


@pytest.mark.parametrize("gone", [False, True])
def test_a_shard_that_changes_while_it_is_indexed_ends_the_stage_with_a_sentence(gone: bool, tmp_path: Path) -> None:
    write_foreign(tmp_path / "theirs")
    config = load_config(
        PrepareCorpusConfig, table="prepare_corpus", argv=["--config", str(experiment(tmp_path, "urls = ['x']"))]
    )
    corpus = Corpus.alone(WebDatasetConfig(urls=(f"{tmp_path}/theirs/*.tar",), val_fraction=0.3).open())
    shard = tmp_path / "theirs" / "00001.tar"
    raw = shard.read_bytes()
    shard.unlink() if gone else shard.write_bytes(raw + bytes(10_240))
    with pytest.raises(ConfigError, match=f"shard_{'missing' if gone else 'changed'}.* run the same command again"):
        index_shard(config, corpus, tmp_path / "corpus" / "train-000001.tar", "train", 1)


# --- an object store


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real server of the S3 protocol on loopback, with credentials in the environment."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=BUCKET_HOST, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEKEY")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="corpora")
        for number in range(4):
            payload = img2dataset_shard(range(number * 20, number * 20 + 20))
            client.put_object(Bucket="corpora", Key=f"laion/{number:05d}.tar", Body=payload)
        yield "s3://corpora/laion"
    server.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("LATENTLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LATENTLINE_CACHE_GB", "1")
    return Cache.of_environment()


def copies(cache: Cache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.is_file() and not path.name.endswith(("lock", ".tmp"))]


def test_a_corpus_in_an_object_store_is_used_through_a_cache_too_small_for_it(
    s3: str, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(img2dataset_shard(range(20)))
    monkeypatch.setenv("LATENTLINE_CACHE_GB", str(2.5 * size / 1e9))
    config = experiment(tmp_path, f'urls = ["{s3}/*.tar"]')
    done = run_stage("prepare_corpus", config=config)
    assert done.returncode == 0, done.stderr
    assert len(copies(cache)) <= 2
    check_corpus(tmp_path / "run" / "corpus", prefix=s3)
    for stage in ("train_vae", "encode_latents"):
        done = run_stage(stage, config=config)
        assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "run" / "latents").counts.out == 72
    assert len(copies(cache)) <= 2
    assert SECRET not in done.stdout + done.stderr
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_compressed_shard_in_an_object_store_is_unpacked_once(s3: str, cache: Cache) -> None:
    import boto3

    payload = gzip.compress(img2dataset_shard(range(20)))
    boto3.client("s3").put_object(Bucket="corpora", Key="packed/00000.tar.gz", Body=payload)
    source = WebDatasetConfig(urls=(s3.replace("laion", "packed/*.tar.gz"),), val_fraction=0.3).open()
    for split in ("train", "val"):
        for index in range(source.count(split)):
            with contextlib.suppress(BadSample):  # the two that img2dataset could not download
                source.read(split, index)
            time.sleep(0.01)  # a use, which is noted in the copy's time
    assert len(copies(cache)) == 2


def test_an_object_that_was_replaced_by_one_of_its_size_is_fetched_again(
    s3: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    source, client = WebDatasetConfig(urls=(s3.replace("laion", "again/0.tar"),), val_fraction=0.3), boto3.client("s3")
    captions = []
    for first in (0, 20):
        client.put_object(Bucket="corpora", Key="again/0.tar", Body=img2dataset_shard(range(first, first + 20)))
        opened = source.open()
        captions.append(opened.read("train", 0).caption)
    assert captions[0] != captions[1]
    url, digest = opened.urls[0], hashlib.sha256(img2dataset_shard(range(20, 40))).hexdigest()
    assert local_path(url, sha256=digest).read_bytes() == img2dataset_shard(range(20, 40))
    with pytest.raises(OSError, match="its content was changed"):
        local_path(url, sha256="0" * 64)


def test_a_service_that_fails_for_a_moment_costs_nothing_and_its_reason_is_said(
    s3: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.001)
    real, failures = remote._filesystem("s3"), [0]

    def failing(name: str, times: int) -> Callable[..., Any]:
        failures[0] = times

        def call(*words: Any, **named: Any) -> Any:
            failures[0] -= 1
            if failures[0] >= 0:
                raise TimeoutError("slow down")
            return getattr(real, name)(*words, **named)

        return call

    shard = img2dataset_shard(range(20))
    for name in ("info", "open"):
        fake = SimpleNamespace(info=real.info, open=real.open)
        setattr(fake, name, failing(name, 2))
        monkeypatch.setattr(remote, "_filesystem", lambda scheme, fake=fake: fake)
        assert cache.fetch(f"{s3}/00000.tar").read_bytes() == shard
        cache.path(f"{s3}/00000.tar").unlink()
        setattr(fake, name, failing(name, 3))
        with pytest.raises(OSError, match=r"cannot be read \(TimeoutError\)"):
            cache.fetch(f"{s3}/00000.tar")
    fake = SimpleNamespace(info=real.info, open=lambda *_, **__: io.BytesIO(b"short"))
    monkeypatch.setattr(remote, "_filesystem", lambda scheme: fake)
    with pytest.raises(OSError, match=f"gave 5 bytes instead of {len(shard)}"):
        cache.fetch(f"{s3}/00000.tar")
    monkeypatch.undo()
    monkeypatch.setenv("LATENTLINE_CACHE_GB", "inf")
    with pytest.raises(ValueError, match="LATENTLINE_CACHE_GB is a number of gigabytes above 0, not 'inf'"):
        Cache.of_environment()


def test_what_is_fetched_is_what_was_stored_and_the_longest_unused_makes_room(s3: str, cache: Cache) -> None:
    urls = matches(f"{s3}/*.tar")
    assert urls == [f"{s3}/{number:05d}.tar" for number in range(4)]
    small = replace(cache, max_bytes=3 * len(img2dataset_shard(range(20))) + 4096)
    for url in urls[:3]:
        assert small.fetch(url).read_bytes() == img2dataset_shard(
            range(int(url[-9:-4]) * 20, int(url[-9:-4]) * 20 + 20)
        )
        time.sleep(0.01)
    held = small.fetch(urls[0])
    with open(small.path(urls[1]), "rb") as still_open:
        small.fetch(urls[3])
        assert sorted(copies(small)) == sorted([held, small.path(urls[2]), small.path(urls[3])])
        assert still_open.read() == img2dataset_shard(range(20, 40))
    with pytest.raises(OSError, match="more than the whole cache may hold"):
        replace(cache, max_bytes=1000).fetch(urls[1])


def test_what_is_fetched_must_be_what_the_manifest_says(s3: str, cache: Cache) -> None:
    url, payload = f"{s3}/00000.tar", img2dataset_shard(range(20))
    with pytest.raises(OSError, match=r"00000\.tar has sha256 .* its manifest says abc: its content was changed"):
        cache.fetch(url, size=len(payload), sha256="abc")
    with pytest.raises(OSError, match=rf"has {len(payload)} bytes instead of 7: it was cut or changed"):
        cache.fetch(url, size=7)
    assert not copies(cache)
    cache.path(url).write_bytes(b"an older one")
    found = cache.fetch(url, size=len(payload), sha256=hashlib.sha256(payload).hexdigest())
    assert found.read_bytes() == payload


def test_what_a_killed_process_left_in_the_cache_is_swept(s3: str, cache: Cache) -> None:
    cache.folder.mkdir()
    left = cache.folder / ".abc.1-2.tmp"
    left.write_bytes(bytes(100))
    cache.fetch(f"{s3}/00000.tar")
    assert not left.exists()


def test_processes_that_want_the_same_file_fetch_it_once(s3: str, cache: Cache) -> None:
    program = (
        f"from data.shards.remote import local_path; import os; print(os.stat(local_path('{s3}/00002.tar')).st_ino)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    jobs = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) for _ in range(3)
    ]
    inodes = {job.communicate(timeout=200)[0] for job in jobs}
    assert all(job.returncode == 0 for job in jobs)
    assert len(inodes) == 1
    assert local_path(f"{s3}/00002.tar").read_bytes() == img2dataset_shard(range(40, 60))


def test_what_cannot_be_fetched_is_named_without_credentials(
    s3: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://corpora/laion/nothing\.tar is not there"):
        cache.fetch(f"{s3}/nothing.tar")
    assert not copies(cache)
    for url in ("s3://KEY:{}@corpora/x.tar", "https://host/x.tar?X-Amz-Signature={}", "https://u:{}@host/x.tar"):
        with pytest.raises(ValueError, match="credentials belong into the environment") as refused:
            check_address(url.format(SECRET))
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize("place", ["file", "command line"])
def test_credentials_in_an_address_are_not_repeated_by_the_stage(place: str, tmp_path: Path) -> None:
    given = f's3://KEY:{SECRET}@corpora/x.tar", "https://host/x.tar?sig={SECRET}'
    config = experiment(tmp_path, f'urls = ["{given if place == "file" else "x.tar"}"]')
    words = ("--source.urls", f'["{given}"]') if place == "command line" else ()
    done = run_stage("prepare_corpus", *words, config=config)
    assert done.returncode == 2
    assert done.stderr.count("credentials belong into the environment") == 2
    assert SECRET not in done.stdout + done.stderr + (tmp_path / "run/corpus/outcome.json").read_text()
