"""Feature extractors: what they respond to, what they must not depend on, and what they are good for."""

import io
import itertools
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor
from torch.nn import functional

from data.sources.fashion_mnist import FashionMNISTConfig
from models.features import FeatureExtractorConfig
from models.features.extractor import FeatureExtractor, eight_bit
from models.features.scattering import ScatteringConfig, morlet_wavelets
from models.metrics.fidelity import psnr, ssim
from models.metrics.frechet import frechet_distance
from models.metrics.kernel import kernel_distance
from models.metrics.neighbours import precision_recall
from models.metrics.probe import LinearProbe

NUM_ANGLES, NUM_OCTAVES = 4, 3
FIRST, SECOND = (
    NUM_ANGLES * 16,
    NUM_ANGLES**2,
)  # coefficients of a first-order octave, of a second-order pair of octaves


@pytest.fixture(scope="module")
def scattering() -> FeatureExtractor:
    return ScatteringConfig().build()


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def grating(angle: float, period: float, *, phase: float = 0) -> Tensor:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    wave = torch.cos(2 * math.pi / period * (x * math.cos(angle) + y * math.sin(angle)) + phase)
    return (128 + 100 * wave).round().to(torch.uint8)[None, None]


def parts_of(features: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """First order by octave, second order by octave of the first, local means, colour; of features (b 312)."""
    sizes = [FIRST, SECOND, SECOND, FIRST, SECOND, FIRST, 16, 24 + 32]
    first1, second12, second13, first2, second23, first3, means, colour = features.split(sizes, dim=1)
    return [first1, first2, first3], [second12, second13, second23], means, colour


# ---- what scattering sees


def test_wavelets_at_each_angle_ignore_a_flat_image_and_have_equal_strength() -> None:
    wavelets = morlet_wavelets(8)

    assert wavelets.sum(dim=(1, 2, 3)).abs().max() < 1e-6
    energy = wavelets[:8].square().sum(dim=(1, 2, 3)) + wavelets[8:].square().sum(dim=(1, 2, 3))
    assert (energy / energy.mean() - 1).abs().max() < 0.05


def test_a_flat_image_has_its_level_as_local_means_and_nothing_else(scattering: FeatureExtractor) -> None:
    first, second, means, colour = parts_of(scattering(torch.full((1, 1, 32, 32), 51, dtype=torch.uint8)))

    torch.testing.assert_close(means, torch.full((1, 16), 0.2))
    for part in (*first, *second, colour):
        assert part.abs().max() < 1e-3


@pytest.mark.parametrize("angle", range(NUM_ANGLES))
@pytest.mark.parametrize("octave", range(NUM_OCTAVES))
def test_a_grating_answers_most_at_its_own_angle_and_octave(
    scattering: FeatureExtractor, angle: int, octave: int
) -> None:
    first, *_ = parts_of(scattering(grating(math.pi * angle / NUM_ANGLES, period=4 * 2**octave)))

    strength = torch.stack([part.reshape(NUM_ANGLES, 16).mean(dim=1) for part in first])  # (octaves angles)
    assert divmod(int(strength.argmax()), NUM_ANGLES) == (octave, angle)


@pytest.mark.parametrize("octave", range(NUM_OCTAVES))
def test_the_first_order_forgets_the_phase_of_a_grating(scattering: FeatureExtractor, octave: int) -> None:
    strengths = []
    for phase in (0, math.pi / 4, math.pi / 2):
        first, *_ = parts_of(scattering(grating(0, period=4 * 2**octave, phase=phase)))
        strengths.append(first[octave].reshape(NUM_ANGLES, 4, 4)[0, 1:3, 1:3])  # away from the border

    assert max(float((strength / strengths[0] - 1).abs().max()) for strength in strengths) < 0.1


def test_the_second_order_sees_how_strokes_are_arranged(scattering: FeatureExtractor) -> None:
    # The same fine vertical stripes, once everywhere at half contrast, once in full contrast in broad horizontal bands.
    stripes = grating(0, 2 / 0.75).float() - 128
    bands = (torch.arange(32) // 4 % 2 == 0).float()[:, None]
    everywhere, banded = (128 + stripes / 2).to(torch.uint8), (128 + stripes * bands).to(torch.uint8)

    _, (_, even, _), _, _ = parts_of(scattering(everywhere))
    _, (_, changing, _), _, _ = parts_of(scattering(banded))

    vertical_stripes_then_horizontal_bands = 0 * NUM_ANGLES + 2
    assert changing.argmax() == vertical_stripes_then_horizontal_bands
    assert changing[0, vertical_stripes_then_horizontal_bands] > 2 * even.max()


def test_a_shift_by_one_pixel_moves_the_features_less_than_the_pixels(scattering: FeatureExtractor) -> None:
    images = fashion("val", 50)[0]
    shifted = functional.pad(images, (1, 0))[..., :-1]

    def relative_change(before: Tensor, after: Tensor) -> float:
        return float((before - after).norm() / (before - before.mean(dim=0)).norm())

    pixels = relative_change(images.float(), shifted.float())
    assert relative_change(scattering(images), scattering(shifted)) < 0.6 * pixels


def test_grey_images_have_no_colour_and_are_as_their_three_equal_channels(scattering: FeatureExtractor) -> None:
    grey, coloured = random_images(3, 1, 32, 32), random_images(3, 3, 32, 32)

    assert torch.equal(scattering(grey), scattering(grey.expand(-1, 3, -1, -1)))
    assert parts_of(scattering(grey))[3].abs().max() == 0
    assert parts_of(scattering(coloured))[3].abs().min() > 0


def test_a_change_of_hue_at_equal_brightness_is_seen(scattering: FeatureExtractor) -> None:
    red = torch.tensor([200, 50, 50], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)
    blue = torch.tensor([62, 87, 228], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)

    (_, _, red_means, red_colour), (_, _, blue_means, blue_colour) = (parts_of(scattering(x)) for x in (red, blue))

    assert (red_means - blue_means).abs().max() < 0.01
    assert (red_colour - blue_colour).abs().max() > 0.2


@pytest.mark.parametrize("resolution", [16, 32, 64, 128])
def test_the_dimension_is_as_stated_at_every_resolution(resolution: int) -> None:
    extractor = TypeAdapter(FeatureExtractorConfig).validate_python({"kind": "scattering", "resolution": resolution})
    extractor = extractor.build()

    features = extractor(random_images(1, 3, 48, 48))

    assert features.shape == (1, extractor.dimension)
    assert extractor.dimension < 600
    assert extractor.name == f"scattering-{resolution}"


def test_the_digest_tells_definitions_apart_and_is_the_same_every_time() -> None:
    digests = [ScatteringConfig(resolution=resolution).build().weights_sha256 for resolution in (16, 32, 64)]
    other_filters = ScatteringConfig().build()
    other_filters.wavelets[0] += 1e-3

    assert len({*digests, other_filters._definition_digest(ScatteringConfig())}) == 4
    assert ScatteringConfig().build().weights_sha256 == digests[1]
    assert re.fullmatch("[0-9a-f]{64}", digests[0])


# ---- what no extractor may depend on


class SeesTheBatchSize(FeatureExtractor):
    """As convolutions do in their last bits; here in the first, so that no lucky kernel hides it."""

    dimension, resolution, images_per_pass = 1, 4, 8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros(1))

    def extract(self, levels: Tensor) -> Tensor:
        return levels.mean(dim=(1, 2, 3))[:, None] + len(levels)


def test_an_images_features_are_the_same_bits_in_any_batch(scattering: FeatureExtractor) -> None:
    images = random_images(65, 3, 28, 28)

    together = scattering(images)

    assert torch.equal(scattering(images[:1]), together[:1])
    assert torch.equal(scattering(images[60:]), together[60:])
    assert torch.equal(scattering(images.flip(0)).flip(0), together)
    assert scattering(images[:0]).shape == (0, scattering.dimension)


def test_every_pass_has_the_same_batch_size() -> None:
    images = torch.full((19, 1, 4, 4), 100, dtype=torch.uint8)

    assert SeesTheBatchSize()(images).unique().tolist() == [108]


def test_features_are_the_same_bits_under_any_number_of_threads(scattering: FeatureExtractor) -> None:
    images, num_threads = random_images(64, 1, 28, 28), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        on_one = scattering(images)
        torch.set_num_threads(2)
        on_two = scattering(images)
    finally:
        torch.set_num_threads(num_threads)

    assert torch.equal(on_one, on_two)


def test_features_do_not_depend_on_a_surrounding_autocast_or_gradient_mode(scattering: FeatureExtractor) -> None:
    images = random_images(2, 3, 32, 32)

    with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
        inside = scattering(images)

    assert not inside.requires_grad
    assert torch.equal(inside, scattering(images))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_features_on_a_gpu_are_those_on_the_cpu_and_the_same_bits_every_time(scattering: FeatureExtractor) -> None:
    images = random_images(70, 3, 48, 48)
    on_gpu = ScatteringConfig().build().cuda()

    features = on_gpu(images.cuda())

    torch.testing.assert_close(features.cpu(), scattering(images), atol=1e-3, rtol=1e-3)
    assert torch.equal(on_gpu(images), features)
    assert torch.equal(on_gpu(images[:3]), features[:3])


def test_float_images_are_measured_as_the_file_that_holds_them(scattering: FeatureExtractor) -> None:
    images = random_images(2, 3, 32, 32)
    images[0, 0, 0, 0], images[0, 0, 0, 1] = 255, 0
    as_float = images / 127.5 - 1
    as_float += 0.4 / 127.5 * (random_images(2, 3, 32, 32, seed=1) / 127.5 - 1)  # less than half a level
    as_float[0, 0, 0, 0], as_float[0, 0, 0, 1] = 1.4, -3.0

    assert torch.equal(eight_bit(as_float), images)
    assert torch.equal(scattering(as_float), scattering(images))


def test_a_mirrored_image_has_mirrored_features(scattering: FeatureExtractor) -> None:
    images = random_images(2, 1, 32, 32)

    first, second, means, _ = parts_of(scattering(images))
    first_m, second_m, means_m, _ = parts_of(scattering(images.flip(3)))

    mirrored_angle = [0, 3, 2, 1]  # angles go round in steps of 45 degrees
    for part, part_m in zip(first, first_m, strict=True):
        expected = part.reshape(2, NUM_ANGLES, 4, 4)[:, mirrored_angle].flip(3)
        torch.testing.assert_close(part_m.reshape(2, NUM_ANGLES, 4, 4), expected, atol=1e-4, rtol=1e-4)
    for part, part_m in zip(second, second_m, strict=True):
        expected = part.reshape(2, NUM_ANGLES, NUM_ANGLES)[:, mirrored_angle][:, :, mirrored_angle]
        torch.testing.assert_close(part_m.reshape(2, NUM_ANGLES, NUM_ANGLES), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(means_m.reshape(2, 4, 4), means.reshape(2, 4, 4).flip(2), atol=1e-5, rtol=1e-5)


def test_resizing_keeps_what_is_coarse_and_averages_what_is_too_fine(scattering: FeatureExtractor) -> None:
    coarse = random_images(1, 1, 32, 32).float()
    coarse = functional.interpolate(coarse, scale_factor=1 / 8, mode="area")
    small, large = (
        functional.interpolate(coarse, size=(size, size), mode="bicubic").round().clamp(0, 255).to(torch.uint8)
        for size in (32, 128)
    )
    fine_noise = (random_images(1, 1, 128, 128) > 127).to(torch.uint8) * 255

    assert (scattering(large) - scattering(small)).abs().max() < 0.25
    (kept, *_), *_ = parts_of(scattering(fine_noise[:, :, ::4, ::4]))
    (averaged, *_), *_ = parts_of(scattering(fine_noise))
    assert math.expm1(averaged.mean()) < 0.4 * math.expm1(kept.mean())  # a quarter in theory: the mean of 16 pixels


def test_images_that_are_not_images_are_refused() -> None:
    extractor = ScatteringConfig().build()
    diverged = torch.zeros(3, 1, 32, 32)
    diverged[1, 0, 3, 4] = math.nan

    with pytest.raises(
        ValueError, match="1 of 3 images hold NaN or infinite values, the first is image 1 of its batch"
    ):
        extractor(diverged)
    with pytest.raises(ValueError, match=re.escape("with 1 or 3 channels, not of shape (2, 4, 32, 32)")):
        extractor(torch.zeros(2, 4, 32, 32))
    with pytest.raises(ValueError, match=re.escape("uint8 levels or float in [-1, 1], not torch.int64")):
        extractor(torch.zeros(2, 1, 32, 32, dtype=torch.int64))


# ---- what the features are good for, on real images


def fashion(split: str, count: int) -> tuple[Tensor, Tensor]:
    source = FashionMNISTConfig().open()
    samples = [source.read(split, index) for index in range(count)]  # type: ignore[arg-type]
    images = torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([sample.label for sample in samples])


@pytest.fixture(scope="module")
def garments(scattering: FeatureExtractor) -> dict[str, Tensor]:
    train, train_labels = fashion("train", 1500)
    val, val_labels = fashion("val", 500)
    return {
        "train": scattering(train),
        "train_labels": train_labels,
        "val_images": val,
        "val": scattering(val),
        "val_labels": val_labels,
    }


def test_a_linear_probe_on_scattering_names_most_garments(garments: dict[str, Tensor]) -> None:
    probe = LinearProbe.fit(garments["train"], garments["train_labels"], num_classes=10)

    assert probe.accuracy(garments["val"], garments["val_labels"]).value > 0.8


def blurred(images: Tensor, sigma: float) -> Tensor:
    offsets = torch.arange(-6, 7)
    window = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = torch.outer(window, window)[None, None] / window.sum() ** 2
    return functional.conv2d(functional.pad(images.float(), (6, 6, 6, 6)), kernel).round().to(torch.uint8)


def noisy(images: Tensor, deviation: float) -> Tensor:
    noise = np.random.default_rng(0).normal(0, deviation, tuple(images.shape))
    return (images + torch.from_numpy(noise)).clamp(0, 255).round().to(torch.uint8)


def without_classes(images: Tensor, num_missing: int) -> Tensor:
    kept = 10 - num_missing  # images go round the classes
    return torch.stack([images[index // 10 * 10 + index % kept] for index in range(len(images))])


def compressed(images: Tensor, quality: int) -> Tensor:
    decoded = []
    for image in images[:, 0].numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "jpeg", quality=quality)
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded))[:, None]


def shifted(images: Tensor, pixels: int) -> Tensor:
    return functional.pad(images, (pixels, 0, 0, 0))[..., : images.shape[-1]]


DAMAGES = {
    "blur": (blurred, (0.6, 1.1, 2.0)),
    "noise": (noisy, (3, 16, 64)),
    "jpeg": (compressed, (15, 6, 1)),
    "shift": (shifted, (1, 3, 5)),
    "missing classes": (without_classes, (1, 5, 9)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_figures_of_samples_move_with_every_step_of_damage(
    scattering: FeatureExtractor, garments: dict[str, Tensor], damage: str
) -> None:
    make, strengths = DAMAGES[damage]
    images, reference = garments["val_images"][:300], garments["train"][:500]
    damaged = [images, *(make(images, strength) for strength in strengths)]  # type: ignore[operator]
    features = [garments["val"][:300], *(scattering(each) for each in damaged[1:])]

    # Distances rise, and what they rise by is no chance; blocks of a JPEG are beneath the kernel distance's error.
    for distance in (frechet_distance, *([kernel_distance] if damage != "jpeg" else [])):
        estimates = [distance(each, reference) for each in features]
        values = [estimate.value for estimate in estimates]
        assert values == sorted(values)
        assert values[-1] - values[0] > 3 * (estimates[0].error + estimates[-1].error)

    # Strange images lie outside of the real ones, missing ones leave the real ones outside.
    found = [precision_recall(each, reference) for each in features]
    figure = "recall" if damage == "missing classes" else "precision"
    values = [getattr(estimates, figure).value for estimates in found]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.8 * values[0]

    # Image by image, where there is an image to compare with.
    if damage not in ("missing classes", "shift"):
        for fidelity in (psnr, ssim):
            means = [float(fidelity(each, images).mean()) for each in damaged]
            assert means == sorted(means, reverse=True)


def test_the_more_of_the_reference_is_copied_the_nearer_a_set_is_to_it(garments: dict[str, Tensor]) -> None:
    reference, fresh = garments["val"], garments["train"][:500]
    sets = [torch.cat([reference[:count], fresh[count:]]) for count in (0, 100, 200, 300, 400, 500)]

    values = [frechet_distance(each, reference).value for each in sets]
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-9
    assert kernel_distance(reference, reference).value < kernel_distance(fresh, reference).value
    found = [precision_recall(each, reference) for each in sets]
    for figure in ("precision", "recall"):
        values = [getattr(estimates, figure).value for estimates in found]
        assert values == sorted(values)
        assert values[-1] == 1


def test_real_training_images_score_the_bias_floor_within_its_interval(garments: dict[str, Tensor]) -> None:
    """Three sets of 500 training images, two as the floor of the other; the floor of an unbiased one is zero."""
    reference, sets = garments["val"], garments["train"].split(500)
    found = [precision_recall(each, reference) for each in sets]
    figures = {
        "frechet_distance": [frechet_distance(each, reference) for each in sets],
        "kernel_distance": [kernel_distance(each, reference) for each in sets],
        "precision": [each.precision for each in found],
        "recall": [each.recall for each in found],
    }
    for name, estimates in figures.items():
        for one, other in itertools.combinations(estimates, 2):
            assert abs(one.value - other.value) <= 1.96 * math.hypot(one.error, other.error), name
    assert all(estimate.value > 3 * estimate.error for estimate in figures["frechet_distance"])
    assert all(abs(estimate.value) <= 1.96 * estimate.error for estimate in figures["kernel_distance"])
