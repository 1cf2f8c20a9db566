"""Weighted mixtures of classes or corpora, exact and without state: a position gives its group and its sample there.

Positions come in cycles. In each the slots are dealt to the groups in fixed numbers, by a permutation of the cycle's
own; so any position tells its group, and how often that group was taken before. A group's samples are gone through in
epochs of its own, each shuffled anew.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from data.order.permutation import permute, round_keys

CYCLE = 4096  # most slots among which weights are dealt; where whole numbers need more, a share is exact to a slot


class Mixture:
    """A stream over groups of samples.

    Args:
        samples: Sample indices, group after group; integers (n,). None when they lie so already.
        group_sizes: Samples of each group; each at least 1.
        weights: Share of each group, relative to the others.
        seed: Seed of the stage.

    Raises:
        ValueError: A group has no sample, or a share too small for the cycle.
    """

    def __init__(
        self, samples: np.ndarray | None, group_sizes: Sequence[int], weights: Sequence[float], *, seed: int
    ) -> None:
        self._samples, self._sizes = samples, np.asarray(group_sizes, dtype=np.int64)
        self._seed = seed
        self._slots = slots_of(np.asarray(weights, dtype=np.float64))
        for group, (size, slots) in enumerate(zip(self._sizes, self._slots, strict=True)):
            if size < 1 or slots < 1:
                lack = "has no sample" if size < 1 else f"weighs less than 1 in {CYCLE}"
                raise ValueError(f"Group {group} of the weighted order {lack}; raise its weight or leave it out.")
        self._first_sample = np.cumsum(self._sizes) - self._sizes
        self._last_slot = np.cumsum(self._slots)

    @classmethod
    def of_labels(
        cls, labels: np.ndarray, *, classes: Sequence[str], weights: Mapping[str, float], seed: int
    ) -> "Mixture":
        """Mix classes; a class without samples is left out.

        Raises:
            ValueError: A sample has no class, or a weight names no class.
        """
        if unknown := sorted(set(weights) - set(classes)):
            raise ValueError(f"order.weights names {unknown[0]!r}, but the classes are {', '.join(classes)}.")
        if labels.min() < 0:
            raise ValueError("A weighted order needs a class for every sample, and some have none.")
        if labels.max() < 1 << 16:  # sorted by their digits, several times as fast as numbers of eight bytes
            labels = labels.astype(np.uint16)
        present, sizes = np.unique(labels, return_counts=True)
        names = dict(enumerate(classes))
        shares = [weights.get(names.get(int(label), ""), 1.0) for label in present]
        # Four bytes a sample instead of eight, in every process.
        narrow = np.uint32 if len(labels) < 1 << 32 else np.int64
        return cls(np.argsort(labels, kind="stable").astype(narrow), sizes.tolist(), shares, seed=seed)

    @classmethod
    def of_corpora(cls, corpora: Mapping[str, int], *, weights: Mapping[str, float], seed: int) -> "Mixture":
        """Mix corpora that lie one after the other, each with its number of samples.

        Raises:
            ValueError: There is only one, or a weight names none.
        """
        if "" in corpora:
            raise ValueError(
                'order.by = "corpus" needs several corpora: name them in a source of kind "union" and prepare it, or '
                'use order.by = "class".'
            )
        if unknown := sorted(set(weights) - set(corpora)):
            raise ValueError(f"order.weights names {unknown[0]!r}, but the corpora are {', '.join(corpora)}.")
        shares = [weights.get(name, 1.0) for name in corpora]
        return cls(None, list(corpora.values()), shares, seed=seed)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the samples at stream positions; int64 (k,)."""
        # The slots of the whole cycles that the positions lie in: some thousands at most.
        length = int(self._last_slot[-1])
        cycles, row = np.unique(positions // length, return_inverse=True)
        slots = np.tile(np.arange(length), len(cycles))
        slots = permute(slots, length, round_keys(self._seed, "order/cycle"), salts=np.repeat(cycles, length))
        groups = np.searchsorted(self._last_slot, slots, side="right").reshape(-1, length)

        # A group's slots are numbered in the order of the stream, so that its samples come in turns.
        ranks = np.argsort(np.argsort(groups, axis=1, kind="stable"), axis=1)
        cycle, place = np.divmod(positions, length)
        group, slot = groups[row, place], ranks[row, place]
        taken = cycle * self._slots[group] + slot - (self._last_slot[group] - self._slots[group])
        turn, place = np.divmod(taken, self._sizes[group])
        salts = turn * len(self._sizes) + group
        place = permute(place, self._sizes[group], round_keys(self._seed, "order/group"), salts=salts)
        place += self._first_sample[group]
        return place if self._samples is None else self._samples[place].astype(np.int64)


def slots_of(weights: np.ndarray) -> np.ndarray:
    """Return the number of slots of a cycle for each weight: the smallest whole numbers in these proportions.

    Where they add up to more than ``CYCLE``, that many slots are dealt by largest remainder.
    """
    whole = [Fraction(repr(weight)) for weight in weights.tolist()]  # as written: 0.1 is a tenth
    denominator = math.lcm(*(weight.denominator for weight in whole))
    counts = [int(weight * denominator) for weight in whole]
    if sum(counts) <= math.gcd(*counts) * max(CYCLE, len(weights)):
        return np.array([count // math.gcd(*counts) for count in counts], dtype=np.int64)
    exact = weights / weights.sum() * max(CYCLE, len(weights))
    slots = np.floor(exact).astype(np.int64)
    missing = max(CYCLE, len(weights)) - int(slots.sum())
    slots[np.argsort(slots - exact, kind="stable")[:missing]] += 1
    return slots
