"""Image files in one folder per class, whose sorted names are the classes, or all in one folder, without classes.

``FOLDER/sneaker/12.jpg`` is of class ``sneaker``; ``FOLDER/sneaker/12.txt``, where there is one, is its caption. Images
may lie deeper. A folder that gives no training image is no class; where none does, the images in ``FOLDER`` itself are
taken. What is no image and no caption of one, is hidden (its name starts with a dot) or lies in a linked folder within
a class is counted as left out. The split of a file depends on its relative name alone, so adding files never moves
others.
"""

import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from data.samples import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    BadSample,
    ImageSample,
    Split,
    count_left_out,
    parse_caption,
)
from data.sources.source import caption_of_class, safe_key, said_left_out, unit_hash

MAX_FILE_BYTES = 512 * 1024 * 1024


class ImageFolderConfig(BaseModel, frozen=True, extra="forbid"):
    """Your own images: one folder per class, or one folder of all."""

    kind: Literal["image_folder"] = "image_folder"  # a folder per class, image files below it; or image files alone
    path: Path  # folder that holds the class folders, or the images
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the images kept for validation

    def open(self) -> "ImageFolder":
        """List the files.

        Raises:
            ValueError: No such folder, no images in one of the splits, or a class whose name is not UTF-8.
            OSError: A folder cannot be read.
        """
        if not self.path.is_dir():
            raise ValueError(
                f"{self.path} is not a folder. Give the folder that holds one folder per class, or the images, as path."
            )
        return ImageFolder(self.path, val_fraction=self.val_fraction)


class ImageFolder:
    """The files of an image folder, sorted."""

    def __init__(self, root: Path, *, val_fraction: float) -> None:
        self._root = root
        #: What is no image, by suffix or name.
        self.left_out: Counter[str] = Counter()
        self._files: dict[Split, list[tuple[str, int]]] = {"train": [], "val": []}

        # The images of each folder, and those beside them. Sorted: a listing's order differs between file systems.
        folders, beside = list[str](), list[str]()
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.is_dir() and entry.name.startswith("."):
                count_left_out(self.left_out, "hidden folders")
            else:
                (folders if entry.is_dir() else beside).append(entry.name)
        images = {name: self._images_below(name) for name in folders}
        alone = self._images_among("", beside)

        # A class is what can be trained on.
        classes = [name for name, files in images.items() if any(unit_hash(file) >= val_fraction for file in files)]
        if classes and alone:
            count_left_out(self.left_out, "images beside the folders", number=len(alone))
        if lone := sum(len(files) for name, files in images.items() if name not in classes):
            count_left_out(self.left_out, "images of folders without a training image", number=lone)
        self.classes = tuple(classes)
        for label, files in [(label, images[name]) for label, name in enumerate(classes)] or [(-1, alone)]:
            for file in files:
                self._files["val" if unit_hash(file) < val_fraction else "train"].append((file, label))
        self._check(val_fraction)

    def _check(self, val_fraction: float) -> None:
        for name in self.classes:
            if os.fsencode(name) != name.encode(errors="replace"):
                raise ValueError(f"{self._root}: the name of the class folder {name!r} is not UTF-8. Rename it.")
        names = [name for files in self._files.values() for name, _ in files]
        for split, files in self._files.items():
            if not files:
                least = math.ceil(1000 * min(map(unit_hash, names), default=0)) / 1000
                advice = f"set it to {least} or more" if names and split == "val" else "change val_fraction"
                raise ValueError(
                    f"{self._root} gives no {split} images at val_fraction = {val_fraction}: it holds {len(names)} "
                    f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))}{said_left_out(self.left_out)}. Add images, "
                    f"or {advice}."
                )

    def _images_below(self, name: str) -> list[str]:
        """Return the images below a class folder, relative to the root, sorted; links to folders are not followed."""
        found = []
        for folder, folders, files in os.walk(self._root / name, onerror=_raise):
            for sub in tuple(folders):
                is_link = os.path.islink(os.path.join(folder, sub))
                if is_link or sub.startswith("."):
                    count_left_out(self.left_out, "linked folders" if is_link else "hidden folders")
                    folders.remove(sub)  # not gone into
            found += self._images_among(Path(folder).relative_to(self._root).as_posix() + "/", files)
        return sorted(found)

    def _images_among(self, folder: str, files: list[str]) -> list[str]:
        """Return the images among the files of a folder, relative to the root, and count what is no caption of one."""
        images: list[str] = []
        parts = [os.path.splitext(name) for name in files]
        stems = {stem for stem, end in parts if end[1:].lower() in IMAGE_SUFFIXES}
        for stem, end in parts:
            if stem.startswith("."):
                count_left_out(self.left_out, "hidden files")
            elif end[1:].lower() in IMAGE_SUFFIXES:
                images.append(folder + stem + end)
            elif end != ".txt" or stem not in stems:
                count_left_out(self.left_out, end.lower() or stem)
        return images

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
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):  # opening a named pipe would wait for ever
                raise BadSample("unreadable", "it is no regular file", key=key, member=relative)
            if found.st_size > MAX_FILE_BYTES:
                detail = f"{found.st_size} bytes; at most {MAX_FILE_BYTES}"
                raise BadSample("file_too_large", detail, key=key, member=relative)
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
            return caption_of_class(self.classes[label].replace("_", " ")) if label >= 0 else ""
        with open(path, "rb") as file:
            return parse_caption(file.read(MAX_CAPTION_BYTES + 1))


def _raise(error: OSError) -> None:
    raise error
