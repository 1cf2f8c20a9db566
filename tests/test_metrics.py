"""Distances of feature sets, precision and recall: against closed forms and independent implementations."""

import math
import re
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.metrics.estimate import Estimate, mean_estimate, worst_fraction
from models.metrics.frechet import Gaussian, Transport, frechet_at_infinity, frechet_distance
from models.metrics.kernel import kernel_distance
from models.metrics.neighbours import nearest, precision_recall
from models.metrics.probe import LinearProbe


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def random_covariance(dimension: int, *, seed: int) -> Tensor:
    root = normals(dimension, 2 * dimension, seed=seed)
    return root @ root.T / dimension


def random_gaussian(dimension: int, *, seed: int) -> tuple[Tensor, Tensor]:
    return normals(dimension, seed=seed), random_covariance(dimension, seed=seed + 1000)


def share_covered(estimates: Iterable[Estimate], truth: float | None = None) -> float:
    """Share of the 95 % intervals that hold ``truth``, or else the mean over all repetitions: the truth at this count.

    Of 200 repetitions it is known to 1.5 %, so that 90 to 98 % is right.
    """
    values, errors = np.array(list(estimates)).T
    return float((np.abs(values - (values.mean() if truth is None else truth)) <= 1.96 * errors).mean())


def gaussian_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    return Transport.between(Gaussian(mean1, covariance1), Gaussian(mean2, covariance2)).distance


# ---- Gaussian statistics


def test_statistics_are_the_mean_and_the_unbiased_covariance_over_the_samples() -> None:
    features = normals(40, 7) * 3 + 5

    statistics = Gaussian.of(features)

    torch.testing.assert_close(statistics.mean, features.mean(dim=0))
    torch.testing.assert_close(statistics.covariance, torch.from_numpy(np.cov(features.numpy(), rowvar=False)))


def test_the_covariance_of_one_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="features: 1 samples are too few, this metric needs at least 2"):
        Gaussian.of(normals(1, 3))


# ---- Frechet distance


def test_the_frechet_distance_of_axis_aligned_gaussians_has_its_closed_form() -> None:
    mean1, mean2 = normals(9, seed=1), normals(9, seed=2)
    variance1, variance2 = normals(9, seed=3).square(), normals(9, seed=4).square()

    distance = gaussian_distance(mean1, variance1.diag(), mean2, variance2.diag())

    closed_form = (mean1 - mean2).square().sum() + (variance1.sqrt() - variance2.sqrt()).square().sum()
    assert distance == pytest.approx(float(closed_form), rel=1e-13)


def test_the_frechet_distance_agrees_with_the_matrix_root_of_the_product() -> None:
    (mean1, covariance1), (mean2, covariance2) = random_gaussian(30, seed=5), random_gaussian(30, seed=6)

    distance = gaussian_distance(mean1, covariance1, mean2, covariance2)

    root = scipy.linalg.sqrtm((covariance1 @ covariance2).numpy())
    expected = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * np.trace(root).real
    assert distance == pytest.approx(float(expected), rel=1e-11)


def test_the_frechet_distance_agrees_with_the_matrix_root_of_fewer_samples_than_features() -> None:
    features, reference = normals(20, 40, seed=7) + 0.3, 1.5 * normals(25, 40, seed=8)
    ours, theirs = Gaussian.of(features), Gaussian.of(reference)

    # The root of a symmetric matrix: the product of two singular covariances may have none.
    root = scipy.linalg.sqrtm(ours.covariance.numpy()).real
    of_product = scipy.linalg.sqrtm(root @ theirs.covariance.numpy() @ root).real
    shift = (ours.mean - theirs.mean).square().sum()
    expected = shift + ours.covariance.trace() + theirs.covariance.trace() - 2 * np.trace(of_product)
    assert frechet_distance(features, reference).value == pytest.approx(float(expected), rel=1e-6)


def test_the_frechet_distance_of_a_set_to_itself_is_zero_with_fewer_samples_than_features() -> None:
    features = normals(20, 64)

    assert frechet_distance(features, features).value < 1e-11


