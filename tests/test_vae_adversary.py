"""A VAE whose discriminator joins on a plateau, through real launches: at the same update whatever happens."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, run_stage, training_rows

from data.files import sha256_of

UPDATES, EVERY, WINDOW, MIN_IMPROVEMENT = 16, 2, 2, 0.15
WORDS = (
    *("--updates", str(UPDATES), "--checkpoint.every_updates", "3", "--checkpoint.keep_every", "3"),
    *("--optim.algorithm", "adamw", "--log_every", "7", "--validate_every", "16"),
    *("--optim.peak_lr", "5e-3", "--images_per_device", "0"),
    *("--objective.adversary.kind", "patchgan", "--objective.adversary.start.kind", "plateau"),
    *("--objective.adversary.start.every", str(EVERY), "--objective.adversary.start.window", str(WINDOW)),
    *("--objective.adversary.start.min_improvement", str(MIN_IMPROVEMENT)),
    *("--objective.adversary.discriminator.channels", "8", "--objective.adversary.discriminator.downsamplings", "1"),
    *("--objective.adversary.discriminator.norm_groups", "8"),
)


def trained(root: Path, corpus: Path, *, processes: int, says: str = "") -> Path:
    done = run_stage("train_vae", "--run.root", str(root), "--inputs.corpus", str(corpus), *WORDS, processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout
    return root / "vae"


def first_with_discriminator(rows: dict[int, dict[str, Any]]) -> int:
    return min(update for update, row in rows.items() if "train/adversarial" in row)


@pytest.fixture(scope="module")
def corpus(one_process_run: Run) -> Path:
    return one_process_run.folder("prepare_corpus")


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed."""
    return trained(tmp_path_factory.mktemp("whole"), corpus, processes=1)


def test_the_discriminator_joins_after_the_first_window_that_gains_too_little(whole: Path) -> None:
    rows = training_rows(whole)
    losses = [rows[update]["train/l1"] for update in range(1, UPDATES + 1)]
    span = EVERY * WINDOW
    too_little = [
        end
        for end in range(2 * span, UPDATES + 1, EVERY)
        if sum(losses[end - span : end]) > (1 - MIN_IMPROVEMENT) * sum(losses[end - 2 * span : end - span])
    ]
    assert too_little[0] > 2 * span, "the first two windows already end it: the test would show nothing"
    assert first_with_discriminator(rows) == too_little[0] + 1
    assert all("train/adversarial" in rows[update] for update in range(too_little[0] + 1, UPDATES + 1))


def test_killed_before_the_discriminator_joins_it_ends_as_if_it_had_never_been(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    """What a kill leaves is what lay there then: here the state is put back to a checkpoint of the undisturbed run."""
    joins = first_with_discriminator(training_rows(whole))
    saved = [int(path.name.removeprefix("update-")) for path in sorted((whole / "checkpoints").glob("update-*"))]
    last = max(number for number in saved if number < joins and number % EVERY)  # within a look: the harder one
    folder = tmp_path / "vae"
    shutil.copytree(whole, folder)
    for number in (n for n in saved if n > last):
        shutil.rmtree(folder / "checkpoints" / f"update-{number:08}")
    for name in ("manifest.json", "vae.safetensors", "config.json"):
        (folder / name).unlink()
    trained(tmp_path, corpus, processes=1, says=f"continuing after update {last}, bit for bit")
    assert training_rows(folder).keys() == training_rows(whole).keys()
    for update, row in training_rows(whole).items():
        again = training_rows(folder)[update]
        for name in (name for name in row if name.startswith(("train/", "health/"))):
            assert again[name] == row[name], (update, name)
    assert sha256_of(folder / "vae.safetensors") == sha256_of(whole / "vae.safetensors")


def test_one_and_two_processes_let_it_join_at_the_same_update(whole: Path, corpus: Path, tmp_path: Path) -> None:
    two = trained(tmp_path, corpus, processes=2, says="the discriminator joins in")
    assert first_with_discriminator(training_rows(two)) == first_with_discriminator(training_rows(whole))
    assert json.loads((two / "manifest.json").read_bytes())["provenance"]["world_size"] == 2
