"""Sources give the same samples on any machine, each of its true class."""

import gzip
import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from data.samples import BadSample, ImageSample, Split, check_key, image_members
from data.shards.writer import ShardWriter
from data.sources import FashionMNISTConfig, ImageFolderConfig, Source, SourceConfig, SyntheticConfig, WebDatasetConfig
from data.sources.fashion_mnist import MOSAIC
from data.sources.source import caption_of_class, safe_key, unit_hash
from data.sources.synthetic import COLOURS, draw
from data.sources.webdataset import expand
from data.transforms import ImageViewConfig, decode_image, view_image

SPLITS: tuple[Split, Split] = ("train", "val")


def pixels_of(sample: ImageSample) -> np.ndarray:
    return decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image


def image_folder(folder: Path) -> Source:
    for name in ("zebra", "ant", "polar_bear"):
        (folder / name / "deep").mkdir(parents=True)
        for number in range(40):
            image = Image.new("RGB", (4, 4), (number, len(name), 0))
            image.save(folder / name / ("deep" if number % 2 else ".") / f"{number}.v1.png")
    (folder / "ant" / "0.v1.txt").write_text("one small ant\n")
    (folder / "notes.txt").write_text("not a class")
    (folder / ".hidden").mkdir()
    return ImageFolderConfig(path=folder, val_fraction=0.2).open()


def shards(folder: Path) -> Source:
    for name, numbers in {"a": range(30), "b": range(30, 50)}.items():
        with ShardWriter(folder / f"{name}.tar") as shard:
            for number in numbers:
                image = np.full((4, 4, 3), number, dtype=np.uint8)
                shard.add(
                    f"k{number}",
                    image_members("k", image, label=number % 2, caption=f"no. {number}", metadata={"n": number}),
                )
    return WebDatasetConfig(urls=(f"{folder}/*.tar",), classes=("even", "odd"), val_fraction=0.3).open()


@pytest.fixture(params=["fashion_mnist", "synthetic", "image_folder", "webdataset"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    if request.param == "fashion_mnist":
        return FashionMNISTConfig().open()
    if request.param == "synthetic":
        return SyntheticConfig(resolution=16, num_train=40, num_val=12).open()
    return image_folder(tmp_path) if request.param == "image_folder" else shards(tmp_path)


def test_every_sample_has_a_key_of_its_own_a_class_and_a_caption(source: Source) -> None:
    keys = set()
    for split in SPLITS:
        indices = range(source.count(split)) if source.count(split) < 200 else range(0, source.count(split), 37)
        for index in indices:
            sample = source.read(split, index)
            keys.add(check_key(sample.key))
            assert 0 <= sample.label < len(source.classes)
            assert sample.caption
            assert pixels_of(sample).dtype == np.uint8
        assert len(keys) >= len(indices)
    assert len({source.read(s, i).key for s in SPLITS for i in range(min(20, source.count(s)))}) == sum(
        min(20, source.count(split)) for split in SPLITS
    )


def test_reading_is_a_pure_function_of_the_index(source: Source) -> None:
    for split in SPLITS:
        last = source.read(split, source.count(split) - 1)
        source.read(split, 0)
        again = source.read(split, source.count(split) - 1)
        assert (again.key, again.label, again.caption, again.metadata) == (
            last.key,
            last.label,
            last.caption,
            last.metadata,
        )
        np.testing.assert_array_equal(pixels_of(again), pixels_of(last))


def test_the_kind_alone_chooses_the_source() -> None:
    adapter: TypeAdapter[object] = TypeAdapter(SourceConfig)
    assert isinstance(adapter.validate_python({"kind": "synthetic", "num_train": 3}), SyntheticConfig)
    with pytest.raises(ValidationError, match="'fashion_mnist', 'image_folder', 'synthetic', 'webdataset', 'union'"):
        adapter.validate_python({"kind": "imagenet"})


# --- Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, *, compressed: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (12, 28, 28)),
        "train-labels-idx1-ubyte": rng.integers(0, 10, 12),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (5, 28, 28)),
        "t10k-labels-idx1-ubyte": rng.integers(0, 10, 5),
    }
    for name, array in arrays.items():
        raw = idx(array)
        (folder / f"{name}{'.gz' if compressed else ''}").write_bytes(gzip.compress(raw) if compressed else raw)
    return arrays


