"""Laws of the experiment as a whole: what a later stage would refuse is said by the first one that can know it."""

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import tomli_w
from conftest import SMOKE, run_here

from data.manifest import ImageShape
from data.samples import encode_png
from data.shards.writer import ShardWriter
from pipelines.model.experiment import TABLES, CorpusFacts, misfits
from pipelines.runtime.config.experiment import load_config
from pipelines.tools.doctor_checks import experiment
from pipelines.tools.plan import StageConfigs

IMAGE = ImageShape(resolution=16, channels=3)
FINE = CorpusFacts(image=IMAGE, classes=("a", "b"), has_validation=True, has_captions=True)
MADE_BEFORE = Path(__file__).parent / "made_by_0_1"
TEXT = '[{ kind = "text" }]'
MODELS = get_type_hints(StageConfigs)


def facts(**changes: Any) -> CorpusFacts:
    return CorpusFacts(**{**vars(FINE), **changes})


def tables(*words: str) -> dict[str, Any]:
    """The smoke experiment's configurations, ``STAGE.KEY VALUE ...`` changed."""
    changed: dict[str, list[str]] = {stage: [] for stage in MODELS}
    for key, value in zip(words[::2], words[1::2], strict=True):
        stage, _, name = key.partition(".")
        changed[stage] += [f"--{name}", value]
    return {
        stage: load_config(model, table=stage, argv=["--config", str(SMOKE), *changed[stage]])
        for stage, model in MODELS.items()
    }


@pytest.mark.parametrize("stage", TABLES)
def test_a_table_s_keys_are_those_of_its_stage(stage: str) -> None:
    whole = MODELS[stage].model_fields
    for name, field in TABLES[stage].model_fields.items():
        if name != "inputs":
            assert field.default == whole[name].default, name
            assert field.annotation in (whole[name].annotation, float), name


@pytest.mark.parametrize("turned", [False, True])
def test_a_kind_within_another_is_kept_in_any_order_of_the_words(turned: bool) -> None:
    inner, outer = "train_vae.objective.adversary.start.kind", "train_vae.objective.adversary.kind"
    words = [(outer, "patchgan"), (inner, "plateau")]
    found = tables(*itertools.chain(*(words[::-1] if turned else words)))["train_vae"].objective.adversary
    assert (found.kind, found.start.kind) == ("patchgan", "plateau")


def test_an_experiment_that_fits_is_fine() -> None:
    assert list(misfits(tables(), FINE)) == []
    assert list(misfits({}, FINE)) == []
    assert list(misfits(tables(), None)) == []


