"""Remote shards (``s3://``, ``gs://``, ``https://``): fetched whole into a bounded cache, or read in ranges.

The cache is shared by all processes of a machine. A file is fetched to a temporary name and renamed, by one process
while the others wait; the longest unused files make room. What is open stays readable after it was evicted.
Credentials come from the environment or the machine's role, as each service's own tools read them; an address that
holds any is refused, so none gets into a log, a configuration or a manifest.

Environment: ``LATENTLINE_CACHE`` names the folder (default ``~/.cache/latentline``), ``LATENTLINE_CACHE_GB`` bounds it
(default 100). ``LATENTLINE_REMOTE_READS`` is ``whole`` (always fetch shards), ``ranged`` (always single samples), or
``auto``: single samples where few of a shard are wanted, whole shards where most are.
"""

import contextlib
import fcntl
import gzip
import hashlib
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from data.files import atomic_file, temporary_beside

T = TypeVar("T")

SCHEMES = ("s3", "gs", "https")
CHUNK_BYTES = 8 << 20
TAR_END_BYTES = 1024
TRIES = 3
PAUSE_SECONDS = 0.5  # after the first failure of a service; each further one is four times as long
POLL_SECONDS = 0.2
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")


def check_address(url: str) -> str:
    """Return ``url`` when it is a plain path, or an address that shards are fetched from.

    Raises:
        ValueError: Another scheme (``pipe:`` would start a shell, ``file:`` hides which file it means), or credentials.
            The message does not repeat them.
    """
    if not url or "\0" in url:
        raise ValueError("a path is not empty and holds no NUL")
    match = _SCHEME.match(url)
    if not match:
        return url
    if match[0] not in [f"{scheme}:" for scheme in SCHEMES] or "://" not in url:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"shards are read from plain paths, {known}, not from {match[0][:20]!r}")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address holds no user, password or query: credentials belong into the environment, such as "
            "AWS_ACCESS_KEY_ID, where they reach no log and no manifest"
        )
    if not parts.netloc or not parts.path.strip("/"):
        raise ValueError(f"{url!r} names no file: expected {parts.scheme}://HOST-OR-BUCKET/PATH")
    return url


def is_remote(url: str) -> bool:
    """Say whether ``url`` is fetched, rather than opened."""
    return "://" in url


def matches(pattern: str) -> list[str]:
    """Return the addresses that a remote pattern names: itself, or sorted what its ``*``, ``?`` and ``[]`` match.

    Raises:
        OSError: The service does not answer or refuses.
    """
    if not re.search(r"[*?\[]", pattern):
        return [pattern]
    scheme = pattern.partition("://")[0]
    filesystem = _filesystem(scheme)
    with _clean_errors(pattern):
        found = filesystem.glob(pattern)
    return sorted(path if is_remote(path) else f"{scheme}://{path}" for path in found)


def local_path(url: str, *, size: int | None = None, sha256: str = "", version: str = "") -> Path:
    """Return a file of this machine with the content of ``url``: a plain path as it is, else a copy in the cache.

    Args:
        url: A path or address.
        size: What it should be, bytes. A copy of another size, sha256 or version is fetched again.
        sha256: What it should be; checked as it is fetched.
        version: By which its service tells it from other content at the same address.

    Raises:
        OSError: It is not there, cannot be fetched, or is another file than it should be.
    """
    wanted = {"sha256": sha256, "version": version}
    return Cache.of_environment().fetch(url, size=size, **wanted) if is_remote(url) else Path(url)


def held(url: str) -> bool:
    """Say whether the cache has a copy of ``url``."""
    return Cache.of_environment().path(url).is_file()


def range_policy(scattered: bool) -> bool:
    """Say whether samples are fetched by themselves; see the module's docstring.

    Raises:
        ValueError: The environment asks for something unknown.
    """
    policy = os.environ.get("LATENTLINE_REMOTE_READS", "auto")
    if policy not in ("auto", "whole", "ranged"):
        raise ValueError(f"LATENTLINE_REMOTE_READS is auto, whole or ranged, not {policy!r}.")
    return scattered if policy == "auto" else policy == "ranged"


def properties_of(url: str) -> dict[str, Any]:
    """Return what its service says of a file that is far away: ``size``, and other things by names of its own.

    Raises:
        OSError: It is not there, or its service does not answer after several tries or does not tell the size.
    """
    filesystem = _filesystem(url.partition("://")[0])

    def info() -> dict[str, Any]:
        with _clean_errors(url):
            return dict(filesystem.info(url))

    about = _patiently(info)
    if not isinstance(about.get("size"), int):
        raise OSError(f"{url}: its server does not say how large it is.")
    return about


