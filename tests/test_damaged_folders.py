"""Folders that are not what a stage left: each is named as what it is, with a way out, and the way out works."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import run_here

from data.manifest import read_input, read_manifest
from data.samples import encode_png
from data.shards.verification import verify_shard
from pipelines.evaluation.real_images import read_items
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.stage.fingerprint import already_done, begin
from pipelines.runtime.stage.work_items import make_items, results_of
from pipelines.runtime.tracking.identity import RunIdentity, pipeline_identity

OLD = Path(__file__).with_name("made_by_0_1")
GARBAGE = (b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of every kind that somebody may give as an input."""
    root = tmp_path_factory.mktemp("folders")
    shutil.copytree(OLD, root / "run")
    for name, network in {"a VAE": {"_class_name": "AutoencoderKL"}, "a U-Net": {"_class_name": "UNet2DModel"}}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(network))
    (root / "a file").touch()
    (root / "empty").mkdir()
    stages = {path.name: path for path in (root / "run").iterdir() if (path / "manifest.json").exists()}
    unfinished = root / "run" / "unfinished"
    checkpoint = unfinished / "unet" / "checkpoints" / "update-00000001"
    others = {path.name: path for path in root.iterdir()} | {"nothing": root / "nothing"}
    return {**stages, **others, "unfinished": unfinished / "latents", "checkpoint": checkpoint}


KINDS = {
    "corpus": "the folder of prepare_corpus",
    "vae": "the folder of train_vae",
    "latents": "the folder of encode_latents",
    "unet": "the folder of train_unet",
    "evaluation": "the folder of evaluate",
    "run": "the folder of a whole run, which holds",
    "unfinished": "the folder of encode_latents, which has not finished",
    "checkpoint": "a checkpoint of a training",
    "a VAE": "the folder of a network of diffusers, of the class AutoencoderKL",
    "a U-Net": "the folder of a network of diffusers, of the class UNet2DModel",
    "a file": "it is a file",
    "empty": "it holds no manifest.json",
    "nothing": "there is no such folder",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "stage"),
    [("corpus", "prepare_corpus"), ("vae", "train_vae"), ("latents", "encode_latents"), ("unet", "train_unet")],
)
def test_an_input_that_is_something_else_is_named_as_that(
    name: str, stage: str, kind: str, folders: dict[str, Path]
) -> None:
    if kind == name:
        assert read_input(name, folders[kind]).stage == stage
        return
    with pytest.raises(ValueError, match=r"\.$") as refusal:
        read_input(name, folders[kind])
    if (kind, name) == ("a VAE", "vae"):
        assert "config.json is not that of an AutoencoderKL" in str(refusal.value)
        return
    assert KINDS[kind] in str(refusal.value)
    assert f"takes the finished folder of {stage}" in str(refusal.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished corpus of ten images, and its experiment file beside its run."""
    root = tmp_path_factory.mktemp("made")
    for number in range(10):
        write_image(root, number)
    source = {"kind": "image_folder", "path": str(root / "images"), "val_fraction": 0.4}
    table = {"source": source, "view": {"resolution": 8}, "samples_per_shard": 3}
    (root / "experiment.toml").write_text(tomli_w.dumps({"prepare_corpus": table}))
    done = run_here("prepare_corpus", "--run.root", str(root / "run"), config=root / "experiment.toml")
    assert done.returncode == 0, done.stderr
    return root / "run", root / "experiment.toml"


def write_image(root: Path, number: int) -> None:
    path = root / "images" / f"class{number % 2}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(np.full((8, 8, 3), 20 * number, np.uint8)))


@pytest.fixture
def corpus(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the finished corpus, to be damaged."""
    return shutil.copytree(made[0], tmp_path / "run") / "corpus"


@pytest.fixture
def prepare(made: tuple[Path, Path], corpus: Path) -> Callable[..., str]:
    """Runs the stage on the copy; returns what it said on standard error."""

    def run(*words: str, code: int = 0) -> str:
        done = run_here("prepare_corpus", "--run.root", str(corpus.parent), *words, config=made[1])
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
        return done.stderr

    return run


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize("damage", ["shard cut", "shard gone", *GARBAGE], ids=lambda value: str(value)[:12])
def test_a_part_of_an_unfinished_stage_that_was_damaged_is_made_again(
    damage: str | bytes, corpus: Path, prepare: Callable[..., str]
) -> None:
    digest, shard = read_manifest(corpus).digest, corpus / "train-000000.tar"
    whole = shard.read_bytes()
    (corpus / "manifest.json").unlink()
    if damage == "shard cut":
        cut(shard)
    elif damage == "shard gone":
        shard.unlink()
    else:
        (corpus / "parts" / "train-000000.tar.json").write_bytes(damage)
    assert "train-000000.tar" in prepare()
    assert read_manifest(corpus).digest == digest
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"x" * path.stat().st_size)])
def test_a_shard_of_a_finished_stage_that_was_damaged_has_a_way_out_that_works(
    damage: Callable[[Path], object], corpus: Path, prepare: Callable[..., str]
) -> None:
    manifest = read_manifest(corpus)
    entry = manifest.files[0]
    shutil.rmtree(corpus / "index")
    damage(corpus / entry.name)
    way_out = "remove it and the manifest.json beside it and run its stage again"
    with pytest.raises(ValueError, match=way_out):
        verify_shard(corpus, entry)
    for path in (corpus / entry.name, corpus / "manifest.json"):
        path.unlink(missing_ok=True)
    prepare()
    verify_shard(corpus, entry)
    assert read_manifest(corpus).digest == manifest.digest


