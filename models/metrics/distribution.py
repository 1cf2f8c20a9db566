"""Distances between a set of generated images and a set of real ones, by their features.

The Frechet distance compares mean and covariance, the kernel distance compares all moments up to the third without
bias, precision and recall separate fidelity from variety. All work in float64 on the CPU, draw nothing at random and
give the same bits under any number of threads. Letters: n samples, m reference samples, d features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.metrics.estimate import Estimate, checked_features, checked_pair, on_one_thread

_NUM_CUTS = 10  # of a manifold into halves
_ROWS_PER_BLOCK = 1024  # bounds memory: a block of kernel values or distances is (1024 m) float64


class Gaussian(NamedTuple):
    """A Gaussian over features."""

    mean: Tensor  # (d,) float64
    covariance: Tensor  # (d d) float64, symmetric and positive semi-definite up to rounding

    @classmethod
    @on_one_thread
    def of(cls, features: Tensor) -> "Gaussian":
        """Fit to ``features`` (n d): sample mean and unbiased covariance.

        Raises:
            ValueError: Fewer than 2 rows, NaN or infinite values.
        """
        features = checked_features(features, name="features", min_samples=2)
        mean = features.mean(dim=0)
        centred = features - mean
        return cls(mean, centred.T @ centred / (len(features) - 1))


class Transport(NamedTuple):
    """Optimal transport between two Gaussians with covariances ``S1 S1^T`` and ``S2 S2^T``."""

    distance: float  # squared Frechet (2-Wasserstein) distance, >= 0, in squared feature units
    roots: tuple["_Root", "_Root"]  # S1 and S2
    axes: tuple[Tensor, Tensor]  # singular vectors of S1^T S2, left and right; (d d)
    singular: Tensor  # its singular values; (d,)

    @classmethod
    @on_one_thread
    def between(cls, first: Gaussian, second: Gaussian) -> "Transport":
        """Compute the transport from ``first`` to ``second``.

        Heusel et al. 2017 (arXiv:1706.08500), eq. 6: ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``. With roots
        ``C = S S^T`` by symmetric eigen-decomposition, the trace of the matrix root is the sum of the singular values
        of ``S1^T S2``. No root of a non-symmetric matrix is taken, and nothing is squared that is rooted afterwards, so
        singular covariances (fewer samples than features) keep their digits.

        Raises:
            ValueError: A covariance is clearly not positive semi-definite.
        """
        root1, root2 = _Root.of(first.covariance), _Root.of(second.covariance)
        left, singular, right_t = torch.linalg.svd(root1.matrix.T @ root2.matrix)
        shift = first.mean.detach().to("cpu", torch.float64) - second.mean.detach().to("cpu", torch.float64)
        # Rounding can leave -1e-16 for equal Gaussians; a distance is not negative.
        distance = max(0.0, float(shift.square().sum()) + root1.trace + root2.trace - 2 * float(singular.sum()))
        return cls(distance, (root1, root2), (left, right_t.T), singular)


@on_one_thread
def frechet_distance(features: Tensor, reference: Tensor) -> Estimate:
    """Frechet distance between the Gaussians fitted to two feature tables, with its standard error.

    The value is ``Transport.distance`` between the sample means and unbiased covariances; it is biased upwards
    by O(d / n), so compare only values of equal sample counts. The error is the infinitesimal jackknife (delta method):
    the deviation of each sample's influence on the distance, which for ``x`` of the first set is, with ``T`` the
    optimal transport map from the first Gaussian to the second,
    ``2 (m1 - m2)^T (x - m1) + (x - m1)^T (I - T) (x - m1)``; and likewise for the second set.

    Args:
        features: (n d), any floating dtype.
        reference: (m d).

    Raises:
        ValueError: Fewer than 2 rows, unequal dimensions, NaN or infinite values.
    """
    features, reference = checked_pair(features, reference)
    first, second = Gaussian.of(features), Gaussian.of(reference)
    transport = Transport.between(first, second)
    shift = first.mean - second.mean
    variance = 0.0
    for sample, mean, root, axes, direction in zip(
        (features, reference), (first.mean, second.mean), transport.roots, transport.axes, (shift, -shift), strict=True
    ):
        centred = sample - mean
        transported = (centred @ root.inverse.T @ axes).square() @ transport.singular  # (x - m)^T T (x - m)
        influence = 2 * (centred @ direction) + centred.square().sum(dim=1) - transported
        variance += float(influence.var()) / len(sample)
    return Estimate(transport.distance, math.sqrt(variance))


class _Root(NamedTuple):
    """A root S of a covariance C = S S^T, with the pseudo-inverse of S and the trace of C."""

    matrix: Tensor
    inverse: Tensor
    trace: float

    @classmethod
    def of(cls, covariance: Tensor) -> "_Root":
        covariance = covariance.detach().to("cpu", torch.float64)
        eigenvalues, eigenvectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        # What an eigenvalue of zero is computed as: its root (1e-8) would otherwise outweigh all other rounding.
        rounding = float(eigenvalues.abs().max()) * len(eigenvalues) * torch.finfo(torch.float64).eps
        if float(eigenvalues.min()) < -1e3 * max(rounding, torch.finfo(torch.float64).tiny):
            raise ValueError(
                f"A covariance has the eigenvalue {float(eigenvalues.min()):.3g} beside a largest of "
                f"{float(eigenvalues.max()):.3g}; none may be negative. Compute it in float64 from centred features."
            )
        kept = eigenvalues > rounding
        scale = eigenvalues.clamp_min(0).sqrt() * kept
        inverse_scale = torch.where(kept, scale, 1.0).reciprocal() * kept
        return cls(
            matrix=eigenvectors * scale,
            inverse=(eigenvectors * inverse_scale).T,
            trace=float(scale.square().sum()),
        )


@on_one_thread
def kernel_distance(features: Tensor, reference: Tensor) -> Estimate:
    """Kernel distance (KID): the squared maximum mean discrepancy under a cubic polynomial kernel, without bias.

    Binkowski et al. 2018 (arXiv:1801.01401), section 4: ``k(x, y) = (x . y / d + 1)^3`` with the unbiased U-statistic
    over all pairs (not over random subsets, whose mean it is), so values of different sample counts compare and small
    negative values are normal. The error is the delete-one jackknife of both sets, exact from the kernel's row sums
    (Arvesen 1969 for U-statistics of two samples); where both sets come from one distribution it is cautious, up to a
    root of two too large.

    Args:
        features: (n d), n >= 3.
        reference: (m d), m >= 3.

    Raises:
        ValueError: Fewer than 3 rows, unequal dimensions, NaN or infinite values.
    """
    features, reference = checked_pair(features, reference, min_samples=3)
    n, m = len(features), len(reference)
    within = _kernel_row_sums(features, features) - _cubic_kernel_diagonal(features)  # (n,) without the own pair
    within_ref = _kernel_row_sums(reference, reference) - _cubic_kernel_diagonal(reference)  # (m,)
    across, across_ref = _kernel_row_sums(features, reference), _kernel_row_sums(reference, features)  # (n,), (m,)

    mean_within = within.sum() / (n * (n - 1))
    mean_within_ref = within_ref.sum() / (m * (m - 1))
    value = mean_within + mean_within_ref - 2 * across.sum() / (n * m)

    variance = 0.0
    for own, other, mean_other, count, count_other in (
        (within, across, mean_within_ref, n, m),
        (within_ref, across_ref, mean_within, m, n),
    ):
        without_one = (
            (own.sum() - 2 * own) / ((count - 1) * (count - 2))
            + mean_other
            - 2 * (other.sum() - other) / ((count - 1) * count_other)
        )
        variance += float(without_one.var(correction=0)) * (count - 1)
    return Estimate(float(value), math.sqrt(variance))


def _kernel_row_sums(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum of the cubic kernel of each row with all columns; (n d), (m d) -> (n,)."""
    dimension = rows.shape[1]
    return torch.cat([(block @ columns.T / dimension + 1).pow(3).sum(dim=1) for block in rows.split(_ROWS_PER_BLOCK)])


