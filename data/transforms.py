"""Transforms of images: decoded safely, upright, in sRGB, in the wanted channels and size; uint8 (h w c).

Nothing is decoded before its size is known and bounded. What cannot be shown right in 8 bits (animations, float pixels,
unknown colour spaces) is refused with a reason, not guessed at.
"""

import hashlib
import zlib
from collections.abc import Iterator
from functools import lru_cache
from io import BytesIO
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from data.samples import BadSample, ImageSample, located

DEFAULT_MAX_PIXELS = 64_000_000
STRIP_ROWS = 256
# By name: Pillow's EPS would start a program.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
FIRST_OF_MANY = ("MPO", "GIF")  # the first picture is taken; a JPEG with several, as phones write, opens as MPO

# How the view of one and the same file has changed from version to version of this code.
VIEW_REVISIONS = (
    "JPEGs are cropped within the box that their decoder returns",
    "images with a colour profile are converted to sRGB",
)

# Dropped by choice of the view or the source, not bad.
FILTER_REASONS = frozenset({"too_small", "extreme_aspect", "not_listed"})

Fit = Literal["crop", "random_crop", "pad", "stretch", "centre"]
Level = Annotated[int, Field(ge=0, le=255)]
MaxPixels = Annotated[int, Field(ge=1, le=178_000_000)]  # above it Pillow itself refuses
Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels


class ImageViewConfig(BaseModel, frozen=True, extra="forbid"):
    """How an image of any size and colour mode becomes a square one of the corpus."""

    resolution: PositiveInt = 256  # side of the square, pixels
    channels: Literal[1, 3] = 3  # 1 grey (ITU-R 601 luma), 3 RGB
    fit: Fit = "crop"  # crop (random: by the key) or pad after scaling, stretch, or centre without scaling
    resample: Literal["lanczos", "area"] = "lanczos"  # for shrinking, both antialiased; enlarging is always Lanczos
    background: tuple[Level, Level, Level] = (255, 255, 255)  # RGB behind transparency and in padding, 0 to 255
    min_side: PositiveInt = 1  # pixels; smaller images are dropped and counted
    max_aspect: Annotated[float, Field(ge=1)] = 1000.0  # long side / short side; beyond it dropped and counted


def view_image(
    image: np.ndarray | bytes,
    config: ImageViewConfig,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    key: str = "",
) -> np.ndarray:
    """Return an image as ``config`` wants it; uint8 (resolution, resolution, channels).

    Args:
        image: An encoded file, or pixels uint8 (h w c), c in 1, 3, 4.
        config: The wanted view.
        max_pixels: Larger images are refused before decoding.
        key: Says where a random crop lies.

    Raises:
        BadSample: ``not_an_image``, ``too_many_pixels``, ``animated``, ``colour_mode``, ``broken_image``, ``too_small``
            or ``extreme_aspect``.
    """
    box: Box | None = None
    if isinstance(image, bytes):
        picture, box = _open_image(image, max_pixels=max_pixels, config=config)
    else:
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        _check_shape(picture.size, config)
    picture = _flatten(picture, config)
    picture = _fit(picture, config, crop_position(config, key), box)
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels.reshape(config.resolution, config.resolution, config.channels)


