"""Laws of the latents' statistics: exact, mergeable, and those of latents that are really drawn."""

import json

import numpy as np
import pytest

from data.statistics import ChannelSums


def moments(num_samples: int, *, seed: int = 0) -> np.ndarray:
    """Moments (n 2 3 4 4): channels of unlike mean and spread; the last one is just the prior."""
    rng = np.random.default_rng(seed)
    mean = rng.normal([[[[5.0]], [[-1.0]], [[0.0]]]], [[[[2.0]], [[0.5]], [[0.0]]]], size=(num_samples, 3, 4, 4))
    log_variance = np.log(np.broadcast_to(np.array([0.01, 0.3, 1.0])[:, None, None], mean.shape))
    return np.stack([mean, log_variance], axis=1).astype(np.float32)


def sums_of(values: np.ndarray) -> ChannelSums:
    sums = ChannelSums.empty(3)
    for sample in values:
        sums.add(sample)
    return sums


def test_the_statistics_are_those_of_latents_drawn_from_the_posteriors() -> None:
    values = moments(500)
    noise = np.random.default_rng(1).normal(size=values[:, 0].shape)
    drawn = values[:, 0] + np.exp(0.5 * values[:, 1]) * noise
    sums = sums_of(values)
    np.testing.assert_allclose(sums.channel_mean, drawn.mean(axis=(0, 2, 3)), atol=0.05)
    np.testing.assert_allclose(sums.std, drawn.std(axis=(0, 2, 3)), rtol=0.02)


def test_parts_merge_to_the_whole_and_survive_json_to_the_bit() -> None:
    values = moments(60)
    parts = [sums_of(values[:7]), ChannelSums.empty(3), sums_of(values[7:40]), sums_of(values[40:])]
    travelled = [ChannelSums.from_json(json.loads(json.dumps(part.to_json()))) for part in parts]
    merged, whole = ChannelSums.merged(travelled), sums_of(values)
    assert merged.summary() == ChannelSums.merged(parts).summary()
    np.testing.assert_allclose(merged.std, whole.std, rtol=1e-12)
    np.testing.assert_array_equal(merged.low, values[:, 0].min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(merged.high, values[:, 0].max(axis=(0, 2, 3)))


def test_a_channel_that_is_only_prior_is_not_active() -> None:
    assert sums_of(moments(50)).active.tolist() == [True, True, False]


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no training shard was encoded"):
        ChannelSums.merged([ChannelSums.empty(3)])
