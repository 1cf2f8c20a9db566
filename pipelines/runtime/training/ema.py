"""Averages of the weights: exponential ones and power ones, several at once, in one fused update each.

After training a power average of any width is combined from those that checkpoints hold (``combine_snapshots``), after
Karras et al. 2024 (arXiv:2312.02696), section 3.2 and appendix C. An average with exponent gamma at time t weighs the
weights of time tau in proportion to tau^gamma, up to t. Another such profile is approached by a sum of stored ones, in
least squares; since averaging is linear, the same sum of the stored weights approaches the other average.
"""

import copy
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn


class ExponentialAverage(BaseModel, frozen=True, extra="forbid"):
    """Constant decay, with a warm-up that lets the average follow the early updates."""

    kind: Literal["exponential"] = "exponential"  # the usual average
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999  # per update
    warmup: bool = True  # decay at update u is at most (1 + u) / (10 + u)


class PowerAverage(BaseModel, frozen=True, extra="forbid"):
    """Weights in proportion to update^gamma (Karras 2024, arXiv:2312.02696, eq. 2): the span grows with training."""

    kind: Literal["power"] = "power"  # scale-free average
    relative_std: Annotated[float, Field(gt=0, lt=0.28)] = 0.1  # width of the profile, as a fraction of training


AverageConfig = Annotated[ExponentialAverage | PowerAverage, Field(discriminator="kind")]


def power_exponent(relative_std: float) -> float:
    """Return gamma for a profile of the given relative width (Karras 2024, algorithm 2).

    Solves std = (gamma + 1)^(1/2) (gamma + 2)^(-1) (gamma + 3)^(-1/2) for gamma >= 0.
    """
    inverse_square: float = relative_std**-2
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = 0.5 * (low + high)
        value = (middle + 2) ** 2 * (middle + 3) / (middle + 1)
        low, high = (middle, high) if value < inverse_square else (low, middle)
    return 0.5 * (low + high)


def decay_at(config: ExponentialAverage | PowerAverage, *, update: int) -> float:
    """Return how much of the old average stays at the ``update``-th update (the first is 1)."""
    match config:
        case ExponentialAverage(decay=decay, warmup=warmup):
            return min(decay, (1 + update) / (10 + update)) if warmup else decay
        case PowerAverage(relative_std=relative_std):
            return float((1.0 - 1.0 / update) ** (power_exponent(relative_std) + 1.0))


class Averages:
    """EMA of the weights: averaged copies of one network; the first is the one that is evaluated and published.

    Args:
        network: The network that is trained; its present weights are where the averages start.
        configs: One average each; at least one.
    """

    def __init__(self, network: nn.Module, configs: tuple[ExponentialAverage | PowerAverage, ...]) -> None:
        self.configs = configs
        self.networks = [copy.deepcopy(network).requires_grad_(False).eval() for _ in configs]
        #: The averaged network that is evaluated and published.
        self.first = self.networks[0]
        # Kept, since walking through the modules for them takes longer than averaging a small network.
        self._network = network
        self._tensors: list[tuple[list[Tensor], list[Tensor]]] = [
            ([*one.parameters()], [*one.buffers()]) for one in (network, *self.networks)
        ]

    @torch.no_grad()
    def update(self, network: nn.Module, *, update: int, refused: Tensor | None = None) -> None:
        """Move every average towards the present weights; ``update`` counts from 1.

        Args:
            network: The network that is trained.
            update: The update that was just made.
            refused: Scalar on the device; where it is 1, nothing moves, without the host waiting for it.
        """
        assert network is self._network, "the averages are of another network"
        (present, constants), *held = self._tensors

        # On a CPU the refusal is read for free, and a plain interpolation is three times as fast.
        on_host = present[0].device.type == "cpu"
        if on_host and refused is not None and bool(refused):
            return
        for config, (average, buffers) in zip(self.configs, held, strict=True):
            decay = decay_at(config, update=update)
            for mine, theirs in zip(buffers, constants, strict=True):
                mine.copy_(theirs)
            if on_host:
                torch._foreach_lerp_(average, present, 1.0 - decay)
                continue

            # One fused kernel that can be refused on the device: a step of plain SGD along (present - average).
            torch._fused_sgd_(
                average,
                present,
                [],
                lr=decay - 1.0,
                weight_decay=-1.0,
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=refused,
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return all averages, for a checkpoint."""
        return {
            f"{index}/{name}": tensor
            for index, average in enumerate(self.networks)
            for name, tensor in average.state_dict().items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``tensors`` returned."""
        for index, average in enumerate(self.networks):
            prefix = f"{index}/"
            average.load_state_dict(
                {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            )


class Snapshot(NamedTuple):
    """A power average as it stood after an update."""

    update: int
    relative_std: float


class Combination(NamedTuple):
    """Weights by which snapshots combine to another average."""

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

    # Least squares of the profiles. Neighbouring snapshots are almost parallel: directions below rounding are left out.
    products = np.array([[profile_product(a, b) for b in snapshots] for a in snapshots])
    towards = np.array([profile_product(snapshot, wanted) for snapshot in snapshots])
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
