"""The measuring itself: a known ratio is found, a control holds 1, and two sides that differ are not timed."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clocks import quietest_round
from torch import Tensor

from models.autoencoder.vae import AutoencoderKL
from pipelines.tools import benchmark_data
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


def test_the_bare_network_encodes_the_same_batches_in_as_many_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the whole with reading and writing can be "faster" than the network in it."""
    calls: list[tuple[int, float]] = []
    at_once, most_at_once = 0, 0

    def encode(network: AutoencoderKL, images: Tensor) -> Any:
        nonlocal at_once, most_at_once
        at_once += 1
        most_at_once = max(most_at_once, at_once)
        calls.append((threading.get_ident(), float(images.double().sum())))
        time.sleep(0.05)  # so that each thread gets its turn
        posterior = original(network, images)
        at_once -= 1
        return posterior

    def called_by(work: Callable[[], object]) -> tuple[int, list[float]]:
        calls.clear()
        work()
        assert threading.get_ident() not in {thread for thread, _ in calls}
        return len({thread for thread, _ in calls}), sorted(total for _, total in calls)

    def compare(ours: Callable[[], object], theirs: Callable[[], object], **_: object) -> bool:
        assert called_by(ours) == called_by(theirs)
        return True

    original = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    monkeypatch.setattr(benchmark_data, "compare", compare)
    assert benchmark_data.encoding(tmp_path, rounds=1)
    assert most_at_once == 1
