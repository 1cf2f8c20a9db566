"""Numbers that go bad in the two real training stages on two ranks: they leave no trace, and all ranks agree."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    STAGES,
    Run,
    communicated,
    stage_command,
    start_ranks,
    training_rows,
)

from data.files import sha256_of

# The discriminator is_main from update 10 on, so that faults fall before and after.
DISCRIMINATOR = (
    *("--objective.adversary.kind", "patchgan", "--objective.adversary.start.update", "10"),
    *("--objective.adversary.discriminator.channels", "8", "--objective.adversary.discriminator.downsamplings", "1"),
    *("--objective.adversary.discriminator.norm_groups", "8"),
)
# Of the soak tests: longer than the experiment's own, so that faults fall before and after checkpoints.
LONG = ("--updates", "60", "--checkpoint.every_updates", "20")
KINDS = {"train_unet": ["data", "loss", "gradient"], "train_vae": ["data", "loss", "gradient", "second"]}


def train(
    stage: str,
    inputs: Run,
    folder: Path,
    *words: str,
    faults: dict[int, tuple[str, int]] | None = None,
    leave_out: tuple[int, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Train a stage on two ranks below ``folder``, with faults and without some batches."""
    folder.mkdir(exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"faults": faults or {}, "leave_out": leave_out, "records": str(folder)}))
    given = [word for name in ("corpus", "latents", "vae") for word in (f"--inputs.{name}", str(inputs.root / name))]
    given = given[:2] if stage == "train_vae" else given[2:]
    more = DISCRIMINATOR if stage == "train_vae" else ()
    command = stage_command(stage, "--run.root", str(folder / "run"), *given, *more, *words)
    place = command.index(f"pipelines.{stage}")
    command[place : place + 1] = ["faulty_stage", str(plan), stage]
    ranks = start_ranks(*command[1:])
    (out, err), _ = communicated(ranks)
    return subprocess.CompletedProcess(command, max(rank.wait() for rank in ranks), out, err)


def seen_by_ranks(folder: Path) -> list[list[list[int]]]:
    """Which (update, batch) each rank took for bad."""
    return [
        [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()] for rank in range(2)
    ]


def evidence(folder: Path, stage: str) -> dict[int, dict[str, Any]]:
    """What was written about bad batches."""
    found = [json.loads(path.read_bytes()) for path in (folder / "run" / STAGES[stage] / "bad_updates").iterdir()]
    return {entry["batch"]: entry for entry in found}


def losses_by_batch(folder: Path, stage: str) -> dict[int, float]:
    lines = (folder / "run" / STAGES[stage] / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "update" in row]
    return {row["batch"]: row["train/loss"] for row in rows}


def test_bad_batches_of_one_rank_are_skipped_by_all(two_process_run: Run, tmp_path: Path) -> None:
    """Each rank itself looks after every update whether a refused one has moved anything."""
    faults = {0: ("data", 1), 3: ("loss", 0), 4: ("gradient", 1), 7: ("loss", 1)}
    words = ("--updates", "8", "--checkpoint.every_updates", "8", "--on_bad_update.policy", "skip")
    words += ("--validate_samples", "0")
    done = train("train_unet", two_process_run, tmp_path, *words, faults=faults)
    assert done.returncode == 0, done.stderr
    first, second = seen_by_ranks(tmp_path)
    assert first == second == [[1, 0], [3, 3], [3, 4], [5, 7]]
    rows = training_rows(tmp_path / "run/unet")
    assert {update: row["batch"] for update, row in rows.items()} == dict(enumerate([1, 2, 5, 6, 8, 9, 10, 11], 1))
    found = evidence(tmp_path, "train_unet")
    assert {batch: entry["ranks"] for batch, entry in found.items()} == {0: [1], 3: [0], 4: [], 7: [1]}
    keys = [key for share in found[7]["keys_by_rank"] for key in share]
    assert [len(share) for share in found[7]["keys_by_rank"]] == [8, 8]
    assert len(set(keys)) == 16


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["train_unet", "train_vae"])
def test_twenty_bad_batches_of_a_real_stage_leave_no_trace(stage: str, two_process_run: Run, tmp_path: Path) -> None:
    rng = random.Random(stage)
    bad = [0, *rng.sample(range(1, 60), 19)]
    faults = {batch: (KINDS[stage][number % len(KINDS[stage])], rng.randrange(2)) for number, batch in enumerate(bad)}
    done = train(stage, two_process_run, tmp_path / "a", *LONG, "--on_bad_update.policy", "skip", faults=faults)
    assert done.returncode == 0, done.stderr
    without = train(stage, two_process_run, tmp_path / "b", *LONG, leave_out=tuple(faults))
    assert without.returncode == 0, without.stderr
    first, second = seen_by_ranks(tmp_path / "a")
    assert first == second
    assert [batch for _, batch in first] == sorted(bad)
    assert sorted(evidence(tmp_path / "a", stage)) == sorted(bad)
    check_same(stage, tmp_path)


def check_same(stage: str, folder: Path) -> None:
    """The trainings ``a`` and ``b`` have the same losses where both count, and the same weights."""
    losses = [losses_by_batch(folder / name, stage) for name in "ab"]
    assert all(losses[0][batch] == loss for batch, loss in losses[1].items())
    weights = [folder / name / "run" / STAGES[stage] / f"{STAGES[stage]}.safetensors" for name in "ab"]
    assert sha256_of(weights[0]) == sha256_of(weights[1])


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stage", ["train_unet", "train_vae"])
def test_a_real_stage_goes_back_to_its_checkpoint_and_past_the_bad_batch(
    stage: str, two_process_run: Run, tmp_path: Path
) -> None:
    # After the checkpoint of update 20 the gradient of batch 25 goes bad, and on the way again the weights in 40.
    faults = {25: ("gradient", 1), 40: ("weights", 1)}
    done = train(stage, two_process_run, tmp_path / "a", *LONG, "--on_bad_update.policy", "rewind", faults=faults)
    assert done.returncode == 0, done.stderr
    without = train(stage, two_process_run, tmp_path / "b", *LONG, leave_out=tuple(range(20, 41)))
    assert without.returncode == 0, without.stderr
    first, second = seen_by_ranks(tmp_path / "a")
    assert first == second == [[26, 25], [35, 40]]
    check_same(stage, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        *((kind, stage) for kind in ("data", "loss", "gradient", "weights") for stage in ("train_unet", "train_vae")),
        ("second", "train_vae"),  # the second network's
    ],
)
def test_a_real_stage_stops_at_a_bad_update_and_can_be_told_to_go_on(
    stage: str, kind: str, two_process_run: Run, tmp_path: Path
) -> None:
    done = train(stage, two_process_run, tmp_path / "a", *LONG, faults={25: (kind, 1)})
    assert done.returncode != 0
    outcome = json.loads((tmp_path / "a/run" / STAGES[stage] / "outcome.json").read_bytes())
    assert (outcome["state"], outcome["exit_code"]) == ("failed", 1)
    assert "Update 26 (batch 25) does not count" in done.stderr
    assert list(evidence(tmp_path / "a", stage)) == [25]
    words = (*LONG, "--on_bad_update.policy", "skip")
    again = train(stage, two_process_run, tmp_path / "a", *words, leave_out=(25,))
    assert again.returncode == 0, again.stderr
    without = train(stage, two_process_run, tmp_path / "b", *LONG, leave_out=(25,))
    assert without.returncode == 0, without.stderr
    check_same(stage, tmp_path)
