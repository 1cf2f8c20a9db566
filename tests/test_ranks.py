"""Laws of several ranks: they agree on what is bad, notice when one goes astray, and say where one hangs."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import socket, start_ranks, start_warm, wait_until
from torch import Tensor
from warm import WarmProcess

from pipelines.runtime.training import replica_check
from pipelines.runtime.training.replica_check import ReplicaCheck, ReplicaError

PROGRAM = Path(__file__).with_name("tiny_training.py")
K = 5


def start(folder: Path, *recipes: dict[str, Any], world_size: int = 2) -> list[WarmProcess]:
    """Start the ranks of a tiny training; each recipe is trained after the other."""
    folder.mkdir(exist_ok=True)
    return start_ranks(str(PROGRAM), str(folder), *(json.dumps(recipe) for recipe in recipes), world_size=world_size)


SELF_TEST = {"updates": 20, "replica_check_every": K}
RECIPES: dict[str, dict[str, Any]] = {
    "healthy": {"config": SELF_TEST},
    "flipped bit": {"flip_after": 7, "on_rank": 1, "config": SELF_TEST},
    "flipped bit before a save": {"flip_after": 6, "on_rank": 1, "config": {"replica_check_every": 0}},
    "same samples": {"same_samples": True, "dropout": 0.0, "config": SELF_TEST},
    "silent term": {"silent_term": True, "on_rank": 1, "config": SELF_TEST},
    "still average": {"still_average": True, "config": SELF_TEST},
    "skipped on one rank": {
        "faults": {3: "data", 6: "loss", 9: "gradient", 10: "second", 21: "weights"},
        "on_rank": 1,
        "config": {"on_bad_update": {"policy": "skip"}},
    },
    "sharded": {
        "faults": {3: "data", 6: "loss", 9: "gradient", 10: "second"},
        "leave_out": [*range(14, 22)],
        "on_rank": 1,
        "config": {"on_bad_update": {"policy": "skip"}, "shard_optimizer": True},
    },
    # The weights went bad after the checkpoint of update 10, which was made of batch 13.
    "left out": {"leave_out": [3, 6, 9, 10, *range(14, 22)]},
    "slow": {"slow_seconds": 0.15, "on_rank": 1, "config": {"updates": 7}},
}


@pytest.mark.soak
def test_four_ranks_that_were_stopped_end_as_if_they_had_not(tmp_path: Path) -> None:
    """From three ranks on it matters in which order their gradients are summed."""
    rest = {"config": {"updates": 25}}
    ranks = start(tmp_path, rest, {**rest, "raise_after": 13}, world_size=4)
    printed = [process.communicate(timeout=200) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0, 0], printed
    shutil.copytree(tmp_path / "1", tmp_path / "again" / "0")
    assert (tmp_path / "1/checkpoints/update-00000010").is_dir()
    ranks = start(tmp_path / "again", rest, world_size=4)
    printed = [process.communicate(timeout=200) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0, 0, 0], printed
    whole, continued = (
        json.loads((folder / "0-rank-0.json").read_bytes()) for folder in (tmp_path, tmp_path / "again")
    )
    assert continued["sum"] == whole["sum"]
    assert continued["rows"][0]["update"] == 11
    losses = [{row["update"]: row["train/loss"] for row in run["rows"]} for run in (whole, continued)]
    assert all(losses[0][update] == loss for update, loss in losses[1].items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """How each recipe ended on each of two ranks."""
    ranks = start(folder, *RECIPES.values())
    printed = [process.communicate(timeout=200) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    found = {
        name: [json.loads((folder / f"{number}-rank-{rank}.json").read_bytes()) for rank in range(2)]
        for number, name in enumerate(RECIPES)
    }
    found["printed"] = [{"out": out, "err": err} for out, err in printed]
    return found


def test_a_healthy_training_passes_its_self_tests(ended: dict[str, Any]) -> None:
    assert [rank["ended"] for rank in ended["healthy"]] == ["done", "done"]
    assert ended["healthy"][0]["sum"] == ended["healthy"][1]["sum"]


@pytest.mark.parametrize(
    ("name", "message", "latest"),
    [
        ("flipped bit", "Rank 1 holds other bits than the other ranks before update 10: first, 0.weight", 10),
        ("flipped bit before a save", "Rank 1 holds other bits than the other ranks after update 10: first, 0.w", 10),
        ("same samples", "Ranks 0 and 1 have the same gradients in update 1", 1),
        ("silent term", "No gradient comes in update 1 on rank 1 from the loss term ", 1),
        ("still average", "Nothing of first_averages has moved in update 1", 1),
    ],
)
def test_the_self_test_names_what_has_gone_astray(name: str, message: str, latest: int, ended: dict[str, Any]) -> None:
    for rank in ended[name]:
        assert rank["ended"].startswith(f"ReplicaError: {message}"), rank["ended"]
        assert rank["update"] <= latest
    assert ended["silent term"][1]["ended"].endswith("the loss term size.")


def test_an_optimizer_in_shards_makes_the_bits_of_a_whole_one(ended: dict[str, Any], folder: Path) -> None:
    """Through updates that do not count, down to the files of a checkpoint."""
    whole, sharded = ended["left out"], ended["sharded"]
    assert [rank["ended"] for rank in sharded] == ["done", "done"]
    first, second = (folder / str(list(RECIPES).index(name)) / "checkpoints" for name in ("left out", "sharded"))
    compared = [path for name in ("first", "second") for path in first.glob(f"*/{name}*.safetensors")]
    assert len(compared) == 2 * 5
    for path in compared:
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path
    assert sum(rank["moments"] for rank in sharded) == whole[0]["moments"] == whole[1]["moments"]
    assert max(rank["moments"] for rank in sharded) < 0.6 * whole[0]["moments"]


def simulated_check(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int, others: Callable[[Tensor], None]
) -> tuple[ReplicaCheck, list[int]]:
    """Return the check of rank 0 of many, and how many numbers it sends; ``others`` changes what the others sent."""
    sent: list[int] = []

    def gathered(values: Tensor, accelerator: object) -> Tensor:
        sent.append(values.numel())
        table = values.expand(num_ranks, *values.shape).clone()
        others(table)
        return table

    monkeypatch.setattr(replica_check, "gathered", gathered)
    accelerator: Any = SimpleNamespace(num_processes=num_ranks, process_index=0, device="cpu")
    tensors = {f"layer.{number}": torch.full((3,), float(number)) for number in range(60)}
    return ReplicaCheck({"net": SimpleNamespace(tensors=lambda: tensors)}, accelerator, every=1), sent


def add_by_rank(table: Tensor, values: Tensor) -> None:
    table.add_(values.view(-1, *[1] * (table.ndim - 1)))


def test_the_replica_check_of_many_ranks_compares_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.process_time()
    check, sent = simulated_check(monkeypatch, 2048, lambda table: None)
    check.compare("now")
    check, sent_of_gradients = simulated_check(monkeypatch, 2048, lambda table: add_by_rank(table, torch.arange(2048)))
    check._local = {str(number): torch.zeros(2, dtype=torch.int64) for number in range(60)}
    check._local_must_differ("now")
    assert time.process_time() - began < 1.5
    assert sent == sent_of_gradients == [1], "healthy ranks send one number each, whatever the number of tensors"


def test_of_many_ranks_the_replica_check_names_the_odd_one_of_the_first_odd_tensor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def others(table: Tensor) -> None:
        for rank, number in ((300, 7), (400, 2)):
            (table[rank, number] if table.ndim > 1 else table[rank : rank + 1]).add_(1)

    check, _ = simulated_check(monkeypatch, 512, others)
    with pytest.raises(ReplicaError, match=r"Rank 400 holds other bits than the other ranks now: net, layer.2\."):
        check.compare("now")
    check, _ = simulated_check(monkeypatch, 512, lambda table: add_by_rank(table, torch.arange(512).clamp(max=510)))
    check._local = {"0, weight": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ReplicaError, match="Ranks 510 and 511 have the same gradients now"):
        check._local_must_differ("now")


def test_what_the_main_process_finds_or_cannot_find_reaches_every_rank(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "from pipelines.runtime.config.stage_config import RunConfig\n"
        "from pipelines.runtime.stage.launch import json_from_main, start_accelerator\n"
        "accelerator = start_accelerator(RunConfig(threads=1))\n"
        "find = lambda: ['\\u00fc', [1, None]] if accelerator.is_main_process else 1 / 0\n"
        "assert json_from_main(find, accelerator) == ['\\u00fc', [1, None]]\n"
        "try: json_from_main(lambda: open('/no/such/shard'), accelerator)\n"
        "except ValueError as error: print(error)\n"
        "accelerator.end_training()\n"
    )
    ranks = start_ranks(str(tmp_path / "rank.py"))
    printed = [rank.communicate(timeout=120) for rank in ranks]
    assert [out for out, _ in printed] == ["[Errno 2] No such file or directory: '/no/such/shard'\n"] * 2, printed


def test_a_changed_listing_is_refused_by_every_rank_before_its_first_shard(tmp_path: Path) -> None:
    (tmp_path / "listing.json").write_text(json.dumps({"sha256": "of another listing"}))
    (tmp_path / "rank.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from pipelines.prepare_corpus import check_listing\n"
        "from pipelines.runtime.config.errors import ConfigError\n"
        "from pipelines.runtime.config.stage_config import RunConfig\n"
        "from pipelines.runtime.stage.launch import start_accelerator\n"
        "accelerator = start_accelerator(RunConfig(threads=1))\n"
        "is_main = accelerator.is_main_process\n"
        "stage = SimpleNamespace(folder=Path(sys.argv[1]), accelerator=accelerator, is_main=is_main)\n"
        "try: check_listing(SimpleNamespace(listing=lambda: ['a.png']), stage); print('begins a shard')\n"
        "except ConfigError as error: print(error)\n"
        "accelerator.end_training()\n"
    )
    printed = [rank.communicate(timeout=120) for rank in start_ranks(str(tmp_path / "rank.py"), str(tmp_path))]
    refusal = f"prepare_corpus.source: its files are not those that {tmp_path} was begun with"
    assert all(out.startswith(refusal) for out, _ in printed), printed


def test_all_ranks_skip_what_is_bad_on_one(ended: dict[str, Any]) -> None:
    skipped, without = ended["skipped on one rank"], ended["left out"]
    assert [rank["ended"] for rank in skipped] == ["done", "done"]
    assert skipped[0]["sum"] == skipped[1]["sum"] == without[0]["sum"]
    losses = [{row["batch"]: row["train/loss"] for row in run[0]["rows"]} for run in (skipped, without)]
    assert all(losses[0][batch] == loss for batch, loss in losses[1].items())


def test_a_straggler_is_named(ended: dict[str, Any]) -> None:
    row = ended["slow"][0]["rows"][-1]
    assert row["perf/slowest_rank"] == 1
    assert row["perf/own_seconds/rank_1"] > 0.15 > row["perf/own_seconds/rank_0"]
    assert f"rank 1 on {socket.gethostname()} delays the others" in ended["printed"][0]["out"]


def test_a_hanging_rank_is_reported_by_all_and_ends_them(tmp_path: Path) -> None:
    ranks = start(tmp_path, {"hang_in": 4, "on_rank": 1, "config": {"hang_seconds": 4.0}})
    printed = [process.communicate(timeout=200) for process in ranks]
    assert all(process.returncode not in (0, None) for process in ranks), printed
    for rank in range(2):
        report = (tmp_path / f"0/watchdog/rank-{rank:04}.report.txt").read_text()
        assert "in update 4 (batch 3)" in report
        assert "sample-3-" in report
    stack = (tmp_path / "0/watchdog/rank-0001.report.txt").read_text()
    assert "one_update" in stack
    assert "tiny_training.py" in stack
    assert json.loads((tmp_path / "0/outcome.json").read_bytes())["state"] == "failed"


@pytest.mark.soak
def test_a_rank_that_hangs_in_native_code_ends_too(tmp_path: Path) -> None:
    ranks = start(tmp_path, {"hang_in": 14, "on_rank": 1, "natively": True, "config": {"hang_seconds": 4.0}})
    printed = [process.communicate(timeout=200) for process in ranks]
    assert all(process.returncode not in (0, None) for process in ranks), printed
    assert "one_update" in printed[1][1]
    assert "in update 14 (batch 13)" in (tmp_path / "0/watchdog/rank-0000.report.txt").read_text()
    ranks = start(tmp_path, {})  # and the same command continues
    printed = [process.communicate(timeout=200) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], printed
    found = json.loads((tmp_path / "0-rank-0.json").read_bytes())
    assert (found["ended"], found["update"], found["rows"][0]["update"]) == ("done", 40, 11)


def test_a_frozen_rank_is_named_by_the_others(tmp_path: Path) -> None:
    config = {"updates": 100_000, "hang_seconds": 4.0, "checkpoint": {"every_updates": 100_000}}
    ranks = start(tmp_path, {"config": config})
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "0/watchdog/rank-0001.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(1)
        os.kill(ranks[1].pid, signal.SIGSTOP)
        out, err = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 1, (out, err)
        report = (tmp_path / "0/watchdog/rank-0000.report.txt").read_text()
        assert f"process {ranks[1].pid}: in update" in report
        assert "all_reduce" in report or "backward" in report
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.parametrize("launcher_lives", [True, False])
def test_a_rank_whose_launcher_died_while_it_was_importing_ends_too(launcher_lives: bool) -> None:
    """The kernel tells of a parent's death only who has asked for it before."""
    code = (
        "import os, sys, time\n"
        "from pipelines.runtime.stage.launch import exit_with_launcher\n"
        "launcher = os.getpid()\n"
        "rank = os.fork()\n"
        "if rank:\n"
        "    sys.argv[1] == 'True' and os.waitpid(rank, 0)\n"
        "    os._exit(0)\n"
        "while sys.argv[1] == 'False' and os.getppid() == launcher: time.sleep(0.01)\n"
        "try: exit_with_launcher(); print('lives', flush=True)\n"
        "except SystemExit as end: print(end, flush=True)\n"
    )
    launcher = start_warm("-c", code, str(launcher_lives), TORCHELASTIC_RUN_ID="none", LOCAL_RANK="0")
    assert launcher.wait(timeout=60) == 0
    wait_until(launcher.printed, seconds=60, what="the rank's answer")
    assert launcher.printed() == ("lives\n" if launcher_lives else "The launcher of this process is gone.\n")
