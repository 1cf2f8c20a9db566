"""Health metrics of an autoencoder: against gradients and moments computed plainly."""

from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import save_file

import models.autoencoder.perceptual
from data.statistics import ChannelSums
from models.autoencoder.discriminator import Discriminator
from models.autoencoder.health import NoGradient, gradient_norms, latent_metrics
from models.autoencoder.objective import LPIPSTerm, PatchAdversary, VAELoss, VAEObjective, VAEObjectiveConfig
from models.autoencoder.perceptual import Perceptual
from models.autoencoder.vae import AutoencoderKL, Posterior, VAEConfig

CONFIG = VAEConfig(latent_channels=3, channels=(8, 8), blocks_per_level=1, norm_groups=4)


@pytest.fixture(autouse=True)
def _narrow_vgg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight channels a layer are enough to be seen, or not, by the terms' gradients."""
    monkeypatch.setattr(
        models.autoencoder.perceptual,
        "STAGES",
        tuple((8,) * len(widths) for widths in models.autoencoder.perceptual.STAGES),
    )


def perceptual_file(folder: Path, *, blind: bool) -> Path:
    torch.manual_seed(0)
    network = Perceptual()
    weights = {
        name: torch.zeros_like(tensor) if blind else torch.rand_like(tensor) * 0.1
        for name, tensor in network.state_dict().items()
    }
    path = folder / "lpips.safetensors"
    save_file(weights, path)
    return path


def judged(objective: VAEObjective) -> tuple[VAELoss, torch.Tensor]:
    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIG, image_channels=3)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    reconstruction, posterior = vae(images, torch.randn(2, 3, 16, 16))
    adversary = objective.config.adversary
    discriminator = None
    if isinstance(adversary, PatchAdversary):
        discriminator = Discriminator(adversary.discriminator, image_channels=3)
    loss = objective(
        images,
        reconstruction,
        posterior,
        elements=images[0].numel(),
        last_layer=vae.last_layer,
        discriminator=discriminator,
    )
    return loss, vae.last_layer


def test_the_pulls_add_up_to_the_gradient_of_the_total(tmp_path: Path) -> None:
    config = VAEObjectiveConfig(
        perceptual=LPIPSTerm(weights=perceptual_file(tmp_path, blind=False), weight=0.7),
        adversary=PatchAdversary(weight=0.3),
    )
    loss, last_layer = judged(VAEObjective(config))
    norms = gradient_norms(loss, last_layer=last_layer)
    assert set(norms) == {"l1", "perceptual", "adversarial"}
    assert all(norm > 0 for norm in norms.values())
    parts = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in loss.pulls.values()]
    (whole,) = torch.autograd.grad(loss.total, last_layer)
    torch.testing.assert_close(sum(parts), whole)  # the KL divergence does not reach the decoder
    for part, norm in zip(parts, norms.values(), strict=True):
        assert norm == part.norm()


def test_a_perceptual_term_that_teaches_nothing_is_an_error(tmp_path: Path) -> None:
    config = VAEObjectiveConfig(perceptual=LPIPSTerm(weights=perceptual_file(tmp_path, blind=True)))
    loss, last_layer = judged(VAEObjective(config))
    with pytest.raises(NoGradient, match="The perceptual term has no gradient at the decoder's last layer"):
        gradient_norms(loss, last_layer=last_layer)


def test_a_channel_without_information_is_not_active() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(8, 3, 4, 4), torch.full((8, 3, 4, 4), -4.0)
    mean[:, 1], log_variance[:, 1] = 0.01 * torch.randn(8, 4, 4), 0.0  # a collapsed channel: the prior
    metrics = latent_metrics(Posterior(mean, log_variance))
    assert metrics["active_channels"] == 2
    assert metrics["kl_1"] < 0.01 < metrics["kl_0"]
    total = sum(metrics[f"kl_{channel}"] for channel in range(3))
    torch.testing.assert_close(total, Posterior(mean, log_variance).kl().mean())
    # The same channels as the statistics of encoded latents call active.
    sums = ChannelSums.empty(3)
    for one_mean, one_variance in zip(mean.numpy(), log_variance.numpy(), strict=True):
        sums.add(torch.tensor([one_mean.tolist(), one_variance.tolist()]).numpy())
    assert sums.active.tolist() == [True, False, True]


def test_health_is_logged_at_every_look_at_the_losses(one_process_run: Run) -> None:
    """In the update's own line: so a rehearsal leaves none, and an update that does not count takes them with it."""
    rows = one_process_run.rows("train_vae")
    looks = {update: row for update, row in rows.items() if "health/active_channels" in row}
    assert sorted(looks) == [8, 16, 24]
    for look in looks.values():
        assert look["health/grad_norm_l1"] > 0
        assert all(look[f"health/kl_{channel}"] >= 0 for channel in range(4))
