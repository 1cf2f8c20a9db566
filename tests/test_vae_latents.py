"""A VAE's latents: augmentation by the papers' formulas and as a pure function of the batch; spectrum, distances."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOKE, Run
from torch import Tensor

from data.manifest import Parents, read_input
from models.autoencoder.augmentation import EquivarianceConfig, Transformation
from models.autoencoder.health import high_frequency_share
from models.autoencoder.objective import LPIPSTerm, PatchAdversary, VAEObjective, VAEObjectiveConfig
from models.autoencoder.vae import AutoencoderKL, VAEConfig
from pipelines.runtime.config.experiment import load_config
from pipelines.train_vae import BatchMaker, TrainVAEConfig, VAEBatch, one_update

CONFIG = VAEConfig(latent_channels=3, channels=(8, 8, 8), blocks_per_level=1, mid_attention=False, norm_groups=4)
WORDS = ("--objective.equivariance.probability", "0.5", "--objective.latent_noise", "3")


def transformed(x: Tensor, factor: int, turns: int) -> Tensor:
    """Means of blocks, then the last column becomes the first row for every turn."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // factor, factor, w // factor, factor).mean(dim=(3, 5))
    for _ in range(turns):
        x = torch.stack(list(reversed(x.unbind(dim=3))), dim=2)
    return x


@pytest.mark.parametrize(("factor", "turns"), [(1, 0), (1, 3), (2, 0), (4, 1)])
def test_what_is_decoded_and_what_it_is_compared_with_are_those_of_the_papers(factor: int, turns: int) -> None:
    """Of an update in two micro-batches: D((1 - tau) T(z) + tau gamma eps) against T(x)."""
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIG, image_channels=3).double()
    images, noise = torch.rand(4, 3, 32, 32).double() * 2 - 1, torch.randn(4, 3, 8, 8).double()
    level, added = torch.rand(4, 1, 1, 1).double(), 3 * torch.randn(4, 3, 8, 8).double()
    batch = VAEBatch(images, noise, Transformation(factor, turns), (level, added))
    logged: dict[str, list[Tensor]] = {}
    training: Any = SimpleNamespace(
        stage=SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu"))),
        config=SimpleNamespace(log_every=1),
        is_due=lambda period: False,
        micro_batches=lambda wrapped: [slice(0, 2), slice(2, 4)],
        backward=lambda loss, terms: loss.backward(),
        log=lambda metrics: [logged.setdefault(name, []).append(value) for name, value in metrics.items()],
        step=lambda optimizers: None,
    )
    trained: Any = SimpleNamespace(wrapped=vae, network=vae, optimizer=None)
    one_update(training, VAEObjective(VAEObjectiveConfig(kl_weight=0.01)), trained, None, batch)

    posterior = vae.encode(images)
    latents = posterior.mean + posterior.log_variance.exp().sqrt() * noise
    side = 8 // factor
    noisy = (1 - level) * transformed(latents, factor, turns) + level * added[..., :side, :side]
    l1 = (transformed(images, factor, turns) - vae.decode(noisy)).abs().mean()
    kl = posterior.kl().mean() / (3 * 32 * 32)
    for name, expected in {"l1": l1, "kl": kl, "loss": l1 + 0.01 * kl}.items():
        torch.testing.assert_close(torch.stack(logged[f"train/{name}"]).mean(), expected, check_dtype=False)
    weights = [vae.encoder.conv_in.weight, vae.decoder.conv_out.weight]
    for weight, gradient in zip(weights, torch.autograd.grad(l1 + 0.01 * kl, weights), strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad / 2, gradient, rtol=1e-6, atol=1e-12)


def maker(folder: Path, *words: str, rank: int = 0, world_size: int = 1) -> BatchMaker:
    argv = ["--config", str(SMOKE), "--run.root", "-", "--inputs.corpus", str(folder), *words]
    stage: Any = SimpleNamespace(
        name="train_vae",
        accelerator=SimpleNamespace(process_index=rank, num_processes=world_size),
        parents=Parents({"corpus": read_input("corpus", folder)}),
    )
    return BatchMaker(load_config(TrainVAEConfig, table="train_vae", argv=argv), stage)


@pytest.fixture(scope="module")
def corpus(one_process_run: Run) -> Path:
    return one_process_run.folder("prepare_corpus")