def view_sample(sample: ImageSample, config: ImageViewConfig, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Return the image of a sample as ``config`` wants it; findings name the sample's shard, key and member."""
    with located(shard=sample.shard, key=sample.key, member=sample.member):
        return view_image(sample.image, config, max_pixels=max_pixels, key=sample.key)


def crop_position(config: ImageViewConfig, key: str) -> tuple[float, float]:
    """Return where the crop of an image lies, (vertical, horizontal) in [0, 1]; (0.5, 0.5) is the centre."""
    if config.fit != "random_crop":
        return 0.5, 0.5
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32, int.from_bytes(digest[4:8], "big") / 2**32


def decode_image(payload: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Return the pixels of an encoded image, upright; uint8 (h w c) with c = 1 (grey), 3 (RGB) or 4 (RGBA)."""
    picture, _ = _open_image(payload, max_pixels=max_pixels)
    pixels = np.asarray(picture, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _open_image(
    payload: bytes, *, max_pixels: int, config: ImageViewConfig | None = None
) -> tuple[Image.Image, Box | None]:
    """Decode an image to mode L, RGB or RGBA in sRGB, upright by its EXIF orientation.

    With a view its size is checked before decoding, and of a JPEG no more is decoded than the view needs.

    Returns:
        The picture, and the box in it that a JPEG fills when it was decoded at a reduced size: the decoder's sides are
        rounded up to whole pixels.
    """
    box: Box | None = None
    try:
        picture = Image.open(BytesIO(payload), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadSample("not_an_image", f"{len(payload)} bytes, starting {payload[:8]!r}") from None
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from None
    except Exception as error:  # parsers of hostile files raise anything
        raise BadSample("broken_image", f"{type(error).__name__}: {str(error)[:200]}") from None
    if picture.width * picture.height > max_pixels:
        raise BadSample("too_many_pixels", f"{picture.width} x {picture.height}; at most {max_pixels} pixels")
    if config is not None:
        _check_shape(picture.size, config)
    if picture.format == "PNG":
        _check_png(payload)
    profile = picture.info.get("icc_profile")
    try:
        if picture.format not in FIRST_OF_MANY and getattr(picture, "n_frames", 1) > 1:
            raise BadSample("animated", f"{picture.format} with {getattr(picture, 'n_frames', 0)} frames")
        if picture.format == "JPEG" and config is not None:
            as_it_is = not any(_to_srgb(profile, mode) for mode in ("L", "RGB"))
            grey = config.channels == 1 and picture.mode in ("L", "RGB") and as_it_is
            whole = picture.size
            drafted = picture.draft("L" if grey else picture.mode, _draft_size(whole, config))
            box = drafted[1] if drafted and picture.size != whole else None
        picture.load()
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        ImageOps.exif_transpose(picture, in_place=True)
        box = box and _transpose_box(box, picture.size, orientation)
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("broken_image", f"{picture.format}: {type(error).__name__}: {str(error)[:200]}") from None
    of_inks = picture.mode == "CMYK" and _to_srgb(profile, "CMYK")
    return _in_srgb(picture if of_inks else _to_eight_bits(picture), profile), box


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert a picture of mode L, RGB, RGBA or CMYK from its profile to sRGB; CMYK becomes RGB."""
    transform = _to_srgb(profile, picture.mode)
    if transform is None:
        return picture
    if transform.input_mode == transform.output_mode:
        ImageCms.applyTransform(picture, transform, inPlace=True)
        return picture
    converted = ImageCms.applyTransform(picture, transform)
    assert converted is not None
    return converted.convert("L") if picture.mode == "L" else converted


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB for pixels of ``mode``.

    None where it changes nothing, or the profile is damaged or of other colours than the pixels, which then stay as
    they are.
    """
    if not profile:
        return None
    try:
        target = ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(BytesIO(profile), target, mode, "RGBA" if mode == "RGBA" else "RGB")
        # Profiles of sRGB come from many makers and differ by a level: they are known by what they do.
        levels = np.moveaxis(np.indices((9, 9, 9)), 0, -1).reshape(27, 27, 3) * 255 // 8
        plain = Image.fromarray(levels.astype(np.uint8)).convert(mode)
        changed = ImageCms.applyTransform(plain, transform)
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    assert changed is not None
    before, after = (np.asarray(picture.convert("RGB"), dtype=int) for picture in (plain, changed))
    return transform if np.abs(after - before).max() > 2 else None


def _check_png(payload: bytes) -> None:
    """Check every chunk's checksum: Pillow skips those of the pixels, and would show flipped bits as they are."""
    view, position = memoryview(payload), 8
    while position + 12 <= len(payload):
        length = int.from_bytes(payload[position : position + 4], "big")
        end = position + 8 + length
        name = payload[position + 4 : position + 8]
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(payload[end : end + 4], "big"):
            raise BadSample("broken_image", f"PNG: chunk {name!r} fails its checksum")
        if name == b"IEND":
            return
        position = end + 4
    raise BadSample("broken_image", "PNG: cut before its end")


def to_unit_range(images: np.ndarray | Tensor) -> Tensor:
    """Turn uint8 images (n h w c) into float32 (n c h w) in [-1, 1]; 0 is -1, 255 is 1."""
    tensor = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    return tensor.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_levels(images: Tensor) -> np.ndarray:
    """Turn float images (n c h w) into uint8 (n h w c): the inverse of ``to_unit_range``, clamped and rounded."""
    levels = images.detach().float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def _check_shape(size: tuple[int, int], config: ImageViewConfig) -> None:
    short, long = min(size), max(size)
    if short < config.min_side:
        raise BadSample("too_small", f"{size[0]} x {size[1]}; the shorter side is at least {config.min_side}")
    if long > config.max_aspect * short:
        raise BadSample("extreme_aspect", f"{size[0]} x {size[1]}; at most {config.max_aspect:g} to 1")


def _draft_size(size: tuple[int, int], config: ImageViewConfig) -> tuple[int, int]:
    """Return the smallest size that a JPEG may be decoded at: at 1/2, 1/4 or 1/8, by fewer coefficients of its DCT.

    Neither side gets shorter than the square. Pillow's area filter takes whole pixels, so it needs more of them.
    """
    if config.fit not in ("crop", "random_crop", "stretch"):
        return size
    least = config.resolution * (4 if config.resample == "area" else 1)
    return least, least


def _transpose_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Move a box at the corner (0, 0) of a stored picture to where it lies in the upright one of ``size``."""
    width, height = (box[3], box[2]) if orientation in (5, 6, 7, 8) else box[2:]
    left = size[0] - width if orientation in (2, 3, 6, 7) else 0.0
    top = size[1] - height if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Bring any mode that has one meaning to L, RGB or RGBA."""
    mode, transparent = picture.mode, "transparency" in picture.info
    if mode.startswith("I;16") or (mode == "I" and picture.format in ("PNG", "PPM")):
        narrow = np.empty((1 + transparent, picture.height, picture.width), dtype=np.uint8)
        for first, strip in _strips(picture):
            wide, rows = np.asarray(strip).astype(np.uint32), slice(first, first + strip.height)
            # 65535 is white: 257 levels of 16 bits to one of 8, rounded.
            narrow[0, rows] = (np.minimum(wide, 65535) * 255 + 32767) // 65535
            if transparent:
                narrow[1, rows] = np.where(wide == picture.info["transparency"], 0, 255)
        grey, *alpha = map(Image.fromarray, narrow)
        return Image.merge("RGBA", [grey, grey, grey, *alpha]) if transparent else grey
    if mode in ("L", "RGB") and not transparent:
        return picture
    if mode == "1":
        grey = picture.convert("L")
        if transparent:
            grey.info["transparency"] = 255 * min(1, picture.info["transparency"])
        return grey.convert("RGBA") if transparent else grey
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or (transparent and mode in ("P", "L", "RGB")):
        return picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
    if mode in ("P", "CMYK", "YCbCr", "RGBX"):
        return picture.convert("RGB")
    raise BadSample("colour_mode", f"{picture.format} in mode {mode}, which has no certain meaning in 8 bits")


def _flatten(picture: Image.Image, config: ImageViewConfig) -> Image.Image:
    """Lay transparency on the background and bring the picture to the wanted channels."""
    wanted = "L" if config.channels == 1 else "RGB"
    if picture.mode != "RGBA":
        return picture if picture.mode == wanted else picture.convert(wanted)
    flat = Image.new(wanted, picture.size)
    for first, strip in _strips(picture):
        background = Image.new("RGBA", strip.size, (*config.background, 255))
        flat.paste(Image.alpha_composite(background, strip).convert(wanted), (0, first))
    return flat


def _strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield a picture in rows of some height, each with its first row: whole copies of the largest take gigabytes."""
    for first in range(0, picture.height, STRIP_ROWS):
        yield first, picture.crop((0, first, picture.width, min(first + STRIP_ROWS, picture.height)))


def _fit(
    picture: Image.Image, config: ImageViewConfig, position: tuple[float, float], box: Box | None = None
) -> Image.Image:
    """Bring a flattened picture, or the box in it that is the picture, to the square."""
    left, top, right, bottom = box or (0, 0, *picture.size)
    side, width, height = config.resolution, right - left, bottom - top
    # Enlarging by area would repeat pixels.
    by_area = config.resample == "area" and side < (max(width, height) if config.fit == "pad" else min(width, height))
    method = Image.Resampling.BOX if by_area else Image.Resampling.LANCZOS
    if config.fit in ("crop", "random_crop"):
        short = min(width, height)
        left, top = left + (width - short) * position[1], top + (height - short) * position[0]
        if short == side and box is None:
            # Whole pixels: nothing to resample.
            left, top = round(left), round(top)
            return picture.crop((int(left), int(top), int(left) + side, int(top) + side))
        return picture.resize((side, side), method, box=(left, top, left + short, top + short))
    if config.fit == "stretch":
        if (width, height) == (side, side) and picture.size == (side, side):
            return picture
        return picture.resize((side, side), method, box=(left, top, right, bottom))
    if config.fit == "pad" and max(width, height) != side:
        scale = side / max(width, height)
        picture = picture.resize((max(1, round(width * scale)), max(1, round(height * scale))), method)
    if picture.size == (side, side):
        return picture
    grey = Image.new("RGB", (1, 1), config.background).convert("L").getpixel((0, 0))
    canvas = Image.new(picture.mode, (side, side), grey if picture.mode == "L" else config.background)
    # Larger than the square (only "centre"): a negative corner crops.
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas
