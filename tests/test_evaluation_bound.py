"""The likelihood of an evaluation: of a model whose likelihood is known, and through the stage."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Run, run_here, unrendered
from torch import Tensor

from models.autoencoder.vae import AutoencoderKL, Posterior, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.likelihood import VariationalBoundConfig
from models.diffusion.posterior import Variance
from models.latent_diffusion import LatentDiffusion, Normalisation
from models.unet import UNetConfig
from pipelines.evaluation.metrics import mean_metrics
from pipelines.model.noise import noise_of

NETWORK = UNetConfig(
    channels=(8, 8), blocks=(1, 1), attention=(False, False), heads=(1, 1), transformer_depth=(1, 1), norm_groups=4
)


class GaussianLatents(AutoencoderKL):
    """A VAE whose latents are normal with mean 3 and deviation 2, whatever the image."""

    def encode(self, images: Tensor) -> Posterior:
        shape = (len(images), self.config.latent_channels, 4, 4)
        return Posterior(torch.full(shape, 3.0), torch.full(shape, 2 * math.log(2.0)))


def bound_of(indices: range, *, num_steps: int, variance: Variance = "step") -> dict[str, Tensor]:
    """An untrained U-Net says v = 0, which is right for standard normal latents: the ideal denoiser of this data.

    So is the step's variance, beta (Ho et al. 2020, section 3.2).
    """
    torch.manual_seed(0)
    model = LatentDiffusion(
        autoencoder=GaussianLatents(VAEConfig(latent_channels=2, channels=(8, 8), norm_groups=4), image_channels=1),
        denoiser=Denoiser(DenoiserConfig(network=NETWORK), latent_channels=2, latent_size=4, num_classes=0).eval(),
        normalisation=Normalisation(mean=(3.0, 3.0), std=(2.0, 2.0)),
    )
    noise = noise_of(0, indices, shape=model.denoiser.latent_shape, device=model.device)
    chain = VariationalBoundConfig(num_steps=num_steps, variance=variance)
    return model.bound(torch.zeros(len(indices), 1, 8, 8), {}, config=chain, noise=noise)


def test_the_bound_of_an_ideal_model_is_the_entropy_of_its_data() -> None:
    entropy = 0.5 * math.log2(2 * math.pi * math.e)  # of a standard normal, bits per dimension
    terms = {variance: bound_of(range(200), num_steps=20, variance=variance) for variance in ("step", "posterior")}
    metrics = {variance: mean_metrics(terms[variance])["bits_per_dimension"] for variance in terms}
    assert metrics["step"]["value"] == pytest.approx(entropy, abs=4 * metrics["step"]["error"])
    assert metrics["step"]["error"] < 0.05
    assert metrics["posterior"]["value"] > entropy + 0.5  # a chain of another variance is a looser bound
    for each in terms.values():
        parts = each["prior"] + each["moves"] + each["reconstruction"]
        torch.testing.assert_close(parts, each["bits_per_dimension"], rtol=1e-5, atol=1e-5)


def test_draws_depend_on_the_image_alone() -> None:
    whole = bound_of(range(4), num_steps=5)["bits_per_dimension"]
    last = bound_of(range(2, 4), num_steps=5)["bits_per_dimension"]
    torch.testing.assert_close(last, whole[2:], rtol=1e-5, atol=1e-6)


def test_an_evaluation_reports_bits_per_dimension(two_process_run: Run, tmp_path: Path) -> None:
    inputs = [f"--inputs.{name}={two_process_run.root / name}" for name in ("corpus", "vae", "unet")]
    short = ["--num_samples", "16", "--sweep", "[]", "--sampler.num_steps", "2", "--probe_images", "0"]
    likelihood = '{ kind = "variational_bound", num_images = 20, num_steps = 4 }'
    with unrendered():
        done = run_here("evaluate", "--run.root", str(tmp_path), *inputs, *short, "--likelihood", likelihood)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_bytes())
    assert set(metrics["likelihood"]) == {"bits_per_dimension", "prior", "moves", "reconstruction"}
    assert all(math.isfinite(metric["value"]) for metric in metrics["likelihood"].values())
    assert metrics["contract"]["likelihood"]["num_steps"] == 4
    assert "bits_per_dimension" in done.stdout

    refused = run_here(
        *("evaluate", "--run.root", str(tmp_path / "other"), *inputs, *short),
        *("--likelihood", '{ kind = "variational_bound", variance = "learned" }'),
    )
    assert refused.returncode == 2
    assert "needs a network that learned one" in refused.stderr
