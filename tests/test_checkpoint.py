"""Laws of checkpoints: whole or absent, verified, never fewer than one good one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

from pipelines.runtime.checkpoint import CheckpointConfig, Checkpoints, DamagedCheckpoint, verify


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
    store = checkpoints(tmp_path)
    save(store, 1)
    save(store, 2)
    for file in sorted((tmp_path / "update-00000002").iterdir()):
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
    (tmp_path / "update-00000002" / "model.safetensors").write_bytes(b"short")
    assert store.newest_intact() == 1
    assert "model.safetensors is damaged" in capfd.readouterr().err
    assert (tmp_path / "damaged-update-00000002").is_dir()


def test_a_failing_disk_is_reported_and_costs_no_good_checkpoint(tmp_path: Path) -> None:
    store = checkpoints(tmp_path, keep_last=1)
    save(store, 1)
    blocker = tmp_path / "update-00000002"
    store.save(2, {"model": {"w": torch.zeros(1)}}, {"not json": float("nan")})
    with pytest.raises(OSError, match="could not be written to .* Those before it are intact"):
        store.wait()
    assert not blocker.exists()
    assert store.newest_intact() == 1


@pytest.mark.parametrize("call", ["fsync", "rename", "openat"])
def test_killed_in_any_system_call_of_a_save_the_one_before_is_good(call: str, tmp_path: Path) -> None:
    """The process kills itself at the n-th call of ``os.fsync``, ``os.rename`` or ``os.open``."""
    code = (
        "import os, signal, sys, torch\nfrom pathlib import Path\n"
        "from pipelines.runtime.checkpoint import CheckpointConfig, Checkpoints\n"
        "store = Checkpoints(Path(sys.argv[1]), CheckpointConfig(keep_last=1), writes=True)\n"
        "name, left = sys.argv[2], int(sys.argv[3])\nreal = getattr(os, name)\n"
        "def dying(*a, **k):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*a, **k)\n"
        "start = max([0, *store.updates()])\n"
        "setattr(os, name, dying)\n"
        "store._commit(start + 1, {'model': {'w': torch.full((3,), start + 1.0)}}, {'next_batch': start + 1})\n"
    )
    function = {"fsync": "fsync", "rename": "rename", "openat": "open"}[call]
    save(checkpoints(tmp_path), 1)
    deaths = 0
    for survived in range(0, 12, 3):
        words = [sys.executable, "-c", code, str(tmp_path), function, str(survived)]
        done = subprocess.run(words, env=environment(), capture_output=True, check=False)
        deaths += done.returncode == -9
        newest = checkpoints(tmp_path).newest_intact()
        assert newest >= 1
        assert checkpoints(tmp_path).read(newest).state["next_batch"] == newest
    assert deaths >= 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith("damaged")]