def _cubic_kernel_diagonal(rows: Tensor) -> Tensor:
    return (rows.square().sum(dim=1) / rows.shape[1] + 1).pow(3)


class PrecisionRecall(NamedTuple):
    """Fidelity and variety; fractions in [0, 1]."""

    precision: Estimate
    recall: Estimate


@on_one_thread
def precision_recall(features: Tensor, reference: Tensor, *, num_neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall of a sample against a reference.

    Kynkaanniemi et al. 2019 (arXiv:1904.06991), eqs. 1-2: a set's manifold is the union of the balls around its points
    that reach to the k-th nearest neighbour. Precision is the fraction of ``features`` inside the manifold of
    ``reference``, recall the fraction of ``reference`` inside that of ``features``. Both fall with the number of
    samples; compare equal counts. The errors are binomial for the points, plus the variance of the manifold by its
    halves: half of what two halves of it differ by (delete-half jackknife, Shao & Wu 1989, which holds for nearest
    neighbours where deleting single points does not).

    Args:
        features: (n d), n > k.
        reference: (m d), m > k.
        num_neighbours: k.

    Raises:
        ValueError: Too few rows for k neighbours, unequal dimensions, NaN or infinite values.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours = {num_neighbours} must be at least 1; 3 is the published choice.")
    features, reference = checked_pair(features, reference, min_samples=num_neighbours + 1)
    return PrecisionRecall(
        precision=_fraction_inside(features, reference, num_neighbours),
        recall=_fraction_inside(reference, features, num_neighbours),
    )


def _fraction_inside(points: Tensor, manifold: Tensor, num_neighbours: int) -> Estimate:
    # The members of the whole manifold, then of two halves of it for each of some random cuts.
    whole, generator = torch.ones(1, len(manifold), dtype=torch.bool), torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(len(manifold), generator=generator) for _ in range(_NUM_CUTS)])
    first = orders < len(manifold) // 2  # (cuts m)
    cuts = torch.cat([whole, first, ~first])

    # The own point, at distance exactly zero, is the first neighbour.
    radii = torch.empty(cuts.shape, dtype=manifold.dtype)
    for rows in torch.arange(len(manifold)).split(_ROWS_PER_BLOCK):
        distances = _distances(manifold[rows], manifold)
        for cut, members in enumerate(cuts):
            within = distances[members[rows]][:, members]
            nth = min(num_neighbours + 1, within.shape[1])
            radii[cut, rows[members[rows]]] = within.kthvalue(nth).values
    inside = torch.zeros(len(cuts), dtype=torch.float64)
    for block in points.split(_ROWS_PER_BLOCK):
        distances = _distances(block, manifold)
        for cut, members in enumerate(cuts):
            inside[cut] += (distances[:, members] <= radii[cut, members]).any(dim=1).sum()
    fraction, *of_halves = (inside / len(points)).tolist()
    halves = torch.tensor(of_halves, dtype=torch.float64).reshape(2, _NUM_CUTS)
    # Half of their squared difference is the variance of a half, and half of that the variance of the whole.
    of_manifold = float((halves[0] - halves[1]).square().mean()) / 4
    return Estimate(fraction, math.sqrt(fraction * (1 - fraction) / len(points) + of_manifold))


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    # Not by the matrix product: |a|^2 - 2ab + |b|^2 leaves 1e-7 for equal points, and duplicates have radius zero.
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")  # (n m)
