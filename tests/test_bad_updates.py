"""Laws of updates that do not count: NaN, infinity and spikes leave no trace, and what was in them is written down."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import Recipe, Tiny
from torch import Tensor

from pipelines.runtime.training.anomalies import AnomalyDetector, BadUpdateConfig
from pipelines.runtime.training.optim import LossScale


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def policy(name: str, **more: float) -> dict[str, object]:
    return {"on_bad_update": {"policy": name, **more}}


def batches_of(tiny: Tiny) -> list[int]:
    return [row["batch"] for row in tiny.tracker.rows]


def test_twenty_bad_batches_leave_no_trace_when_they_are_skipped(tmp_path: Path) -> None:
    rng = random.Random(0)
    faults = {batch: rng.choice(["data", "loss", "gradient", "second"]) for batch in rng.sample(range(60), 20)}
    skipped = Tiny(tmp_path / "a", Recipe(faults=faults, config=policy("skip"))).run()
    without = Tiny(tmp_path / "b", Recipe(leave_out=tuple(faults))).run()
    assert same(skipped.tensors(), without.tensors())
    assert batches_of(skipped) == batches_of(without)
    assert [row["update"] for row in skipped.tracker.rows] == list(range(1, 41))
    written = {int(path.stem[-8:]) for path in (tmp_path / "a/bad_updates").iterdir()}
    assert written == {batch for batch in faults if batch < skipped.training.next_batch}
    assert len(written) > 10


@pytest.mark.parametrize("kind", ["data", "loss", "gradient", "second"])
def test_stopping_names_the_samples_and_keeps_the_weights_of_the_update_before(kind: str, tmp_path: Path) -> None:
    stopped = Tiny(tmp_path / "a", Recipe(faults={12: kind}))
    with pytest.raises(FloatingPointError, match=r"Update 13 \(batch 12\) does not count.*Lower optim.peak_lr"):
        stopped.run()
    assert same(stopped.tensors(), Tiny(tmp_path / "b", Recipe(config={"updates": 12})).run().tensors())
    found = json.loads((tmp_path / "a/bad_updates/update-00000013-batch-00000012.json").read_bytes())
    assert found["keys_by_rank"] == [[f"sample-12-{position}" for position in range(8)]]
    assert found["ranks"] == ([] if kind == "gradient" else [0])
    assert [row["update"] for row in stopped.tracker.rows] == list(range(1, 13))


def test_rewinding_goes_back_to_the_checkpoint_and_past_the_batch(tmp_path: Path) -> None:
    rewound = Tiny(tmp_path / "a", Recipe(faults={25: "gradient"}, config=policy("rewind"))).run()
    without = Tiny(tmp_path / "b", Recipe(leave_out=tuple(range(20, 26)))).run()
    assert same(rewound.tensors(), without.tensors())
    again = [row for row in rewound.tracker.rows if row.get("attempt") == 2]
    assert [(row["update"], row["batch"]) for row in again[:2]] == [(21, 26), (22, 27)]
    first = [row["update"] for row in rewound.tracker.rows if "attempt" not in row]
    assert first == list(range(1, 26))


@pytest.mark.parametrize("name", ["skip", "rewind"])
def test_weights_that_went_bad_come_back_from_the_checkpoint(name: str, tmp_path: Path) -> None:
    mended = Tiny(tmp_path / "a", Recipe(faults={25: "weights"}, config=policy(name))).run()
    without = Tiny(tmp_path / "b", Recipe(leave_out=tuple(range(20, 26)))).run()
    assert same(mended.tensors(), without.tensors())


def test_weights_that_went_bad_before_any_checkpoint_end_the_training(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"The weights themselves are not finite \(first, 0.weight\)"):
        Tiny(tmp_path, Recipe(faults={5: "weights"}, config=policy("skip"))).run()


def test_a_spike_is_refused_and_an_ordinary_loss_is_not(tmp_path: Path) -> None:
    spiky = policy("skip", spike_factor=20.0, spike_span=10)
    # Two in a row: the first must not lift the mean that the second is compared with.
    refused = Tiny(tmp_path / "a", Recipe(faults={30: "spike", 31: "spike"}, config=spiky)).run()
    without = Tiny(tmp_path / "b", Recipe(leave_out=(30, 31), config=spiky)).run()
    assert same(refused.tensors(), without.tensors())
    assert "jumped to" in (tmp_path / "a/bad_updates/update-00000031-batch-00000030.json").read_text()
    early = Tiny(tmp_path / "c", Recipe(faults={5: "spike"}, config=spiky)).run()
    assert 5 in batches_of(early), "there is no mean yet to compare with"


def test_a_limit_ends_what_would_skip_for_ever(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="It is the 4th; on_bad_update.limit = 3"):
        Tiny(tmp_path, Recipe(faults=dict.fromkeys(range(60), "data"), config=policy("skip", limit=3))).run()


def test_a_run_that_ended_between_skips_continues_as_if_it_had_not(tmp_path: Path) -> None:
    faults = {8: "data", 15: "loss", 16: "gradient", 33: "second"}
    whole = Tiny(tmp_path / "a", Recipe(faults=faults, config=policy("skip"))).run()
    with pytest.raises(InterruptedError):
        Tiny(tmp_path / "b", Recipe(faults=faults, config=policy("skip"), raise_after=27)).run()
    rest = Tiny(tmp_path / "b", Recipe(faults=faults, config=policy("skip"))).run()
    assert same(rest.tensors(), whole.tensors())
    assert rest.training.next_batch == whole.training.next_batch == 44


def test_a_factor_that_would_call_everything_a_spike_is_refused() -> None:
    with pytest.raises(ValueError, match="a factor of 0.5 would call every loss a spike"):
        BadUpdateConfig(spike_factor=0.5)


def test_an_overflow_of_fp16_is_refused_but_no_fault_until_the_scale_is_spent() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))  # makes the scale
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, scaler=scaler)
    anomalies = AnomalyDetector(BadUpdateConfig(), accelerator)
    metrics, norms = {"train/loss": torch.tensor(1.0)}, {"train/grad_norm": torch.tensor(float("inf"))}
    anomalies.check(metrics, norms)
    anomalies.send_to_host(update=1, batch=0, metrics=metrics)
    assert anomalies.refused
    assert anomalies.first_bad(wait=True) is None
    anomalies.check(metrics, {"train/grad_norm": torch.tensor(1.0)})
    assert not anomalies.refused
    twin = torch.amp.GradScaler("cpu")
    twin.scale(torch.ones(1))
    LossScale(twin).load(LossScale(scaler).tensors())
    assert twin.get_scale() == 4.0
    scaler.load_state_dict({**scaler.state_dict(), "scale": 0.5})
    anomalies.check(metrics, norms)
    anomalies.send_to_host(update=3, batch=2, metrics=metrics)
    bad = anomalies.first_bad(wait=True)
    assert bad is not None
    assert bad.update == 3


def test_a_compiled_training_is_the_plain_one_to_rounding(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    config = {"updates": 6, "replica_check_every": 2, "global_batch": 8, "images_per_device": 8}
    plain = Tiny(tmp_path / "a", Recipe(config=config, dropout=0.0)).run()
    compiled = Tiny(tmp_path / "b", Recipe(config={**config, "compile": True}, dropout=0.0)).run()
    assert compiled.first._compiled_call_impl is not None
    for ours, theirs in zip(compiled.tracker.rows, plain.tracker.rows, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
    assert compiled.tensors().keys() == plain.tensors().keys()
