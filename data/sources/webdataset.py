"""WebDataset shards that others wrote (img2dataset's too): read in place, strictly, at any index.

Every shard is scanned once at opening, headers only; what is kept of a sample is 16 bytes. Members that are no part of
a sample are counted by suffix. Nothing is extracted, no address is ever given to a shell, and a member's name is only
ever compared.
"""

import glob
import hashlib
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from braceexpand import braceexpand
from pydantic import AfterValidator, BaseModel, Field

from data.samples import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    BadSample,
    ImageSample,
    Split,
    check_key,
    count_left_out,
    located,
    parse_caption,
    parse_label,
    parse_metadata,
)
from data.shards.keys import later_occurrences
from data.shards.remote import check_address, is_remote, matches
from data.shards.scan import RawSample, mapped, scan_shard
from data.sources.scan_cache import FoundShard, found_shards
from data.sources.source import safe_key, said_left_out

MAX_SHARDS = 1_000_000
MAX_IMAGE_BYTES = 512 * 1024 * 1024
MAX_LABEL_BYTES = 64
SCANS_KEPT = 4
T = TypeVar("T")
MAX_BRACES = 16  # that one lies in
_BRACES = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}|\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\}|[{},]")
_LETTERS = 52

ShardAddress = Annotated[str, AfterValidator(check_address)]


class WebDatasetConfig(BaseModel, frozen=True, extra="forbid"):
    """Existing WebDataset shards: tars, or .tar.gz, of KEY.jpg|png|webp with KEY.cls, KEY.txt, KEY.json."""

    kind: Literal["webdataset"] = "webdataset"  # tars that others wrote, read in place
    urls: Annotated[
        tuple[ShardAddress, ...], Field(min_length=1)
    ]  # paths, s3://, gs:// or https:// with {000..099}, {a,b}, globs
    val_urls: tuple[ShardAddress, ...] = ()  # shards of the validation split; without them val_fraction decides
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01  # share kept for validation, by the hash of the key
    classes: tuple[str, ...] = ()  # names by label; without them labels are not read
    captions: Literal["required", "optional", "ignored"] = "optional"  # whether a sample needs KEY.txt
    other_members: Literal["ignored", "refused"] = "ignored"  # such as KEY.mask.webp: counted, or bad samples
    copied: bool = False  # write new shards of finished squares, instead of using these where they lie; .tar.gz always

    def open(self) -> "WebDataset":
        """Scan the shards.

        Raises:
            ValueError: A path names no file, or a split is empty.
        """
        return WebDataset(self)


