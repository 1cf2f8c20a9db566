"""Every odd image is shown right or refused with a reason."""

import contextlib
import io
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from data.samples import BadSample, ImageSample
from data.transforms import (
    ImageViewConfig,
    crop_position,
    decode_image,
    to_levels,
    to_unit_range,
    view_image,
    view_sample,
)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture without detail finer than a few pixels; uint8 (h w 3)."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(6 * x + 2), np.cos(5 * y), np.sin(4 * (x + y))]
    return np.rint(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


RED, BLUE = (255, 0, 0), (0, 0, 255)
HALVES = np.zeros((8, 8, 3), dtype=np.uint8)
HALVES[:, :4], HALVES[:, 4:] = RED, BLUE


def test_bilevel_images_become_black_and_white() -> None:
    image = Image.fromarray(np.array([[0, 255], [255, 0]], dtype=np.uint8)).convert("1")
    np.testing.assert_array_equal(decode_image(encoded(image))[:, :, 0], [[0, 255], [255, 0]])


def test_palettes_become_their_colours() -> None:
    image = Image.fromarray(HALVES).quantize(2)
    assert image.mode == "P"
    np.testing.assert_array_equal(decode_image(encoded(image)), HALVES)


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16"])
def test_a_transparent_colour_takes_the_background(mode: str) -> None:
    image = Image.fromarray(HALVES)
    grey = np.asarray(image.convert("L"))
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "1":
        image = Image.fromarray(grey > grey.mean())
    else:
        image = image.quantize(2) if mode == "P" else image.convert(mode)
    transparent = image.getpixel((0, 0))
    view = ImageViewConfig(resolution=8, channels=3, background=(0, 255, 0))
    shown = view_image(encoded(image, transparency=transparent), view)
    assert (shown[:, :4] == (0, 255, 0)).all()
    opaque = decode_image(encoded(image))
    assert (shown[:, 4:] == opaque[:, 4:]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_half_transparency_mixes_with_the_background(mode: str) -> None:
    image = Image.new(mode, (8, 8), (200, 200, 200, 128) if mode == "RGBA" else (200, 128))
    shown = view_image(encoded(image), ImageViewConfig(resolution=8, channels=1, background=(0, 0, 0)))
    assert abs(int(shown[0, 0, 0]) - round(200 * 128 / 255)) <= 1


def test_sixteen_bits_become_eight_by_rounding() -> None:
    levels = np.array([[0, 1, 128, 129, 257, 30000, 65534, 65535]], dtype=np.uint16)
    shown = decode_image(encoded(Image.fromarray(levels)))
    np.testing.assert_array_equal(shown[:, :, 0], np.rint(levels / 257).astype(np.uint8))


def test_sixteen_bits_of_colour_keep_their_colours() -> None:
    import zlib

    levels = np.random.default_rng(0).integers(0, 65536, (4, 5, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = (5).to_bytes(4, "big") + (4).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    payload = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.abs(decode_image(payload).astype(float) - levels / 257).max() <= 1


def test_tall_images_are_flattened_and_narrowed_in_strips_that_nobody_sees() -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (700, 9), dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    assert np.array_equal(decode_image(buffer.getvalue())[:, :, 0], np.rint(deep / 257).astype(np.uint8))
    clear = rng.integers(0, 256, (700, 9, 4), dtype=np.uint8)
    view = ImageViewConfig(resolution=700, fit="centre", background=(10, 200, 30))
    alpha = clear[:, :, 3:] / 255
    expected = clear[:, :, :3] * alpha + np.array([10, 200, 30]) * (1 - alpha)
    shown = view_image(clear, view)[:, 345:354]
    assert np.abs(shown - expected).max() <= 1


def test_cmyk_becomes_rgb() -> None:
    shown = decode_image(encoded(Image.fromarray(HALVES).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(shown[2, 1].astype(int) - RED).max() < 12
    assert np.abs(shown[2, 6].astype(int) - BLUE).max() < 12


WHITE = (0.9642, 1.0, 0.8249)  # D50
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])  # to XYZ at D50
DISPLAY_P3 = np.array([[0.5151, 0.2919, 0.1572], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])


def icc(space: bytes, **tags: bytes) -> bytes:
    """A colour profile, version 2."""
    tags = {"wtpt": xyz(WHITE), **tags}
    table, body, start = len(tags).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + (start + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data + bytes(-len(data) % 4)
    kind, connection = (b"prtr", b"Lab ") if space == b"CMYK" else (b"mntr", b"XYZ ")
    head = (start + len(body)).to_bytes(4, "big") + bytes(4) + b"\2\x10\0\0" + kind + space + connection
    return head + bytes(12) + b"acsp" + bytes(28) + xyz(WHITE)[8:] + bytes(48) + table + body


def xyz(values: Iterable[float]) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(value * 256).to_bytes(2, "big")


def rgb_profile(to_xyz: np.ndarray, exponent: float) -> bytes:
    columns = {f"{name}XYZ": xyz(column) for name, column in zip("rgb", to_xyz.T, strict=True)}
    return icc(b"RGB ", **columns, **{f"{name}TRC": gamma(exponent) for name in "rgb"})


def to_srgb(levels: np.ndarray, to_xyz: np.ndarray, exponent: float) -> np.ndarray:
    """The reference: from the profile's primaries to XYZ to those of sRGB, in float64; (... 3)."""
    linear = np.clip((levels / 255) ** exponent @ (np.linalg.inv(SRGB) @ to_xyz).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_colour_profile_is_converted_to_srgb(form: str, channels: int) -> None:
    image = Image.fromarray(np.clip(smooth(32, 32), 60, 190))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    payload = encoded(image, form, icc_profile=rgb_profile(DISPLAY_P3, 1.8), **options)
    stored = decode_image(encoded(image, form, **options)).astype(float)
    expected = to_srgb(stored, DISPLAY_P3, 1.8)
    assert np.abs(expected - stored).max() > 20
    if channels == 1:
        expected = (expected @ [0.299, 0.587, 0.114])[:, :, None]
    shown = view_image(payload, ImageViewConfig(resolution=32, channels=channels))
    assert np.abs(shown - expected).max() < 2


def test_grey_and_transparent_images_are_converted_too() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    shown = decode_image(encoded(Image.fromarray(grey), icc_profile=icc(b"GRAY", kTRC=gamma(1.8))))
    linear = (grey / 255) ** 1.8
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert shown.shape == (16, 16, 1)
    assert np.abs(shown[:, :, 0] - expected).max() < 2
    clear = noise(16, 16, 4)
    shown = decode_image(encoded(Image.fromarray(clear), icc_profile=rgb_profile(DISPLAY_P3, 2.2)))
    np.testing.assert_array_equal(shown[:, :, 3], clear[:, :, 3])
    assert np.abs(shown[:, :, :3] - to_srgb(clear[:, :, :3], DISPLAY_P3, 2.2)).max() < 3


def test_cmyk_has_the_colours_of_its_profile() -> None:
    # Cyan is printed as a middle grey; every other ink is black.
    corners = [(255, 128, 128) if ink == 0 else (127, 128, 128) if ink == 8 else (0, 128, 128) for ink in range(16)]
    identity = b"".join(int(65536 * (i == j)).to_bytes(4, "big") for i in range(3) for j in range(3))
    tables = [bytes(range(256)) * 4, bytes(np.array(corners, dtype=np.uint8)), bytes(range(256)) * 3]
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + b"".join(tables)
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    profile = icc(b"CMYK", A2B0=lut, A2B1=lut)
    shown = decode_image(encoded(image, "JPEG", quality=100, icc_profile=profile))
    assert np.abs(shown.astype(int) - 119).max() < 4  # L* = 50


@pytest.mark.parametrize(
    "profile",
    [
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        b"junk",
        rgb_profile(DISPLAY_P3, 2.2)[:300],
        icc(b"GRAY", kTRC=gamma(1.0)),
        icc(b"CMYK"),
    ],
    ids=["sRGB", "junk", "cut", "of grey", "of ink without a table"],
)
def test_pixels_stay_as_they_are_with_a_profile_of_srgb_or_one_that_cannot_be_theirs(profile: bytes) -> None:
    image = Image.fromarray(noise(64, 64))
    for form in ("PNG", "JPEG"):
        for channels in (1, 3):
            view = ImageViewConfig(resolution=16, channels=channels)
            with_profile = view_image(encoded(image, form, icc_profile=profile), view)
            np.testing.assert_array_equal(with_profile, view_image(encoded(image, form), view))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_shown_upright(orientation: int) -> None:
    upright = Image.fromarray(smooth(24, 40))
    # The stored picture is the upright one, transformed by the inverse of what the tag asks for.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(stored, exif=exif)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image() -> None:
    payload = encoded(Image.fromarray(smooth(16, 16)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xee" * 40)
    assert decode_image(payload).shape == (16, 16, 3)


def test_grey_is_luma() -> None:
    image = noise(8, 8)
    shown = view_image(image, ImageViewConfig(resolution=8, channels=1))[:, :, 0]
    assert np.abs(shown - image @ np.array([0.299, 0.587, 0.114])).max() <= 1
    grey = noise(8, 8, 1)
    np.testing.assert_array_equal(view_image(grey, ImageViewConfig(resolution=8)), np.repeat(grey, 3, axis=2))


@pytest.mark.parametrize("fit", ["crop", "random_crop", "pad", "stretch", "centre"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_is_left_alone(fit: str, channels: int) -> None:
    image = noise(16, 16, channels)
    view = ImageViewConfig(resolution=16, channels=channels, fit=fit)
    np.testing.assert_array_equal(view_image(image, view), image)


def test_centre_pads_and_crops_without_resampling() -> None:
    image = noise(6, 20)
    shown = view_image(image, ImageViewConfig(resolution=10, fit="centre", background=(1, 2, 3)))
    np.testing.assert_array_equal(shown[2:8], image[:, 5:15])
    assert (shown[[0, 1, 8, 9]] == (1, 2, 3)).all()


def test_padding_keeps_the_whole_picture_and_its_aspect() -> None:
    shown = view_image(
        np.full((10, 40, 3), 200, np.uint8), ImageViewConfig(resolution=20, fit="pad", background=(0, 0, 0))
    )
    rows = np.flatnonzero((shown == 200).all(axis=(1, 2)))
    assert (rows[0], rows[-1]) == (7, 11)
    assert (shown[[6, 12]] == 0).all()


def test_a_crop_lies_in_the_centre_or_anywhere_by_the_key() -> None:
    image = noise(8, 24)
    np.testing.assert_array_equal(view_image(image, ImageViewConfig(resolution=8)), image[:, 8:16])
    view, lefts = ImageViewConfig(resolution=8, fit="random_crop"), []
    for number in range(400):
        shown = view_image(image, view, key=f"k{number}")
        (left,) = [left for left in range(17) if np.array_equal(shown, image[:, left : left + 8])]
        lefts.append(left)
        np.testing.assert_array_equal(shown, view_sample(ImageSample(key=f"k{number}", image=image), view))
    assert set(lefts) == set(range(17))
    assert 7 < np.mean(lefts) < 9
    tops = [crop_position(view, f"k{number}")[0] for number in range(400)]
    assert 0.45 < np.mean(tops) < 0.55
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.2


@pytest.mark.parametrize("resample", ["lanczos", "area"])
def test_shrinking_averages_what_it_cannot_show(resample: str) -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    shown = view_image(stripes, ImageViewConfig(resolution=16, resample=resample))
    assert np.abs(shown[2:-2, 2:-2].astype(float) - 127.5).max() < 3


def test_area_is_the_mean_of_the_covered_pixels() -> None:
    image = noise(32, 32)
    expected = image.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3))
    shown = view_image(image, ImageViewConfig(resolution=8, resample="area"))
    assert np.abs(shown - expected).max() <= 1


def test_a_large_jpeg_decoded_small_is_the_one_decoded_whole() -> None:
    payload = encoded(Image.fromarray(smooth(1000, 1400)), "JPEG", quality=95)
    view = ImageViewConfig(resolution=128)
    whole = view_image(decode_image(payload), view).astype(int)
    assert np.abs(view_image(payload, view).astype(int) - whole).max() <= 4
    assert np.abs(view_image(payload, view).astype(int) - whole).mean() < 0.5


@lru_cache
def wavy_jpeg(height: int, width: int, orientation: int = 1) -> bytes:
    """A picture whose finest detail is a tenth of its long side."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = 127.5 + 110 * np.stack([np.sin(54 * x + 2), np.cos(48 * y), np.sin(36 * (x + y))], axis=-1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(waves.astype(np.uint8)), "JPEG", quality=95, subsampling=0, exif=exif)


def fitted(picture: Image.Image, view: ImageViewConfig) -> np.ndarray:
    """The reference: a whole decode, resampled from the exact box."""
    (width, height), box = picture.size, (0.0, 0.0, float(picture.width), float(picture.height))
    if view.fit != "stretch":
        (top, left), short = crop_position(view, "k"), min(picture.size)
        left, top = (width - short) * left, (height - short) * top
        box = (left, top, left + short, top + short)
    method = Image.Resampling.BOX if view.resample == "area" else Image.Resampling.LANCZOS
    return np.asarray(picture.resize((view.resolution, view.resolution), method, box=box)).astype(float)


SIZES = [(512, 1023), (513, 517), (705, 705), (1026, 512), (766, 1001), (1023, 1025), (2049, 2100)]


@pytest.mark.parametrize("fit", ["crop", "random_crop", "stretch"])
@pytest.mark.parametrize("resample", ["lanczos", "area"])
def test_jpegs_of_any_size_are_shown_where_a_whole_decode_has_them(fit: str, resample: str) -> None:
    view = ImageViewConfig(resolution=256, fit=fit, resample=resample)
    for height, width in SIZES:
        payload = wavy_jpeg(height, width)
        expected = fitted(Image.open(io.BytesIO(payload)), view)
        found = view_image(payload, view, key="k").astype(float)
        noise_level = np.square(found - expected).mean()
        assert 10 * np.log10(255**2 / max(noise_level, 1e-9)) >= 45, (height, width)
        # Least squares: how far the one has to be moved to become the other.
        slopes = np.stack([slope.ravel() for slope in np.gradient(expected.mean(axis=-1))], axis=-1)
        shift = np.linalg.lstsq(slopes, (expected - found).mean(axis=-1).ravel(), rcond=None)[0]
        assert np.abs(shift).max() < 0.25, (height, width)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_small_is_turned_with_its_box(orientation: int) -> None:
    for height, width in [(705, 1001), (1001, 705)]:
        payload = wavy_jpeg(height, width, orientation)
        view = ImageViewConfig(resolution=64)
        expected = fitted(ImageOps.exif_transpose(Image.open(io.BytesIO(payload))), view)
        assert np.square(view_image(payload, view) - expected).mean() < 255**2 / 10**4.5


@pytest.mark.parametrize("side", [384, 383, 129])
def test_no_jpeg_is_decoded_smaller_than_the_square(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: decoded.append(self.size) or resize(self, *a, **k))
    for factor in (2, 4, 8):
        for short in range(factor * side - 3, factor * side + 4):
            payload = encoded(Image.new("L", (short, short)), "JPEG")
            view_image(payload, ImageViewConfig(resolution=side, channels=1))
            assert min(decoded[-1]) >= side, short


def test_the_pixel_bound_holds_before_anything_is_decoded() -> None:
    payload = encoded(Image.new("L", (300, 200)))
    assert decode_image(payload, max_pixels=60_000).shape == (200, 300, 1)
    with pytest.raises(BadSample, match="too_many_pixels: 300 x 200; at most 59999 pixels"):
        # The pixels are cut away: were they touched, it would be called broken.
        decode_image(payload[:60], max_pixels=59_999)


def test_every_flipped_bit_of_a_png_is_found() -> None:
    clean = encoded(Image.fromarray(noise(6, 6)))
    for position in range(8, len(clean)):
        damaged = bytearray(clean)
        damaged[position] ^= 1
        with pytest.raises(BadSample):
            decode_image(bytes(damaged))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_a_cut_file_is_broken_wherever_it_is_cut(form: str) -> None:
    payload = encoded(Image.fromarray(noise(24, 24)), form)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BadSample) as found:
            decode_image(payload[: int(share * len(payload))])
        assert found.value.reason in ("broken_image", "not_an_image")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_damage_to_an_image_ends_in_pixels_or_a_finding(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]))
    image = Image.fromarray(noise(9, 7, 4)) if form in ("PNG", "WEBP", "TIFF") else Image.fromarray(noise(9, 7))
    damaged = bytearray(encoded(image, form))
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for view in (ImageViewConfig(resolution=4), ImageViewConfig(resolution=4, channels=1, fit="pad")):
        with contextlib.suppress(BadSample):
            assert view_image(bytes(damaged), view, max_pixels=100_000).shape == (4, 4, view.channels)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_enlarging_by_area_does_not_repeat_pixels(fit: str) -> None:
    ramp = np.repeat(np.linspace(0, 255, 8).astype(np.uint8)[None, :, None], 8, axis=0)
    shown = view_image(ramp, ImageViewConfig(resolution=32, channels=1, fit=fit, resample="area"))
    assert len(np.unique(shown[16])) > 16


def test_small_and_extreme_images_are_dropped_where_the_view_says_so() -> None:
    view = ImageViewConfig(resolution=8, min_side=10, max_aspect=3)
    view_image(noise(10, 30), view)
    with pytest.raises(BadSample, match="too_small: 9 x 20; the shorter side is at least 10"):
        view_image(noise(20, 9), view)
    with pytest.raises(BadSample, match="extreme_aspect: 31 x 10; at most 3 to 1"):
        view_image(encoded(Image.fromarray(noise(10, 31))), view)


def test_findings_about_an_image_name_its_shard_and_member() -> None:
    sample = ImageSample(key="k", image=b"junk", shard="s.tar", member="k.png")
    with pytest.raises(BadSample, match=r"^s\.tar: k\.png: not_an_image: 4 bytes, starting b'junk'$"):
        view_sample(sample, ImageViewConfig(resolution=8))


def test_levels_survive_the_way_to_the_unit_range_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    tensor = to_unit_range(levels)
    assert tensor.shape == (1, 1, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_levels(tensor), levels)
    np.testing.assert_array_equal(to_levels(tensor * 3)[tensor.permute(0, 2, 3, 1).numpy() > 0.4], 255)
    colour = noise(4, 6)[None]
    assert torch.equal(to_unit_range(colour)[0, 2], torch.from_numpy(colour[0, :, :, 2]) / 127.5 - 1)
