"""Samples and their members: one image or one latent, and its bytes in a shard, both ways.

A sample is a key and members ``KEY.suffix``. Images: one of ``IMAGE_SUFFIXES``, ``cls`` (decimal label), ``txt`` (UTF-8
caption), ``json``. Latents: ``latent.npy``, ``latent_flip.npy`` (2, c, h, w) = posterior mean, log-variance, with the
same ``cls``, ``txt``, ``json``, and ``NAME.npy`` for features of conditioners. Everything here is parsed as data,
within bounds, and never unpickled: member contents come from whoever wrote the shard.
"""

import ast
import contextlib
import json
import math
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Split = Literal["train", "val"]
PNG_KEYWORD = "latentline"  # of the JSON in a drawn image: what it was drawn with, and the weights' sha256

IMAGE_SUFFIXES = (
    *("png", "jpg", "jpeg", "webp", "avif", "bmp", "gif", "j2k", "jfif", "jp2"),
    *("pbm", "pgm", "pnm", "ppm", "tif", "tiff"),
)
MOST_LEFT_OUT_NAMES = 32
LATENT_SUFFIX, FLIPPED_SUFFIX = "latent.npy", "latent_flip.npy"
MAX_KEY_CHARACTERS = 80
MAX_CAPTION_BYTES = 64 * 1024
MAX_JSON_BYTES = 1024 * 1024
MAX_NPY_BYTES = 256 * 1024 * 1024
MAX_NPY_HEADER_BYTES = 4096

_NPY_MAGIC = b"\x93NUMPY"
_NPY_DTYPES = frozenset({"<f2", "<f4", "<f8", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "|b1"})
_KEY = re.compile(r"[A-Za-z0-9_\-]+")
_LABEL = re.compile(rb"\s*([+-]?[0-9]{1,18})\s*")


class BadSample(ValueError):
    """Input that cannot become a sample. ``str()`` names shard, member and reason.

    Args:
        reason: One snake_case word for counting, such as ``broken_image``.
        detail: What was found and what was expected.
        shard: File that holds the sample; "" when it stands alone.
        key: The sample's key, as far as it is known.
        member: Member or file at fault; "" when it is the sample as a whole.
    """

    def __init__(self, reason: str, detail: str, *, shard: str = "", key: str = "", member: str = "") -> None:
        self.reason, self.detail, self.shard, self.key, self.member = reason, detail, shard, key, member
        where = ": ".join(part for part in (shard, member or key) if part)
        super().__init__(f"{where or 'sample'}: {reason}: {detail}")

    def at(self, *, shard: str = "", key: str = "", member: str = "") -> "BadSample":
        """Return the same finding with the place filled in where it was not known; see ``located``."""
        shard, key, member = self.shard or shard, self.key or key, self.member or member
        return BadSample(self.reason, self.detail, shard=shard, key=key, member=member)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions travel between processes by pickle, which would call __init__ with the message alone.
        return partial(BadSample, shard=self.shard, key=self.key, member=self.member), (self.reason, self.detail)


@contextlib.contextmanager
def located(*, shard: str = "", key: str = "", member: str = "") -> Iterator[None]:
    """Fill in the place of a finding that is raised in the block, where it was not known."""
    try:
        yield
    except BadSample as error:
        raise error.at(shard=shard, key=key, member=member) from None


@dataclass(frozen=True, kw_only=True)
class ImageSample:
    """One image of a source.

    Args:
        key: Unique in the corpus; see ``check_key``.
        image: Pixels uint8 (h w c), c in 1, 3, 4, or the encoded file as it was found.
        label: Class in [0, number of classes); -1 when there is none.
        caption: One line of text; "" when there is none.
        metadata: JSON object that goes along.
        shard: File or shard it is from, for errors.
        member: Member that holds the image, for errors.
    """

    key: str
    image: np.ndarray | bytes
    label: int = -1
    caption: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    shard: str = ""
    member: str = ""


