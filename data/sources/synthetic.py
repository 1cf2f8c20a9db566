"""Drawn coloured shapes with exact class and caption: a corpus of any size and resolution for tests and trials.

Class = shape; colour, size and place vary. A sample is a pure function of (seed, split, index).
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt

from data.randomness import generator
from data.samples import ImageSample, Split

CLASSES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 60, 180),
    "orange": (240, 140, 30),
}


class SyntheticConfig(BaseModel, frozen=True, extra="forbid"):
    """Drawn coloured shapes: four classes, six colours, exact captions."""

    kind: Literal["synthetic"] = "synthetic"  # circles, squares, triangles, crosses
    resolution: PositiveInt = Field(32, ge=8)  # side of the images, pixels
    num_train: PositiveInt = 1000  # training images
    num_val: PositiveInt = 200  # validation images
    seed: NonNegativeInt = 0  # other seeds give other images

    def open(self) -> "Synthetic":
        """Return the source."""
        return Synthetic(self)


class Synthetic:
    """Shapes, drawn when they are read."""

    classes = CLASSES
    left_out: ClassVar[Mapping[str, int]] = {}

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config

    def count(self, split: Split) -> int:
        """Return the number of images of a split."""
        return self._config.num_train if split == "train" else self._config.num_val

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: the configuration says everything."""
        yield self._config.model_dump_json()

    def read(self, split: Split, index: int) -> ImageSample:
        """Draw one image; RGB (resolution resolution 3). Classes follow one another."""
        if not 0 <= index < self.count(split):
            raise IndexError(f"synthetic {split} has images 0 to {self.count(split) - 1}, not {index}.")
        draws = generator(self._config.seed, f"synthetic/{split}", position=index)
        label = index % len(CLASSES)
        colour = list(COLOURS)[draws.integers(len(COLOURS))]
        radius = draws.uniform(0.35, 0.75)
        centre = draws.uniform(radius - 1, 1 - radius, size=2)
        size = "small" if radius < 0.55 else "large"
        image = draw(CLASSES[label], COLOURS[colour], radius=radius, centre=centre, resolution=self._config.resolution)
        return ImageSample(
            key=f"{split}-{index:06d}",
            image=image,
            label=label,
            caption=f"a {size} {colour} {CLASSES[label]}",
            metadata={"source": "synthetic", "colour": colour, "radius": round(radius, 6)},
        )


def draw(shape: str, colour: tuple[int, int, int], *, radius: float, centre: np.ndarray, resolution: int) -> np.ndarray:
    """Draw an antialiased shape on light grey; uint8 (resolution resolution 3).

    Args:
        shape: One of ``CLASSES``.
        colour: RGB, 0 to 255.
        radius: Half its width, where the image is 2 wide.
        centre: Its place (y, x) in [-1, 1].
        resolution: Side of the image, pixels.
    """
    grid = (np.arange(resolution) + 0.5) * 2 / resolution - 1
    y, x = np.abs(grid[:, None] - centre[0]), np.abs(grid[None, :] - centre[1])
    below = grid[:, None] - centre[0]
    # Signed distances to the border, negative inside.
    if shape == "circle":
        distance = np.hypot(y, x) - radius
    elif shape == "square":
        distance = np.maximum(y, x) - radius * 0.85
    elif shape == "triangle":
        distance = np.maximum(below - radius * 0.8, (2 * x - below) / np.sqrt(5) - radius * 0.4)
    else:
        arm = radius * 0.3
        distance = np.minimum(np.maximum(y - arm, x - radius), np.maximum(x - arm, y - radius))
    # A border pixel takes the share of the colour that covers it.
    cover = np.clip(0.5 - distance * resolution / 2, 0, 1)[:, :, None]
    return np.rint(cover * np.array(colour) + (1 - cover) * 235).astype(np.uint8)
