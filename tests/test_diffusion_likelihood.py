"""The variational bound: its parts against distributions, its sum against the entropy of Gaussian data.

For Gaussian data and its ideal denoiser all terms are quadratic in the data and in the noise, so that three
Gauss-Hermite nodes for each give their expectations exactly: the laws hold to rounding, without sampling.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from models.diffusion.likelihood import (
    NATS_PER_BIT,
    gaussian_kl,
    gaussian_nll,
    prior_term,
    variational_bound,
)
from models.diffusion.posterior import posterior_variance, step_variance
from models.diffusion.prediction import Estimate
from models.diffusion.schedule import (
    CosineScheduleConfig,
    FlowMatchingConfig,
    LinearScheduleConfig,
    scalar_level,
)
from models.diffusion.spacing import sampling_moments

LINEAR = LinearScheduleConfig().build()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------- the parts


def test_gaussian_terms_equal_the_distributions_of_torch():
    mean1, mean2, log_variance1, log_variance2, x = draw(5, 100)
    one = torch.distributions.Normal(mean1, (0.5 * log_variance1).exp())
    two = torch.distributions.Normal(mean2, (0.5 * log_variance2).exp())
    kl = gaussian_kl(mean1=mean1, log_variance1=log_variance1, mean2=mean2, log_variance2=log_variance2)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(one, two))
    torch.testing.assert_close(gaussian_nll(x, mean=mean1, log_variance=log_variance1), -one.log_prob(x))


def test_the_prior_term_is_the_divergence_from_a_standard_normal_and_zero_at_pure_noise():
    x0 = draw(3, 4, 2, 2)
    level = LINEAR.moment(300).level
    q = torch.distributions.Normal(level.alpha * x0, level.sigma.expand_as(x0))
    p = torch.distributions.Normal(torch.zeros_like(x0), torch.ones_like(x0))
    expected = torch.distributions.kl_divergence(q, p).flatten(1).mean(dim=1)
    torch.testing.assert_close(prior_term(x0, level=level), expected)
    assert torch.equal(prior_term(x0, level=scalar_level(alpha=0.0, sigma=1.0)), torch.zeros(3).double())


# ------------------------------------------------------------------------------------------------ exact expectations

ROOTS, MASSES = np.polynomial.hermite_e.hermegauss(3)
PAIRS = torch.tensor(list(itertools.product(ROOTS, ROOTS)), dtype=torch.float64)  # (9 2): data, noise
WEIGHTS = torch.tensor([a * b for a, b in itertools.product(MASSES, MASSES)], dtype=torch.float64) / (2 * math.pi)


def expected_bound(process, *, std: float, num_steps: int, variance: str):
    """Prior, moves and reconstruction for data N(0, std^2) and its ideal denoiser, averaged over data and noise."""

    def ideal(x, moment):
        alpha, sigma = moment.level.alpha, moment.level.sigma
        spread = alpha**2 * std**2 + sigma**2
        return Estimate(x0=alpha * std**2 / spread * x, eps=sigma / spread * x)

    data, noise = (values[:, None, None, None] for values in PAIRS.unbind(1))
    moments = sampling_moments(process, num_steps=num_steps, spacing="linspace")
    bound = variational_bound(ideal, std * data, moments, variance=variance, fresh_noise=lambda i: noise)
    return WEIGHTS @ bound.prior, WEIGHTS @ bound.moves, WEIGHTS @ bound.reconstruction, moments


PROCESSES = {
    "linear": LINEAR,
    "cosine": CosineScheduleConfig().build(),
    "zero terminal SNR": LinearScheduleConfig(zero_terminal_snr=True).build(),
}


@pytest.mark.parametrize("num_steps", [2, 10, 100])
@pytest.mark.parametrize("schedule", PROCESSES)
def test_the_bound_is_tight_for_standard_normal_data(schedule, num_steps):
    """Its reverse chain is Gaussian with variance beta: the bound is the entropy of the data, at any respacing."""
    prior, moves, reconstruction, _ = expected_bound(PROCESSES[schedule], std=1.0, num_steps=num_steps, variance="step")
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert (prior + moves.sum() + reconstruction).item() == pytest.approx(entropy, abs=1e-9)


@pytest.mark.parametrize("variance", ["posterior", "step"])
@pytest.mark.parametrize("schedule", [*PROCESSES, "flow"])
def test_every_term_equals_its_closed_form_for_gaussian_data(schedule, variance):
    std, num_steps = 0.4, 12
    process = PROCESSES.get(schedule, FlowMatchingConfig().build())
    prior, moves, reconstruction, moments = expected_bound(process, std=std, num_steps=num_steps, variance=variance)
    levels = [moment.level for moment in moments]
    first = levels[0]
    q = first.alpha**2 * std**2 + first.sigma**2
    assert prior.item() == pytest.approx(float(0.5 * (q - 1 - first.sigma.square().log())), abs=1e-12)
    for move, (now, then) in zip(moves, itertools.pairwise(levels), strict=True):
        posterior = posterior_variance(now=now, then=then)
        own = posterior if variance == "posterior" else step_variance(now=now, then=then)
        uncertainty = std**2 * now.sigma**2 / (now.alpha**2 * std**2 + now.sigma**2)  # of x0, given x
        of_x0 = then.alpha * step_variance(now=now, then=then) / now.sigma**2
        expected = 0.5 * (posterior / own - 1 - (posterior / own).log() + of_x0**2 * uncertainty / own)
        assert move.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    last = levels[-1]
    uncertainty = std**2 * last.sigma**2 / (last.alpha**2 * std**2 + last.sigma**2)
    own = last.sigma**2 if variance == "step" else posterior_variance(now=levels[-2], then=last)
    expected = 0.5 * (math.log(2 * math.pi) + own.log() + uncertainty / own)
    assert reconstruction.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_bound_stays_above_the_entropy_and_closes_in_on_it_with_more_steps():
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.4**2)
    gaps = []
    for num_steps in (30, 100, 1000):
        prior, moves, reconstruction, _ = expected_bound(LINEAR, std=0.4, num_steps=num_steps, variance="step")
        gaps.append((prior + moves.sum() + reconstruction).item() - entropy)
    assert 0 < gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] < 0.02


def test_the_bound_is_reported_in_bits():
    noise = draw(2, 3, 2, 2, seed=1)
    bound = variational_bound(
        lambda x, moment: Estimate(x0=0.1 * x, eps=x),
        draw(2, 3, 2, 2),
        sampling_moments(LINEAR, num_steps=5, spacing="trailing"),
        variance="step",
        fresh_noise=lambda i: noise,
    )
    assert bound.moves.shape == (2, 4)
    total = bound.prior + bound.moves.sum(dim=1) + bound.reconstruction
    torch.testing.assert_close(bound.bits_per_dimension * NATS_PER_BIT, total)
    assert math.exp(NATS_PER_BIT) == pytest.approx(2)


def test_a_bound_of_one_moment_is_refused_with_advice():
    with pytest.raises(ValueError, match="at least 2 moments, not 1: give it more steps"):
        variational_bound(
            lambda x, moment: Estimate(x, x),
            draw(1, 1, 1, 1),
            [LINEAR.moment(5)],
            variance="step",
            fresh_noise=lambda i: draw(1, 1, 1, 1),
        )
