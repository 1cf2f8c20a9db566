"""The measuring itself: a known ratio is found, a control holds 1, and two sides that differ are not timed."""

import time

import numpy as np
import pytest
from clocks import quietest_round

from pipelines.tools.benchmark_data import check_same
from pipelines.tools.paired_timing import Ratio, compare


def test_a_known_ratio_is_found_and_the_control_holds_one() -> None:
    def errors() -> list[float]:
        found = compare(lambda: time.sleep(0.02), lambda: time.sleep(0.06), units=(1, 1), rounds=7, clock="wall")
        assert found.faster.low <= found.faster.median <= found.faster.high
        twice = compare(lambda: time.sleep(0.02), lambda: time.sleep(0.02), units=(2, 1), rounds=7, clock="wall")
        return [abs(found.faster.median / 3 - 1), abs(found.control.median - 1), abs(twice.faster.median / 2 - 1)]

    assert max(quietest_round(errors, limit=0.3, rounds=5)) < 0.3


def test_sleeping_costs_no_cpu_seconds() -> None:
    def work() -> None:
        sum(range(200_000))

    found = compare(lambda: (time.sleep(0.05), work()), work, units=(1, 1), rounds=5, clock="cpu")
    assert found.faster.median > 0.5


def test_the_interval_is_narrow_for_steady_ratios_and_wide_for_restless_ones() -> None:
    steady, restless = Ratio.of([2.0] * 9), Ratio.of([1.0, 9.0, 2.0, 5.0, 3.0])
    assert (steady.low, steady.median, steady.high) == (2, 2, 2)
    assert restless.low < restless.median < restless.high


def test_sides_that_read_different_samples_are_not_timed() -> None:
    one = {"a": np.zeros(3, dtype=np.uint8), "b": np.ones(3, dtype=np.uint8)}
    check_same(one, {key: value.copy() for key, value in one.items()})
    with pytest.raises(ValueError, match="different samples: 2 and 1"):
        check_same(one, {"a": one["a"]})
    with pytest.raises(ValueError, match="b differs by 1 on average"):
        check_same(one, {**one, "b": np.full(3, 2, dtype=np.uint8)})
    check_same(one, {**one, "b": np.full(3, 2, dtype=np.uint8)}, within=1.0)
