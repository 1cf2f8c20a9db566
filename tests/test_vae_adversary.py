"""A VAE with LPIPS whose discriminator joins on a plateau, through real launches: at the same update whatever happens.

So its first updates are those of a VAE with LPIPS alone. VGG16 has eight channels a layer here, and for its sake the
latents are turned and made noisy, but not downscaled.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, communicated, stage_command, start_ranks, training_rows
from safetensors.torch import load_file, save_file

import models.autoencoder.perceptual
from data.files import sha256_of
from models.autoencoder.perceptual import Perceptual

STAGES = tuple((8,) * len(widths) for widths in models.autoencoder.perceptual.STAGES)
PROGRAM = f"""
import models.autoencoder.perceptual
from pipelines import train_vae
models.autoencoder.perceptual.STAGES = {STAGES}
train_vae.main()
"""
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
    *("--objective.equivariance.probability", "0.5", "--objective.equivariance.factors", "[1]"),
    *("--objective.latent_noise", "0.1"),
)


def trained(root: Path, inputs: Sequence[str], *, processes: int, says: str = "") -> Path:
    words = stage_command("train_vae", "--run.root", str(root), *inputs, *WORDS)[3:]
    ranks = start_ranks("-c", PROGRAM, *words, world_size=processes)
    printed = communicated(ranks)
    assert [rank.wait() for rank in ranks] == [0] * processes, printed
    assert says in "".join(out for out, _ in printed)
    return root / "vae"


def first_with_discriminator(rows: dict[int, dict[str, Any]]) -> int:
    return min(update for update, row in rows.items() if "train/adversarial" in row)


@pytest.fixture(scope="module")
def inputs(one_process_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options that name the corpus and the weights of a small LPIPS."""
    weights, generator = tmp_path_factory.mktemp("weights") / "lpips.safetensors", torch.Generator().manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.autoencoder.perceptual, "STAGES", STAGES)
        shapes = {name: tensor.shape for name, tensor in Perceptual().state_dict().items()}
    kernels = {name: torch.randn(shape, generator=generator) / 6 for name, shape in shapes.items() if len(shape) > 1}
    others = {name: torch.rand(shape, generator=generator) / 6 for name, shape in shapes.items() if len(shape) == 1}
    save_file(kernels | others, weights)
    corpus = str(one_process_run.folder("prepare_corpus"))
    perceptual = ("--objective.perceptual.kind", "lpips", "--objective.perceptual.weights", str(weights))
    return ("--inputs.corpus", corpus, *perceptual)


@pytest.fixture(scope="module")
def whole(inputs: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nothing disturbed."""
    return trained(tmp_path_factory.mktemp("whole"), inputs, processes=1)


def test_the_discriminator_joins_after_the_first_window_that_gains_too_little(whole: Path) -> None:
    rows = training_rows(whole)
    losses = [rows[update]["train/l1"] + rows[update]["train/perceptual"] for update in range(1, UPDATES + 1)]
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
    whole: Path, inputs: tuple[str, ...], tmp_path: Path
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
    trained(tmp_path, inputs, processes=1, says=f"continuing after update {last}, bit for bit")
    assert training_rows(folder).keys() == training_rows(whole).keys()
    for update, row in training_rows(whole).items():
        again = training_rows(folder)[update]
        for name in (name for name in row if name.startswith(("train/", "health/"))):
            assert again[name] == row[name], (update, name)
    assert sha256_of(folder / "vae.safetensors") == sha256_of(whole / "vae.safetensors")


def test_two_processes_train_as_one_with_lpips_alone_and_with_the_discriminator(
    whole: Path, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    two = trained(tmp_path, inputs, processes=2, says="the discriminator joins in")
    assert json.loads((two / "manifest.json").read_bytes())["provenance"]["world_size"] == 2
    rows, of_two = training_rows(whole), training_rows(two)
    assert first_with_discriminator(of_two) == first_with_discriminator(rows) > 4
    for update, row in rows.items():
        for term in ("l1", "perceptual", "kl"):  # rounding grows from update to update
            expected = pytest.approx(row[f"train/{term}"], rel=1e-5 if update <= 4 else 5e-3)
            assert of_two[update][f"train/{term}"] == expected, (update, term)
    found = load_file(two / "vae.safetensors")
    for name, tensor in load_file(whole / "vae.safetensors").items():
        assert (found[name] - tensor).norm() < 5e-3 * tensor.norm(), name
