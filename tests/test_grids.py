"""Grids of images: all their text can be read, and every class has its examples."""

import io
from pathlib import Path

import numpy as np
import pytest
from manifests import commit_corpus
from PIL import Image, ImageFont

from data.samples import image_members
from data.shards.writer import ShardWriter
from pipelines.model.grids import grid_png, heading
from pipelines.prepare_corpus import EXAMPLE_ROWS, example_grid

CELLS = np.full((2, 3, 64, 64, 3), 128, dtype=np.uint8)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("L"))


def test_a_title_is_wrapped_rather_than_cut_off() -> None:
    title = "guidance 2.5, ddim with 250 steps, seed 12345, and what else a title may say of a grid"
    wide = pixels(grid_png(np.repeat(CELLS, 6, axis=1), title=title))
    narrow = pixels(grid_png(CELLS[:, :1], title=title))
    assert (narrow[:, -2:] == 255).all(), "the text ends before the edge"
    # As much ink as on one line, up to how its letters meet the grid of pixels.
    ink = [(255 - picture[: picture.shape[0] - 2 * 66 - 2].astype(int)).sum() for picture in (wide, narrow)]
    assert ink[1] == pytest.approx(ink[0], rel=0.05)
    assert narrow.shape[1] < 300
    assert pixels(grid_png(CELLS)).shape == (2 * 66 + 2, 3 * 66 + 2)


def test_a_folded_grid_is_nearly_square_and_has_every_image_below_its_label() -> None:
    for rows, columns, shape in ((2, 10, (2 * (2 * 66 + 22) + 2, 5 * 66 + 2)), (4, 10, (2 * (4 * 66 + 22) + 2, 332))):
        greys = np.arange(1, rows * columns + 1).reshape(rows, columns) * 5
        cells = np.broadcast_to(greys[..., None, None, None], (rows, columns, 64, 64, 1)).astype(np.uint8)
        labels = [chr(ord("a") + column) for column in range(columns)]
        picture = pixels(grid_png(cells, column_labels=labels, folds=True))
        assert picture.shape == shape
        whole = pixels(grid_png(cells, column_labels=labels))
        halves = [pixels(grid_png(cells[:, half], column_labels=labels[half])) for half in (slice(5), slice(5, 10))]
        assert (picture == np.concatenate([halves[0][:-2], halves[1]])).all()
        assert whole.shape[1] / whole.shape[0] > 2.2
    square = np.zeros((8, 10, 64, 64, 1), np.uint8)
    assert pixels(grid_png(square, folds=True)).shape == pixels(grid_png(square)).shape


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sneaker", "sneaker"),
        ("Größe", "Größe"),
        ("A\u0308rzte", "Ärzte"),
        ("Кошка", "Кошка"),
        ("猫", "no. 7"),
        ("猫 cat", "no. 7 cat"),
        ("two\nlines\tof text", "two lines of text"),
        ("", ""),
        ("a" * 100_000, "a" * 400),
    ],
)
def test_a_heading_has_letters_that_the_font_has_or_the_number_of_its_class(name: str, shown: str) -> None:
    assert heading(name, 7) == shown
    grid_png(CELLS, column_labels=(name, name, name), row_labels=(name[:40], ""), title=name[:40])


def test_every_letter_of_a_heading_is_drawn_as_itself() -> None:
    """A letter that a font lacks is drawn as the same box as a code point that no font has."""
    from matplotlib import get_data_path

    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 12)
    box = bytes(font.getmask("\ufff0"))
    for letter in (chr(code) for code in range(0x21, 0x3000) if chr(code).isalnum()):
        if heading(letter, 3) == letter:
            assert bytes(font.getmask(letter)) != box, letter


def write_corpus(folder: Path, labels: list[int], *, classes: tuple[str, ...], corpora: tuple[str, ...] = ("",)):
    """Shards of 50 samples of one colour a class, for each corpus in turn."""
    entries = []
    for corpus in corpora:
        for first in range(0, len(labels), 50):
            with ShardWriter(folder / f"train-{len(entries):06}.tar") as writer:
                for number, label in enumerate(labels[first : first + 50], start=first):
                    image = np.full((64, 64, 1), 20 * (label + 2), dtype=np.uint8)
                    image[0] = corpora.index(corpus)
                    key = f"{corpus}{number}"
                    writer.add(key, image_members(key, image, label=label, caption="", metadata={}))
            assert writer.entry is not None
            entries.append(type(writer.entry)(**{**writer.entry.as_json(), "corpus": corpus}))
    return commit_corpus(folder, entries, resolution=64, channels=1, classes=classes)


def cells_of(png: bytes, columns: int) -> np.ndarray:
    """Return the second pixel row of each cell (rows columns) and its first."""
    picture = pixels(png)
    top = picture.shape[0] - EXAMPLE_ROWS * 66 - 2
    return np.array(
        [[picture[top + 2 + 66 * r + 5, 2 + 66 * c + 5] for c in range(columns)] for r in range(EXAMPLE_ROWS)]
    )


def test_a_large_first_class_leaves_no_other_without_examples(tmp_path: Path) -> None:
    labels = [0] * 700 + [1] * 3 + [2] * 40
    corpus = write_corpus(tmp_path, labels, classes=("a", "b", "c"))
    found = cells_of(example_grid(tmp_path, corpus), 3)
    assert found.tolist() == [[40, 60, 80]] * 3 + [[40, 255, 80]]


def test_examples_without_classes_fill_the_grid(tmp_path: Path) -> None:
    found = cells_of(example_grid(tmp_path, write_corpus(tmp_path, [-1] * 100, classes=())), 12)
    assert (found == 20).all()
    (tmp_path / "few").mkdir()
    few = example_grid(tmp_path / "few", write_corpus(tmp_path / "few", [-1] * 6, classes=()))
    assert cells_of(few, 2).tolist() == [[20, 20]] * 3 + [[255, 255]]


def test_examples_of_several_corpora_stand_in_turn(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [0, 1] * 30, classes=("a", "b"), corpora=("x", "y"))
    picture = pixels(example_grid(tmp_path, corpus))
    top = picture.shape[0] - EXAMPLE_ROWS * 66
    assert [int(picture[top + 66 * row, 10]) for row in range(EXAMPLE_ROWS)] == [0, 1, 0, 1]
