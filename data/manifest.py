"""Manifests: what a stage made, from what, and whether it is still that.

A manifest has two objects. ``content`` says what the work is; its canonical JSON gives the digest, so equal work has
an equal digest wherever and whenever it was done. ``provenance`` says who did it, where and when.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.files import sha256_of, write_json

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 1 << 30

Verify = Literal["size", "hash"]


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of ``value``: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of ``value``, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a stage.

    Args:
        name: Path relative to the manifest.
        bytes: Size of the file.
        sha256: Its hash.
        samples: How many of its samples belong to the stage.
        url: Absolute path or URL, when the file is used where it lies and ``name`` is only what it is called here.
        corpus: Which of several corpora its samples are of; "" when there is only one.
    """

    name: str
    bytes: int
    sha256: str
    samples: int = 0
    url: str = ""
    corpus: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return what a manifest holds."""
        return {key: value for key, value in asdict(self).items() if key not in ("url", "corpus") or value}

    @classmethod
    def of(cls, path: Path, *, samples: int = 0, name: str | None = None) -> "FileEntry":
        """Describe a file that is on disk."""
        return cls(name=name or path.name, bytes=path.stat().st_size, sha256=sha256_of(path), samples=samples)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest as read; see the module's docstring for its two objects."""

    content: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of ``content``."""
        return digest_of(self.content)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files that belong to the stage, in the order written."""
        return tuple(FileEntry(**entry) for entry in self.content["files"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty when the corpus has no classes."""
        return tuple(self.content.get("classes", ()))


def write_manifest(
    folder: str | Path, *, content: Mapping[str, Any], files: list[FileEntry], provenance: Mapping[str, Any]
) -> Manifest:
    """Commit the manifest of ``folder``; do it last, since its presence means that the stage is finished."""
    whole = {"format_version": FORMAT_VERSION, **content, "files": [entry.as_json() for entry in files]}
    write_json(Path(folder) / MANIFEST_NAME, {"content": whole, "provenance": dict(provenance)})
    return Manifest(content=whole, provenance=provenance)


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of a finished stage.

    Raises:
        FileNotFoundError: There is none: the stage has not finished.
        ValueError: The file is not a manifest of this format.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: the stage that writes it has not finished.")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a manifest has at most {MAX_MANIFEST_BYTES}.")
    try:
        raw = json.loads(path.read_bytes())
        content, provenance = raw["content"], raw["provenance"]
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a manifest of this program ({error!r}). Delete it and run its stage again."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this program reads version {FORMAT_VERSION}.")
    return Manifest(content=content, provenance=provenance)


def verify_files(folder: str | Path, manifest: Manifest, *, level: Verify = "size") -> None:
    """Compare the local files of a manifest with what it says; URLs are left to whoever fetches them.

    Raises:
        ValueError: A file is missing, has another size or (level ``hash``) another sha256; the message names it.
    """
    for entry in manifest.files:
        if "://" in entry.url:
            continue
        path = Path(entry.url) if entry.url else Path(folder) / entry.name
        if not path.is_file():
            raise ValueError(
                f"{path} is missing, but {Path(folder) / MANIFEST_NAME} lists it. Restore it or run its stage again."
            )
        size = path.stat().st_size
        if size != entry.bytes:
            raise ValueError(f"{path} has {size} bytes, its manifest says {entry.bytes}: it was cut or changed.")
        if level == "hash" and (found := sha256_of(path)) != entry.sha256:
            raise ValueError(f"{path} has sha256 {found}, its manifest says {entry.sha256}: its content has changed.")
