"""Frechet distance between two sets of images, by the mean and covariance of their features.

Works in float64, on the device of the features, and gives the same bits there under any number of threads. Letters: n
samples, m reference samples, d features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.metrics.estimate import Estimate, checked_features, checked_pair, on_one_thread

_NUM_CUTS = 4  # of both sets into halves, for the extrapolation


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
        shift = (first.mean - second.mean).double()
        # Rounding can leave -1e-16 for equal Gaussians; a distance is not negative.
        distance = max(0.0, float(shift.square().sum()) + root1.trace + root2.trace - 2 * float(singular.sum()))
        return cls(distance, (root1, root2), (left, right_t.T), singular)


@on_one_thread
def frechet_distance(features: Tensor, reference: Tensor) -> Estimate:
    """Frechet distance between the Gaussians fitted to two feature tables, with its standard error.

    The value is ``Transport.distance`` between the sample means and unbiased covariances; it is biased upwards
    by O(d / n), near ``d (d + 5) / 4 (1 / n + 1 / m)`` for white features, so compare only values of equal sample
    counts. The error is the infinitesimal jackknife (delta method):
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
    influences = []
    for sample, mean, root, axes, direction in zip(
        (features, reference), (first.mean, second.mean), transport.roots, transport.axes, (shift, -shift), strict=True
    ):
        centred = sample - mean
        transported = (centred @ root.inverse.T @ axes).square() @ transport.singular  # (x - m)^T T (x - m)
        influences.append(2 * (centred @ direction) + centred.square().sum(dim=1) - transported)
    return Estimate.of_influences(transport.distance, samples=influences[0], reference=influences[1])


@on_one_thread
def frechet_at_infinity(features: Tensor, reference: Tensor) -> Estimate:
    """Frechet distance extrapolated to infinitely many images on both sides, with its standard error.

    Chong & Forsyth 2020 (arXiv:1911.07023): the bias of the distance falls as 1 / n, so a line through distances at
    several n, over 1 / n, meets infinity at the unbiased one. Here the line goes through the whole sets and their
    halves (the mean over both halves of some random cuts): ``2 F(n, m) - F(n / 2, m / 2)``, without the bias of either
    side. The first-order influence of a sample is the same in all terms, so the error is that of ``F(n, m)``. Values of
    different counts compare; small negative ones are normal. Trust it where a half has more images than features.

    Args:
        features: (n d), n >= 4.
        reference: (m d), m >= 4.

    Raises:
        ValueError: Fewer than 4 rows, unequal dimensions, NaN or infinite values.
    """
    features, reference = checked_pair(features, reference, min_samples=4)
    whole = frechet_distance(features, reference)
    generator, of_halves = torch.Generator().manual_seed(0), 0.0
    for _ in range(_NUM_CUTS):
        halves = [torch.randperm(len(rows), generator=generator).chunk(2) for rows in (features, reference)]
        for mine, theirs in zip(*halves, strict=True):
            fitted = (Gaussian.of(features[mine]), Gaussian.of(reference[theirs]))
            of_halves += Transport.between(*fitted).distance / (2 * _NUM_CUTS)
    return Estimate.of_influences(2 * whole.value - of_halves, **whole.influences)


class _Root(NamedTuple):
    """A root S of a covariance C = S S^T, with the pseudo-inverse of S and the trace of C."""

    matrix: Tensor
    inverse: Tensor
    trace: float

    @classmethod
    def of(cls, covariance: Tensor) -> "_Root":
        covariance = covariance.detach().double()
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