def test_the_embedded_corpus_is_balanced_and_small() -> None:
    source = FashionMNISTConfig().open()
    assert (source.count("train"), source.count("val"), len(source.classes)) == (5000, 1000, 10)
    assert MOSAIC.stat().st_size <= 3_000_000
    for split, each in (("train", 500), ("val", 100)):
        labels = [source.read(split, index).label for index in range(source.count(split))]
        assert np.bincount(labels).tolist() == [each] * 10
        assert sorted(labels[:10]) == list(range(10))


def test_the_embedded_images_are_all_different_and_none_is_in_both_splits() -> None:
    source = FashionMNISTConfig().open()
    images = [pixels_of(source.read(split, i)).tobytes() for split in SPLITS for i in range(source.count(split))]
    assert len(set(images)) == 6000


def test_the_embedded_images_belong_to_their_classes() -> None:
    """Nearest class mean, which knows nothing of order, agrees as often as it does on Fashion-MNIST (0.68)."""
    source = FashionMNISTConfig().open()
    train = np.stack([pixels_of(source.read("train", index)) for index in range(5000)]).astype(np.float32)
    means = np.stack([train[label::10].mean(axis=0).ravel() for label in range(10)])
    val = np.stack([pixels_of(source.read("val", index)) for index in range(1000)]).reshape(1000, -1).astype(np.float32)
    nearest = ((val[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert np.mean(nearest == np.arange(1000) % 10) > 0.6
    assert source.classes[7] == "sneaker"
    assert source.read("val", 7).caption == "a photo of a sneaker"


@pytest.mark.parametrize("compressed", [False, True])
def test_the_full_corpus_is_what_the_idx_files_hold(compressed: bool, tmp_path: Path) -> None:
    arrays = write_idx(tmp_path, compressed=compressed)
    source = FashionMNISTConfig(size="full", path=tmp_path).open()
    for split, prefix in (("train", "train"), ("val", "t10k")):
        images, labels = arrays[f"{prefix}-images-idx3-ubyte"], arrays[f"{prefix}-labels-idx1-ubyte"]
        for index in range(source.count(split)):
            sample = source.read(split, index)
            np.testing.assert_array_equal(pixels_of(sample)[:, :, 0], images[index])
            assert sample.label == labels[index]


def test_bad_idx_files_are_named(tmp_path: Path) -> None:
    config = FashionMNISTConfig(size="full", path=tmp_path)
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte\[\.gz\] is not there. Install Debian's dataset-fashion-mnist"
    ):
        config.open()
    write_idx(tmp_path, compressed=True)
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    raw = gzip.decompress(path.read_bytes())
    for damaged, phrase in [
        (gzip.compress(raw)[:-4], "is damaged"),
        (gzip.compress(raw[:-1]), "not an idx file"),
        (gzip.compress(b"\0\0\x0d\x01" + raw[4:]), "not an idx file"),
        (gzip.compress(idx(np.full(5, 10))), "labels below 10"),
        (gzip.compress(idx(np.zeros(4))), "as many labels"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=phrase):
            config.open()


# --- image folders


def test_classes_are_the_sorted_folders(tmp_path: Path) -> None:
    source = image_folder(tmp_path)
    assert source.classes == ("ant", "polar_bear", "zebra")
    assert sum(source.count(split) for split in SPLITS) == 120
    assert 10 < source.count("val") < 40
    found = {
        s.metadata["file"]: s for split in SPLITS for s in (source.read(split, i) for i in range(source.count(split)))
    }
    assert found["ant/0.v1.png"].caption == "one small ant"
    assert found["ant/deep/1.v1.png"].caption == "a photo of an ant"
    assert found["polar_bear/2.v1.png"].caption == "a photo of a polar bear"
    assert pixels_of(found["zebra/deep/39.v1.png"])[0, 0].tolist() == [39, 5, 0]
    assert all(source.classes[sample.label] == name.split("/")[0] for name, sample in found.items())


def test_adding_files_moves_no_other_file_to_another_split(tmp_path: Path) -> None:
    before = image_folder(tmp_path)
    val = {before.read("val", index).key for index in range(before.count("val"))}
    for number in range(100, 140):
        Image.new("L", (4, 4)).save(tmp_path / "ant" / f"{number}.png")
    after = ImageFolderConfig(path=tmp_path, val_fraction=0.2).open()
    assert val < {after.read("val", index).key for index in range(after.count("val"))}


def test_bad_files_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for number in range(60):
        (tmp_path / "a" / f"{number}.png").write_bytes(b"")
        (tmp_path / "a" / f"{number}.txt").write_bytes(b"\xff")
    source = ImageFolderConfig(path=tmp_path).open()
    with pytest.raises(BadSample, match=r"^a/\d+\.txt: caption_not_utf8"):
        source.read("val", 0)
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    with pytest.raises(BadSample, match=r"a/\d+\.png: unreadable: .*No such file"):
        source.read("train", 0)


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder\. Give the folder that holds one folder per class"):
        ImageFolderConfig(path=tmp_path / "none").open()
    (tmp_path / "a").mkdir()
    for name in ("a/1.svg", "a/2.SVG", "3.heic"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no train images at val_fraction = 0.1: it holds 0 .* 1 \.heic.*change val_"):
        ImageFolderConfig(path=tmp_path).open()
    Image.new("L", (4, 4)).save(tmp_path / "a" / "4.png")
    needed = unit_hash("a/4.png")
    with pytest.raises(
        ValueError, match=rf"no val images .* holds 1 files .*, or set it to {needed + 5e-4:.3f} or more"
    ):
        ImageFolderConfig(path=tmp_path, val_fraction=0.001).open()


# Pillow's name of the format of each suffix, and whether it keeps the pixels of a few colours unchanged.
FORMATS = {
    **{"jpg": ("JPEG", False), "jfif": ("JPEG", False), "MPO.JPG": ("MPO", False)},
    **{"webp": ("WEBP", False), "avif": ("AVIF", False), "png": ("PNG", True), "gif": ("GIF", True)},
    **{"bmp": ("BMP", True), "tif": ("TIFF", True), "ppm": ("PPM", True), "jp2": ("JPEG2000", True)},
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_of_every_format_the_first_picture_is_read(suffix: str, tmp_path: Path) -> None:
    form, is_lossless = FORMATS[suffix]
    pixels = np.zeros((24, 40, 3), dtype=np.uint8)
    pixels[:, 20:], pixels[12:, :, 1] = (250, 0, 0), 120
    first, second = Image.fromarray(pixels), Image.new("RGB", (40, 24), "white")
    more = {"save_all": True, "append_images": [second]} if form in ("MPO", "GIF") else {}
    (tmp_path / "a").mkdir()
    for number in range(30):
        first.save(tmp_path / "a" / f"{number}.{suffix}", form, **more, **({} if is_lossless else {"quality": 95}))
    source = ImageFolderConfig(path=tmp_path, val_fraction=0.3).open()
    assert sum(source.count(split) for split in SPLITS) == 30
    assert not source.left_out
    found = view_image(source.read("train", 0).image, ImageViewConfig(resolution=24, fit="crop"))
    difference = np.abs(found.astype(int) - pixels[:, 8:32])
    assert difference.max() == 0 if is_lossless else difference.mean() < 6


def test_a_grey_image_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    payload = b"P5 8 8 65535\n" + levels.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode_image(payload)[:, :, 0], np.round(levels / 257))


def test_a_program_is_never_started_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(BadSample, match="not_an_image"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


def test_images_without_class_folders_are_a_corpus_without_classes(tmp_path: Path) -> None:
    for number in range(40):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "7.txt").write_bytes("\ufeffsieben \u00c4pfel".encode())
    source = ImageFolderConfig(path=tmp_path, val_fraction=0.2).open()
    assert source.classes == ()
    assert not source.left_out
    samples = [source.read(split, index) for split in SPLITS for index in range(source.count(split))]
    assert len({sample.key for sample in samples}) == 40
    assert {sample.label for sample in samples} == {-1}
    assert {sample.caption for sample in samples} == {"", "sieben \u00c4pfel"}


# Files beside 30 images of the class "a" -> what is left out.
BESIDE = {
    "other formats": (["a/x.heic", "a/y.HEIC", "a/z.svg"], {".heic": 2, ".svg": 1}),
    "a caption without an image": (["a/lone.txt"], {".txt": 1}),
    "a name without an end": (["a/LICENSE", "README"], {"LICENSE": 1, "README": 1}),
    "images beside the folders": (["1.png", "2.jpg", "notes.txt"], {"images beside the folders": 2, ".txt": 1}),
    "an empty folder": (["b/"], {}),
    "a folder of drawings": (["b/1.svg"], {".svg": 1}),
    "hidden files and folders": (["a/._0.png", ".cache/1.png", "a/.x/1.png"], {"hidden files": 1, "hidden folders": 2}),
    "a linked folder": (["a/linked -> a/"], {"linked folders": 1}),
    "names that cannot be printed": (["a/x.\udcff\n"], {".??": 1}),
    "many names": ([f"a/{number}.{number}" for number in range(40)], {}),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_no_image_of_a_class_is_counted(kind: str, tmp_path: Path) -> None:
    names, left_out = BESIDE[kind]
    (tmp_path / "a").mkdir()
    for number in range(30):
        Image.new("L", (4, 4)).save(tmp_path / "a" / f"{number}.png")
    for name in names:
        name, _, target = name.partition(" -> ")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if target:
            (tmp_path / name).symlink_to(tmp_path / target)
        elif name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).touch()
    source = ImageFolderConfig(path=tmp_path, val_fraction=0.3).open()
    assert source.classes == ("a",)
    assert sum(source.count(split) for split in SPLITS) == 30
    if kind == "many names":
        assert (len(source.left_out), source.left_out["others"], source.left_out.total()) == (33, 8, 40)
    else:
        assert source.left_out == left_out


def test_a_folder_of_validation_images_alone_is_no_class(tmp_path: Path) -> None:
    names = sorted((f"b/{number}.png" for number in range(200)), key=unit_hash)
    for name in [*names[:3], *(f"a/{number}.png" for number in range(30))]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    source = ImageFolderConfig(path=tmp_path, val_fraction=0.3).open()
    assert source.classes == ("a",)
    assert source.left_out == {"images of folders without a training image": 3}
    Image.new("L", (4, 4)).save(tmp_path / names[-1])
    source = ImageFolderConfig(path=tmp_path, val_fraction=0.3).open()
    assert (source.classes, dict(source.left_out)) == (("a", "b"), {})


def test_a_named_pipe_is_a_bad_sample_and_a_folder_that_cannot_be_read_an_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    for number in range(30):
        os.mkfifo(tmp_path / "a" / f"{number}.png")
    with pytest.raises(BadSample, match=r"a/\d+\.png: unreadable: it is no regular file"):
        ImageFolderConfig(path=tmp_path).open().read("train", 0)
    with pytest.raises(ValueError, match="is not UTF-8"):
        (tmp_path / "a").rename(tmp_path / "\udcff")
        ImageFolderConfig(path=tmp_path).open()


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    image_folder(tmp_path)
    os.symlink("/", tmp_path / "ant" / "everything")
    assert sum(ImageFolderConfig(path=tmp_path).open().count(split) for split in SPLITS) == 120


# --- drawn shapes


def test_drawn_images_hold_the_colour_that_their_caption_names() -> None:
    source = SyntheticConfig(resolution=32, num_train=60).open()
    for index in range(60):
        sample = source.read("train", index)
        size, colour, shape = sample.caption.split()[1:]
        assert shape == source.classes[sample.label]
        image = pixels_of(sample).reshape(-1, 3)
        assert (image == COLOURS[colour]).all(axis=1).mean() > (0.02 if size == "small" else 0.06)
        assert (image == 235).all(axis=1).any()


def test_drawn_shapes_have_the_area_of_geometry() -> None:
    radius = 0.6
    arm = 0.3 * radius
    areas = {
        "circle": np.pi * radius**2,
        "square": (2 * 0.85 * radius) ** 2,
        "triangle": None,
        "cross": 2 * (2 * radius * 2 * arm) - (2 * arm) ** 2,
    }
    for shape, area in areas.items():
        image = draw(shape, (0, 0, 0), radius=radius, centre=np.zeros(2), resolution=128)
        covered = 4 * (1 - image[:, :, 0].astype(float) / 235).mean()
        if area is None:
            # Legs y = 2|x| - 0.4 r sqrt(5) and base y = 0.8 r: half-width grows from 0 at the tip.
            height = 0.8 * radius + 0.4 * radius * np.sqrt(5)
            area = height * height / 2
        assert covered == pytest.approx(area, rel=0.02), shape


def test_other_seeds_and_splits_give_other_drawings() -> None:
    one, other = SyntheticConfig().open(), SyntheticConfig(seed=1).open()
    assert pixels_of(one.read("train", 0)).tobytes() != pixels_of(other.read("train", 0)).tobytes()
    assert pixels_of(one.read("train", 0)).tobytes() != pixels_of(one.read("val", 0)).tobytes()
    with pytest.raises(IndexError, match="has images 0 to 199, not 200"):
        one.read("val", 200)


# --- shards of others


def test_existing_shards_are_read_in_place(tmp_path: Path) -> None:
    source = shards(tmp_path)
    assert source.count("train") + source.count("val") == 50
    found = {s.key: s for split in SPLITS for s in (source.read(split, i) for i in range(source.count(split)))}
    assert found.keys() == {f"k{number}" for number in range(50)}
    for number in range(50):
        sample = found[f"k{number}"]
        assert (sample.label, sample.caption, sample.metadata) == (number % 2, f"no. {number}", {"n": number})
        assert (pixels_of(sample) == number).all()


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What webdataset's own writer makes of the same samples: a tar, a compressed one, and one written into a pipe."""
    monkeypatch.setenv("LATENTLINE_CACHE", str(tmp_path / "cache"))
    samples = [
        {"__key__": f"{n:04}", "png": image_bytes(n), "cls": n % 4, "txt": f"picture {n}", "json": {"number": n}}
        for n in range(60)
    ]
    for name in ("a.tar", "b.tar.gz", "c.tgz"):
        with webdataset.TarWriter(str(tmp_path / name)) as writer:
            for sample in samples:
                writer.write(sample)
    with open(tmp_path / "d.tar", "wb") as file:
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file)
        with webdataset.TarWriter(pipe.stdin) as writer:
            for sample in samples:
                writer.write(sample)
        assert pipe.stdin is not None
        pipe.stdin.close()
        assert pipe.wait() == 0
    return tmp_path


def image_bytes(number: int) -> bytes:
    buffer = io.BytesIO()
    rng = np.random.default_rng(number)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_compressed_and_streamed_shards_hold_what_plain_ones_do(packed: Path) -> None:
    found = {}
    for name in ("a.tar", "b.tar.gz", "c.tgz", "d.tar"):
        config = WebDatasetConfig(urls=(str(packed / name),), val_fraction=0.2, classes=("a", "b", "c", "d"))
        source = config.open()
        assert source.copied == (name in ("b.tar.gz", "c.tgz")), "nothing has a place in a compressed file"
        found[name] = [
            (split, sample.key, sample.label, sample.caption, sample.metadata, sample.image)
            for split in SPLITS
            for sample in (source.read(split, index) for index in range(source.count(split)))
        ]
    assert len(found["a.tar"]) == 60
    assert found["a.tar"] == found["b.tar.gz"] == found["c.tgz"] == found["d.tar"]


def test_a_damaged_compressed_shard_is_no_short_one(packed: Path) -> None:
    path = packed / "b.tar.gz"
    raw = path.read_bytes()
    for place in (len(raw) // 2, len(raw) - 6):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        with pytest.raises(OSError, match=r"b\.tar\.gz is damaged at an unknown place"):
            WebDatasetConfig(urls=(str(path),), val_fraction=0.5).open()
    path.write_bytes(raw[: len(raw) // 2])
    source = WebDatasetConfig(urls=(str(path),), val_fraction=0.5).open()
    faults, good = [], 0
    for split in SPLITS:
        for index in range(source.count(split)):
            try:
                source.read(split, index)
                good += 1
            except BadSample as error:
                faults.append(error.reason)
    assert faults == ["truncated"]
    assert 10 < good < 50


def test_shards_can_be_given_to_each_split(tmp_path: Path) -> None:
    shards(tmp_path)
    source = WebDatasetConfig(urls=(f"{tmp_path}/a.tar",), val_urls=(f"{tmp_path}/b.tar",)).open()
    assert (source.count("train"), source.count("val")) == (30, 20)
    assert source.read("train", 3).label == -1  # no classes were given
    with pytest.raises(ValueError, match=r"a\.tar is in urls and in val_urls"):
        WebDatasetConfig(urls=(f"{tmp_path}/?.tar",), val_urls=(f"{tmp_path}/a.tar",)).open()


def test_a_split_that_would_be_empty_is_named(tmp_path: Path) -> None:
    shards(tmp_path)
    with pytest.raises(
        ValueError, match=r"1 shards with 30 samples leave none for val\. Give other urls, give val_urls"
    ):
        WebDatasetConfig(urls=(f"{tmp_path}/a.tar",), val_fraction=1e-9).open()


def test_braces_and_globs_name_files_in_order(tmp_path: Path) -> None:
    for number in (7, 8, 9, 10, 11):
        (tmp_path / f"s-{number:03d}.tar").touch()
    falling = [Path(path).name for path in expand((f"{tmp_path}/s-{{011..009}}.tar",))]
    assert falling == ["s-011.tar", "s-010.tar", "s-009.tar"]
    names = [
        Path(path).name
        for path in expand((f"{tmp_path}/s-{{009..011}}.tar", f"{tmp_path}/s-00{{8,7}}.tar", f"{tmp_path}/*.tar"))
    ]
    assert names == [f"s-{number:03d}.tar" for number in (9, 10, 11, 8, 7)]
    (tmp_path / "lost.tar").symlink_to(tmp_path / "not mounted.tar")
    with pytest.raises(ValueError, match=r"lost\.tar' is a link to nothing"):
        expand((f"{tmp_path}/*.tar",))
    (tmp_path / "lost.tar").unlink()
    with pytest.raises(ValueError, match=r"s-012\.tar' names no file"):
        expand((f"{tmp_path}/s-{{009..012}}.tar",))
    with pytest.raises(ValueError, match=r"s-\{009\.\.011\.tar' has braces that do not close\. Write \{000"):
        expand((f"{tmp_path}/s-{{009..011.tar",))


@pytest.mark.parametrize(
    "braces",
    [
        *("{0..999999999}", "{-9..999999999}", "{a,{999999999..0..9}}", "{1..1000001}"),
        *("{a,{1..999}{1..999}{1..999}}", "{a,{a..z}{a..z}{a..z}{A..Z}}", "{0,1}" * 20, "{x{0..999},y{0..999999}}"),
        *("{" + "9" * 400 + ".." + "8" * 400 + "}", "{1.." + "9" * 5_000 + "}"),
    ],
)
def test_a_range_of_over_a_million_shards_is_refused_before_it_is_expanded(
    braces: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.sources.webdataset.braceexpand", lambda *_, **__: pytest.fail("it was expanded"))
    with pytest.raises(ValueError, match=r"s-.*' names more than 1000000 shards\."):
        expand((f"/nowhere/s-{braces}.tar",))


@pytest.mark.parametrize("url", ["{" * 50_000 + "}" * 50_000, "{a," * 5_000 + "b" + "}" * 5_000])
def test_braces_in_thousands_of_others_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="has braces in more than 16 others"):
        expand((url,))


@pytest.mark.parametrize(
    "url",
    [
        *("a", "{a}", "{a,b}", "a,b{1..3}", "{a{0..9},b{0..99..10}}", "{5..2}-{01..10}", "{{a,b},c}x{,y}", "{a{b,c}d}"),
        *("{-3..3..2}", "x{1,2{3,4{5,6}}}", "{a,b}}", "{1..3..0}"),
    ],
)
def test_the_number_of_names_is_known_before_they_are_made(url: str) -> None:
    from braceexpand import braceexpand

    from data.sources.webdataset import most_names

    try:
        assert most_names(url) == len(list(braceexpand(url, escape=False)))
    except ValueError:
        assert url == "{a,b}}"


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch /tmp/x",
        "PIPE: ls",
        "file:///etc/passwd",
        "file:x.tar",
        "http://a/b.tar",
        "gopher:x",
        "",
        "a\0b",
        "s3://bucket",
        "s3://key:secret@bucket/x.tar",
        "https://host/x.tar?signature=1",
    ],
)
def test_only_paths_and_fetched_addresses_are_taken_for_shards(url: str) -> None:
    with pytest.raises(ValidationError):
        WebDatasetConfig(urls=(url,))
    with pytest.raises(ValidationError):
        WebDatasetConfig(urls=("a.tar",), val_urls=(url,))


@pytest.mark.parametrize(("name", "caption"), [("ankle boot", "a photo of an ankle boot"), ("bag", "a photo of a bag")])
def test_captions_have_their_article(name: str, caption: str) -> None:
    assert caption_of_class(name) == caption


def test_any_name_makes_a_key_and_different_names_different_keys() -> None:
    names = ["a/b.png", "a-b.png", "\u00e9", "a" * 500, "a" * 499 + "b", "..", "/", "\udcff"]
    assert len({check_key(safe_key(name)) for name in names}) == len(names)
