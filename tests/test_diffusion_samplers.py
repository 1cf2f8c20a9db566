"""Samplers: laws, mostly on problems with a closed form.

Those are Gaussian data, whose ideal denoiser is linear and whose probability-flow ODE has an exact solution, and a
small set of points, whose ideal denoiser is a softmax. test_diffusion_samplers_reference.py compares with others' code.
"""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.diffusion.prediction import Estimate, estimate_from_output
from models.diffusion.samplers import (
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    EulerConfig,
    HeunConfig,
    check_sampler,
    ddim,
    ddim_inversion,
    ddpm,
    dpm_solver_pp,
    euler,
    heun,
    lerp,
    sample,
    sample_steps,
    slerp,
)
from models.diffusion.schedule import (
    CLEAN,
    CosineScheduleConfig,
    FlowMatchingConfig,
    LinearScheduleConfig,
    Moment,
    ScaledLinearScheduleConfig,
    add_noise,
)
from models.diffusion.spacing import sampling_moments, spaced_steps

LINEAR = LinearScheduleConfig().build()
FLOW = FlowMatchingConfig().build()
SPACINGS = ["leading", "trailing", "linspace", "quadratic", "karras"]
DETERMINISTIC = [DDIMConfig, EulerConfig, HeunConfig, DPMSolverConfig]
ALL_SAMPLERS = [*DETERMINISTIC, lambda **grid: DDIMConfig(eta=0.5, **grid), DDPMConfig]
PROCESSES = {
    "linear": LINEAR,
    "scaled linear": ScaledLinearScheduleConfig().build(),
    "cosine": CosineScheduleConfig().build(),
    "zero terminal SNR": LinearScheduleConfig(zero_terminal_snr=True).build(),
    "flow": FLOW,
}


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def no_noise(index: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


# ------------------------------------------------------------------------------------------------------------- grids


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_train_steps=st.integers(1, 400), spacing=st.sampled_from(SPACINGS[:-1]))
def test_respacing_takes_the_asked_number_of_steps_each_once_and_in_range(data, num_train_steps, spacing):
    num_steps = data.draw(st.integers(1, num_train_steps))
    steps = spaced_steps(num_train_steps=num_train_steps, num_steps=num_steps, spacing=spacing)
    assert len(steps) == num_steps
    assert all(a > b for a, b in pairwise(steps))
    assert steps[-1] >= 0
    assert steps[0] <= num_train_steps - 1
    if spacing != "leading":
        assert steps[0] == num_train_steps - 1


# -------------------------------------------------------------------------------------------------------------- laws


def dummy(x: torch.Tensor, moment: Moment) -> Estimate:
    """A network that depends on the latents and on the time."""
    output = torch.tanh(0.7 * x + 0.2 * x.roll(1, dims=1) + 0.3 * math.cos(moment.time / 300))
    return estimate_from_output(output, x, moment.level, "v")


def exact(x0: torch.Tensor):
    """A denoiser that knows the data."""
    return lambda x, moment: Estimate(x0=x0, eps=(x - moment.level.alpha * x0) / moment.level.sigma)


def allowed(process, spacing: str) -> bool:
    return spacing != "karras" or process not in (FLOW, PROCESSES["zero terminal SNR"])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", PROCESSES)
def test_every_sampler_recovers_the_data_when_the_estimate_is_exact(schedule, spacing):
    process, x0, noise = PROCESSES[schedule], draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    for make in ALL_SAMPLERS:
        for num_steps in (1, 2, 13, 50):
            config = make(num_steps=num_steps, spacing=spacing)
            if not allowed(process, spacing):
                continue
            recovered = sample(config, process, exact(x0), noise, fresh_noise=lambda i: draw(2, 3, 2, 2, seed=i))
            torch.testing.assert_close(recovered, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "num_steps"), [*itertools.product(PROCESSES, (3, 50)), ("zero terminal SNR", 1000)]
)
def test_ddim_with_the_exact_noise_recovers_the_data_at_any_respacing(schedule, num_steps):
    """The network says eps, and x0 follows from it: the latents then stay on the line from noise to data."""
    process, x0, eps = PROCESSES[schedule], draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1)
    for spacing in ("leading", "trailing", "linspace", "quadratic"):
        moments = sampling_moments(process, num_steps=num_steps, spacing=spacing)
        moments = [moment for moment in moments if moment.level.alpha > 0]
        x = add_noise(x0, eps, moments[0].level)
        for step in ddim(
            lambda x, moment: estimate_from_output(eps, x, moment.level, "eps"), x, moments, eta=0, fresh_noise=no_noise
        ):
            on_line = add_noise(x0, eps, step.level)
            condition = float(1 / moments[0].level.alpha)
            assert (step.x - on_line).abs().max() <= 1e-12 + 1e-15 * condition * len(moments)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("schedule", PROCESSES)