def count_left_out(counts: Counter[str], name: str, *, number: int = 1) -> None:
    """Count what a source leaves out, by suffix or name; beyond 32 of these they are counted together."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name[:60])
    counts[name if name in counts or len(counts) < MOST_LEFT_OUT_NAMES else "others"] += number


def check_key(key: str) -> str:
    """Return ``key`` when it may name a sample: letters, digits, ``_`` and ``-``, at most 80.

    Raises:
        BadSample: ``bad_key``. A dot would move the border between key and suffix; a slash would make a path of it.
    """
    if len(key) > MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
        raise BadSample(
            "bad_key", f"a key has 1 to {MAX_KEY_CHARACTERS} of A-Z a-z 0-9 _ -, not {key[:100]!r}", key=key[:100]
        )
    return key


def image_members(
    key: str, image: np.ndarray, *, label: int, caption: str, metadata: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return the members of an image sample, by suffix.

    Args:
        key: Names the sample in errors.
        image: uint8 (h w c), c = 1 or 3; stored losslessly.
        label: Class, or -1 for none (no ``cls`` member is made).
        caption: Caption, or "" for none (no ``txt`` member is made).
        metadata: Goes into ``json`` with sorted keys.
    """
    members = {"png": encode_png(image)}
    if label >= 0:
        members["cls"] = b"%d" % label
    if caption:
        members["txt"] = caption.encode()
    try:
        text = json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False, allow_nan=False)
        members["json"] = text.encode(errors="backslashreplace")  # half a surrogate pair, as JSON writes it
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"metadata is not JSON: {error}", key=key, member=f"{key}.json") from error
    return members


def latent_members(
    key: str,
    moments: np.ndarray,
    *,
    flipped: np.ndarray | None = None,
    dtype: str = "float16",
    features: Mapping[str, np.ndarray] | None = None,
    carried: Mapping[str, bytes],
) -> dict[str, bytes]:
    """Return the members of a latent sample, by suffix.

    Args:
        key: Names the sample in errors.
        moments: Posterior mean and log-variance; float (2, c, h, w).
        flipped: The same of the mirrored image.
        dtype: Stored type, ``float16`` or ``float32``.
        features: Further arrays by name, such as a caption's ``text_tokens`` (s, d).
        carried: Members taken over from the image sample (``cls``, ``txt``, ``json``).

    Raises:
        BadSample: ``latent_not_finite`` or ``latent_overflow`` (too large for ``dtype``).
    """
    arrays = {LATENT_SUFFIX: moments, **{f"{name}.npy": values for name, values in (features or {}).items()}}
    if flipped is not None:
        arrays[FLIPPED_SUFFIX] = flipped
    encoded = {suffix: encode_npy(narrow(values, dtype, key=key, suffix=suffix)) for suffix, values in arrays.items()}
    return {**encoded, **carried}


def narrow(values: np.ndarray, dtype: str, *, key: str, suffix: str) -> np.ndarray:
    """Cast to ``dtype``, refusing NaN, infinity and what overflows; any shape."""
    largest = float(np.abs(values).max(initial=0.0))  # NaN where there is one
    if largest <= float(np.finfo(dtype).max):
        return np.ascontiguousarray(values, dtype=dtype)
    if number := np.count_nonzero(~np.isfinite(values)):
        reason, detail = "latent_not_finite", f"{number} values are NaN or infinite"
    else:
        reason, detail = "latent_overflow", f"a value of {largest:.6g} does not fit {dtype}; store float32"
    raise BadSample(reason, detail, key=key, member=f"{key}.{suffix}")