def test_the_frechet_distance_of_gaussians_on_different_lines_is_the_sum_of_their_variances() -> None:
    # Both covariances are singular, and so is their product: its matrix root does not exist as a power series.
    origin, along_x, along_y = (
        torch.zeros(3),
        torch.diag(torch.tensor([4.0, 0, 0])),
        torch.diag(torch.tensor([0, 9.0, 0])),
    )

    assert gaussian_distance(origin, along_x, origin, along_y) == pytest.approx(13, rel=1e-14)


def test_the_frechet_distance_keeps_its_digits_over_sixteen_orders_of_variance() -> None:
    variance1, variance2 = 10.0 ** torch.arange(-8, 8, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    rotation = torch.linalg.qr(normals(16, 16)).Q
    origin = torch.zeros(16)

    distance = gaussian_distance(
        origin, rotation @ variance1.diag() @ rotation.T, origin, rotation @ variance2.diag() @ rotation.T
    )

    assert distance == pytest.approx(float((variance1.sqrt() - 1).square().sum()), rel=1e-9)


def test_features_in_a_subspace_have_the_distance_and_the_error_of_that_subspace() -> None:
    features, reference = normals(50, 4) + 0.5, 2 * normals(70, 4, seed=1)
    embedding = torch.linalg.qr(normals(64, 4, seed=2)).Q.T  # (4 64) orthonormal rows; covariances become singular

    estimate = frechet_distance(features, reference)

    assert frechet_distance(features @ embedding, reference @ embedding) == pytest.approx(estimate, rel=1e-11)


def test_the_distance_of_sets_without_variety_is_that_of_their_means() -> None:
    assert frechet_distance(torch.full((3, 2), 1.5), torch.full((4, 2), -0.5)) == (8, 0)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_root_of_the_frechet_distance_is_a_metric(seed: int) -> None:
    first, second, third = (random_gaussian(4, seed=3 * seed + index) for index in range(3))

    def distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
        return math.sqrt(gaussian_distance(*a, *b))

    assert distance(first, second) == pytest.approx(distance(second, first), rel=1e-12)
    assert distance(first, third) <= distance(first, second) + distance(second, third) + 1e-12


def test_a_covariance_that_is_not_positive_is_refused_with_its_eigenvalue() -> None:
    with pytest.raises(ValueError, match=r"eigenvalue -0\.5 beside a largest of 1; none may be negative"):
        gaussian_distance(torch.zeros(2), torch.diag(torch.tensor([1.0, -0.5])), torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_error_of_the_frechet_distance_is_its_spread_over_repeated_draws(shift: float) -> None:
    scale = torch.tensor([2.0, 1.0, 0.7, 0.5])
    draws = [
        frechet_distance(normals(300, 4, seed=2 * i) * scale + shift, normals(200, 4, seed=2 * i + 1))
        for i in range(200)
    ]

    assert 0.9 <= share_covered(draws) <= 0.98
    spread = torch.tensor([draw.value for draw in draws]).std()
    stated = torch.tensor([draw.error for draw in draws]).mean()
    assert 0.85 < float(stated / spread) < 1.2  # the spread of 200 draws is itself known to 5 %


def test_the_extrapolated_distance_has_no_bias_and_a_true_error() -> None:
    """Features of which a half has twice as many images; the plain distance is off by many of these errors."""
    scale, truth = torch.linspace(2.0, 0.3, 30), 0.0
    mean, wider = torch.full((30,), 0.3).double(), 1.1 * scale.double()
    truth = gaussian_distance(mean, wider.square().diag(), torch.zeros(30).double(), scale.double().square().diag())
    pairs = [
        (normals(120, 30, seed=2 * n) * wider + mean, normals(200, 30, seed=2 * n + 1) * scale) for n in range(200)
    ]

    found = np.array([frechet_at_infinity(*pair) for pair in pairs])

    assert 0.9 <= share_covered(found, truth) <= 0.98
    assert abs(found[:, 0].mean() - truth) < found[:, 1].mean()
    assert frechet_distance(*pairs[0]).value - truth > 5 * found[:, 1].mean()


@pytest.mark.soak  # half a minute of linear algebra
def test_the_frechet_distance_of_shifted_gaussians_in_2048_dimensions_is_2048() -> None:
    """From given moments; samples have the bias of their count besides, which is O(d / n)."""
    covariance = torch.eye(2048, dtype=torch.float64)
    zeros, ones = torch.zeros(2048, dtype=torch.float64), torch.ones(2048, dtype=torch.float64)
    assert gaussian_distance(zeros, covariance, ones, covariance) == pytest.approx(2048)


@pytest.mark.parametrize(
    ("num_samples", "dimension"),
    [(4_000, 64), pytest.param(50_000, 2048, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])],
)
def test_the_frechet_distance_of_samples_has_the_stated_bias(num_samples: int, dimension: int) -> None:
    """Minutes of linear algebra for 50,000 samples of 2,048 features: 2,048 and a bias of 42."""
    features, reference = normals(num_samples, dimension), normals(num_samples, dimension, seed=1)
    features += 1

    found = frechet_distance(features, reference)

    bias = (dimension * (dimension + 1) / 4 + dimension) * 2 / num_samples
    assert abs(found.value - (dimension + bias)) <= 1.96 * found.error
    assert bias > found.error


# ---- kernel distance


def kernel_distance_by_definition(features: np.ndarray, reference: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(features), len(reference)
    within = sum(kernel(features[i], features[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_ref = sum(kernel(reference[i], reference[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    across = sum(kernel(x, y) for x in features for y in reference) / (n * m)
    return within + within_ref - 2 * across


def test_the_kernel_distance_and_its_error_agree_with_their_definitions() -> None:
    features, reference = normals(9, 4).numpy() + 0.5, normals(7, 4, seed=1).numpy()

    distance = kernel_distance(torch.from_numpy(features), torch.from_numpy(reference))

    assert distance.value == pytest.approx(kernel_distance_by_definition(features, reference), rel=1e-12)
    variance = 0.0
    for part, count in (("features", 9), ("reference", 7)):
        without_one = [
            kernel_distance_by_definition(np.delete(features, i, 0), reference)
            if part == "features"
            else kernel_distance_by_definition(features, np.delete(reference, i, 0))
            for i in range(count)
        ]
        variance += (count - 1) * float(np.var(without_one))
    assert distance.error == pytest.approx(math.sqrt(variance), rel=1e-10)


def repeated_kernel_distances(*, shift: float) -> tuple[Tensor, float]:
    draws = [kernel_distance(normals(200, 3, seed=2 * i) + shift, normals(250, 3, seed=2 * i + 1)) for i in range(200)]
    assert 0.9 <= share_covered(draws) <= 0.98
    return torch.tensor([draw.value for draw in draws]), float(torch.tensor([draw.error for draw in draws]).mean())


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average_with_a_cautious_error() -> None:
    values, stated = repeated_kernel_distances(shift=0)

    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(200)
    assert 1.0 < stated / float(values.std()) < 1.6


def test_the_error_of_the_kernel_distance_is_its_spread_over_repeated_draws() -> None:
    values, stated = repeated_kernel_distances(shift=1)

    assert 0.85 < stated / float(values.std()) < 1.2


def test_blocks_of_rows_do_not_change_the_kernel_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    features, reference = normals(50, 6), normals(33, 6, seed=1)
    whole = kernel_distance(features, reference)

    monkeypatch.setattr("models.metrics.kernel._ROWS_PER_BLOCK", 7)

    assert kernel_distance(features, reference) == pytest.approx(whole, rel=1e-12)


# ---- exchanged sets


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance])
def test_distances_and_their_errors_are_the_same_in_both_directions(metric: object) -> None:
    features, reference = normals(60, 5) * 1.2 + 0.4, normals(80, 5, seed=1)

    assert metric(features, reference) == pytest.approx(metric(reference, features), rel=1e-10)  # type: ignore[operator]


def test_exchanged_sets_exchange_precision_and_recall() -> None:
    features, reference = normals(60, 5) * 1.2 + 0.4, normals(80, 5, seed=1)

    there, back = precision_recall(features, reference), precision_recall(reference, features)

    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert there.precision.value < there.recall.value


# ---- precision and recall


def test_precision_and_recall_agree_with_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    features, reference = normals(40, 3).numpy() * 1.5, normals(30, 3, seed=1).numpy() + np.array([2.0, 0, 0])

    def fraction_inside(points: np.ndarray, manifold: np.ndarray) -> float:
        inside = 0
        for point in points:
            for i, centre in enumerate(manifold):
                others = np.delete(manifold, i, axis=0)
                radius = np.sort(np.linalg.norm(others - centre, axis=1))[2]
                if np.linalg.norm(point - centre) <= radius:
                    inside += 1
                    break
        return inside / len(points)

    monkeypatch.setattr("models.metrics.neighbours._ROWS_PER_BLOCK", 7)
    precision, recall = precision_recall(torch.from_numpy(features), torch.from_numpy(reference))

    assert precision.value == pytest.approx(fraction_inside(features, reference))
    assert recall.value == pytest.approx(fraction_inside(reference, features))
    assert 0 < precision.value < recall.value < 1  # so that the two cannot be exchanged unnoticed
    assert precision.error > math.sqrt(precision.value * (1 - precision.value) / 40)


@pytest.mark.parametrize(
    ("num_points", "shift"),
    [(200, 0.3), *(pytest.param(*case, marks=pytest.mark.soak) for case in [(400, 0.5), (300, 0.8), (100, -0.6)])],
)
def test_the_errors_of_precision_and_recall_cover_both_sets(num_points: int, shift: float) -> None:
    """Binomial errors alone cover 55 % of the second of these cases."""
    pairs = [
        precision_recall(normals(num_points, 8, seed=2 * n) + shift, normals(120, 8, seed=2 * n + 1))
        for n in range(200)
    ]
    for estimates in zip(*pairs, strict=True):
        assert 0.9 <= share_covered(estimates) <= 0.98


@pytest.mark.parametrize(
    ("rates", "total"),
    [
        ([0.9] * 10, 100),
        ([0.7] * 10, 50),
        ([0.6, *[0.9] * 9], 50),
        ([0.5, 0.95, 0.95], 60),
        ([*np.linspace(0.7, 0.95, 10)], 50),
        ([0.8], 100),
    ],
)
def test_the_error_of_the_worst_of_several_fractions_covers_the_worst_rate(rates: list[float], total: int) -> None:
    draws = np.random.default_rng(1).binomial(total, rates, size=(400, len(rates)))
    estimates = [worst_fraction(row, [total] * len(rates), draws=500) for row in draws]
    np.testing.assert_allclose([estimate.value for estimate in estimates], draws.min(axis=1) / total)
    assert 0.9 <= share_covered(estimates, min(rates)) <= 0.98


def test_where_all_of_few_succeed_the_worst_fraction_is_not_certain() -> None:
    assert worst_fraction([50] * 4, [50] * 4) == (1, pytest.approx(0.008, rel=0.2))


def test_equal_sets_have_full_precision_and_recall_even_when_every_image_is_there_many_times() -> None:
    features = normals(5, 16).repeat_interleave(6, dim=0) * 1e3 + 1e4  # all radii are exactly zero

    precision, recall = precision_recall(features, features.flip(0))

    assert (precision.value, recall.value) == (1, 1)


def test_missing_modes_lower_the_recall_and_strange_samples_the_precision() -> None:
    modes = torch.eye(4).repeat_interleave(25, dim=0) * 100
    reference = modes + normals(100, 4)
    two_modes = torch.cat([reference[:50], reference[:50]]) + 0.05 * normals(100, 4, seed=1)
    half_strange = torch.cat([reference[:50] - 500, reference[50:]]) + 0.05 * normals(100, 4, seed=2)

    assert precision_recall(two_modes, reference).precision.value > 0.95
    assert precision_recall(two_modes, reference).recall.value <= 0.5
    assert precision_recall(half_strange, reference).precision.value <= 0.5


def test_too_few_samples_for_the_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="reference features: 3 samples are too few, this metric needs at least 4"):
        precision_recall(normals(9, 2), normals(3, 2))
    with pytest.raises(ValueError, match="num_neighbours = 0 must be at least 1"):
        precision_recall(normals(9, 2), normals(9, 2), num_neighbours=0)


def test_the_nearest_neighbour_is_the_one_that_all_distances_show() -> None:
    features, reference = normals(40, 5), normals(70, 5, seed=1)
    features[3] = reference[11]
    whole = np.linalg.norm(features.numpy()[:, None] - reference.numpy(), axis=2)

    found = nearest(features, reference)

    np.testing.assert_array_equal(found.indices, whole.argmin(axis=1))
    np.testing.assert_allclose(found.distances, whole.min(axis=1), atol=1e-12)
    assert found.distances[3] == 0


# ---- influences of single images


@pytest.mark.parametrize(
    ("metric", "part", "agreement"),
    [
        (frechet_distance, "samples", 0.99),
        (frechet_distance, "reference", 0.99),
        (kernel_distance, "samples", 0.9999),
        (kernel_distance, "reference", 0.9999),
        (lambda *sets: precision_recall(*sets).precision, "samples", 0.9999),
        (lambda *sets: precision_recall(*sets).recall, "reference", 0.9999),
        (lambda first, _: mean_estimate(first[:, 0]), "samples", 0.9999),
    ],
)
def test_an_image_s_influence_is_what_leaving_it_out_changes(
    metric: Callable[..., Estimate], part: str, agreement: float
) -> None:
    sets = {"samples": normals(80, 3) + 1.0, "reference": normals(60, 3, seed=1)}
    whole, count = metric(*sets.values()), len(sets[part])

    without = [
        metric(*(each[torch.arange(len(each)) != left_out] if name == part else each for name, each in sets.items()))
        for left_out in range(count)
    ]

    changes = np.array([(count - 1) * (whole.value - estimate.value) for estimate in without])
    influences = whole.influences[part].numpy()
    assert np.corrcoef(changes, influences)[0, 1] >= agreement
    assert np.std(changes) == pytest.approx(np.std(influences), rel=0.03)
    assert whole.error**2 >= np.var(influences, ddof=1) / count * (1 - 1e-9)


# ---- what all metrics on features promise


def all_metrics(features: Tensor, reference: Tensor, labels: Tensor) -> list[float]:
    probe = LinearProbe.fit(features, labels, num_classes=3)
    return [
        *frechet_distance(features, reference),
        *kernel_distance(features, reference),
        *(figure for estimate in precision_recall(features, reference) for figure in estimate),
        *probe.accuracy(reference, labels),
        *probe.weight.flatten().tolist(),
    ]


def test_metrics_are_the_same_bits_under_any_number_of_threads() -> None:
    features, reference = normals(1200, 130).float(), normals(1200, 130, seed=1).float() * 1.1
    labels = torch.arange(1200) % 3
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        on_one = all_metrics(features, reference, labels)
        torch.set_num_threads(2)
        on_two = all_metrics(features, reference, labels)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)

    assert on_one == on_two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_metrics_on_a_gpu_are_those_on_the_processor() -> None:
    features, reference = normals(600, 40), normals(500, 40, seed=1) * 1.1
    labels = torch.arange(500) % 3
    here = all_metrics(features[:500], reference, labels)
    there = all_metrics(features[:500].cuda(), reference.cuda(), labels)
    np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(
        nearest(features.cuda(), reference.cuda()).indices.cpu(), nearest(features, reference).indices
    )


def test_a_metric_that_fails_leaves_the_number_of_threads_as_it_was() -> None:
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="too few"):
            frechet_distance(normals(1, 2), normals(9, 2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_features_that_are_not_finite_are_refused_with_their_row(metric: object) -> None:
    broken = normals(9, 3)
    broken[4, 1], broken[6, 0] = math.nan, math.inf

    with pytest.raises(ValueError, match="features: 2 of 9 rows hold NaN or infinite values, the first is row 4"):
        metric(broken, normals(9, 3))  # type: ignore[operator]


@pytest.mark.parametrize("metric", [frechet_distance, kernel_distance, precision_recall])
def test_features_of_two_extractors_are_refused(metric: object) -> None:
    with pytest.raises(ValueError, match=r"features have dimension 3, but reference features have 5.*same extractor"):
        metric(normals(9, 3), normals(9, 5))  # type: ignore[operator]


def test_features_that_are_no_table_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("(samples, features), not of shape (4, 3, 2)")):
        Gaussian.of(normals(4, 3, 2))


def test_a_mean_comes_with_the_deviation_of_means() -> None:
    draws = [mean_estimate(normals(25, seed=i)) for i in range(300)]

    assert torch.tensor([draw.value for draw in draws]).std() == pytest.approx(0.2, rel=0.15)
    assert torch.tensor([draw.error for draw in draws]).mean() == pytest.approx(0.2, rel=0.05)
    with pytest.raises(ValueError, match=re.escape("at least 2 values in one dimension, not shape (1,)")):
        mean_estimate(torch.ones(1))
