"""Protocol of every source: images of two splits, by index, in a fixed order; keys and captions made of names."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from data.samples import ImageSample, Split


class Source(Protocol):
    """A corpus as it is found. Two readings of one index give the same sample, on any machine."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty when images have no class."""
        ...

    @property
    def left_out(self) -> Mapping[str, int]:
        """Number of files, or members of shards, that are no part of a sample, by suffix or name."""
        ...

    def count(self, split: Split) -> int:
        """Return the number of samples of a split, bad ones included."""
        ...

    def listing(self) -> Iterator[str]:
        """Yield a line for each index, cheaply and in order: when the lines change, indices mean other samples."""
        ...

    def read(self, split: Split, index: int) -> ImageSample:
        """Return sample ``index`` in [0, count).

        Raises:
            BadSample: It cannot become a sample; the others still can.
        """
        ...


def listing_digest(lines: Iterable[str]) -> str:
    """Return the sha256 of the lines of a source's listing."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(os.fsencode(line) + b"\n")
    return digest.hexdigest()


def said_left_out(left_out: Mapping[str, int]) -> str:
    """Return the end of a line that says what a source leaves out; empty when it is nothing."""
    return "; left out: " + ", ".join(f"{count} {name}" for name, count in left_out.items()) if left_out else ""


def caption_of_class(name: str) -> str:
    """Return the plain caption of a class, with the right article: ``a photo of an ankle boot``."""
    article = "an" if name[:1].lower() in "aeiou" else "a"
    return f"a photo of {article} {name}"


def unit_hash(name: str) -> float:
    """Map a name to [0, 1), evenly: names below a fraction are that fraction, whatever other names there are."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64


def safe_key(name: str) -> str:
    """Make a key of any name: readable, without dots or slashes, and unique by its hash."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[-48:].strip("-")
    return f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