@pytest.mark.parametrize(
    ("words", "corpus", "key", "why"),
    [
        ((), facts(classes=()), "train_unet.denoiser", "needs a corpus with at least one class"),
        ((), facts(image=ImageShape(resolution=18, channels=3)), "train_vae.network.channels", "no multiple of 4"),
        (
            ("train_unet.denoiser.network.channels", "[32, 32, 32, 32]",
             "train_unet.denoiser.network.blocks", "[1,1,1,1]",
             "train_unet.denoiser.network.attention", "[false,false,false,true]",
             "train_unet.denoiser.network.heads", "[1,1,1,2]",
             "train_unet.denoiser.network.transformer_depth", "[1,1,1,1]"),
            FINE, "train_unet.denoiser", "cannot be halved 3 times",
        ),
        (("encode_latents.flipped", "false"), FINE, "train_unet.flip_probability", "stores no mirrored latents"),
        (("train_unet.denoiser.conditioners", TEXT), FINE, "train_unet.denoiser.conditioners",
         "needs the features of captions"),
        (
            ("train_unet.denoiser.conditioners", '[{ kind = "text", name = "t5" }]', "encode_latents.captions.kind",
             "minilm"),
            FINE, "train_unet.denoiser.conditioners", "reads the features named 't5'",
        ),
        (
            ("train_unet.denoiser.conditioners", TEXT, "encode_latents.captions.kind", "minilm"),
            facts(has_captions=False), "train_unet.denoiser.conditioners", "the first images of the corpus have none",
        ),
        (("train_unet.order.kind", "weighted"), facts(classes=()), "train_unet.order", "needs classes"),
        (("train_vae.order", '{ kind = "weighted", weights = { c = 2.0 } }'), FINE, "train_vae.order", "names 'c'"),
        (("train_unet.grid.sampler", '{ kind = "ddpm", num_steps = 5, variance = "learned" }'), FINE,
         "train_unet.grid.sampler", "learned"),
        (("evaluate.sampler", '{ kind = "ddpm", num_steps = 5, variance = "learned" }'), FINE, "evaluate.sampler",
         "learned"),
        (("evaluate.likelihood", '{ kind = "variational_bound", num_steps = 5, variance = "learned" }'), FINE,
         "evaluate.likelihood", "learned"),
        ((), facts(has_validation=False), "evaluate", "validation images"),
        ((), facts(has_validation=False), "train_unet.validate_samples", "validation images"),
        (("train_unet.extractor", '{ kind = "inception", weights = "/nowhere.pth" }'), FINE, "train_unet.extractor",
         "There is no weights file /nowhere.pth"),
        (("evaluate.extractor", '{ kind = "inception", weights = "/nowhere.pth" }'), FINE, "evaluate.extractor",
         "There is no weights file /nowhere.pth"),
        (("train_vae.objective.perceptual", '{ kind = "lpips", weights = "/nowhere.safetensors" }'), FINE,
         "train_vae.objective.perceptual", "do not exist"),
        (("train_vae.objective.equivariance", "{ probability = 0.5, factors = [3] }"), FINE, "train_vae.objective",
         "does not divide"),
        (("encode_latents.captions", '{ kind = "pretrained", folder = "/nowhere" }'), FINE, "encode_latents.captions",
         "/nowhere holds no text encoder"),
        (("encode_latents.inputs.vae", "/nowhere"), FINE, "encode_latents.inputs.vae", "there is no such folder"),
        (("train_vae.start", '{ kind = "diffusers", folder = "/nowhere" }'), FINE, "train_vae.start", "/nowhere"),
        (("train_unet.start", '{ kind = "diffusers", folder = "/nowhere" }'), FINE, "train_unet.denoiser", "/nowhere"),
        (("train_vae.start", '{ kind = "run", folder = "/nowhere" }'), FINE, "train_vae.start", "has not finished"),
        (("train_vae.start", f'{{ kind = "run", folder = "{MADE_BEFORE}/vae" }}'), FINE, "train_vae.start",
         "has latent_channels = 2, not 4"),
        (("train_unet.start", f'{{ kind = "run", folder = "{MADE_BEFORE}/vae" }}'), FINE, "train_unet.denoiser",
         "is the folder of train_vae, not of train_unet"),
        (("train_unet.start", f'{{ kind = "run", folder = "{MADE_BEFORE}/unet" }}'), facts(classes=None),
         "train_unet.denoiser", "has channels = "),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_its_key(
    words: tuple[str, ...], corpus: CorpusFacts, key: str, why: str
) -> None:
    found = [line for line in misfits(tables(*words), corpus) if line.startswith(f"{key}: ")]
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    ("package", "words", "why"),
    [
        ("efficientnet_lite_pytorch", ("evaluate.extractor.kind", "efficientnet_lite0"), "pip install"),
        ("transformers", ("encode_latents.captions.kind", "minilm"), "needs the library transformers"),
        (
            "transformers",
            ("train_unet.denoiser.conditioners", TEXT, "train_unet.captions.kind", "computed"),
            "needs the library transformers",
        ),
    ],
)
def test_an_extra_that_a_later_stage_needs_is_looked_for(
    package: str, words: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    (line,) = misfits(tables(*words), FINE)
    assert why in line


def test_doctor_fails_where_the_tables_do_not_fit() -> None:
    stages = StageConfigs(**tables("encode_latents.flipped", "false", "encode_latents.inputs.vae", "/nowhere"))
    assert [(level, text.partition(":")[0]) for level, text in experiment(stages)] == [
        ("failed", "encode_latents.inputs.vae"),
        ("failed", "train_unet.flip_probability"),
    ]
    assert [level for level, _ in experiment(StageConfigs(**tables()))] == ["ok"]


def test_what_a_table_takes_from_elsewhere_need_not_fit() -> None:
    words = ("train_unet.inputs.latents", "/elsewhere", "train_unet.inputs.vae", "/elsewhere")
    assert list(misfits(tables(*words, "encode_latents.flipped", "false"), facts(classes=()))) == []


@pytest.fixture
def without_classes(tmp_path: Path) -> Path:
    """The smoke experiment with images that have no classes, which its U-Net is conditioned on."""
    for split in ("train", "val"):
        with ShardWriter(tmp_path / f"{split}.tar") as writer:
            for number in range(4):
                writer.add(f"{split}{number}", {"png": encode_png(np.full((16, 16, 3), number, np.uint8))})
    whole = tomllib.loads(SMOKE.read_text())
    shards = {f"{name}urls": [str(tmp_path / f"{split}.tar")] for name, split in (("", "train"), ("val_", "val"))}
    whole["prepare_corpus"]["source"] = {"kind": "webdataset", **shards}
    path = tmp_path / "experiment.toml"
    path.write_text(tomli_w.dumps(whole))
    return path


def test_the_first_stage_refuses_what_the_file_says_of_a_later_one(without_classes: Path, tmp_path: Path) -> None:
    words = ("prepare_corpus", "--run.root", str(tmp_path / "run"))
    done = run_here(*words, config=without_classes)
    assert done.returncode == 2, done.stderr
    assert "train_unet.denoiser: A class conditioner needs a corpus with at least one class" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "corpus").glob("*.tar"))
    reason = json.loads((tmp_path / "run" / "corpus" / "outcome.json").read_bytes())["reason"]
    assert "A class conditioner needs a corpus" in reason

    # Where the command line changes this stage, it may change that one, too.
    done = run_here(*words, "--samples_per_shard", "2", config=without_classes)
    assert done.returncode == 0, done.stderr
    assert "warning: a later stage would refuse this experiment" in done.stdout
    assert "A class conditioner needs a corpus" in done.stdout

    # The next stage says it again, and the forecast.
    done = run_here("train_vae", "--run.root", str(tmp_path / "run"), config=without_classes)
    assert (done.returncode, "A class conditioner needs a corpus" in done.stderr) == (2, True)
    done = run_here("plan", "--run.root", str(tmp_path / "run"), "--trial", "false", config=without_classes)
    assert (done.returncode, "A class conditioner needs a corpus" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


def test_a_mistake_in_a_later_table_is_said_at_once_and_a_table_that_is_absent_is_none(tmp_path: Path) -> None:
    whole = tomllib.loads(SMOKE.read_text())
    whole["evaluate"]["sampler"]["kind"] = "dimm"
    path = tmp_path / "experiment.toml"
    path.write_text(tomli_w.dumps(whole))
    done = run_here("prepare_corpus", "--run.root", str(tmp_path / "run"), config=path)
    assert done.returncode == 2
    assert "evaluate.sampler.kind = 'dimm'" in done.stderr
    assert "did you mean ddim?" in done.stderr
    path.write_text(tomli_w.dumps({"run": {}, "prepare_corpus": whole["prepare_corpus"]}))
    assert run_here("prepare_corpus", "--run.root", str(tmp_path / "run"), config=path).returncode == 0