def test_any_number_of_ranks_augments_a_global_batch_alike(corpus: Path) -> None:
    whole, halves = maker(corpus, *WORDS), [maker(corpus, *WORDS, rank=rank, world_size=2) for rank in range(2)]
    for index in (7, 0, 1_000_000, 3):
        batch, parts = whole.make(index), [half.make(index) for half in halves]
        assert {part.transformation for part in parts} == {batch.transformation}
        for found, *shares in zip(batch.latent_noise, *(part.latent_noise for part in parts), strict=True):
            assert torch.equal(found, torch.cat(shares))


def test_augmentation_is_drawn_as_configured_and_changes_no_other_draw(corpus: Path) -> None:
    without, with_it = maker(corpus, "--global_batch", "8"), maker(corpus, "--global_batch", "8", *WORDS)
    batches = [with_it.make(index) for index in range(600)]
    counts = Counter(batch.transformation for batch in batches)
    assert abs(counts.pop(None) - 300) < 4 * (600 / 4) ** 0.5  # standard errors
    assert set(counts) == {Transformation(factor, turns) for factor in (1, 2, 4) for turns in range(4)}
    assert all(abs(count - 25) < 4 * 25**0.5 for count in counts.values())
    level, noise = (torch.cat([batch.latent_noise[field] for batch in batches]) for field in (0, 1))
    assert level.flatten().sort().values.numpy() == pytest.approx((np.arange(4800) + 0.5) / 4800, abs=0.03)
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(3, rel=0.01)
    for index in (0, 5):
        plain = without.make(index)
        assert (plain.transformation, plain.latent_noise) == (None, ())
        assert torch.equal(plain.images, batches[index].images)
        assert torch.equal(plain.noise, batches[index].noise)


@pytest.mark.parametrize("side", [7, 8])
def test_waves_that_half_the_size_cannot_hold_are_the_high_frequencies(side: int) -> None:
    """Whatever a channel's scale and mean; every frequency is tried along both sides."""
    row = torch.arange(side).double()
    for cycles in range(1, side // 2 + 1):
        wave = torch.cos(2 * torch.pi * cycles * row / side)
        for x in (wave[:, None].expand(side, side), wave.expand(side, side)):
            latents = torch.stack([torch.stack([x, 5 + 100 * x]), torch.stack([-x, 5 - 100 * x])])
            assert high_frequency_share(latents) == pytest.approx(float(cycles / side > 0.25), abs=1e-9)
    assert high_frequency_share(torch.full((2, 2, side, side), 0.123)) == 0
    noise = torch.randn(500, 2, side, side, generator=torch.Generator().manual_seed(0))
    low = 2 * (side // 4) + 1
    assert high_frequency_share(noise) == pytest.approx(1 - (low / side) ** 2, abs=0.01)


def test_the_last_validation_alone_has_the_distances(one_process_run: Run) -> None:
    lines = (one_process_run.folder("train_vae") / "metrics.jsonl").read_text().splitlines()
    validations = [row for row in map(json.loads, lines) if "val/psnr" in row]
    assert ["val/interpolation_distance" in row for row in validations] == [False] * (len(validations) - 1) + [True]
    assert validations[-1]["val/interpolation_distance"] > validations[-1]["val/reconstruction_distance"] > 0


def test_sides_that_a_term_cannot_take_are_refused_before_any_work() -> None:
    downscaled, lpips = (
        EquivarianceConfig(probability=0.5, factors=(2, 4)),
        LPIPSTerm(weights=Path("lpips.safetensors")),
    )
    VAEObjectiveConfig(perceptual=lpips, adversary=PatchAdversary()).check_sizes(resolution=24, latent_size=7)
    VAEObjectiveConfig(equivariance=downscaled, perceptual=lpips).check_sizes(resolution=64, latent_size=16)
    refused = {
        "4 does not divide 6, the latents' side": VAEObjectiveConfig(equivariance=downscaled),
        "perceptual needs images of 16 pixels a side or more; here the smallest have 12": VAEObjectiveConfig(
            equivariance=EquivarianceConfig(probability=0.5, factors=(2,)), perceptual=lpips
        ),
        "adversary needs images of 48 pixels a side or more; here the smallest have 24": VAEObjectiveConfig(
            adversary=PatchAdversary(discriminator={"downsamplings": 4})
        ),
    }
    for message, config in refused.items():
        with pytest.raises(ValueError, match=message):
            config.check_sizes(resolution=24, latent_size=6)
    with pytest.raises(ValueError, match="norm_groups = 32 does not divide 48"):
        PatchAdversary(discriminator={"channels": 24})
