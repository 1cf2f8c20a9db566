"""Power averages of any width, after training: combinations of the averages that checkpoints hold.

Karras et al. 2024 (arXiv:2312.02696), section 3.2 and appendix C. An average with exponent gamma at time t weighs the
weights of time tau in proportion to tau^gamma, up to t. Another such profile is approached by a sum of stored ones, in
least squares; since averaging is linear, the same sum of the stored weights approaches the other average.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipelines.runtime.training.ema import power_exponent


class Snapshot(NamedTuple):
    """A power average as it stood after an update."""

    update: int
    relative_std: float


class Combination(NamedTuple):
    """How snapshots combine to another average."""

    weights: np.ndarray  # one a snapshot, float64; they sum to one
    residual: float  # distance of the profiles over the length of the wanted one, in L2: 0 is exact


def combine_snapshots(snapshots: Sequence[Snapshot], wanted: Snapshot) -> Combination:
    """Return the combination of ``snapshots`` that comes nearest to ``wanted``.

    Raises:
        ValueError: There is none, or all end before the wanted one, so that none knows its last weights.
    """
    if not snapshots or max(snapshot.update for snapshot in snapshots) < wanted.update:
        raise ValueError(
            f"There is no power average of update {wanted.update} or later. Reconstruct an earlier update, or train "
            'with averages of kind "power" and keep their checkpoints.'
        )
    products = np.array([[profile_product(a, b) for b in snapshots] for a in snapshots])
    towards = np.array([profile_product(snapshot, wanted) for snapshot in snapshots])
    # Neighbouring snapshots are almost parallel: directions below rounding are left out.
    weights, *_ = np.linalg.lstsq(products, towards, rcond=1e-13)
    # A sum of one, so that weights that never moved are given back; least squares alone misses it by the residual.
    weights /= weights.sum()
    length = profile_product(wanted, wanted)
    missed = weights @ products @ weights - 2 * weights @ towards + length
    return Combination(weights=weights, residual=float(np.sqrt(max(missed, 0.0) / length)))


def profile_product(a: Snapshot, b: Snapshot) -> float:
    """Return the integral of the product of two profiles over time (Karras 2024, appendix C.2, algorithm 3)."""
    gamma_a, gamma_b = power_exponent(a.relative_std), power_exponent(b.relative_std)
    # Computed by the ratio of the times: powers of the times themselves would overflow.
    ratio, exponent = a.update / b.update, gamma_b if a.update < b.update else -gamma_a
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * max(a.update, b.update))
    return float(scale * ratio**exponent)