def encode_png(image: np.ndarray, *, texts: Mapping[str, str] | None = None) -> bytes:
    """Return ``image``, uint8 (h w c) with c = 1, 3 or 4, as PNG that holds ``texts`` by keyword."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"An image is uint8 (h w c) with 1, 3 or 4 channels, not {image.dtype} {image.shape}.")
    buffer, about = BytesIO(), PngInfo()
    for keyword, text in (texts or {}).items():
        about.add_itxt(keyword, text)
    pixels = image[:, :, 0] if image.shape[2] == 1 else image
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=6, pnginfo=about)
    return buffer.getvalue()


def parse_label(payload: bytes, *, num_classes: int | None = None) -> int:
    """Return the class in a ``cls`` member, in [0, ``num_classes``).

    Raises:
        BadSample: ``label_not_a_number`` or ``label_out_of_range``.
    """
    match = _LABEL.fullmatch(payload.removeprefix(BOM_UTF8))
    if not match:
        raise BadSample("label_not_a_number", f"expected a decimal number, found {payload[:40]!r}")
    label = int(match[1])
    if label < 0 or (num_classes is not None and label >= num_classes):
        top = "" if num_classes is None else f" and below {num_classes}"
        raise BadSample("label_out_of_range", f"expected a label from 0{top}, found {label}")
    return label


def parse_caption(payload: bytes, *, required: bool = True) -> str:
    """Return the caption in a ``txt`` member, without a byte order mark and surrounding white space.

    Raises:
        BadSample: ``caption_too_long`` (over 64 KiB), ``caption_not_utf8``, ``caption_has_nul`` or, where it is
            ``required``, ``caption_empty``.
    """
    if len(payload) > MAX_CAPTION_BYTES:
        raise BadSample("caption_too_long", f"{len(payload)} bytes; at most {MAX_CAPTION_BYTES}")
    try:
        caption = payload.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("caption_not_utf8", f"byte {error.start} is not UTF-8") from error
    if "\0" in caption:
        raise BadSample("caption_has_nul", f"NUL at character {caption.index(chr(0))}")
    if required and not caption:
        raise BadSample("caption_empty", "nothing but white space")
    return caption


def parse_metadata(payload: bytes) -> dict[str, Any]:
    """Return the object in a ``json`` member; NaN and infinities, which others write but JSON lacks, become null.

    Raises:
        BadSample: ``json_too_long`` (over 1 MiB) or ``bad_json`` (not JSON, nested too deep, or not an object).
    """
    if len(payload) > MAX_JSON_BYTES:
        raise BadSample("json_too_long", f"{len(payload)} bytes; at most {MAX_JSON_BYTES}")
    try:
        value = json.loads(payload, parse_constant=lambda _: None, parse_float=_finite_or_none)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise BadSample("bad_json", f"expected an object, found {type(value).__name__}")
    return value


def _finite_or_none(digits: str) -> float | None:
    return number if math.isfinite(number := float(digits)) else None


@dataclass(frozen=True)
class NpyLayout:
    """Layout of an array in the bytes of an ``npy`` member: ``header`` bytes, then C-ordered ``shape`` of ``dtype``."""

    dtype: str
    shape: tuple[int, ...]
    header: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of the array itself."""
        # Python integers: a hostile shape must not wrap around.
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def encode_npy(array: np.ndarray) -> bytes:
    """Return ``array`` in npy format 1.0, little-endian and C-ordered; equal arrays give equal bytes."""
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return _npy_header(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=64)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return what stands before the values; making it takes longer than copying them."""
    buffer, like = BytesIO(), np.empty(shape, dtype)
    np.lib.format.write_array(buffer, like, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()[: buffer.tell() - like.nbytes]


def parse_npy_layout(head: bytes | memoryview, *, size: int) -> NpyLayout:
    """Read the header of an npy member without trusting it.

    Args:
        head: The member's first bytes, at least 4 KiB or all of it.
        size: Bytes of the whole member.

    Raises:
        BadSample: ``bad_npy``: another magic or version, object or unknown dtype, Fortran order, more than 256 MiB, or
            a shape that does not fill the member exactly.
    """
    head = bytes(head[: MAX_NPY_HEADER_BYTES + 12])
    if head[:6] != _NPY_MAGIC or len(head) < 12 or head[6] not in (1, 2, 3):
        raise BadSample("bad_npy", f"not an npy array: starts with {head[:8]!r}")
    length_bytes = 2 if head[6] == 1 else 4
    start = 8 + length_bytes
    length = int.from_bytes(head[8:start], "little")
    if length > MAX_NPY_HEADER_BYTES or start + length > len(head):
        raise BadSample("bad_npy", f"header of {length} bytes; at most {MAX_NPY_HEADER_BYTES} and inside the member")
    try:
        fields = ast.literal_eval(head[start : start + length].decode("latin-1").strip())
        dtype, shape, fortran = fields["descr"], fields["shape"], fields["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise BadSample("bad_npy", f"header is not an npy header ({type(error).__name__})") from error
    if not isinstance(dtype, str) or dtype not in _NPY_DTYPES:
        raise BadSample("bad_npy", f"dtype {str(dtype)[:60]!r} is not one of {', '.join(sorted(_NPY_DTYPES))}")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise BadSample("bad_npy", f"shape {str(shape)[:60]} is not a tuple of at most 8 lengths")
    layout = NpyLayout(dtype, shape, start + length)
    if fortran is not False and len([n for n in shape if n > 1]) > 1:
        raise BadSample("bad_npy", "Fortran order; store it C-ordered")
    if layout.payload_bytes > MAX_NPY_BYTES:
        raise BadSample("bad_npy", f"shape {shape} of {dtype} is over {MAX_NPY_BYTES} bytes")
    if (needed := layout.header + layout.payload_bytes) != size:
        raise BadSample("bad_npy", f"shape {shape} of {dtype} needs {needed} bytes, found {size}")
    return layout
