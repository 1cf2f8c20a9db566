"""Laws of the data order: each epoch a permutation, any position on its own."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.order.order import FullShuffleConfig, Order, SequentialConfig
from data.order.permutation import permute, round_keys

SIZES = st.integers(1, 5_000)
SEEDS = st.integers(0, 2**63 - 1)


def shuffled(num_samples: int, seed: int) -> Order:
    return Order(FullShuffleConfig(), num_samples=num_samples, seed=seed)


@given(SIZES, SEEDS, st.integers(0, 10**12))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = shuffled(num_samples, seed).indices(epoch * num_samples, num_samples)
    assert sorted(order.tolist()) == list(range(num_samples))


@given(st.integers(1, 300), SEEDS, st.integers(0, 2_000), st.lists(st.integers(1, 97), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_stream_is_the_same_however_it_is_cut(num_samples: int, seed: int, first: int, cuts: list[int]) -> None:
    order = shuffled(num_samples, seed)
    whole = order.indices(first, sum(cuts))
    starts = first + np.cumsum([0, *cuts[:-1]])
    pieces = [order.indices(int(start), count) for start, count in zip(starts, cuts, strict=True)]
    assert np.array_equal(whole, np.concatenate(pieces))


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    orders = [shuffled(1_000, seed).indices(epoch * 1_000, 1_000) for seed in (0, 1) for epoch in (0, 1)]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            # Two random permutations agree in one place on average (Poisson); ten would be a one in a million.
            assert (one == other).sum() < 10
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_a_sample_can_come_at_any_place() -> None:
    places = np.array([np.flatnonzero(shuffled(8, seed).indices(0, 8) == 3)[0] for seed in range(800)])
    counts = np.bincount(places, minlength=8)
    # Chi-square with 7 degrees of freedom: above 24.3 once in a thousand.
    assert (np.square(counts - 100) / 100).sum() < 24.3


def test_neighbours_in_the_corpus_do_not_stay_neighbours() -> None:
    order = shuffled(10_000, 0).indices(0, 10_000)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.001


def test_the_first_batch_of_a_hundred_million_samples_needs_no_table() -> None:
    import tracemalloc

    tracemalloc.start()
    shuffled(100_000_000, 0).indices(123_456_789_012, 1_024)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_sequential_is_the_order_of_the_shards() -> None:
    order = Order(SequentialConfig(), num_samples=3, seed=7)
    assert order.indices(2, 5).tolist() == [2, 0, 1, 2, 0]


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="the corpus is empty"):
        shuffled(0, 0)


@pytest.mark.parametrize("size", [2, 3, 5, 6, 11, 17, 25, 63, 64])
def test_a_small_set_is_shuffled_uniformly_place_by_place_and_pair_by_pair(size: int) -> None:
    draws = 20_000
    values, salts = np.tile(np.arange(size), draws), np.repeat(np.arange(draws), size)
    shuffles = permute(values, size, round_keys(0, "order"), salts=salts).reshape(draws, size)
    assert np.array_equal(np.sort(shuffles, axis=1), np.broadcast_to(np.arange(size), shuffles.shape))
    places = np.stack([np.bincount(column, minlength=size) for column in shuffles.T])
    pairs = np.bincount(shuffles[:, 0] * size + shuffles[:, -1], minlength=size**2).reshape(size, size)
    for counts, freedom in ((places, (size - 1) ** 2), (pairs[~np.eye(size, dtype=bool)], size * (size - 1) - 1)):
        assert stats.chisquare(counts.ravel(), ddof=counts.size - 1 - freedom).pvalue > 1e-4


def test_sizes_of_one_call_do_not_mix() -> None:
    sizes, keys = np.array([3, 1_000, 63, 64, 1]), round_keys(0, "order")
    values = sizes - 1
    alone = [permute(values[[i]], int(size), keys, salts=np.array([i]))[0] for i, size in enumerate(sizes)]
    assert permute(values, sizes, keys, salts=np.arange(5)).tolist() == alone


def test_large_sets_keep_the_orders_that_they_have_always_had() -> None:
    order = shuffled(1_000, 0).indices(0, 3_000).astype("<i8").tobytes()
    assert hashlib.sha256(order).hexdigest() == "0ad965f08ce16a505408a0cedf5eba92ced5f2f4547c09fd207bbcc4480d78d0"