class WebDataset:
    """Samples of tars, bad ones included: reading such a one raises its finding."""

    def __init__(self, config: WebDatasetConfig) -> None:
        self._config = config
        self.classes = config.classes
        self._scans: OrderedDict[int, tuple[list[RawSample], Counter[str]]] = OrderedDict()
        #: Members that nothing reads, by suffix.
        self.left_out: Counter[str] = Counter()
        self._lock = threading.Lock()
        train, val = expand(config.urls), expand(config.val_urls)
        if both := sorted(set(train) & set(val)):
            raise ValueError(f"{both[0]} is in urls and in val_urls; a shard belongs to one split.")
        self._shards = found_shards([*train, *val])
        #: Whether new shards are written: of compressed ones always, since nothing in them has a place.
        self.copied = config.copied or any(shard.is_packed for shard in self._shards)
        #: Absolute path or URL of each shard.
        self.urls = tuple(shard.url for shard in self._shards)
        hashes, numbers, rows = self._scan_all()
        self._numbers, self._rows = numbers, rows
        self._duplicates = later_occurrences(hashes, self._keys_at)
        is_val = numbers >= len(train) if val else hashes < np.uint64(int(config.val_fraction * 2**64))
        self._places: dict[Split, np.ndarray] = {
            "train": np.flatnonzero(~is_val),
            "val": np.flatnonzero(is_val),
        }
        for split, places in self._places.items():
            if not len(places):
                raise ValueError(
                    f"{len(self._shards)} shards with {len(rows)} samples leave none for {split}"
                    f"{said_left_out(self.left_out)}. "
                    "Give other urls, give val_urls, or change val_fraction."
                )

    def count(self, split: Split) -> int:
        """Return the number of samples of a split, bad ones included."""
        return len(self._places[split])

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: the shards with their sizes, and how many samples each split has of them."""
        yield from (f"{shard.url} {shard.bytes}" for shard in self._shards)
        yield from (f"{split} {len(places)}" for split, places in self._places.items())

    def read(self, split: Split, index: int) -> ImageSample:
        """Return a sample, its image undecoded.

        Raises:
            BadSample: What is wrong with it, naming shard and member.
        """
        return self._read(int(self._places[split][index]))

    def _read(self, place: int) -> ImageSample:
        number, row = int(self._numbers[place]), int(self._rows[place])
        shard = self._shards[number]
        raw = self._scan(number)[row]
        if raw.faults:
            raise raw.faults[0].at()  # a fresh one: an exception that is raised again keeps its old tracebacks
        with located(shard=shard.url, key=raw.key):
            if place in self._duplicates:
                raise BadSample("duplicate_key", "another sample of the corpus has this key")
            return self._sample(raw, shard)

    def holds(self, number: int, split: Split) -> bool:
        """Say whether a shard holds samples of ``split``."""
        return len(self._places_of(number, split)) > 0

    def samples_of(self, number: int, split: Split) -> Iterator[tuple[RawSample, ImageSample | BadSample]]:
        """Yield the samples of one shard that belong to ``split``: where they lie, and the sample or its finding."""
        for place in self._places_of(number, split).tolist():
            raw = self._scan(number)[int(self._rows[place])]
            try:
                found = self._read(place)
                yield self._listed(raw, found), found
            except BadSample as error:
                yield raw, error

    def _places_of(self, number: int, split: Split) -> np.ndarray:
        places = self._places[split]
        first, last = np.searchsorted(self._numbers[places], [number, number + 1])
        return places[first:last]

    def _listed(self, raw: RawSample, sample: ImageSample) -> RawSample:
        """Return the sample under our key, with those members that the configuration reads."""
        read = {*IMAGE_SUFFIXES, "json"}
        read |= {"cls"} if self.classes else set()
        read |= {"txt"} if sample.caption else set()
        return RawSample(_key_of(raw.key), {suffix: at for suffix, at in raw.members.items() if suffix in read})

    def _sample(self, raw: RawSample, shard: FoundShard) -> ImageSample:
        metadata = self._parsed(raw, shard, "json", MAX_JSON_BYTES, parse_metadata) if "json" in raw.members else {}
        suffixes = [suffix for suffix in IMAGE_SUFFIXES if suffix in raw.members]
        if not suffixes:
            # img2dataset leaves a sample without an image where its download failed, and says so in the json.
            said = [str(metadata[name])[:200] for name in ("status", "error_message") if metadata.get(name)]
            status = f"; its json says {', '.join(map(repr, said))}" if said else ""
            raise BadSample("missing_image", f"no member {' or '.join(IMAGE_SUFFIXES)}{status}")
        if len(suffixes) > 1:
            raise BadSample("two_images", f"members {' and '.join(suffixes)}")
        return ImageSample(
            key=_key_of(raw.key),
            image=self._parsed(raw, shard, suffixes[0], MAX_IMAGE_BYTES, bytes),
            label=self._label(raw, shard),
            caption=self._caption(raw, shard),
            metadata=metadata,
            shard=shard.url,
            member=raw.members[suffixes[0]].name,
        )

    def _label(self, raw: RawSample, shard: FoundShard) -> int:
        if not self.classes:
            return -1
        if "cls" not in raw.members:
            raise BadSample("missing_label", "no member cls, but classes are given")
        return self._parsed(raw, shard, "cls", MAX_LABEL_BYTES, partial(parse_label, num_classes=len(self.classes)))

    def _caption(self, raw: RawSample, shard: FoundShard) -> str:
        if self._config.captions == "ignored":
            return ""
        if "txt" not in raw.members:
            if self._config.captions == "required":
                raise BadSample("missing_caption", "no member txt, but captions are required")
            return ""
        # img2dataset writes an empty one where it has none.
        parse = partial(parse_caption, required=self._config.captions == "required")
        return self._parsed(raw, shard, "txt", MAX_CAPTION_BYTES, parse)

    def _parsed(self, raw: RawSample, shard: FoundShard, suffix: str, at_most: int, parse: Callable[[bytes], T]) -> T:
        """Read a member of bounded size and parse it; findings name the member."""
        member = raw.members[suffix]
        with located(member=member.name):
            if member.size > at_most:
                raise BadSample("member_too_large", f"{member.size} bytes; at most {at_most}")
            # Read, not mapped: a file that shrinks now gives a short read instead of a signal.
            with open(shard.path, "rb") as file:
                payload = os.pread(file.fileno(), member.size, member.offset)
            if len(payload) != member.size:
                raise BadSample("shard_changed", "the file was cut since it was scanned")
            return parse(payload)

    def _scan(self, number: int) -> list[RawSample]:
        """Return the samples of a shard."""
        return self._scanned(number)[0]

    def _scanned(self, number: int) -> tuple[list[RawSample], Counter[str]]:
        """Return the samples of a shard and what it holds besides, scanning it unless that was done lately."""
        shard = self._shards[number]
        try:
            size = shard.current_bytes()
        except OSError as error:
            detail = f"{error.strerror or error} since it was scanned"
            raise BadSample("shard_missing", detail, shard=shard.url) from None
        if size != shard.bytes:
            detail = f"{size} bytes, {shard.bytes} when it was scanned"
            raise BadSample("shard_changed", detail, shard=shard.url)
        with self._lock:
            if number not in self._scans:
                others: Counter[str] = Counter()
                counted = others if self._config.other_members == "ignored" else None
                with mapped(shard.path) as buffer:
                    self._scans[number] = scan_shard(buffer, shard=shard.url, left_out=counted), others
                while len(self._scans) > SCANS_KEPT:
                    self._scans.popitem(last=False)
            self._scans.move_to_end(number)
            return self._scans[number]

    def _keys_at(self, places: np.ndarray) -> Iterator[str]:
        for place in places.tolist():
            number, row = int(self._numbers[place]), int(self._rows[place])
            yield self._scan(number)[row].key or _nameless(self._shards[number].url, row)

    def _scan_all(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return, for every sample of every shard: hash of its key (uint64), shard number and row (int32)."""
        hashes = []
        for number, shard in enumerate(self._shards):
            kept = shard.scan(self._config.other_members)
            if kept is None:
                samples, others = self._scanned(number)
                keys = [sample.key or _nameless(shard.url, row) for row, sample in enumerate(samples)]
                kept = np.array([_hash(key) for key in keys], dtype=np.uint64), others
                shard.remember(*kept, self._config.other_members)
            hashes.append(kept[0])
            for name, count in kept[1].items():
                count_left_out(self.left_out, name, number=count)
        numbers = np.repeat(np.arange(len(hashes), dtype=np.int32), [len(known) for known in hashes])
        rows = np.concatenate([np.arange(len(known), dtype=np.int32) for known in hashes])
        return np.concatenate(hashes), numbers, rows