def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance(schedule, spacing):
    process, noise = PROCESSES[schedule], draw(2, 4, 3, 3)
    moments = sampling_moments(process, num_steps=17, spacing=spacing)
    fresh = {"fresh_noise": lambda i: draw(2, 4, 3, 3, seed=100 + i)}
    for a, b in zip(
        ddim(dummy, noise, moments, eta=1.0, **fresh),
        ddpm(dummy, noise, moments, variance="posterior", **fresh),
        strict=True,
    ):
        torch.testing.assert_close(a.x, b.x, rtol=0, atol=1e-12)


def ideal_for_gaussian(*, mean: float, std: float):
    """The posterior mean of data that is N(mean, std^2)."""

    def denoise(x: torch.Tensor, moment: Moment) -> Estimate:
        alpha, sigma = moment.level.alpha, moment.level.sigma
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x0 = mean + gain * (x - alpha * mean)
        return Estimate(x0=x0, eps=sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2))

    return denoise


def flow_of_gaussian(x, *, mean: float, std: float, now, then):
    """The exact solution of the probability-flow ODE: standardised latents stay what they are."""
    spread_now, spread_then = (((level.alpha * std) ** 2 + level.sigma**2).sqrt() for level in (now, then))
    return then.alpha * mean + (x - now.alpha * mean) * spread_then / spread_now


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("heun", 2), ("dpm_solver_pp", 2)], ids=["euler", "heun", "dpm_solver_pp"]
)
@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_solvers_converge_at_their_order_on_a_closed_form_problem(schedule, method, order):
    process = PROCESSES[schedule]
    denoise, x = ideal_for_gaussian(mean=0.3, std=0.5), draw(1, 4, 2, 2)
    errors = []
    for num_steps in (20, 40, 80, 160):
        # Log-spaced ratios, so that halving the steps halves them everywhere; the jump onto clean data is left out.
        ratios = torch.logspace(1.0, -1.0, num_steps + 1).double().tolist()
        moments = [process.moment_at_ratio(ratio) for ratio in ratios]
        run = {
            "euler": lambda m: euler(denoise, x, m),
            "heun": lambda m: heun(denoise, x, m, straight=process.straight),
            "dpm_solver_pp": lambda m: dpm_solver_pp(denoise, x, m),
        }[method]
        *_, before_last, _ = run(moments)
        truth = flow_of_gaussian(x, mean=0.3, std=0.5, now=moments[0].level, then=moments[-1].level)
        errors.append(float((before_last.x - truth).abs().max()))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "quadratic"])
@pytest.mark.parametrize("config", [DDIMConfig(), HeunConfig(), DPMSolverConfig()], ids=lambda config: config.kind)
def test_few_steps_from_nearly_pure_noise_keep_the_spread_of_the_data(config, spacing):
    """A cosine schedule starts at 20,000 times as much noise as data; Heun's 10 steps once gave 10 times the spread."""
    noise, config = draw(1, 4, 8, 8), config.model_copy(update={"num_steps": 10, "spacing": spacing})
    x = sample(config, PROCESSES["cosine"], ideal_for_gaussian(mean=0.0, std=1.0), noise, fresh_noise=no_noise)
    assert float(x.std() / noise.std()) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("config", [DDPMConfig(num_steps=100), DDIMConfig(num_steps=100, eta=0.5)])
@pytest.mark.parametrize("schedule", PROCESSES)
def test_stochastic_samplers_give_the_distribution_of_the_data(schedule, config):
    n, generator = 40_000, torch.Generator().manual_seed(0)

    def fresh(index):
        return torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)

    config = config.model_copy(update={"spacing": "quadratic"})
    samples = sample(
        config, PROCESSES[schedule], ideal_for_gaussian(mean=0.3, std=0.5), fresh(0), fresh_noise=fresh
    ).flatten()
    assert samples.mean() == pytest.approx(0.3, abs=0.015)
    assert samples.std() == pytest.approx(0.5, abs=0.025)


POINTS = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.4]], dtype=torch.float64)


def ideal_for_points(x: torch.Tensor, moment: Moment) -> Estimate:
    """The ideal denoiser of a data set: its points, weighed by how likely each of them became ``x``."""
    alpha, sigma = moment.level.alpha, moment.level.sigma
    flat = x.flatten(1)
    distance = (flat[:, None] - alpha * POINTS).square().sum(dim=2)
    x0 = ((-distance / (2 * sigma**2)).softmax(dim=1) @ POINTS).reshape(x.shape)
    return Estimate(x0=x0, eps=(x - alpha * x0) / sigma)


@pytest.mark.parametrize("make", ALL_SAMPLERS)
@pytest.mark.parametrize("schedule", PROCESSES)
def test_every_sampler_ends_on_the_data_when_the_denoiser_is_ideal(schedule, make):
    noise = draw(600, 2, 1, 1)
    config = make(num_steps=40, spacing="trailing")
    samples = sample(
        config, PROCESSES[schedule], ideal_for_points, noise, fresh_noise=lambda i: draw(600, 2, 1, 1, seed=i + 1)
    )
    distance, nearest = torch.cdist(samples.flatten(1), POINTS).min(dim=1)
    assert (distance < 0.02).double().mean() > 0.97
    shares = nearest.bincount(minlength=3) / 600
    assert (shares - 1 / 3).abs().max() < 0.1


