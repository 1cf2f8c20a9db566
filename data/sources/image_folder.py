"""Image files in one folder per class; the folders' names, sorted, are the classes.

``FOLDER/sneaker/12.jpg`` is of class ``sneaker``; ``FOLDER/sneaker/12.txt``, where there is one, is its caption. Images
may lie deeper. The split of a file depends on its relative name alone, so adding files never moves others.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from data.samples import MAX_CAPTION_BYTES, BadSample, ImageSample, Split, parse_caption
from data.sources.source import caption_of_class, safe_key, unit_hash

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_FILE_BYTES = 512 * 1024 * 1024


class ImageFolderConfig(BaseModel, frozen=True, extra="forbid"):
    """Your own images: one folder per class."""

    kind: Literal["image_folder"] = "image_folder"  # a folder per class, image files below it
    path: Path  # folder that holds the class folders
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the images kept for validation

    def open(self) -> "ImageFolder":
        """List the files.

        Raises:
            ValueError: No such folder, no class folders, or no images in one of the splits.
        """
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is not a folder. Give the folder that holds one folder per class as path.")
        return ImageFolder(self.path, val_fraction=self.val_fraction)


class ImageFolder:
    """The files of an image folder, sorted."""

    def __init__(self, root: Path, *, val_fraction: float) -> None:
        self._root = root
        # Sorted: the order of a listing differs between file systems, and labels must not.
        self.classes = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
        if not self.classes:
            raise ValueError(f"{root} holds no folders. Put the images of each class into a folder named after it.")
        self._files: dict[Split, list[tuple[str, int]]] = {"train": [], "val": []}
        for label, name in enumerate(self.classes):
            for relative in _images_below(root, name):
                split: Split = "val" if unit_hash(relative) < val_fraction else "train"
                self._files[split].append((relative, label))
        for split, files in self._files.items():
            if not files:
                total, endings = sum(map(len, self._files.values())), ", ".join(sorted(EXTENSIONS))
                raise ValueError(
                    f"{root} gives no {split} images at val_fraction = {val_fraction}: it holds {total} files "
                    f"ending in {endings}. Add images, or change val_fraction."
                )

    def count(self, split: Split) -> int:
        """Return the number of files of a split."""
        return len(self._files[split])

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: the files of both splits."""
        return (f"{split} {label} {name}" for split, files in self._files.items() for name, label in files)

    def read(self, split: Split, index: int) -> ImageSample:
        """Return one file, undecoded, with its class and caption.

        Raises:
            BadSample: ``unreadable``, ``file_too_large``, or what is wrong with its caption.
        """
        relative, label = self._files[split][index]
        path, key = self._root / relative, safe_key(relative)
        try:
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise BadSample("file_too_large", f"{size} bytes; at most {MAX_FILE_BYTES}", key=key, member=relative)
            image = path.read_bytes()
            caption = self._caption(path, label)
        except OSError as error:
            raise BadSample("unreadable", str(error), key=key, member=relative) from error
        except BadSample as error:
            raise error.at(key=key, member=str(Path(relative).with_suffix(".txt"))) from None
        return ImageSample(
            key=key, image=image, label=label, caption=caption, metadata={"file": relative}, member=relative
        )

    def _caption(self, image: Path, label: int) -> str:
        path = image.with_suffix(".txt")
        if not path.is_file():
            return caption_of_class(self.classes[label].replace("_", " "))
        with open(path, "rb") as file:
            return parse_caption(file.read(MAX_CAPTION_BYTES + 1))


def _images_below(root: Path, name: str) -> list[str]:
    """Return the image files below a class folder, relative to ``root``, sorted; links to folders are not followed."""
    found = []
    for folder, _, files in os.walk(root / name):
        found += [Path(folder, f).relative_to(root).as_posix() for f in files if Path(f).suffix.lower() in EXTENSIONS]
    return sorted(found)
