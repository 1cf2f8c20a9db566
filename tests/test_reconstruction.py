"""Power averages of any width, reconstructed from stored ones: against averages that were really kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, run_here, run_stage
from safetensors.torch import load_file
from torch import nn

from pipelines.runtime.training.ema import (
    Averages,
    PowerAverage,
    Snapshot,
    combine_snapshots,
    power_exponent,
    profile_product,
)

NUM_UPDATES, EVERY = 1_024, 64
STORED, WANTED = (0.05, 0.10), (0.03, 0.05, 0.075, 0.15)


def test_the_product_of_two_profiles_is_its_integral() -> None:
    for a, b in [((100, 0.05), (100, 0.1)), ((40, 0.2), (100, 0.1)), ((100, 0.05), (70, 0.15))]:
        end = max(a[0], b[0])
        times = (np.arange(200_000) + 0.5) / 200_000 * end
        profiles = []
        for update, relative_std in (a, b):
            gamma = power_exponent(relative_std)
            inside = np.where(times <= update, times / update, 0.0)
            profiles.append((gamma + 1) / update * inside**gamma)
        integral = (profiles[0] * profiles[1]).mean() * end
        assert profile_product(Snapshot(*a), Snapshot(*b)) == pytest.approx(integral, rel=1e-4)
        assert profile_product(Snapshot(*a), Snapshot(*b)) == pytest.approx(profile_product(Snapshot(*b), Snapshot(*a)))


@pytest.fixture(scope="module")
def walk() -> tuple[dict[Snapshot, torch.Tensor], dict[float, torch.Tensor]]:
    """Weights that wander: stored averages of two widths, and the wanted ones as kept all along."""
    torch.manual_seed(0)
    network = nn.Linear(64, 64, bias=False).double()
    averages = Averages(network, tuple(PowerAverage(relative_std=width) for width in (*STORED, *WANTED)))
    stored = {}
    for update in range(1, NUM_UPDATES + 1):
        with torch.no_grad():
            network.weight.add_(torch.randn(64, 64, dtype=torch.float64))
        averages.update(network, update=update)
        if update % EVERY == 0:
            for width, average in zip(STORED, averages.networks, strict=False):
                stored[Snapshot(update, width)] = average.weight.detach().clone()
    kept = {width: average.weight.detach() for width, average in zip(WANTED, averages.networks[2:], strict=True)}
    return stored, kept


@pytest.mark.parametrize("width", WANTED)
def test_a_reconstructed_average_is_the_one_that_was_never_kept(
    width: float, walk: tuple[dict[Snapshot, torch.Tensor], dict[float, torch.Tensor]]
) -> None:
    stored, kept = walk
    combination = combine_snapshots(list(stored), Snapshot(NUM_UPDATES, width))
    found = sum(weight * tensor for weight, tensor in zip(combination.weights, stored.values(), strict=True))
    assert isinstance(found, torch.Tensor)
    nearest = min((kept_width for kept_width in STORED), key=lambda other: abs(other - width))
    error = float((found - kept[width]).norm() / kept[width].norm())
    stand_in = float((stored[Snapshot(NUM_UPDATES, nearest)] - kept[width]).norm() / kept[width].norm())
    assert combination.weights.sum() == pytest.approx(1)
    assert error < 0.02
    assert error < 0.2 * stand_in or width in STORED
    assert combination.residual < 0.1


def test_a_stored_average_is_given_back_as_it_is() -> None:
    stored = [Snapshot(update, width) for update in (10, 20, 30) for width in STORED]
    combination = combine_snapshots(stored, Snapshot(30, 0.10))
    np.testing.assert_allclose(combination.weights, [0, 0, 0, 0, 0, 1], atol=1e-6)
    assert combination.residual < 1e-6


def test_an_average_that_ends_after_all_stored_ones_is_refused() -> None:
    with pytest.raises(ValueError, match="no power average of update 40 or later"):
        combine_snapshots([Snapshot(30, 0.1)], Snapshot(40, 0.1))


def test_a_unet_is_reconstructed_from_its_checkpoints_and_draws(two_process_run: Run, tmp_path: Path) -> None:
    root = tmp_path / "run"
    inputs = [f"--inputs.{name}={two_process_run.root / name}" for name in ("latents", "vae")]
    averages = '[{ kind = "power", relative_std = 0.1 }, { kind = "power", relative_std = 0.05 }]'
    lengths = ["--updates", "24", "--validate_every", "24", "--validate_samples", "0"]
    lengths += ["--checkpoint.every_updates", "3", "--checkpoint.keep_every", "3"]
    done = run_stage("train_unet", "--run.root", str(root), *inputs, "--averages", averages, *lengths)
    assert done.returncode == 0, done.stderr

    words = ["--run.root", str(root)]
    for name, width in (("same", "0.1"), ("other", "0.2")):
        done = run_here("reconstruct", *words, "--relative_std", width, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert "from 16 averages" in done.stdout
    published = load_file(root / "unet" / "unet.safetensors")
    same, other = (load_file(tmp_path / name / "unet.safetensors") for name in ("same", "other"))
    for name, tensor in published.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(other[name], tensor, rtol=1e-3) for name, tensor in published.items())
    content = json.loads((tmp_path / "other" / "manifest.json").read_bytes())["content"]
    assert content["reconstruction"] == {"update": 24, "relative_std": 0.2}
    trained = json.loads((root / "unet" / "manifest.json").read_bytes())["content"]
    assert content["parents"]["latents"] == trained["parents"]["latents"]  # of its error budget
    done = run_here(
        *("sample", f"--inputs.vae={two_process_run.root / 'vae'}", f"--inputs.unet={tmp_path / 'other'}"),
        *("--number", "2", "--sampler.num_steps", "2", "--output", str(tmp_path / "samples")),
    )
    assert done.returncode == 0, done.stderr

    # An evaluation takes checkpoints and widths alike: those of the published weights draw the published samples.
    shutil.copytree(root / "unet", root / "twin")
    curve = ("--curve.updates", "[12, 24]", "--curve.relative_stds", "[0.2]", "--inputs.guide", str(root / "twin"))
    evaluation = (
        *("evaluate", *words, *inputs, f"--inputs.corpus={two_process_run.root / 'corpus'}", "--run.threads", "1"),
        *("--num_samples", "16", "--sweep", "[1.0]", "--sampler.num_steps", "2", "--probe_images", "0"),
    )
    done = run_here(*evaluation, *curve)
    assert done.returncode == 0, done.stderr
    features = {
        name: load_file(root / "evaluation" / f"features-{name}.safetensors")["features"]
        for name in ("guidance_1", "guidance_2", "update_24", "update_12", "width_0p2")
    }
    # Its own weights lead a network nowhere, so that any scale draws what scale 1 does, which has no guide.
    torch.testing.assert_close(features["guidance_1"], features["guidance_2"], rtol=0, atol=0)
    torch.testing.assert_close(features["update_24"], features["guidance_2"], rtol=0, atol=0)
    found = json.loads((root / "evaluation" / "metrics.json").read_bytes())
    assert [set(point) & {"update", "relative_std"} for point in found["curve"]] == [{"update"}] * 2 + [
        {"relative_std"}
    ]
    assert found["curve"][1]["frechet_distance"] == found["sweep"][0]["frechet_distance"]
    assert len({float(features[name].sum()) for name in ("guidance_2", "update_12", "width_0p2")}) == 3
    for name in ("updates", "updates_curve", "widths", "widths_curve"):
        assert (root / "evaluation" / f"{name}.png").stat().st_size > 1_000

    done = run_here(*evaluation, "--name", "other", "--curve.updates", "[7]")
    assert done.returncode == 2
    assert "no checkpoint of update 7" in done.stderr
    assert "kept are: 3, 6, 9" in done.stderr


def test_a_training_without_power_averages_cannot_be_reconstructed(two_process_run: Run, tmp_path: Path) -> None:
    done = run_here("reconstruct", "--run.root", str(two_process_run.root), "--output", str(tmp_path / "unet"))
    assert done.returncode == 2
    assert "trained without averages of kind 'power'" in done.stderr
