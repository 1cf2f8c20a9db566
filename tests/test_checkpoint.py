"""Laws of checkpoints: whole or absent, verified, never fewer than one good one."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_training import Recipe, Rows, Tiny

from data.files import sha256_of
from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.provenance import code_version, exactness, made_by
from pipelines.runtime.stage.stage import running_stage
from pipelines.runtime.training.checkpoint import (
    Best,
    BestBy,
    Checkpoint,
    CheckpointConfig,
    Checkpoints,
    DamagedCheckpoint,
    Weights,
    verify,
)
from pipelines.runtime.training.config import TrainingConfig


def commit_again(checkpoint: Path) -> None:
    """Write the manifest of what a checkpoint's folder holds now."""
    (checkpoint / "manifest.json").unlink()
    files = [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in checkpoint.iterdir()]
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))


def checkpoints(folder: Path, **config: int) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**config), writes=True)


def save(store: Checkpoints, update: int) -> None:
    store.save(update, {"model": {"w": torch.full((3,), float(update))}}, {"next_batch": update})
    store.wait()


def test_what_was_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    weights = {
        "a": torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "b": torch.tensor(3, dtype=torch.int64),
    }
    store.save(7, {"model": weights, "optimizer": {"m": torch.randn(5)}}, {"next_batch": 9})
    store.wait()
    found = checkpoints(tmp_path).read(7)
    assert found.state == {"next_batch": 9}
    assert all(torch.equal(found.parts["model"][name], tensor) for name, tensor in weights.items())


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    store, weights = checkpoints(tmp_path), torch.zeros(1_000_000)
    store.save(1, {"model": {"w": weights}}, {})
    weights.fill_(1.0)
    store.wait()
    assert store.read(1).parts["model"]["w"].sum() == 0


def test_the_newest_stay_and_every_nth_stays_for_good(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=2, keep_every=30)
    for update in range(10, 100, 10):
        save(store, update)
    assert store.updates() == [30, 60, 80, 90]