def answers_ranges(url: str) -> bool:
    """Say whether a part of ``url`` can be asked for: object stores know how, of web servers not every one does.

    Raises:
        OSError: It is not there, or its service does not answer.
    """
    if not url.startswith("https:"):
        return True
    filesystem = _filesystem("https")
    with _clean_errors(url):
        try:
            with filesystem.open(url, "rb", block_size=1, cache_type="none") as file:
                file.seek(1)
                return len(file.read(1)) == 1
        except ValueError:  # seen from the answer's head: the rest of it is not read
            return False


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """Return the bytes [start, end) of each (url, start, end); all are asked for at once.

    Raises:
        OSError: One of them cannot be read, after several tries, or is shorter.
    """
    out: list[bytes] = [b""] * len(ranges)
    missing = [place for place, (_, start, end) in enumerate(ranges) if end > start]
    for attempt in range(TRIES):
        if missing and attempt:
            time.sleep(PAUSE_SECONDS * 4 ** (attempt - 1))
        # None is left after the first try as a rule; a range of no bytes is not asked for at all.
        for scheme in sorted({ranges[place][0].partition("://")[0] for place in missing}):
            places = [place for place in missing if ranges[place][0].startswith(f"{scheme}://")]
            urls, starts, ends = (list(column) for column in zip(*(ranges[place] for place in places), strict=True))
            filesystem = _filesystem(scheme)
            with _clean_errors(urls[0]):
                found = filesystem.cat_ranges(urls, starts, ends, on_error="return")
            for place, payload in zip(places, found, strict=True):
                if isinstance(payload, bytes) and len(payload) == ranges[place][2] - ranges[place][1]:
                    out[place] = payload
                elif attempt == TRIES - 1:
                    url, start, end = ranges[place]
                    with _clean_errors(url):
                        if isinstance(payload, BaseException):
                            raise payload
                    raise OSError(f"{url} gave {len(payload)} bytes for the range {start} to {end}.")
        missing = [place for place in missing if not out[place]]
    return out