def test_a_result_that_was_damaged_since_the_start_is_made_again_by_the_same_command(tmp_path: Path) -> None:
    parts, made = tmp_path / "parts", list[str]()
    parts.mkdir()
    lone = {"is_main": False, "accelerator": SimpleNamespace(process_index=0, num_processes=1)}
    stage: Any = SimpleNamespace(folder=tmp_path, stop=SimpleNamespace(requested=lambda: False), **lone)
    (parts / "a.json").write_text("{")
    for _ in range(2):
        with contextlib.suppress(ConfigError):
            make_items(stage, ["a"], lambda name: made.append(name) or {"samples": 1})
            assert results_of(stage, ["a"]) == [{"samples": 1}]
    assert made == ["a"]

    # The same of an evaluation's features, which lie beside the result.
    (parts / "a.safetensors").write_bytes(b"cut")
    with pytest.raises(ConfigError, match=r"a\.safetensors is damaged .* The same command makes it again"):
        read_items(parts, ["a"], "features")
    assert not (parts / "a.json").exists()


@pytest.mark.parametrize("content", GARBAGE, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("name", ["request.json", "listing.json", "run.json", "../pipeline.json", "manifest.json"])
def test_damaged_bookkeeping_is_named_with_a_way_out_that_works(
    name: str, content: bytes, corpus: Path, prepare: Callable[..., str]
) -> None:
    digest = read_manifest(corpus).digest
    (corpus / "manifest.json").unlink()
    (corpus / name).write_bytes(content)
    said = prepare(code=2)
    assert str((corpus / name).name) in said
    if "away" in said:
        corpus.rename(corpus.with_name("away"))
    else:
        assert "emove it" in said
        (corpus / name).unlink()
    prepare()
    assert read_manifest(corpus).digest == digest


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["counts"].update(out=3),
        lambda content: content["files"][0].update(bytes=1),
        lambda content: content["splits"].pop("val"),
        lambda content: content["config"].pop("view"),
        lambda content: content.update(classes=["other"]),
        lambda content: content.update(new=1),
        lambda content: content["image"].update(resolution="8"),
        lambda content: content["counts"].update(out=float("nan")),
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused_with_a_way_out_that_works(
    change: Callable[[dict], object], corpus: Path, prepare: Callable[..., str]
) -> None:
    digest, path = read_manifest(corpus).digest, corpus / "manifest.json"
    whole = json.loads(path.read_bytes())
    change(whole["content"])
    path.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="Restore it, or remove it and run its stage again"):
        read_manifest(corpus)
    prepare(code=2)
    path.unlink()
    prepare()
    assert read_manifest(corpus).digest == digest


