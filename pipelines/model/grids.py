"""Grids of images, and plots, as one PNG each, for people.

Text is set in matplotlib's DejaVu Sans: Latin, Greek, Cyrillic and more. A heading in another script, such as Chinese,
gets the number of its class or column instead.
"""

import io
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 12
GAP = 2  # pixels between cells
LABEL_HEIGHT = 22
LONGEST_TEXT = 400  # letters
MIN_CELL = 64  # small images are enlarged to at least this
MIN_TITLE_WIDTH = 240  # of a line, pixels


def grid_png(
    images: np.ndarray,
    *,
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    title: str = "",
    folds: bool = False,
) -> bytes:
    """Return a grid of images as PNG.

    Args:
        images: uint8 (rows columns h w c), c in 1, 3.
        column_labels: One a column, above the grid; shortened to the column's width.
        row_labels: One a row, left of the grid.
        title: Lines above everything.
        folds: Break a wide grid into bands of columns, one below the other, so that it fits into the smallest square.
    """
    # Room for the cells and the text beside and above them.
    rows, columns, height, width, _ = images.shape
    zoom = max(1, -(-MIN_CELL // min(height, width)))
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    font = _font()
    row_labels = [_drawable(label) for label in row_labels]
    left = max((round(font.getlength(label)) + 10 for label in row_labels), default=0)
    band_h = rows * cell_h + LABEL_HEIGHT * any(column_labels)
    widths = {bands: left + -(-columns // bands) * cell_w + GAP for bands in range(1, columns + 1 if folds else 2)}
    bands = min(widths, key=lambda bands: max(widths[bands], bands * band_h))
    lines = _wrapped(_drawable(title), font, max(widths[bands], MIN_TITLE_WIDTH) - 2 * GAP)
    full_width = max([widths[bands], *(round(font.getlength(line)) + 2 * GAP for line in lines)])
    top = LABEL_HEIGHT * (len(lines) + any(column_labels)) + GAP
    canvas = Image.new("RGB", (full_width, LABEL_HEIGHT * len(lines) + bands * band_h + GAP), "white")

    def corner(row: int, column: int) -> tuple[int, int]:
        band, place = divmod(column, -(-columns // bands))
        return left + GAP + place * cell_w, top + band * band_h + row * cell_h

    # The text.
    draw = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((GAP, 3 + number * LABEL_HEIGHT), line, fill="black", font=font)
    for column, label in enumerate(column_labels):
        x, y = corner(0, column)
        shown = _fitted(heading(label, column), font, cell_w)
        place = x + (cell_w - GAP) / 2, y - GAP - LABEL_HEIGHT / 2
        draw.text(place, shown, fill="black", font=font, anchor="mm")
    for row, label in enumerate(row_labels):
        for first in range(0, columns, -(-columns // bands)):
            place = left - 6, corner(row, first)[1] + (cell_h - GAP) / 2
            draw.text(place, label, fill="black", font=font, anchor="rm")

    # The images.
    for row in range(rows):
        for column in range(columns):
            cell = np.repeat(np.repeat(images[row, column], zoom, axis=0), zoom, axis=1)
            picture = Image.fromarray(cell[..., 0] if cell.shape[-1] == 1 else cell)
            canvas.paste(picture, corner(row, column))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def plot_png(figure: Any) -> bytes:
    """Return a figure of matplotlib, which only those who draw one import, as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def heading(name: str, number: int) -> str:
    """Return ``name``, or where the font lacks some of its letters "no. NUMBER" and those that it has."""
    shown = _drawable(name)
    return shown if len(shown) == len(_in_one_line(name)) else f"no. {number} {shown}".strip()


@cache
def _font() -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # a third of a second, which only those who draw wait for

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


@cache
def _letters() -> frozenset[int]:
    """Return the code points that the font has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font().path).get_charmap())


def _in_one_line(text: str) -> str:
    # One character a letter: decomposed umlauts, as macOS names files, would be drawn beside their letters.
    return unicodedata.normalize("NFC", " ".join(text[:LONGEST_TEXT].split()))


def _drawable(text: str) -> str:
    return " ".join("".join(letter for letter in _in_one_line(text) if ord(letter) in _letters()).split())


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break ``text`` between words into lines of at most ``width`` pixels; a longer word stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _fitted(label: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Shorten ``label`` until it is at most ``width`` pixels wide."""
    short = label
    while short and font.getlength(short) > width:
        short = short[:-2] + "." if len(short) > 2 else ""
    return short