@dataclass(frozen=True)
class Cache:
    """A bounded folder of fetched files."""

    folder: Path
    max_bytes: int

    @classmethod
    def of_environment(cls) -> "Cache":
        """Return the cache that the environment asks for; see the module's docstring."""
        folder = Path(os.environ.get("LATENTLINE_CACHE", "~/.cache/latentline")).expanduser()
        said = os.environ.get("LATENTLINE_CACHE_GB", "100")
        try:
            size = float(said)
        except ValueError:
            size = math.nan
        if not 0 < size < math.inf:
            raise ValueError(f"LATENTLINE_CACHE_GB is a number of gigabytes above 0, not {said!r}.")
        return cls(folder, int(size * 1e9))

    def path(self, url: str) -> Path:
        """Return where the copy of ``url`` lies when it is there."""
        return self.folder / hashlib.sha256(url.encode()).hexdigest()[:40]

    def fetch(self, url: str, *, size: int | None = None, sha256: str = "", version: str = "") -> Path:
        """Return the copy of ``url``, made now if need be; see ``local_path``.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be fetched, is larger than the cache, or is another file than it should be.
        """
        path, kept = self.path(url), self.path(url).with_suffix(".lock")

        def is_there() -> bool:
            # The lock's file says what the copy is; nothing, if an older version of this code made it.
            known = kept.read_text().split(maxsplit=1) if (sha256 or version) and kept.is_file() else []
            same = known[:1] == [sha256] if sha256 else known[1:] == [version]
            return (same or not known) and self._touched(path, size)

        if is_there():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(kept.name):
            if not is_there():
                found = int(properties_of(url)["size"])
                if size is not None and found != size:
                    raise OSError(f"{url} has {found} bytes instead of {size}: it was cut or changed.")
                digest = self._download(_filesystem(url.partition("://")[0]), url, found, path, sha256=sha256)
                kept.write_text(f"{digest} {version}")
        return path

    def unpacked(self, packed: Path, *, version: str) -> Path:
        """Return a copy of a gzip-compressed file without compression, made now if need be, one for each ``version``.

        Of one that was cut the copy ends there, without blocks that end a tar: so its scan finds it truncated.

        Raises:
            OSError: It is damaged, cannot be read, or the copy would be larger than the cache.
        """
        path = self.path(f"{packed} {version}")
        if self._touched(path, None):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(f"{path.name}.lock"):
            if not self._touched(path, None):
                with atomic_file(path) as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # as in ``_download``
                    self._unpack(packed, file)
                with self._locked("lock"):
                    self._make_room(0, str(packed))
        return path

    def _unpack(self, packed: Path, file: IO[bytes]) -> None:
        with gzip.open(packed) as source:
            try:
                while chunk := source.read1(CHUNK_BYTES):
                    if file.tell() + len(chunk) > self.max_bytes:
                        raise OSError(f"{packed} is larger than the whole cache may hold; raise LATENTLINE_CACHE_GB.")
                    file.write(chunk)
            except EOFError:
                file.truncate(max(0, file.tell() - TAR_END_BYTES))
            except (gzip.BadGzipFile, zlib.error) as error:
                raise OSError(f"{packed} is damaged at an unknown place ({error}): get it again.") from None

    @staticmethod
    def _touched(path: Path, size: int | None) -> bool:
        """Mark a copy as used now; False when it is not there or has another size."""
        try:
            if size is not None and path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _download(self, filesystem: Any, url: str, size: int, path: Path, *, sha256: str) -> str:
        """Fetch a file and return its sha256."""
        temporary = temporary_beside(path)
        with open(temporary, "xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # while it is held, this file's writer is running
                while True:
                    with self._locked("lock"):
                        if self._make_room(size, url):
                            os.ftruncate(file.fileno(), size)  # others now count it against the bound
                            break
                    time.sleep(POLL_SECONDS)
                digest = _patiently(lambda: _copy(filesystem, url, size, file))
                if sha256 and digest != sha256:
                    raise OSError(
                        f"{url} has sha256 {digest[:12]}, its manifest says {sha256[:12]}: its content was changed."
                    )
                file.flush()
                os.fsync(file.fileno())  # it has its size from the start: after a power cut it would be zeros
                os.rename(temporary, path)
                return digest
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _make_room(self, size: int, url: str) -> bool:
        """Evict the longest unused copies until ``size`` bytes fit; False as long as other fetches fill the cache.

        Hold the cache's lock.
        """
        if size > self.max_bytes:
            raise OSError(f"{url} has {size} bytes, more than the whole cache may hold; raise LATENTLINE_CACHE_GB.")
        copies = []
        for found in os.scandir(self.folder):
            # Locks: one for each shard that ever was here.
            if found.name.endswith("lock") or not found.is_file():
                continue
            path = Path(found)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                if path.suffix == ".tmp" and _is_orphan(path):
                    path.unlink()
                elif path.suffix == ".tmp":
                    size += status.st_size
                else:
                    copies.append((status.st_mtime_ns, status.st_size, path))
        if size > self.max_bytes:
            return False
        held = sum(bytes for _, bytes, _ in copies)
        for _, bytes, path in sorted(copies):
            if held + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            held -= bytes
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock of the cache; the kernel gives it back when its holder dies."""
        with open(self.folder / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _is_orphan(temporary: Path) -> bool:
    """Say whether the process that wrote a temporary file has ended: nobody holds its lock."""
    with open(temporary, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Empty: its writer may be about to lock it.
        return temporary.stat().st_size > 0


def _copy(filesystem: Any, url: str, size: int, file: Any) -> str:
    """Copy ``url`` into ``file`` from its start, and return its sha256.

    Raises:
        OSError: It ended early or holds more, or this machine's disk is full.
    """
    file.seek(0)
    digest = hashlib.sha256()
    with _clean_errors(url):
        source = filesystem.open(url, "rb", block_size=CHUNK_BYTES, cache_type="readahead")
    with source:
        while True:
            with _clean_errors(url):
                chunk = source.read(CHUNK_BYTES)
            if not chunk:
                break
            try:
                file.write(chunk)
            except OSError as error:
                raise OSError(error.errno, error.strerror, file.name) from None
            digest.update(chunk)
    if file.tell() != size:
        raise OSError(f"{url} gave {file.tell()} bytes instead of {size}.")
    return digest.hexdigest()


def _patiently(act: Callable[[], T]) -> T:
    """Return what ``act`` returns, after several tries where its service fails; a pause lets it recover."""
    for attempt in range(TRIES - 1):
        try:
            return act()
        except OSError as error:
            if isinstance(error, (FileNotFoundError, PermissionError)) or error.errno is not None:  # or of this machine
                raise
            time.sleep(PAUSE_SECONDS * 4**attempt)
    return act()


def _filesystem(scheme: str) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, skip_instance_cache=False)
    except ImportError as error:
        raise OSError(
            f"{scheme}:// needs a package that is not installed: pip install 'latentline[remote]'."
        ) from error


@contextlib.contextmanager
def _clean_errors(url: str) -> Iterator[None]:
    """Turn whatever a service's library raises into an OSError without its details, which may hold credentials."""
    try:
        yield
    except FileNotFoundError as error:
        # fsspec raises this for any error of a web server; the reason is in its cause.
        if (cause := error.__cause__) is not None and getattr(cause, "status", 0) != 404:
            raise OSError(f"{url} cannot be read ({type(cause).__name__}).") from None
        raise FileNotFoundError(f"{url} is not there.") from None
    except PermissionError:
        raise PermissionError(f"{url}: access was refused. Check the credentials in the environment.") from None
    except Exception as error:
        raise OSError(f"{url} cannot be read ({type(error).__name__}).") from None
