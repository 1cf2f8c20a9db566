"""The emoji source: which drawing has which name, group and split, on a folder made here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.samples import BadSample, ImageSample
from data.sources import EmojiConfig
from data.sources.emoji import Emoji
from data.transforms import FILTER_REASONS, ImageViewConfig, view_sample

# In the list's format; drawings of the second half of the pairs are there.
LIST: list[dict[str, Any]] = [
    {"name": "WAVING HAND", "unified": "1F44B", "category": "People & Body"},
    {"name": "Handshake", "unified": "1F91D", "category": "People & Body"},
    {"name": "HASH KEY", "unified": "0023-FE0F-20E3", "category": "Symbols"},
    {"name": "Rainbow Flag", "unified": "1F3F3-FE0F-200D-1F308", "category": "Flags"},
    {"name": "LIGHT TONE", "unified": "1F3FB", "category": "Component"},
    {"name": "NEVER DRAWN", "unified": "1F000", "category": "Symbols"},
]
LIST[0]["skin_variations"] = {"1F3FB": {"unified": "1F44B-1F3FB"}, "1F3FF": {"unified": "1F44B-1F3FF"}}
LIST[1]["skin_variations"] = {"1F3FB-1F3FF": {"unified": "1FAF1-1F3FB-200D-1FAF2-1F3FF"}}
STEMS = [
    *("1f44b", "1f44b-1f3fb", "1f44b-1f3ff", "1faf1-1f3fb-200d-1faf2-1f3ff"),
    *("23-20e3", "1f3f3-fe0f-200d-1f308", "1f3fb", "1f1e6"),
]


@pytest.fixture
def config(tmp_path: Path) -> EmojiConfig:
    drawing = np.zeros((72, 72, 4), dtype=np.uint8)
    drawing[20:50, 20:50] = (200, 30, 30, 255)
    (tmp_path / "drawings").mkdir()
    for stem in STEMS:
        Image.fromarray(drawing).save(tmp_path / "drawings" / f"{stem}.png")
    (tmp_path / "emoji.json").write_text(json.dumps(LIST))
    return EmojiConfig(drawings=tmp_path / "drawings", names=tmp_path / "emoji.json", val_fraction=0.5)


def everything(source: Emoji) -> tuple[dict[str, ImageSample], dict[str, str]]:
    """All samples by key, and the reasons of the others."""
    samples, others = {}, {}
    for split in ("train", "val"):
        for index in range(source.count(split)):
            try:
                sample = source.read(split, index)
                samples[sample.key] = sample
            except BadSample as error:
                others[error.key] = error.reason
    return samples, others


def test_captions_are_names_with_skin_tones_and_classes_are_groups(config: EmojiConfig) -> None:
    source = config.open()
    samples, _ = everything(source)
    assert {key: (sample.caption, source.classes[sample.label]) for key, sample in samples.items()} == {
        "1f44b": ("waving hand", "People & Body"),
        "1f44b-1f3fb": ("waving hand, light skin tone", "People & Body"),
        "1f44b-1f3ff": ("waving hand, dark skin tone", "People & Body"),
        "1faf1-1f3fb-200d-1faf2-1f3ff": ("handshake, light and dark skin tone", "People & Body"),
        "23-20e3": ("hash key", "Symbols"),
        "1f3f3-fe0f-200d-1f308": ("rainbow flag", "Flags"),
    }
    assert source.classes == ("Flags", "People & Body", "Symbols")


def test_drawings_without_a_name_are_counted_and_do_not_stop_the_stage(config: EmojiConfig) -> None:
    samples, others = everything(config.open())
    assert others == {"1f3fb": "not_listed", "1f1e6": "not_listed"}
    assert len(samples) + len(others) == len(STEMS)
    assert set(others.values()) <= FILTER_REASONS


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_an_emoji_in_all_skin_tones_is_in_one_split(config: EmojiConfig, fraction: float) -> None:
    source = config.model_copy(update={"val_fraction": fraction}).open()
    splits = {
        source.read(split, index).key: split
        for split in ("train", "val")
        for index in range(source.count(split))
        if source._stems[split][index].startswith("1f44b")
    }
    assert len(splits) == 3
    assert len(set(splits.values())) == 1


def test_the_transparent_ground_becomes_white(config: EmojiConfig) -> None:
    samples, _ = everything(config.open())
    image = view_sample(samples["1f44b"], ImageViewConfig(resolution=64, fit="stretch"))
    assert image.shape == (64, 64, 3)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[32, 32].tolist() == [200, 30, 30]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("[", "is not a list of emoji"), ("{}", None), ('[{"name": "X"}]', "KeyError"), ("[1]", "TypeError")],
)
def test_a_list_of_another_format_is_refused(config: EmojiConfig, content: str, complaint: str | None) -> None:
    assert config.names is not None
    config.names.write_text(content)
    if complaint is None:
        assert set(everything(config.open())[1].values()) == {"not_listed"}
    else:
        with pytest.raises(ValueError, match=complaint):
            config.open()


def test_missing_packages_are_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[emoji\]'"):
        EmojiConfig().open()
