"""Laws of the per-sample draws: a function of (seed, purpose, batch, position) and nothing else."""

import numpy as np
from scipy import stats

from data.randomness import SampleDraws, generator


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


def test_draws_of_many_samples_are_standard_normal_and_uniform() -> None:
    draws = SampleDraws(0, 0, range(2_000))
    assert stats.kstest(draws.normals("noise", (5,)).ravel(), "norm").pvalue > 0.001
    assert stats.kstest(draws.uniforms("time"), "uniform").pvalue > 0.001


def test_long_draws_of_neighbours_never_overlap() -> None:
    first = generator(0, "noise", batch=0, position=0).random(100_000)
    second = generator(0, "noise", batch=0, position=1).random(100_000)
    assert not np.isin(first, second).any()
