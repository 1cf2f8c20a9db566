"""Laws of the other orders: blocked and weighted, and of all orders in random layouts of shards, ranks and workers."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from manifests import commit_latents

from data.loading import LatentShards
from data.order.order import AnyOrderConfig, BlockedShuffleConfig, FullShuffleConfig, Order, WeightedConfig
from data.prefetch import Prefetch
from data.samples import latent_members
from data.shards.writer import ShardWriter

LAYOUTS = st.fixed_dictionaries(
    {
        "shard_sizes": st.lists(st.integers(0, 1_000), min_size=1, max_size=37).filter(any),
        "blocked": st.booleans(),
        "window": st.integers(1, 5_000),
        "seed": st.integers(0, 2**62),
        "stop": st.integers(0, 2**30),
    }
)
BATCH = 96  # splits among 1 to 4 ranks, and among streams


def open_order(layout: dict, streams: int) -> Order:
    config: AnyOrderConfig = FullShuffleConfig()
    if layout["blocked"]:
        config = BlockedShuffleConfig(canonical_nodes=streams, window=layout["window"])
    sizes = layout["shard_sizes"]
    return Order(config, num_samples=sum(sizes), seed=layout["seed"], global_batch=BATCH, shard_sizes=sizes)


@contextlib.contextmanager
def batches_of(make: Callable[[int], np.ndarray], *, start: int, workers: int) -> Iterator[Iterator[np.ndarray]]:
    """Batches from ``start`` on, made by this many workers ahead of use, or right here."""
    if not workers:
        yield (make(index) for index in range(start, 2**62))
        return
    with Prefetch(make, start=start, depth=2 * workers, threads=workers) as stream:
        yield (loaded.batch for loaded in stream)


@given(LAYOUTS, st.integers(1, 4), st.integers(0, 3), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_ranks_workers_and_stops_change_nothing(layout: dict, ranks: int, workers: int, streams: int) -> None:
    total = sum(layout["shard_sizes"])
    steps = -(-2 * total // BATCH)
    reference = open_order(layout, streams).indices(0, steps * BATCH)
    for epoch in range(2):
        assert np.array_equal(np.sort(reference[epoch * total : (epoch + 1) * total]), np.arange(total))

    stop, share = layout["stop"] % (steps + 1), BATCH // ranks
    found = np.empty((steps, ranks, share), dtype=np.int64)
    for rank in range(ranks):
        # A new process on each side of the stop: nothing but the step number is carried over.
        for first, last in ((0, stop), (stop, steps)):
            order = open_order(layout, streams)

            def make(index: int, rank: int = rank, order: Order = order) -> np.ndarray:
                return order.indices(index * BATCH + rank * share, share)

            with batches_of(make, start=first, workers=workers) as stream:
                for step, batch in enumerate(islice(stream, last - first), first):
                    found[step, rank] = batch
    assert np.array_equal(found.ravel(), reference)


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_nodes_of_a_blocked_order_fetch_each_shard_about_once_an_epoch(nodes: int) -> None:
    sizes, streams, per_node = [50] * 100 + [13] * 7, 8, BATCH // nodes
    total, of_shard = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    config = BlockedShuffleConfig(canonical_nodes=streams, window=120)
    order = Order(config, num_samples=total, seed=5, global_batch=BATCH, shard_sizes=sizes)
    for epoch in (0, 3):
        epoch_of_batch = [range(-(-epoch * total // BATCH), (epoch + 1) * total // BATCH)]
        fetched = 0
        for node in range(nodes):
            seen = [order.indices(b * BATCH + node * per_node, per_node) for span in epoch_of_batch for b in span]
            fetched += len(set(of_shard[np.concatenate(seen)].tolist()))
        assert fetched <= len(sizes) + streams


def test_a_blocked_order_needs_few_shards_at_a_time_and_mixes_them() -> None:
    sizes = [100] * 200
    of_shard = np.repeat(np.arange(200), sizes)
    config = BlockedShuffleConfig(canonical_nodes=4, window=500)
    order = Order(config, num_samples=20_000, seed=5, global_batch=BATCH, shard_sizes=sizes)
    # Six shards can touch a window, and the stretch of a hundred batches touches 2,400 / 500 + 1 windows a stream.
    for first in (0, 40, 90):
        near = order.indices(first * BATCH, 10 * BATCH)
        assert len(set(of_shard[near].tolist())) <= 4 * 2 * 6
    part = order.indices(0, 24)
    assert len(set(of_shard[part].tolist())) >= 3
    again = Order(config, num_samples=20_000, seed=6, global_batch=BATCH, shard_sizes=sizes)
    assert set(order.indices(0, 960).tolist()) != set(order.indices(20_000, 960).tolist())
    assert set(order.indices(0, 960).tolist()) != set(again.indices(0, 960).tolist())


def test_a_batch_that_does_not_split_into_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch = 10 does not split into 4 equal parts"):
        Order(BlockedShuffleConfig(canonical_nodes=4), num_samples=9, seed=0, global_batch=10, shard_sizes=[9])


@given(st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 2**62), st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_classes_are_balanced_exactly_and_each_is_gone_through_in_turns(
    sizes: list[int], seed: int, first: int
) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = Order(WeightedConfig(), num_samples=len(labels), seed=seed, labels=labels)
    start = first * len(sizes)
    stream = order.indices(start, 120 * len(sizes))
    assert Counter(labels[stream].tolist()) == dict.fromkeys(range(len(sizes)), 120)
    assert np.array_equal(stream[7:31], order.indices(start + 7, 24))
    from_zero = order.indices(0, 120 * len(sizes))
    for label, size in enumerate(sizes):
        taken = from_zero[labels[from_zero] == label]
        for turn in range(120 // size):
            assert len(set(taken[turn * size : (turn + 1) * size].tolist())) == size


def test_weights_are_the_shares_of_their_classes() -> None:
    labels = np.repeat([0, 1, 2], [10, 20, 3])
    config = WeightedConfig(weights={"cat": 5.0, "dog": 2.0})
    order = Order(config, num_samples=33, seed=0, labels=labels, classes=("cat", "dog", "emu"))
    shares = np.bincount(labels[order.indices(0, 8 * 4096)]) / (8 * 4096)
    np.testing.assert_allclose(shares, [5 / 8, 2 / 8, 1 / 8], atol=1 / 4096)


@pytest.mark.parametrize("weights", [{"cat": 0.7313, "dog": 0.2}, {"cat": 1.2345678, "dog": 0.9}])
def test_in_long_cycles_too_a_class_is_gone_through_in_turns_from_its_first_draw_on(weights: dict) -> None:
    sizes = [11, 7, 700]
    labels = np.repeat([0, 1, 2], sizes)
    config, classes = WeightedConfig(weights=weights), ("cat", "dog", "emu")
    order = Order(config, num_samples=718, seed=1, labels=labels, classes=classes)
    stream = order.indices(0, 40_000)
    for label, size in enumerate(sizes):
        taken = stream[labels[stream] == label]
        turns = taken[: len(taken) // size * size].reshape(-1, size)
        assert [len(set(turn)) for turn in turns.tolist()] == [size] * len(turns)
    # The same however it is cut, and from wherever it begins.
    pieces = [order.indices(first, 613) for first in range(9_000, 9_000 + 20 * 613, 613)]
    assert np.array_equal(np.concatenate(pieces), stream[9_000 : 9_000 + 20 * 613])


@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        ([0, 1, -1], {}, "needs a class for every sample"),
        ([0, 1, 1], {"cow": 2.0}, "order.weights names 'cow', but the classes are cat, dog"),
        ([0, 1, 1], {"cat": 1e6}, "weighs less than 1 in 4096"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(labels: list[int], weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(WeightedConfig(weights=weights), num_samples=3, seed=0, labels=np.array(labels), classes=("cat", "dog"))


@pytest.mark.parametrize("config", [BlockedShuffleConfig(canonical_nodes=2, window=9), WeightedConfig()])
def test_shards_give_an_order_what_it_needs(config: AnyOrderConfig, tmp_path: Path) -> None:
    entries = []
    for number, count in enumerate([5, 0, 8]):
        with ShardWriter(tmp_path / f"train-{number:06d}.tar") as shard:
            for row in range(count):
                moments = np.full((2, 1, 1, 1), 10 * number + row, dtype=np.float16)
                shard.add(f"k{number}-{row}", latent_members("k", moments, carried={"cls": b"%d" % (row % 2)}))
        assert shard.entry is not None
        entries.append(shard.entry)
    commit_latents(tmp_path, entries)
    shards = LatentShards(tmp_path, split="train")
    batch = shards.read(shards.order(config, seed=1, global_batch=4).indices(0, 14))
    if config.kind == "weighted":
        assert Counter(batch.labels.tolist()) == {0: 7, 1: 7}
    else:
        assert len(set(batch.keys)) == 13
