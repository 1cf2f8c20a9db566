"""Strict scanner of tars: the place of each member's bytes, and everything that is odd about the file.

It reads headers only, never extracts, and never makes a path of a member's name. After damage it looks for the next
sound header (magic and checksum, on a 512-byte border), so that what follows is still found and the damage is counted.
Formats: Unix v7, POSIX.1-1988 ustar, GNU long names, POSIX.1-2001 pax (``path`` and ``size``).
"""

import mmap
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 512
MAX_NAME_BYTES = 1024
MAX_EXTENSION_BYTES = 1024 * 1024

_ZEROS = bytes(BLOCK)
_NO_MAGIC = bytes(72)  # magic, version and names of owner and group, which v7 headers lack
_PACKERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
_REGULAR = (b"\0", b"0", b"7")  # as old tars say it, as POSIX does, and contiguous files
_FOLDER = b"5"
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # control characters and ends of lines
_ODD_KINDS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"6": "named pipe",
}

Buffer = bytes | mmap.mmap


class Member(NamedTuple):
    """A regular file in a tar: ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Fault:
    """What a sound shard does not hold: a word for counting, the member it hit (if known), and what was found."""

    reason: str
    member: str
    detail: str


@dataclass(slots=True)
class _Pending:
    """What extension headers say about the member after them."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


def scan_tar(buffer: Buffer) -> Iterator[Member | Fault]:
    """Yield the members of a tar and its faults, in file order.

    Reasons: ``empty_file``, ``gzip``, ``not_a_tar``, ``truncated`` (payload or end missing), ``damaged_header``,
    ``link``, ``device``, ``sparse``, ``unsafe_name``, ``long_name``, ``name_not_utf8``, ``oversized_extension``,
    ``trailing_data``.
    """
    size = len(buffer)
    if size == 0:
        yield Fault("empty_file", "", "0 bytes")
        return
    if buffer[:2] == b"\x1f\x8b":
        yield Fault("gzip", "", "gzip-compressed, though it is not called so: name it .tar.gz")
        return
    if packer := next((name for start, name in _PACKERS.items() if buffer[: len(start)] == start), ""):
        yield Fault("not_a_tar", "", f"{packer}-compressed; plain tars and .tar.gz are read")
        return
    position, pending, found = 0, _Pending(), False
    while position < size:
        header = buffer[position : position + BLOCK]
        if header == _ZEROS:
            yield from _end(buffer, position)
            return
        problem = _header_problem(header)
        if problem:
            following = _next_header(buffer, position + BLOCK)
            if not found and following < 0:
                yield Fault("not_a_tar", "", problem)
                return
            if len(header) < BLOCK:
                yield Fault("truncated", "", f"the file ends inside the header at byte {position}")
                return
            yield Fault("damaged_header", "", f"{problem} at byte {position}")
            pending, position = _Pending(), following
            if position < 0:
                return
            continue
        found = True
        position, items = _one_entry(buffer, position, header, pending)
        yield from items
        if position < 0:
            return
    yield Fault("truncated", "", f"no end-of-archive mark: the file ends at a member border, byte {size}")


