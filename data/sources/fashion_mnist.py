"""Fashion-MNIST: 28 x 28 grey garments in ten classes (Xiao et al. 2017, arXiv:1708.07747; MIT licence).

``embedded`` cuts 5,000 training and 1,000 validation images out of ``fashion_mnist.png`` beside this file; ``full``
reads all 70,000 from the idx files. Validation images are of the original test files. The embedded images go round the
classes, so that every stretch of them holds all ten.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel

from data.samples import ImageSample, Split
from data.sources.source import caption_of_class

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE = 28
MOSAIC = Path(__file__).with_name("fashion_mnist.png")
MOSAIC_COLUMNS = 60
PER_CLASS: dict[Split, int] = {"train": 500, "val": 100}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IDX_PREFIX: dict[Split, str] = {"train": "train", "val": "t10k"}


class FashionMNISTConfig(BaseModel, frozen=True, extra="forbid"):
    """Fashion-MNIST, the embedded 6,000 images or all 70,000."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"  # grey garments, 28 x 28, ten classes
    size: Literal["embedded", "full"] = "embedded"  # 6,000 images that come along, or all 70,000 from idx files
    path: Path = DEBIAN_FOLDER  # folder of the four idx files, plain or .gz; only for size = "full"

    def open(self) -> "FashionMNIST":
        """Return the source.

        Raises:
            ValueError: ``full``, and the idx files are not there or not what they should be.
        """
        if self.size == "embedded":
            return FashionMNIST({split: _cut_mosaic(split) for split in PER_CLASS})
        return FashionMNIST({split: _read_idx_pair(self.path, IDX_PREFIX[split]) for split in IDX_PREFIX})


class FashionMNIST:
    """Images uint8 (n 28 28) and labels (n,) of both splits, in memory (55 MB in full)."""

    classes = CLASSES
    left_out: ClassVar[Mapping[str, int]] = {}

    def __init__(self, splits: dict[Split, tuple[np.ndarray, np.ndarray]]) -> None:
        self._splits = splits

    def count(self, split: Split) -> int:
        """Return the number of images of a split."""
        return len(self._splits[split][1])

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: the pixels and labels of both splits, which are in memory."""
        for split, (images, labels) in self._splits.items():
            yield f"{split} {hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()}"

    def read(self, split: Split, index: int) -> ImageSample:
        """Return one image; grey (28 28 1)."""
        images, labels = self._splits[split]
        label = int(labels[index])
        return ImageSample(
            key=f"{split}-{index:06d}",
            image=images[index][:, :, None],
            label=label,
            caption=caption_of_class(CLASSES[label]),
            metadata={"source": "fashion_mnist", "index": index},
        )


def _cut_mosaic(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Cut a split out of the mosaic: class by class 500 training, then 100 validation images, in reading order."""
    mosaic = np.asarray(Image.open(MOSAIC))
    rows = mosaic.shape[0] // SIDE
    tiles = mosaic.reshape(rows, SIDE, MOSAIC_COLUMNS, SIDE).swapaxes(1, 2).reshape(len(CLASSES), -1, SIDE, SIDE)
    first, count = (0 if split == "train" else PER_CLASS["train"]), PER_CLASS[split]
    # Class after class, round and round: sample i is of class i % 10.
    images = tiles[:, first : first + count].swapaxes(0, 1).reshape(-1, SIDE, SIDE)
    return images, np.tile(np.arange(len(CLASSES)), count)


def _read_idx_pair(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
        raise ValueError(
            f"{folder}/{prefix}-*: expected images (n {SIDE} {SIDE}) with as many labels below {len(CLASSES)}, "
            f"found images {images.shape} and labels {labels.shape}."
        )
    return images, labels


def _read_idx(folder: Path, name: str, *, dimensions: int) -> np.ndarray:
    """Read an idx file of unsigned bytes, plain or gzip-compressed (format: LeCun's MNIST page)."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ValueError(
            f"{folder / name}[.gz] is not there. Install Debian's dataset-fashion-mnist, give the folder of "
            'the idx files as path, or use size = "embedded".'
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch it again.") from error
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if raw[:4] != bytes([0, 0, 8, dimensions]) or len(raw) != header + int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path} is not an idx file of unsigned bytes in {dimensions} dimensions, or it is cut.")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
