"""PSNR, SSIM and the linear probe: against closed forms and independent implementations."""

import math
import re

import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize
import torch
from torch import Tensor

from models.metrics.fidelity import psnr, ssim
from models.metrics.probe import LinearProbe


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ---- reconstructions


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_psnr_of_a_constant_error_has_its_closed_form_for_each_image() -> None:
    reference = random_images(3, 1, 8, 8) // 2
    images = reference + torch.tensor([1, 10, 100], dtype=torch.uint8)[:, None, None, None]

    expected = torch.tensor([20 * math.log10(255 / error) for error in (1, 10, 100)], dtype=torch.float64)
    torch.testing.assert_close(psnr(images, reference), expected, rtol=1e-12, atol=0)


def test_psnr_of_equal_images_is_that_of_rounding_to_eight_bits() -> None:
    images = random_images(2, 3, 8, 8)

    assert psnr(images, images).tolist() == pytest.approx([10 * math.log10(255**2 * 12)] * 2)


@pytest.mark.parametrize("figure", [psnr, ssim])
def test_float_images_are_measured_like_their_eight_bit_levels_and_clamped(figure: object) -> None:
    images, reference = random_images(2, 3, 16, 16), random_images(2, 3, 16, 16, seed=1)
    images[0, 0, 0, 0] = 255
    as_float = images / 127.5 - 1
    as_float[0, 0, 0, 0] = 1.7  # a decoder's overshoot, which no file can hold

    measured = figure(as_float, reference / 127.5 - 1)  # type: ignore[operator]

    torch.testing.assert_close(measured, figure(images, reference), rtol=1e-6, atol=1e-7)  # type: ignore[operator]


def test_ssim_agrees_with_an_independent_implementation() -> None:
    reference = random_images(2, 3, 24, 17)
    images = (reference.double() * 0.7 + random_images(2, 3, 24, 17, seed=1).double() * 0.3).round().to(torch.uint8)

    expected = []
    for image, other in zip(images.double().numpy(), reference.double().numpy(), strict=True):
        channels = []
        for x, y in zip(image, other, strict=True):

            def mean(a: np.ndarray) -> np.ndarray:
                return scipy.ndimage.gaussian_filter(a, sigma=1.5, radius=5)[5:-5, 5:-5]

            ux, uy = mean(x), mean(y)
            vx, vy, vxy = mean(x * x) - ux**2, mean(y * y) - uy**2, mean(x * y) - ux * uy
            c1, c2 = 6.5025, 58.5225
            channels.append(((2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))).mean())
        expected.append(np.mean(channels))
    torch.testing.assert_close(ssim(images, reference), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=0)


def test_ssim_is_one_for_equal_images_only() -> None:
    images = random_images(1, 1, 16, 16)
    changed = images.clone()
    changed[0, 0, 8, 8] ^= 1

    assert ssim(images, images).item() == pytest.approx(1, abs=1e-12)
    assert ssim(changed, images).item() < 1 - 1e-9


def test_images_of_unequal_shape_or_below_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("images (2, 1, 8, 8) and reference (2, 3, 8, 8)")):
        psnr(random_images(2, 1, 8, 8), random_images(2, 3, 8, 8))
    with pytest.raises(ValueError, match="11x11 windows; images of 16x10 are smaller"):
        ssim(random_images(1, 1, 16, 10), random_images(1, 1, 16, 10))


# ---- linear probe


def labelled_features(num_samples: int = 90, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(num_samples) % 3
    centres = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    return normals(num_samples, 4, seed=seed) + 1.5 * centres[labels], labels


def test_the_probe_is_at_the_minimum_of_its_loss() -> None:
    features, labels = labelled_features()
    inputs = ((features - features.mean(0)) / features.std(0)).numpy()
    one_hot = np.eye(3)[labels.numpy()]

    def loss(flat: np.ndarray) -> float:
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = inputs @ weight.T + bias
        log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return -(one_hot * log_probabilities).sum(axis=1).mean() + 0.05 / 2 * (weight**2).sum()

    probe = LinearProbe.fit(features, labels, num_classes=3, l2=0.05)

    oracle = scipy.optimize.minimize(loss, np.zeros(15), method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(probe.weight.numpy(), oracle.x[:12].reshape(3, 4), atol=1e-4)
    np.testing.assert_allclose(
        (probe.bias - probe.bias.mean()).numpy(), oracle.x[12:] - oracle.x[12:].mean(), atol=1e-4
    )


def test_the_probe_does_not_depend_on_the_units_of_the_features() -> None:
    features, labels = labelled_features()
    other_units = features * torch.tensor([1e-3, 1.0, 50.0, 1e4]) + torch.tensor([0.0, 10.0, -3.0, 1e3])
    new, _ = labelled_features(seed=1)
    new_other_units = new * torch.tensor([1e-3, 1.0, 50.0, 1e4]) + torch.tensor([0.0, 10.0, -3.0, 1e3])

    predicted = LinearProbe.fit(features, labels, num_classes=3).predict(new)

    assert torch.equal(LinearProbe.fit(other_units, labels, num_classes=3).predict(new_other_units), predicted)


def test_a_feature_that_never_varied_is_ignored_by_the_probe() -> None:
    features, labels = labelled_features()
    with_constant = torch.cat([features, torch.full((90, 1), 0.1, dtype=torch.float64)], dim=1)
    probe = LinearProbe.fit(with_constant, labels, num_classes=3)
    new, _ = labelled_features(seed=1)

    predicted = probe.predict(torch.cat([new, torch.full((90, 1), 7.0, dtype=torch.float64)], dim=1))

    assert torch.equal(predicted, LinearProbe.fit(features, labels, num_classes=3).predict(new))


def test_the_accuracy_of_the_probe_is_counted_on_new_samples_with_its_binomial_error() -> None:
    probe = LinearProbe.fit(*labelled_features(300), num_classes=3)
    new, labels = labelled_features(300, seed=1)

    accuracy = probe.accuracy(new, labels)

    right = int((probe.predict(new) == labels).sum())
    assert accuracy.value == right / 300
    assert 0.6 < accuracy.value < 0.95  # classes overlap: the Bayes classifier is right in 0.83
    assert accuracy.error == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 299))


def test_the_error_of_the_probes_accuracy_covers_its_accuracy_on_very_many_samples() -> None:
    probe = LinearProbe.fit(*labelled_features(300), num_classes=3)
    truth = probe.accuracy(*labelled_features(200_000, seed=1)).value

    found = np.array([probe.accuracy(*labelled_features(300, seed=seed)) for seed in range(2, 202)])

    assert 0.9 <= (np.abs(found[:, 0] - truth) <= 1.96 * found[:, 1]).mean() <= 0.98


def test_mistakes_in_the_probes_data_are_named() -> None:
    features, labels = labelled_features()

    with pytest.raises(ValueError, match=r"No sample of class 3 to fit a probe on \(of 4 classes\)"):
        LinearProbe.fit(features, labels, num_classes=4)
    with pytest.raises(ValueError, match=r"Labels run from 0 to 2, but must be in 0\.\.1"):
        LinearProbe.fit(features, labels, num_classes=2)
    with pytest.raises(ValueError, match=re.escape("90 samples need labels of shape (90,), not (89,)")):
        LinearProbe.fit(features, labels[1:], num_classes=3)
    with pytest.raises(ValueError, match=r"fitted on 4 features, but these have 3\. Use the same extractor"):
        LinearProbe.fit(features, labels, num_classes=3).predict(features[:, :3])
