"""Nearest neighbours between two sets of images, by their features: precision, recall and copies of training images.

Works in float64, on the device of the features, in blocks. Letters: n samples, m reference samples, d features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from models.metrics.estimate import Estimate, checked_pair, on_one_thread

_NUM_CUTS, _NUM_GROUPS = 3, 8  # of a manifold into groups
_ROWS_PER_BLOCK = 1024  # bounds memory: a block of distances is (1024 m) float64
_KEPT_NEIGHBOURS = 16  # of a member; seven eighths miss 4 of them once in 1e10
_ROUNDING = 1e-12  # squared distances below this share of the squared norms are those of equal points


class PrecisionRecall(NamedTuple):
    """Fidelity and variety; fractions in [0, 1]."""

    precision: Estimate
    recall: Estimate


class Nearest(NamedTuple):
    """The nearest neighbour of each of n points."""

    distances: Tensor  # (n,) float64
    indices: Tensor  # (n,) int64


@on_one_thread
def nearest(features: Tensor, reference: Tensor) -> Nearest:
    """Find the nearest of ``reference`` for each of ``features``.

    Args:
        features: (n d).
        reference: (m d).

    Raises:
        ValueError: No rows, unequal dimensions, NaN or infinite values.
    """
    features, reference = _centred(*checked_pair(features, reference, min_samples=1))
    found = [_squared_distances(rows, reference).min(dim=1) for rows in features.split(_ROWS_PER_BLOCK)]
    return Nearest(torch.cat([each.values for each in found]).sqrt(), torch.cat([each.indices for each in found]))


@on_one_thread
def precision_recall(features: Tensor, reference: Tensor, *, num_neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall of a sample against a reference.

    Kynkaanniemi et al. 2019 (arXiv:1904.06991), eqs. 1-2: a set's manifold is the union of the balls around its points
    that reach to the k-th nearest neighbour. Precision is the fraction of ``features`` inside the manifold of
    ``reference``, recall the fraction of ``reference`` inside that of ``features``. Both fall with the number of
    samples; compare equal counts. The errors are binomial for the points, plus the variance of the manifold, of which
    each eighth is left out in turn (delete-group jackknife, Shao & Wu 1989, which holds for nearest neighbours where
    deleting single points does not). What single points vary by then is in the binomial error already.

    Args:
        features: (n d), n > k.
        reference: (m d), m > k.
        num_neighbours: k.

    Raises:
        ValueError: Too few rows for k neighbours, unequal dimensions, NaN or infinite values.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours = {num_neighbours} must be at least 1; 3 is the published choice.")
    features, reference = _centred(*checked_pair(features, reference, min_samples=num_neighbours + 1))
    return PrecisionRecall(
        precision=_fraction_inside(features, reference, num_neighbours, points_are="samples"),
        recall=_fraction_inside(reference, features, num_neighbours, points_are="reference"),
    )


def _fraction_inside(points: Tensor, manifold: Tensor, num_neighbours: int, *, points_are: str) -> Estimate:
    # The members of the whole manifold, then of it without each of the groups of some random cuts.
    whole, generator = torch.ones(1, len(manifold), dtype=torch.bool), torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(len(manifold), generator=generator) for _ in range(_NUM_CUTS)])
    groups = orders * _NUM_GROUPS // len(manifold)  # (cuts m)
    cuts = torch.cat([whole, *(groups != group for group in range(_NUM_GROUPS))]).to(manifold.device)
    squared_radii = _squared_radii(manifold, cuts, num_neighbours)

    # A point lies in the balls of few members: only these pairs are looked at, for every cut.
    blocks = []
    for block in points.split(_ROWS_PER_BLOCK):
        squared = _squared_distances(block, manifold)
        rows, members = (squared <= squared_radii.amax(dim=0)).nonzero(as_tuple=True)
        within = squared[rows, members] <= squared_radii[:, members]  # (cuts pairs)
        of_cuts = torch.zeros(len(cuts), len(block), dtype=torch.float64, device=manifold.device)
        blocks.append((of_cuts.index_add_(1, rows, within.double()) > 0).double().cpu())
    inside = torch.cat(blocks, dim=1)  # (cuts n)
    fraction, by_group = inside[0].mean(), inside[1:].unflatten(0, (_NUM_GROUPS, _NUM_CUTS))

    # The delete-group jackknife of each cut, in the mean over the cuts.
    scale = math.sqrt((_NUM_GROUPS - 1) * (_NUM_GROUPS * _NUM_CUTS - 1))
    of_groups = scale * (by_group.mean(dim=0) - by_group).flatten(0, 1)  # (groups x cuts n)
    return Estimate.of_influences(float(fraction), **{points_are: inside[0] - fraction, "groups": of_groups})


def _squared_radii(manifold: Tensor, cuts: Tensor, num_neighbours: int) -> Tensor:
    """Squared distance of each member to its k-th nearest neighbour among its cut's; (cuts m), -1 outside the cut."""
    radii = torch.full(cuts.shape, -1.0, dtype=manifold.dtype, device=manifold.device)
    nths = (cuts.sum(dim=1) - 1).clamp(max=num_neighbours).tolist()
    for rows in torch.arange(len(manifold), device=manifold.device).split(_ROWS_PER_BLOCK):
        squared = _squared_distances(manifold[rows], manifold)
        near, indices = squared.topk(min(_KEPT_NEIGHBOURS, len(manifold)), dim=1, largest=False)
        for cut, (members, nth) in enumerate(zip(cuts, nths, strict=True)):
            # The own point, at distance exactly zero, is one of those that are counted.
            counted = members[indices].cumsum(dim=1)
            place = (counted <= nth).sum(dim=1)
            found = near.gather(1, place.clamp(max=near.shape[1] - 1)[:, None])[:, 0]
            far = place == near.shape[1]
            if far.any():
                found[far] = squared[far][:, members].topk(nth + 1, largest=False).values[:, -1]
            radii[cut, rows] = torch.where(members[rows], found * (1 + _ROUNDING), -1.0)
    return radii


def _centred(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets around the reference's mean, which keeps the digits of their distances."""
    mean = reference.mean(dim=0)
    return features - mean, reference - mean


def _squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared distances (n m), by the matrix product; exactly zero between equal points."""
    norms = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    squared = torch.addmm(norms, rows, columns.T, alpha=-2)
    return torch.where(squared < _ROUNDING * norms, 0.0, squared)
