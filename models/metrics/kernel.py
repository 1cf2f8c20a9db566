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
    within, within_ref = _sums_within(features), _sums_within(reference)  # (n,), (m,)
    across, across_ref = _sums_across(features, reference)  # (n,), (m,)

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


def _sums_across(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the kernel of each row with all columns, and of each column with all rows; (n d), (m d) -> (n,), (m,)."""
    of_rows, of_columns = [], columns.new_zeros(len(columns))
    for block in rows.split(_ROWS_PER_BLOCK):
        kernel = _cubic_kernel(block, columns)
        of_rows.append(kernel.sum(dim=1))
        of_columns += kernel.sum(dim=0)
    return torch.cat(of_rows), of_columns


def _sums_within(rows: Tensor) -> Tensor:
    """Sum of the kernel of each row with all others, each pair computed once; (n d) -> (n,)."""
    sums = rows.new_zeros(len(rows))
    for first in range(0, len(rows), _ROWS_PER_BLOCK):
        block, rest = rows[first : first + _ROWS_PER_BLOCK], rows[first:]
        kernel = _cubic_kernel(block, rest)
        kernel.diagonal().zero_()  # the own pair
        sums[first : first + len(block)] += kernel.sum(dim=1)
        sums[first + len(block) :] += kernel[:, len(block) :].sum(dim=0)
    return sums


def _cubic_kernel(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows @ columns.T).div_(rows.shape[1]).add_(1).pow_(3)