def expand(urls: tuple[str, ...]) -> list[str]:
    """Return the files that these name, each once, in the order given, globs sorted; paths absolute.

    Raises:
        ValueError: One of them names no file, has unbalanced braces, or there are over a million.
    """
    found: dict[str, None] = {}
    for url in urls:
        # Before it is expanded: braceexpand makes the whole of a range, and of what braces hold, at once.
        if not most_names(url) <= MAX_SHARDS:  # also of numbers that no float holds
            raise ValueError(f"{url[:200]!r} names more than {MAX_SHARDS} shards.")
        try:
            patterns = braceexpand(url, escape=False)
        except ValueError:
            raise ValueError(f"{url[:200]!r} has braces that do not close. Write {{000..099}} or {{a,b}}.") from None
        for pattern in patterns:
            if is_remote(pattern):
                paths = matches(pattern)
            else:
                named = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
                paths = [str(Path(name).absolute()) for name in named if Path(name).is_file()]
            if not paths:
                raise ValueError(f"{pattern!r} names no file. Check the path; a relative one starts at {Path.cwd()}.")
            found.update(dict.fromkeys(paths))
    return list(found)


def most_names(url: str) -> float:
    """Return how many names ``url`` stands for, at most: alternatives add up, what stands side by side multiplies.

    Raises:
        ValueError: Its braces are nested too deep.
    """
    opened: list[tuple[float, float]] = []  # of each open brace: names of the alternatives before, names outside it
    names, before = 1.0, 0.0
    for token in _BRACES.finditer(url):
        match token[0]:
            case "{":
                if len(opened) == MAX_BRACES:
                    raise ValueError(f"{url[:200]!r} has braces in more than {MAX_BRACES} others.")
                opened.append((before, names))
                names, before = 1.0, 0.0
            case ",":
                names, before = 1.0 if opened else names, before + names if opened else before
            case "}" if opened:
                outer_before, outer = opened.pop()
                names, before = outer * (before + names), outer_before
            case span if token[1]:
                first, last, step = (float(number or 1) for number in token.groups())
                names *= abs(last - first) // (abs(step) or 1) + 1
            case span if len(span) > 1:
                names *= _LETTERS
    return names


def _key_of(key: str) -> str:
    """Return a key of ours for a foreign one: the same where it is allowed."""
    try:
        return check_key(key)
    except BadSample:
        return safe_key(key)


def _nameless(url: str, row: int) -> str:
    """Return what stands for the key of a fault that is no sample's: unlike any other."""
    return f"\0{url}/{row}"


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
