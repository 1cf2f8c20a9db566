"""Grids of images, and plots, as one PNG each, for people."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between cells
LABEL_HEIGHT = 22
MIN_CELL = 64  # small images are enlarged to at least this


def grid_png(
    images: np.ndarray, *, column_labels: Sequence[str] = (), row_labels: Sequence[str] = (), title: str = ""
) -> bytes:
    """Return a grid of images as PNG.

    Args:
        images: uint8 (rows columns h w c), c in 1, 3.
        column_labels: One a column, above the grid; shortened to the column's width.
        row_labels: One a row, left of the grid.
        title: One line above everything.
    """
    rows, columns, height, width, _ = images.shape
    zoom = max(1, -(-MIN_CELL // min(height, width)))
    cell_h, cell_w = height * zoom + GAP, width * zoom + GAP
    font = ImageFont.load_default(size=13)
    left = max((round(font.getlength(label)) + 10 for label in row_labels), default=0)
    top = LABEL_HEIGHT * (bool(title) + bool(column_labels))
    canvas = Image.new("RGB", (left + columns * cell_w + GAP, top + rows * cell_h + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((left + GAP, 3), title, fill="black", font=font)
    for column, label in enumerate(column_labels):
        x = left + GAP + column * cell_w + (cell_w - GAP) / 2
        draw.text((x, top - LABEL_HEIGHT / 2), _fitted(label, font, cell_w), fill="black", font=font, anchor="mm")
    for row, label in enumerate(row_labels):
        y = top + GAP + row * cell_h + (cell_h - GAP) / 2
        draw.text((left - 6, y), label, fill="black", font=font, anchor="rm")
    for row in range(rows):
        for column in range(columns):
            cell = np.repeat(np.repeat(images[row, column], zoom, axis=0), zoom, axis=1)
            picture = Image.fromarray(cell[..., 0] if cell.shape[-1] == 1 else cell)
            canvas.paste(picture, (left + GAP + column * cell_w, top + GAP + row * cell_h))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def plot_png(figure: Any) -> bytes:
    """Return a figure of matplotlib, which only those who draw one import, as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _fitted(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Shorten ``label`` until it is at most ``width`` pixels wide."""
    short = label
    while short and font.getlength(short) > width:
        short = short[:-2] + "." if len(short) > 2 else ""
    return short
