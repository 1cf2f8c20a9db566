"""Laws of the per-sample draws: a function of (seed, purpose, batch, position) and nothing else."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from scipy import stats

from data.order.order import FullShuffleConfig, Order
from data.randomness import SampleDraws, generator, key_of
from pipelines.model.batches import GlobalBatches
from pipelines.runtime.training.config import TrainingConfig


def test_a_sample_draws_the_same_whoever_draws_it() -> None:
    whole = SampleDraws(3, 11, range(8)).normals("noise", (2, 4))
    part = SampleDraws(3, 11, range(4, 8)).normals("noise", (2, 4))
    assert np.array_equal(whole[4:], part)


def test_seed_purpose_batch_and_position_each_change_the_draw() -> None:
    base = SampleDraws(0, 0, [0]).normals("noise", (16,))
    others = [
        SampleDraws(1, 0, [0]).normals("noise", (16,)),
        SampleDraws(0, 0, [0]).normals("posterior", (16,)),
        SampleDraws(0, 1, [0]).normals("noise", (16,)),
        SampleDraws(0, 0, [1]).normals("noise", (16,)),
    ]
    assert all(not np.isin(other, base).any() for other in others)


def test_drawing_for_one_purpose_does_not_shift_another() -> None:
    draws = SampleDraws(0, 5, range(3))
    before = draws.uniforms("time")
    draws.normals("noise", (100,))
    assert np.array_equal(draws.uniforms("time"), before)


def test_a_sample_draws_what_numpy_draws_from_its_own_counter() -> None:
    """Also where samples before it have left half of a word, or of a buffer, in the generator that they share."""
    draws = SampleDraws(3, 7, [5, 0, 2**40])
    fresh = [np.random.Philox(key=key_of(3, "noise"), counter=(0, 0, position, 7)) for position in (5, 0, 2**40)]
    normals, uniforms = draws.normals("noise", (3, 5)), draws.uniforms("noise", (3,))
    for row, bits in enumerate(fresh):
        assert np.array_equal(normals[row], np.random.Generator(bits).standard_normal((3, 5), dtype=np.float32))
    fresh = [np.random.Philox(key=key_of(3, "noise"), counter=(0, 0, position, 7)) for position in (5, 0, 2**40)]
    assert np.array_equal(uniforms, [np.random.Generator(bits).random(3) for bits in fresh])


def test_draws_of_many_samples_are_standard_normal_and_uniform() -> None:
    draws = SampleDraws(0, 0, range(2_000))
    assert stats.kstest(draws.normals("noise", (5,)).ravel(), "norm").pvalue > 0.001
    assert stats.kstest(draws.uniforms("time"), "uniform").pvalue > 0.001


def test_long_draws_of_neighbours_never_overlap() -> None:
    first = generator(0, "noise", batch=0, position=0).random(100_000)
    second = generator(0, "noise", batch=0, position=1).random(100_000)
    assert not np.isin(first, second).any()


class Shares(GlobalBatches[tuple[np.ndarray, np.ndarray, np.ndarray]]):
    """Samples, flips and posterior noise of a training's batches."""

    def __init__(self, stage: str) -> None:
        shards = SimpleNamespace(order=lambda order, *, seed, global_batch: Order(order, num_samples=5_000, seed=seed))
        frame = SimpleNamespace(name=stage, accelerator=SimpleNamespace(process_index=0, num_processes=1))
        config = TrainingConfig(updates=1, global_batch=1_000)
        super().__init__(config, cast(Any, frame), cast(Any, shards), order=FullShuffleConfig())

    def make(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        draws = self.draws(index)
        samples = self.samples(index, self.share.positions)
        return samples, draws.uniforms("flip"), draws.normals("posterior", (4,))


def test_trainings_of_one_seed_share_neither_order_nor_draws() -> None:
    (order, flips, noise), theirs = (Shares(stage).make(3) for stage in ("train_vae", "train_unet"))
    assert (order == theirs[0]).sum() < 10
    assert stats.pearsonr(flips, theirs[1]).pvalue > 0.001
    assert stats.pearsonr(noise.ravel(), theirs[2].ravel()).pvalue > 0.001
    again = Shares("train_vae").make(3)
    assert all(np.array_equal(one, other) for one, other in zip((order, flips, noise), again, strict=True))
