"""WebDataset shards that others wrote (img2dataset's too): read in place, strictly, at any index.

Every shard is scanned once at opening, headers only, several at once, and by one of the processes that open the source
together. What a process then holds is a few bytes a shard, and sixteen a validation sample. Members that are no part of
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
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

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
from data.sources.scan_cache import FoundShard, ScanSharing, ShardScan, found_shards, scans_of
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

    def open(self, sharing: ScanSharing | None = None) -> "WebDataset":
        """Scan the shards, alone or each in one of the processes that share the scans. With ``sharing`` a collective.

        Raises:
            ValueError: A path names no file, or a split is empty.
        """
        return WebDataset(self, sharing)

    def shards_now(self) -> Iterator[str]:
        """Yield each shard with its size, which ``WebDataset.listing`` begins with; none is looked through."""
        yield from (f"{url} {size}" for url, size, _ in _found(self)[1])


class WebDataset:
    """Samples of tars, bad ones included: reading such a one raises its finding."""

    def __init__(self, config: WebDatasetConfig, sharing: ScanSharing | None = None) -> None:
        # Shards, as one process finds them.
        self._config = config
        self.classes = config.classes
        self._scans: OrderedDict[int, tuple[list[RawSample], Counter[str]]] = OrderedDict()
        self._lock = threading.Lock()
        find = partial(_found, config)
        num_train, found = find() if sharing is None else sharing.from_main(find)
        self._shards = [FoundShard(*each) for each in found]
        #: Whether new shards are written: of compressed ones always, since nothing in them has a place.
        self.copied = config.copied or any(shard.is_packed for shard in self._shards)
        #: Absolute path or URL of each shard.
        self.urls = tuple(shard.url for shard in self._shards)

        # Their samples: a place each, one shard after the other.
        scans = scans_of(self._shards, self._found_in, sharing, kind=config.other_members)
        #: Members that nothing reads, by suffix.
        self.left_out: Counter[str] = Counter()
        joined, sizes = bytearray(), [0]
        for scan in map(scans, range(len(self._shards))):
            joined += scan.key_hashes[0].tobytes()
            sizes.append(scan.key_hashes.shape[1])
            for name, count in scan.left_out.items():
                count_left_out(self.left_out, name, number=count)
        self._firsts = np.cumsum(sizes)
        hashes = np.frombuffer(joined, dtype=np.uint64)

        def others_at(places: np.ndarray) -> np.ndarray:
            numbers = self._numbers_of(places)
            others = [
                scans(number).key_hashes[1][places[numbers == number] - self._firsts[number]]
                for number in np.unique(numbers).tolist()
            ]
            return np.concatenate([*others, np.empty(0, dtype=np.uint64)])

        self._duplicates = later_occurrences(hashes, others_at)

        # Splits: the places of validation samples, and how many training samples lie before each.
        is_val = hashes < np.uint64(int(config.val_fraction * 2**64))
        val_shards = num_train < len(self._shards)
        self._val = np.arange(self._firsts[num_train], len(hashes)) if val_shards else np.flatnonzero(is_val)
        self._train_before = self._val - np.arange(len(self._val))
        for split in get_args(Split):
            if not self.count(split):
                raise ValueError(
                    f"{len(self._shards)} shards with {len(hashes)} samples leave none for {split}"
                    f"{said_left_out(self.left_out)}. "
                    "Give other urls, give val_urls, or change val_fraction."
                )

    def count(self, split: Split) -> int:
        """Return the number of samples of a split, bad ones included."""
        return len(self._val) if split == "val" else int(self._firsts[-1]) - len(self._val)

    def listing(self) -> Iterator[str]:
        """See ``Source.listing``: the shards with their sizes, and how many samples each split has of them."""
        yield from (f"{shard.url} {shard.bytes}" for shard in self._shards)
        yield from (f"{split} {self.count(split)}" for split in get_args(Split))

    def read(self, split: Split, index: int) -> ImageSample:
        """Return a sample, its image undecoded.

        Raises:
            BadSample: What is wrong with it, naming shard and member.
        """
        if split == "val":
            return self._read(int(self._val[index]))
        return self._read(index + int(np.searchsorted(self._train_before, index, side="right")))

    def _read(self, place: int) -> ImageSample:
        number = int(self._numbers_of(np.asarray(place)))
        shard = self._shards[number]
        raw = self._scan(number)[place - int(self._firsts[number])]
        if raw.faults:
            raise raw.faults[0].at()  # a fresh one: an exception that is raised again keeps its old tracebacks
        with located(shard=shard.url, key=raw.key):
            nth = int(np.searchsorted(self._duplicates, place))
            if place in self._duplicates[nth : nth + 1]:
                raise BadSample("duplicate_key", "another sample of the corpus has this key")
            return self._sample(raw, shard)

    def holds(self, number: int, split: Split) -> bool:
        """Say whether a shard holds samples of ``split``."""
        return len(self._places_of(number, split)) > 0

    def samples_of(self, number: int, split: Split) -> Iterator[tuple[RawSample, ImageSample | BadSample]]:
        """Yield the samples of one shard that belong to ``split``: where they lie, and the sample or its finding."""
        for place in self._places_of(number, split).tolist():
            raw = self._scan(number)[place - int(self._firsts[number])]
            try:
                found = self._read(place)
                yield self._listed(raw, found), found
            except BadSample as error:
                yield raw, error

    def opened(self, number: int) -> BufferedReader:
        """Open a shard for reading."""
        return self._shards[number].opened()

    def _places_of(self, number: int, split: Split) -> np.ndarray:
        first, last = self._firsts[number : number + 2]
        val = self._val[slice(*np.searchsorted(self._val, [first, last]))]
        return val if split == "val" else np.delete(np.arange(first, last), val - first)

    def _numbers_of(self, places: np.ndarray) -> np.ndarray:
        """Return the number of the shard that each place lies in."""
        return np.searchsorted(self._firsts, places, side="right") - 1

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
            with shard.opened() as file:
                payload = os.pread(file.fileno(), member.size, member.offset)
            if len(payload) != member.size:
                raise BadSample("shard_changed", "the file was cut since it was scanned")
            return parse(payload)

    def _scan(self, number: int) -> list[RawSample]:
        """Return the samples of a shard, scanning it unless that was done lately."""
        try:
            return self._scanned(number)[0]
        except FileNotFoundError:  # another error is the machine's or the service's, and ends the stage
            raise BadSample(
                "shard_missing", "it has gone since it was scanned", shard=self._shards[number].url
            ) from None

    def _scanned(self, number: int) -> tuple[list[RawSample], Counter[str]]:
        """Return the samples of a shard, and the members that are no part of one."""
        shard = self._shards[number]
        size = shard.current_bytes()
        with shard.opened() as file:
            if size != shard.bytes:
                detail = f"{size} bytes, {shard.bytes} when it was scanned"
                raise BadSample("shard_changed", detail, shard=shard.url)
            with self._lock:
                found = self._scans.get(number)
            if found is None:  # outside the lock: the threads of an opening scan a shard each
                others: Counter[str] = Counter()
                counted = others if self._config.other_members == "ignored" else None
                with mapped(file) as buffer:
                    found = scan_shard(buffer, shard=shard.url, left_out=counted), others
        with self._lock:
            self._scans[number] = found
            self._scans.move_to_end(number)
            while len(self._scans) > SCANS_KEPT:
                self._scans.popitem(last=False)
        return found

    def _found_in(self, number: int) -> ShardScan:
        """Scan a shard. The first of the two hashes of a key decides the split."""
        url, (samples, others) = self._shards[number].url, self._scanned(number)
        keys = [sample.key or _nameless(url, row) for row, sample in enumerate(samples)]
        hashes = [[_hash(key, digest_size=size) for key in keys] for size in (8, 16)]
        return ShardScan(np.array(hashes, dtype=np.uint64), others)


def _found(config: WebDatasetConfig) -> tuple[int, list[tuple[str, int, str]]]:
    """Return the number of shards for training, and all shards as they are now, those for validation last."""
    train, val = expand(config.urls), expand(config.val_urls)
    if both := sorted(set(train) & set(val)):
        raise ValueError(f"{both[0]} is in urls and in val_urls; a shard belongs to one split.")
    return len(train), [(shard.url, shard.bytes, shard.version) for shard in found_shards([*train, *val])]


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
                if lost := [name for name in named if Path(name).is_symlink() and not Path(name).exists()]:
                    raise ValueError(f"{lost[0]!r} is a link to nothing. Mount what it points at, or remove it.")
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


def _hash(key: str, *, digest_size: int) -> int:
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=digest_size).digest()
    return int.from_bytes(digest[:8], "big")