def test_files_that_a_source_has_got_since_its_corpus_was_finished_are_said(
    made: tuple[Path, Path], corpus: Path, prepare: Callable[..., str], tmp_path: Path
) -> None:
    assert prepare() == ""
    images = Path(shutil.copytree(made[1].parent / "images", tmp_path / "images"))
    words = ("--run.root", str(tmp_path / "other"), "--source.path", str(images))
    assert run_here("prepare_corpus", *words, config=made[1]).returncode == 0
    write_image(tmp_path, 10)
    done = run_here("prepare_corpus", *words, config=made[1])
    assert done.returncode == 0
    assert "lists other files now than those that" in done.stderr
    assert "choose another run.root, or move this folder" in done.stderr
    shutil.rmtree(images)  # what a finished stage was made from may be gone
    assert run_here("prepare_corpus", *words, config=made[1]).stderr == ""

    (tmp_path / "shards").mkdir()
    shard, val = next(corpus.glob("train-*.tar")), next(corpus.glob("val-*.tar"))
    shutil.copy(shard, tmp_path / "shards" / "0.tar")
    source = f'{{ kind = "webdataset", urls = ["{tmp_path}/shards/*.tar"], val_urls = ["{val}"] }}'
    words = ("--run.root", str(tmp_path / "tars"), "--source", source)
    for name in ("1.tar", "2.tar"):
        done = run_here("prepare_corpus", *words, config=made[1])
        assert (done.returncode, "lists other files now" in done.stderr) == (0, name == "2.tar"), done.stderr
        shutil.copy(shard, tmp_path / "shards" / name)


def test_a_mistyped_source_does_not_bind_the_corrected_one(made: tuple[Path, Path], tmp_path: Path) -> None:
    words = ("prepare_corpus", "--run.root", str(tmp_path / "run"))
    done = run_here(*words, "--source.path", "/nowhere", config=made[1])
    assert (done.returncode, "/nowhere is not a folder" in done.stderr) == (2, True)
    assert run_here(*words, config=made[1]).returncode == 0
    done = run_here(*words, "--source.path", "/nowhere", config=made[1])
    assert (done.returncode, "source.path: was" in done.stderr) == (2, True)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_that_holds_another_stage_s_work_is_not_taken(finished: bool, tmp_path: Path) -> None:
    if finished:
        shutil.copytree(OLD / "vae", tmp_path, dirs_exist_ok=True)
    else:
        begin(tmp_path, {"stage": "train_vae", "config": {}, "parents": {}}, fingerprint_ignores={})
    request = {"stage": "train_unet", "config": {"updates": 1}, "parents": {}}
    with pytest.raises(ConfigError, match="holds the work of train_vae, not of train_unet"):
        already_done(tmp_path, request, allowed=("updates",))


@pytest.mark.parametrize("content", [*GARBAGE, b'{"run_id": 1}', b'{"pipeline_id": 1}', b'{"a": [1]}'])
def test_a_damaged_identity_is_no_traceback(content: bytes, tmp_path: Path) -> None:
    for name, read in (("run.json", RunIdentity.read), ("pipeline.json", pipeline_identity)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged .*Remove it, and the"):
            read(tmp_path)
    for tool in ("sync", "compare"):
        done = run_here(tool, str(tmp_path), config=None)
        assert (done.returncode, "run.json is damaged" in done.stderr) == (2, True)