def _one_entry(buffer: Buffer, position: int, header: bytes, pending: _Pending) -> tuple[int, list[Member | Fault]]:
    """Interpret one sound header; returns where the next one is (-1: nowhere) and what was found."""
    kind, start = header[156:157], position + BLOCK
    length = _number(header[124:136])
    # Link targets and folders have no payload whatever their size field says.
    if kind in _REGULAR and pending.size is not None:
        length = pending.size
    raw_name = pending.name or _own_name(header)
    shown = raw_name[:120].decode("utf-8", "backslashreplace")
    if length is None or length < 0:
        _reset(pending)
        detail = f"size field {header[124:136]!r} is not a number"
        return _next_header(buffer, start), [Fault("damaged_header", shown, detail)]
    if kind in _ODD_KINDS or kind == _FOLDER:
        length = 0
    if start + length > len(buffer):
        missing = start + length - len(buffer)
        return -1, [Fault("truncated", shown, f"the file ends {missing} bytes before the member does")]
    following = start + -(-length // BLOCK) * BLOCK
    if kind in (b"x", b"g", b"L", b"K"):
        payload = buffer[start : start + min(length, MAX_EXTENSION_BYTES)]
        return following, _extension(payload, length, kind, shown, pending)
    sparse = pending.sparse or kind == b"S"
    _reset(pending)
    if kind == _FOLDER or (kind in _REGULAR and raw_name.endswith(b"/")):  # as the oldest tars say it
        return following, []
    if kind in _ODD_KINDS:
        reason = "link" if kind in b"12" else "device"
        return following, [Fault(reason, shown, f"a {_ODD_KINDS[kind]}; only regular files are read")]
    if sparse:
        skipped = _after_sparse(buffer, header, start) + following - start if kind == b"S" else following
        return skipped, [Fault("sparse", shown, "a sparse file, which expands when read; store it whole")]
    if kind not in _REGULAR:
        return following, [Fault("damaged_header", shown, f"unknown kind of member {kind!r}")]
    return following, [_named(raw_name, shown, start, length)]


def _named(raw_name: bytes, shown: str, offset: int, size: int) -> Member | Fault:
    if len(raw_name) > MAX_NAME_BYTES:
        return Fault("long_name", shown, f"a name of {len(raw_name)} bytes; at most {MAX_NAME_BYTES}")
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        return Fault("name_not_utf8", shown, "the member's name is not UTF-8")
    name = name.removeprefix("./")
    if not name or name.startswith("/") or "\\" in name or ".." in name.split("/") or _UNSAFE.search(name):
        return Fault("unsafe_name", shown, "names are relative, without '..', backslash or control characters")
    return Member(name, offset, size)


def _extension(payload: bytes, length: int, kind: bytes, shown: str, pending: _Pending) -> list[Member | Fault]:
    """Take over what a pax or GNU extension header says; faults are those of its size and syntax."""
    if length > MAX_EXTENSION_BYTES:
        detail = f"an extension header of {length} bytes; at most {MAX_EXTENSION_BYTES}"
        return [Fault("oversized_extension", shown, detail)]
    if kind == b"L":
        pending.name = payload.rstrip(b"\0")
    if kind == b"x":
        records = _pax_records(payload)
        if records is None:
            return [Fault("damaged_header", shown, "a malformed pax header")]
        pending.name = records.get(b"path", pending.name)
        pending.sparse = any(key.startswith(b"GNU.sparse") for key in records)
        if b"size" in records:
            if not records[b"size"].isdigit() or len(records[b"size"]) > 18:
                return [Fault("damaged_header", shown, f"pax size {records[b'size'][:30]!r} is not a number")]
            pending.size = int(records[b"size"])
    return []


def _pax_records(payload: bytes) -> dict[bytes, bytes] | None:
    """Parse ``b"LENGTH key=value\\n"`` records; None when malformed."""
    records, position = {}, 0
    while position < len(payload):
        space = payload.find(b" ", position, position + 9)
        digits = payload[position:space] if space > 0 else b""
        if not digits.isdigit():
            return None
        end = position + int(digits)
        key, separator, value = payload[space + 1 : end - 1].partition(b"=")
        if not separator or end <= position or end > len(payload) or payload[end - 1 : end] != b"\n":
            return None
        records[key] = value
        position = end
    return records


def is_header_of(header: bytes, size: int) -> bool:
    """Say whether these bytes are a sound header of a regular file of ``size`` bytes."""
    # A size beyond 8 GB stands in an extension header; no member that is read is so large.
    return not _header_problem(header) and header[156:157] in _REGULAR and _number(header[124:136]) == size


def _header_problem(header: bytes) -> str:
    """Say why ``header`` is not a tar header; "" when it is one."""
    if len(header) < BLOCK:
        return f"a header of {len(header)} bytes instead of {BLOCK}"
    if header[257:262] != b"ustar" and header[257:329] != _NO_MAGIC:
        return "no ustar magic"
    stored = _number(header[148:156])
    # The checksum counts its own field as eight spaces.
    if stored != sum_of_bytes(header[:148] + b" " * 8 + header[156:]):
        return "wrong header checksum"
    return ""


def sum_of_bytes(block: bytes) -> int:
    """Return the sum of a block's bytes, which a header has as its checksum."""
    # Adler-32 holds the sum modulo 65521, which 512 letters of ASCII do not reach, and is ten times as fast.
    return zlib.adler32(block, 0) & 0xFFFF if block.isascii() else sum(block)


def _number(raw: bytes) -> int | None:
    """Parse an octal or (GNU) base-256 number field."""
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big") if raw[0] == 0x80 else None
    digits = raw.strip(b" \0")
    try:
        return int(digits, 8) if digits else 0
    except ValueError:
        return None


def _own_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    # Only POSIX headers have a prefix; GNU keeps times there.
    prefix = header[345:500].partition(b"\0")[0] if header[345] and header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _after_sparse(buffer: Buffer, header: bytes, start: int) -> int:
    """Return where the payload of an old GNU sparse member starts, behind its continuation headers."""
    extended = header[482:483]
    while extended == b"\1" and start + BLOCK <= len(buffer):
        extended = buffer[start + 504 : start + 505]
        start += BLOCK
    return start


def _next_header(buffer: Buffer, position: int) -> int:
    """Return where the first sound header at or after ``position`` is, on a block border; -1 when there is none."""
    if buffer[257:329] == _NO_MAGIC:
        borders = range(position + -position % BLOCK, len(buffer), BLOCK)
        return next((start for start in borders if not _header_problem(buffer[start : start + BLOCK])), -1)
    while (magic := buffer.find(b"ustar", position + 257)) >= 0:
        candidate = magic - 257
        if candidate % BLOCK == 0 and not _header_problem(buffer[candidate : candidate + BLOCK]):
            return candidate
        position = candidate + 1
    return -1


def _reset(pending: _Pending) -> None:
    pending.name, pending.size, pending.sparse = None, None, False


def _end(buffer: Buffer, position: int) -> Iterator[Fault]:
    """Check what stands from the first zero block to the end of the file: at least two zero blocks, and only zeros."""
    if len(buffer) < position + 2 * BLOCK:
        yield Fault("truncated", "", f"the end-of-archive mark at byte {position} is cut")
        return
    for start in range(position, len(buffer), 1 << 20):
        chunk = buffer[start : start + (1 << 20)]
        if chunk.count(0) != len(chunk):
            yield Fault("trailing_data", "", f"data behind the end-of-archive mark at byte {position}")
            return