def test_inversion_and_sampling_close_the_circle_as_the_steps_become_finer():
    denoise, x0 = ideal_for_gaussian(mean=0.3, std=0.5), draw(1, 4, 2, 2)
    errors = []
    for num_steps in (100, 200, 400):
        moments = sampling_moments(LINEAR, num_steps=num_steps, spacing="trailing")
        *_, inverted = ddim_inversion(denoise, x0, moments)
        *_, sampled = ddim(denoise, inverted.x, moments, eta=0, fresh_noise=no_noise)
        errors.append(float((sampled.x - x0).abs().max()))
    assert errors[-1] < 0.05
    assert all(b < 0.7 * a for a, b in pairwise(errors))


@pytest.mark.parametrize("make", ALL_SAMPLERS)
def test_a_sampler_yields_every_step_down_to_clean_data_in_the_dtype_of_its_noise(make):
    asked = []

    def fresh(index):
        asked.append(index)
        return draw(1, 4, 2, 2, seed=index, dtype=torch.float32)

    config = make(num_steps=9)
    steps = list(sample_steps(config, LINEAR, dummy, draw(1, 4, 2, 2, dtype=torch.float32), fresh_noise=fresh))
    assert [step.index for step in steps] == list(range(9))
    assert all(a.level.sigma > b.level.sigma for a, b in pairwise(steps))
    assert steps[-1].level is CLEAN
    assert {step.x.dtype for step in steps} == {torch.float32}
    stochastic = config.kind == "ddpm" or (config.kind == "ddim" and config.eta > 0)
    assert asked == (list(range(8)) if stochastic else [])  # the last step adds no noise


@pytest.mark.parametrize("make", DETERMINISTIC)
def test_a_deterministic_sampler_asks_the_network_as_often_as_it_says(make):
    calls = []

    def denoise(x, moment):
        calls.append(moment.time)
        return dummy(x, moment)

    config = make(num_steps=12)
    sample(config, LINEAR, denoise, draw(2, 4, 3, 3), fresh_noise=no_noise)
    assert len(calls) == (23 if config.kind == "heun" else 12)


# --------------------------------------------------------------------------------------------------- interpolation


def test_slerp_runs_along_the_arc_from_one_noise_to_the_other():
    a, b = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=1)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1))[:, None, None, None]
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    for weight in (0.25, 0.5, 0.9):
        between = slerp(a, b, weight)
        torch.testing.assert_close(between.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        angle_to = [torch.nn.functional.cosine_similarity(between.flatten(1), end.flatten(1)).acos() for end in (a, b)]
        torch.testing.assert_close(angle_to[0] * (1 - weight), angle_to[1] * weight)


def test_slerp_of_parallel_samples_is_the_straight_way():
    a = draw(2, 4, 2, 2)
    for other in (a, 3 * a, -a):
        between = slerp(a, other, 0.3)
        assert torch.isfinite(between).all()
        torch.testing.assert_close(between, lerp(a, other, 0.3))
    single = slerp(a.float(), a.float(), 0.3)
    torch.testing.assert_close(single, a.float())


# ----------------------------------------------------------------------------------------------- what cannot be run


def test_more_steps_than_the_schedule_has_are_refused_with_advice():
    with pytest.raises(ValueError, match="num_steps = 1001 cannot take more steps than the 1000") as caught:
        check_sampler(DDIMConfig(num_steps=1001), LINEAR, variance_is_learned=False)
    assert 'Use at most 1000, or spacing = "karras"' in str(caught.value)
    check_sampler(DDIMConfig(num_steps=1001, spacing="karras"), LINEAR, variance_is_learned=False)


def test_inverting_a_prediction_of_the_data_is_refused_with_advice():
    def denoise(x, moment):
        return estimate_from_output(0.5 * x, x, moment.level, "x0")

    moments = sampling_moments(LINEAR, num_steps=5, spacing="trailing")
    with pytest.raises(ValueError, match="noise in it is not finite") as caught:
        list(ddim_inversion(denoise, draw(1, 4, 2, 2), moments))
    assert "use one that predicts eps, v or velocity" in str(caught.value)


@pytest.mark.parametrize("schedule", ["flow", "zero terminal SNR"])
def test_karras_spacing_from_pure_noise_is_refused_with_advice(schedule):
    with pytest.raises(ValueError, match='spacing = "karras" needs a finite noise-to-data ratio') as caught:
        check_sampler(EulerConfig(spacing="karras"), PROCESSES[schedule], variance_is_learned=False)
    assert 'Use spacing = "trailing"' in str(caught.value)


def test_a_sampler_with_a_variance_that_was_not_learned_is_refused_with_advice():
    with pytest.raises(ValueError, match=r'sampler\.variance = "learned" needs a network that learned one') as caught:
        check_sampler(DDPMConfig(variance="learned"), LINEAR, variance_is_learned=False)
    assert 'Use sampler.variance = "posterior" or "step"' in str(caught.value)
    check_sampler(DDPMConfig(variance="learned"), LINEAR, variance_is_learned=True)
