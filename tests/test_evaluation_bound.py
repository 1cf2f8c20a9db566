"""The likelihood figure of an evaluation: of a model whose likelihood is known, and through the stage."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Run, run_here, run_stage
from torch import Tensor

from data.manifest import LatentScaling
from models.autoencoder.vae import AutoencoderKL, Posterior, VAEConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.posterior import Variance
from models.unet import UNetConfig
from pipelines.evaluation.likelihood import BoundMeter, VariationalBoundConfig, bound_metrics
from pipelines.model.weights import Normalisation

NETWORK = UNetConfig(
    channels=(8, 8), blocks=(1, 1), attention=(False, False), heads=(1, 1), transformer_depth=(1, 1), norm_groups=4
)


class GaussianLatents(AutoencoderKL):
    """A VAE whose latents are normal with mean 3 and deviation 2, whatever the image."""

    def encode(self, images: Tensor) -> Posterior:
        shape = (len(images), self.config.latent_channels, 4, 4)
        return Posterior(torch.full(shape, 3.0), torch.full(shape, 2 * math.log(2.0)))


def meter_of(num_steps: int, *, variance: Variance = "step") -> BoundMeter:
    """An untrained U-Net says v = 0, which is right for standard normal latents: the ideal denoiser of this data.

    So is the step's variance, beta (Ho et al. 2020, section 3.2).
    """
    torch.manual_seed(0)
    denoiser = Denoiser(DenoiserConfig(network=NETWORK), latent_channels=2, latent_size=4, num_classes=0).eval()
    return BoundMeter(
        VariationalBoundConfig(num_steps=num_steps, variance=variance),
        network=denoiser,
        normalisation=Normalisation(LatentScaling(mean=(3.0, 3.0), std=(2.0, 2.0))),
        vae=GaussianLatents(VAEConfig(latent_channels=2, channels=(8, 8), norm_groups=4), image_channels=1),
        seed=0,
    )


def test_the_bound_of_an_ideal_model_is_the_entropy_of_its_data() -> None:
    entropy = 0.5 * math.log2(2 * math.pi * math.e)  # of a standard normal, bits per dimension
    images = torch.zeros(200, 1, 8, 8)
    terms = {
        variance: meter_of(20, variance=variance).measure(range(200), images, {}, autocast=contextlib.nullcontext())
        for variance in ("step", "posterior")
    }
    metrics = {variance: bound_metrics(terms[variance])["bits_per_dimension"] for variance in terms}
    assert metrics["step"]["value"] == pytest.approx(entropy, abs=4 * metrics["step"]["error"])
    assert metrics["step"]["error"] < 0.05
    assert metrics["posterior"]["value"] > entropy + 0.5  # a chain of another variance is a looser bound
    for each in terms.values():
        parts = each["prior"] + each["moves"] + each["reconstruction"]
        torch.testing.assert_close(parts, each["bits_per_dimension"], rtol=1e-5, atol=1e-5)


def test_draws_depend_on_the_image_alone() -> None:
    meter, images = meter_of(5), torch.zeros(4, 1, 8, 8)
    whole = meter.measure(range(4), images, {}, autocast=contextlib.nullcontext())["bits_per_dimension"]
    last = meter.measure([2, 3], images[:2], {}, autocast=contextlib.nullcontext())["bits_per_dimension"]
    torch.testing.assert_close(last, whole[2:], rtol=1e-5, atol=1e-6)


def test_an_evaluation_reports_bits_per_dimension(two_process_run: Run, tmp_path: Path) -> None:
    inputs = [f"--inputs.{name}={two_process_run.root / name}" for name in ("corpus", "vae", "unet")]
    short = ["--num_samples", "16", "--sweep", "[]", "--sampler.num_steps", "2"]
    likelihood = '{ kind = "variational_bound", num_images = 20, num_steps = 4 }'
    done = run_stage("evaluate", "--run.root", str(tmp_path), *inputs, *short, "--likelihood", likelihood)
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
