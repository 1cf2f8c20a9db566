"""Kernel distance between two sets of images: all moments of their features up to the third, without bias."""

import torch
from torch import Tensor

from models.metrics.estimate import Estimate, checked_pair, on_one_thread

_ROWS_PER_BLOCK = 1024  # bounds memory: a block of kernel values is (1024 m) float64


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

    influences = []
    for own, other, mean_other, count, count_other in (
        (within, across, mean_within_ref, n, m),
        (within_ref, across_ref, mean_within, m, n),
    ):
        without_one = (
            (own.sum() - 2 * own) / ((count - 1) * (count - 2))
            + mean_other
            - 2 * (other.sum() - other) / ((count - 1) * count_other)
        )
        influences.append((count - 1) * (without_one.mean() - without_one))
    return Estimate.of_influences(float(value), samples=influences[0], reference=influences[1])


def _kernel_row_sums(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum of the cubic kernel of each row with all columns; (n d), (m d) -> (n,)."""
    dimension = rows.shape[1]
    return torch.cat([(block @ columns.T / dimension + 1).pow(3).sum(dim=1) for block in rows.split(_ROWS_PER_BLOCK)])


def _cubic_kernel_diagonal(rows: Tensor) -> Tensor:
    return (rows.square().sum(dim=1) / rows.shape[1] + 1).pow(3)
