"""Conditions: labels and captions, and what stands for none."""

import pytest
import torch
from torch import Tensor

from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.conditioning import Conditioning, combine
from models.conditioning.text import TextConditioner, TextConditionerConfig

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