def test_a_flipped_bit_in_any_file_is_found_and_the_checkpoint_before_is_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Tiny(tmp_path, Recipe(config={"updates": 20})).run()
    newest = tmp_path / "checkpoints/update-00000020"
    verify(newest)
    files = sorted(newest.iterdir())
    assert len(files) == 8, "two networks, two optimizers, averages, anomalies, state and manifest"
    for file in files:
        intact = file.read_bytes()
        for position in {0, len(intact) // 2, len(intact) - 1}:
            broken = bytearray(intact)
            broken[position] ^= 1
            file.write_bytes(bytes(broken))
            if file.name == "manifest.json" and position == len(intact) - 1:
                continue  # the newline behind the JSON
            with pytest.raises(DamagedCheckpoint, match="is damaged"):
                verify(file.parent)
        file.write_bytes(intact)
    (newest / "first.safetensors").write_bytes(b"short")
    assert checkpoints(newest.parent).newest_intact() == 10
    assert "first.safetensors has 5 bytes" in capfd.readouterr().err
    assert (newest.parent / "damaged-update-00000020").is_dir()


def test_a_failing_disk_is_reported_and_costs_no_good_checkpoint(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=1)
    save(store, 1)
    blocker = tmp_path / "update-00000002"
    store.save(2, {"model": {"w": torch.zeros(1)}}, {"not json": float("nan")})
    with pytest.raises(OSError, match="could not be written to .* Those before it are intact"):
        store.wait()
    assert not blocker.exists()
    assert store.newest_intact() == 1


def test_a_checkpoint_with_a_number_that_is_not_finite_is_never_committed(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save(store, 1)
    store.save(2, {"model": {"w": torch.tensor([1.0, float("nan")])}}, {})
    with pytest.raises(OSError, match="model, w is not finite"):
        store.wait()
    assert store.updates() == [1]


def test_the_best_by_a_metric_stays_and_is_saved_between_the_others(tmp_path: Path) -> None:
    config = {
        "validate_every": 4,
        "checkpoint": {"every_updates": 15, "keep_last": 1, "best": {"kind": "metric", "metric": "val/loss"}},
    }
    tiny = Tiny(tmp_path, Recipe(config=config)).run()  # its val/loss is (update - 20)^2
    assert checkpoints(tmp_path / "checkpoints").updates() == [20, 40]
    again = Tiny(tmp_path, Recipe(config={**config, "updates": 44})).run()
    assert checkpoints(tmp_path / "checkpoints").updates() == [20, 44]
    assert tiny.training.update == 40
    assert again.training.update == 44


@pytest.mark.parametrize(
    ("metric", "better", "values"), [("other", "lower", (30, 10)), ("val", "higher", (0.04, 0.06))]
)
def test_a_best_of_another_metric_or_direction_is_no_best(
    metric: str, better: str, values: tuple[float, float]
) -> None:
    before = Best(BestBy(metric="val"))
    assert before.beaten_by({"val": 0.05}, update=1)
    after = Best(BestBy(metric=metric, better=better))
    after.found = before.found
    assert [after.beaten_by({metric: value}, update=2 + number) for number, value in enumerate(values)] == [True, True]


def test_a_folder_that_a_user_set_aside_is_no_checkpoint(tmp_path: Path) -> None:
    store = checkpoints(tmp_path)
    save(store, 1)
    store.wait()
    shutil.copytree(tmp_path / "update-00000001", tmp_path / "update-00000001.bak")
    assert checkpoints(tmp_path).updates() == [1]


def test_an_error_ends_the_training_only_when_its_last_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage gives the folder's lock back then: a writer that goes on would meet the next start."""
    tiny = Tiny(tmp_path, Recipe(raise_after=11))
    monkeypatch.setattr(tiny.tracker, "flush", lambda: time.sleep(0.5))
    with pytest.raises(InterruptedError, match="the stage's own"):
        tiny.run()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "checkpoint writer"]
    assert checkpoints(tmp_path / "checkpoints").updates() == [10]


def test_a_metric_that_nobody_measures_is_refused(tmp_path: Path) -> None:
    config = {"checkpoint": {"best": {"kind": "metric", "metric": "val/los"}}}
    with pytest.raises(ConfigError, match="'val/los' is not measured here; measured are val/loss"):
        Tiny(tmp_path / "new", Recipe(config=config)).run()
    # A restart does not wait for its next validation.
    Tiny(tmp_path / "begun", Recipe(config={"updates": 20})).run()
    again = Tiny(tmp_path / "begun", Recipe(config={**config, "validate_every": 30}))
    with pytest.raises(ConfigError, match="'val/los' is not measured here; measured are val/loss"):
        again.run()
    assert not again.tracker.rows


def test_a_training_that_has_made_more_updates_than_it_is_to_make_is_refused(tmp_path: Path) -> None:
    Tiny(tmp_path, Recipe(config={"updates": 20})).run()
    with pytest.raises(ConfigError, match=r"has made 20 updates, but tiny\.updates = 10: give at least 20"):
        Tiny(tmp_path, Recipe(config={"updates": 10})).run()


def test_checkpoints_that_stay_for_good_are_written_whatever_the_others_are(tmp_path: Path) -> None:
    config = {"updates": 40, "checkpoint": {"every_updates": 15, "keep_every": 12, "keep_last": 1}}
    Tiny(tmp_path, Recipe(config=config)).run()
    assert checkpoints(tmp_path / "checkpoints").updates() == [12, 24, 36, 40]


def test_a_checkpoint_says_what_its_bits_depend_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = Tiny(tmp_path, Recipe(config={"updates": 10})).run()
    path = tmp_path / "checkpoints/update-00000010/state.json"
    state = json.loads(path.read_bytes())
    assert state["images"] == 10 * 8
    assert tiny.tracker.rows[-1]["progress/images"] == 10 * 8
    assert state["next_batch"] == 10
    assert (state["world_size"], state["threads"]) == (1, 1)
    assert len(state["config"]) == 64
    assert state["code"] == code_version()
    Tiny(tmp_path, Recipe(config={"updates": 10, "log_every": 3})).run()
    assert "continuing after update 10, bit for bit" in capsys.readouterr().out
    path.write_text(json.dumps({**state, "code": "0000"}))
    commit_again(path.parent)
    Tiny(tmp_path, Recipe(config={"updates": 10})).run()
    assert f"to rounding at best, since code was 0000, is now {code_version()}" in capsys.readouterr().out


def test_a_finished_training_goes_on_from_its_last_checkpoint_as_one_that_was_never_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Tiny(tmp_path / "whole", Recipe(config={"updates": 40})).run()
    Tiny(tmp_path / "unet", Recipe(config={"updates": 20})).run()
    manifest = tmp_path / "unet" / "manifest.json"
    manifest.write_text("{}")
    there: list[bool] = []
    longer = Tiny(tmp_path / "unet", Recipe(config={"updates": 40}))
    longer.after_update = lambda update: there.append(manifest.exists())
    longer.run()
    assert there == [False] * 20
    assert (
        "was finished after update 20: its manifest is removed, it trains on until update 40" in capsys.readouterr().out
    )
    assert longer.tensors().keys() == whole.tensors().keys()
    assert all(torch.equal(value, longer.tensors()[name]) for name, value in whole.tensors().items())


def test_a_finished_training_without_checkpoints_is_left_as_it_is(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text("{}")
    with pytest.raises(ConfigError, match="is finished and holds no intact checkpoint to train on from"):
        Tiny(tmp_path, Recipe(config={"updates": 40})).run()
    assert manifest.exists()


def test_a_gpu_without_deterministic_kernels_and_another_library_or_processor_are_not_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

    def made(device: str, *, deterministic: bool = False) -> dict[str, object]:
        run = RunConfig(deterministic=deterministic)
        return made_by({}, run, world_size=1, device=torch.device(device))

    cpu, gpu, any_order = made("cpu"), made("cuda", deterministic=True), made("cuda")
    assert exactness(cpu, cpu) == exactness(gpu, gpu) == "bit for bit"
    assert exactness(any_order, any_order) == (
        "to rounding at best, since kernels of a GPU sum in any order with run.deterministic = false"
    )
    other = {"torch": "2.10.0", "cudnn": 90100, "processor": "NVIDIA H100", "attention": "math"}
    for name, value in other.items():
        assert f"to rounding at best, since {name} was {value}, is now " in exactness({**gpu, name: value}, gpu)
    older = {name: value for name, value in cpu.items() if name != "torch"}
    assert "torch was not recorded, is now" in exactness(older, cpu)
    assert "processor was" in exactness(gpu, cpu)


@pytest.mark.parametrize("change", ["renamed", "missing", "unknown"])
def test_a_checkpoint_with_other_parts_than_the_training_is_refused_with_exit_code_2(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an older version wrote it, which had another name for a part."""
    Tiny(tmp_path / "unet", Recipe(config={"updates": 10})).run()
    newest = tmp_path / "unet/checkpoints/update-00000010"
    part = (newest / "anomalies.safetensors").read_bytes()
    if change != "unknown":
        (newest / "anomalies.safetensors").unlink()
    if change != "missing":
        (newest / "verdicts.safetensors").write_bytes(part)
    commit_again(newest)
    given = {"updates": 4, "global_batch": 2, "run": {"root": str(tmp_path), "tracking_uri": "offline"}}
    config = TrainingConfig.model_validate_json(json.dumps(given))
    with pytest.raises(SystemExit) as end, running_stage(config, name="train_unet"):
        Tiny(tmp_path / "unet", Recipe(config={"updates": 10})).run()
    assert end.value.code == 2
    said = capsys.readouterr().err
    held = {"renamed": "", "missing": "", "unknown": "anomalies, "}[change] + "first, first_averages, first_optimizer"
    others = "" if change == "missing" else ", verdicts"
    assert f"update-00000010 holds {held}, second, second_optimizer{others}, but this training consists of anom" in said
    assert "Finish it with that version, or begin anew with another run.root." in said


def test_a_part_that_a_changed_configuration_has_dropped_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Tiny(tmp_path, Recipe(config={"updates": 10})).run()
    newest = tmp_path / "checkpoints/update-00000010"
    (newest / "loss_scale.safetensors").write_bytes((newest / "anomalies.safetensors").read_bytes())
    commit_again(newest)
    # Of what killed runs wrote behind the checkpoint, lines of other configurations are not these. The change was
    # accepted by a start that ended before its first checkpoint, and is not accepted again.
    monkeypatch.setattr(Rows, "resume_after", lambda self, update: 2)
    first = Tiny(tmp_path, Recipe(config={"updates": 20})).run().tracker.rows[0]
    assert (first["update"], first["attempt"]) == (11, 3)


def test_a_part_of_another_shape_is_refused_with_advice() -> None:
    part = Weights(torch.nn.Linear(2, 3))
    checkpoint = Checkpoint(
        path=Path("update-5"), update=5, parts={"net": Weights(torch.nn.Linear(2, 2)).tensors()}, state={}
    )
    with pytest.raises(ConfigError, match=r"(?s)update-5, net: .*size mismatch.* Take back what was changed"):
        checkpoint.load_into({"net": part}, changed=True)
