"""Noise schedules: equal to the references, and each step consistent with the jump.

| ours                     | theirs (diffusers)            | tolerance, absolute                                       |
|--------------------------|-------------------------------|-----------------------------------------------------------|
| betas                    | DDIMScheduler, float32        | 1e-7; 1e-5 with zero terminal SNR                         |
| alpha_bars               | DDIMScheduler, float32        | 1e-6, the rounding of a float32 product of 1000           |
| alpha_bars               | longhand numpy, float64       | 1e-13 relative                                            |
| with_zero_terminal_snr   | rescale_zero_terminal_snr     | equal bit by bit, in float64                              |
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.diffusion.posterior import forward_step, step_scale, step_variance
from models.diffusion.schedule import (
    CLEAN,
    CosineScheduleConfig,
    DiscreteDiffusion,
    FlowMatching,
    FlowMatchingConfig,
    LinearScheduleConfig,
    NoiseLevel,
    ScaledLinearScheduleConfig,
    add_noise,
    scalar_level,
    with_zero_terminal_snr,
)

SCHEDULES = [
    LinearScheduleConfig(),
    LinearScheduleConfig(num_steps=100),
    ScaledLinearScheduleConfig(),
    CosineScheduleConfig(),
    CosineScheduleConfig(num_steps=4),
    LinearScheduleConfig(zero_terminal_snr=True),
    ScaledLinearScheduleConfig(zero_terminal_snr=True),
    CosineScheduleConfig(zero_terminal_snr=True),
]
PROCESSES = [config.build() for config in SCHEDULES] + [FlowMatchingConfig().build()]
KINDS_THERE = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def reference_scheduler(config) -> DDIMScheduler:
    ends = {} if config.kind == "cosine" else {"beta_start": config.beta_start, "beta_end": config.beta_end}
    if config.kind == "linear":
        ends = {name: value * 1000 / config.num_steps for name, value in ends.items()}
    return DDIMScheduler(
        num_train_timesteps=config.num_steps,
        beta_schedule=KINDS_THERE[config.kind],
        rescale_betas_zero_snr=config.zero_terminal_snr,
        **ends,
    )


def name(config) -> str:
    return f"{config.kind}-{config.num_steps}" + ("-zero" if config.zero_terminal_snr else "")


@pytest.mark.parametrize("config", SCHEDULES, ids=name)
def test_schedules_equal_the_reference_implementation(config):
    theirs = reference_scheduler(config)
    ours = config.build()
    # Theirs are float32, in which rescaling divides by numbers near zero, and in which a thousand factors add up to
    # 1e-6; a later test has the rescaling in float64.
    tolerance = 1e-5 if config.zero_terminal_snr else 1e-7
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=0, atol=tolerance)
    product = torch.cumprod(1 - theirs.betas.double(), dim=0)
    torch.testing.assert_close(ours.alpha_bars, product, rtol=0, atol=min(tolerance, 1e-6))
    torch.testing.assert_close(ours.alpha_bars, theirs.alphas_cumprod.double(), rtol=0, atol=1e-6)


def test_linear_schedule_equals_the_published_numbers_bit_by_bit():
    theirs = np.linspace(1e-4, 2e-2, 1000, dtype=np.float64)
    ours = LinearScheduleConfig().build()
    np.testing.assert_allclose(ours.betas.numpy(), theirs, rtol=1e-15, atol=0)
    np.testing.assert_allclose(ours.alpha_bars.numpy(), np.cumprod(1 - theirs), rtol=1e-13, atol=0)


def test_cosine_alpha_bar_is_the_squared_cosine_where_beta_is_not_capped():
    steps = np.arange(1, 1000) / 1000
    f = np.cos((steps + 0.008) / 1.008 * np.pi / 2) ** 2
    expected = f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    ours = CosineScheduleConfig().build()
    np.testing.assert_allclose(ours.alpha_bars[:-1].numpy(), expected, rtol=1e-11, atol=0)
    assert ours.betas[-1] == 0.999


def test_zero_terminal_snr_equals_the_reference_in_float64_bit_by_bit():
    for config in SCHEDULES:
        betas = config.betas()
        assert torch.equal(with_zero_terminal_snr(betas), rescale_zero_terminal_snr(betas))


def test_linear_schedule_reaches_the_same_noise_with_any_number_of_steps():
    ends = [LinearScheduleConfig(num_steps=steps).build().alpha_bars[-1].log() for steps in (1000, 4000)]
    assert abs(ends[0] - ends[1]) < 0.1


@pytest.mark.parametrize("config", [c for c in SCHEDULES if c.zero_terminal_snr], ids=name)
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_step(config):
    plain = config.model_copy(update={"zero_terminal_snr": False}).build()
    process = config.build()
    last = process.moment(process.num_steps - 1).level
    assert last.alpha == 0
    assert last.sigma == 1
    torch.testing.assert_close(process.betas[0], plain.betas[0], rtol=0, atol=1e-15)
    assert torch.isfinite(process.betas).all()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_noise_grows_with_every_step_along_the_path_of_the_process(process):
    levels = [CLEAN] + [process.moment(step).level for step in range(process.num_steps)]
    alpha = torch.stack([level.alpha for level in levels])
    sigma = torch.stack([level.sigma for level in levels])
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() > 0).all()
    norm = alpha + sigma if process.straight else alpha**2 + sigma**2
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=1e-15)


@pytest.mark.parametrize("config", SCHEDULES, ids=name)
def test_single_steps_add_up_to_the_jump(config):
    """q(x_t | x_0), composed of its steps, has the mean and the variance of the jump at every t."""
    process = config.build()
    mean, variance, before = torch.tensor(1.0).double(), torch.tensor(0.0).double(), CLEAN
    found, expected = [], []
    for step in range(process.num_steps):
        now = process.moment(step).level
        mean = step_scale(now=now, then=before) * mean
        variance = step_scale(now=now, then=before) ** 2 * variance + step_variance(now=now, then=before)
        found += [mean, variance]
        expected += [now.alpha, now.sigma**2]
        before = now
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", SCHEDULES, ids=name)
def test_one_step_adds_the_variance_beta(config):
    process = config.build()
    levels = [process.moment(step).level for step in range(process.num_steps)]
    added = torch.stack([step_variance(now=now, then=then) for then, now in pairwise(levels)])
    kept = torch.stack([step_scale(now=now, then=then) ** 2 for then, now in pairwise(levels)])
    torch.testing.assert_close(added, process.betas[1:], rtol=0, atol=1e-14)
    torch.testing.assert_close(kept, 1 - process.betas[1:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("way", ["jump", "steps"])
def test_noised_data_has_the_mean_and_the_deviation_of_its_level(way):
    process = LinearScheduleConfig(num_steps=50).build()
    n, target = 200_000, process.moment(24).level
    generator = torch.Generator().manual_seed(0)
    x = x0 = torch.full((n,), 0.7, dtype=torch.float64)
    if way == "jump":
        x = add_noise(x0, torch.randn(n, generator=generator, dtype=torch.float64), target)
    else:
        levels = [CLEAN] + [process.moment(step).level for step in range(25)]
        for then, now in pairwise(levels):
            x = forward_step(x, torch.randn(n, generator=generator, dtype=torch.float64), now=now, then=then)
    five_errors = 5 * float(target.sigma) / math.sqrt(n)
    assert abs(x.mean() - 0.7 * target.alpha) < five_errors
    assert abs(x.std() - target.sigma) < five_errors


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_each_sample_gets_the_level_of_its_own_time_in_the_dtype_of_the_latents(process):
    steps = torch.tensor([process.num_steps - 1, 0, 2])
    times = steps + 1 if process.straight else steps
    for dtype in (torch.float32, torch.float64):
        level = process.level(times, like=torch.zeros(3, 4, 2, 2, dtype=dtype))
        for i, step in enumerate(steps.tolist()):
            moment = process.moment(step)
            assert moment.time == times[i]
            assert level.alpha[i, 0, 0, 0] == moment.level.alpha.to(dtype)
            assert level.sigma[i, 0, 0, 0] == moment.level.sigma.to(dtype)
        assert level.alpha.shape == (3, 1, 1, 1)
        assert level.alpha.dtype == dtype


def test_the_level_before_the_first_step_is_clean_data():
    process = CosineScheduleConfig(num_steps=10).build()
    like = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    before = process.level_before(torch.tensor([0, 1, 9]), like=like)
    expected = [CLEAN, process.moment(0).level, process.moment(8).level]
    assert before.alpha.flatten().tolist() == [float(level.alpha) for level in expected]
    assert before.sigma.flatten().tolist() == [float(level.sigma) for level in expected]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: type(process).__name__)
def test_a_moment_is_found_again_by_its_noise_ratio(process):
    for step in (*range(0, process.num_steps, 9), process.num_steps - 1):
        moment = process.moment(step)
        if moment.level.alpha > 0:
            found = process.moment_at_ratio(float(moment.level.ratio))
            assert found.time == pytest.approx(moment.time, abs=1e-6)
            torch.testing.assert_close(found.level.alpha, moment.level.alpha, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.level.sigma, moment.level.sigma, rtol=1e-9, atol=1e-12)


def test_a_noise_ratio_between_two_steps_gets_a_time_between_them():
    process = LinearScheduleConfig().build()
    low, high = (float(process.moment(step).level.ratio) for step in (500, 501))
    assert process.moment_at_ratio(math.sqrt(low * high)).time == pytest.approx(500.5, abs=1e-9)


def test_a_noise_ratio_beyond_the_schedule_keeps_its_level_at_the_time_of_the_end():
    process = LinearScheduleConfig().build()
    assert process.moment_at_ratio(1e6).time == 999
    assert process.moment_at_ratio(1e-6).time == 0
    assert process.moment_at_ratio(1e-6).level.ratio == pytest.approx(1e-6)


@settings(max_examples=50, deadline=None)
@given(num_steps=st.integers(2, 300), part=st.floats(0.01, 0.99))
def test_every_step_owns_an_equal_part_of_the_way(num_steps, part):
    chain = DiscreteDiffusion(torch.full((num_steps,), 0.01))
    steps = torch.arange(num_steps)
    assert torch.equal(chain.time((steps.double() + part) / num_steps), steps)
    assert chain.time(torch.tensor([1.0])).item() == num_steps - 1
    assert FlowMatching(num_steps).time(torch.tensor([0.25])).item() == 0.25 * num_steps


def test_the_signal_to_noise_ratio_is_said_in_three_ways():
    level = scalar_level(alpha=0.8, sigma=0.6)
    assert level.ratio == pytest.approx(0.75)
    assert level.snr == pytest.approx(1 / 0.75**2)
    assert level.log_snr == pytest.approx(math.log(1 / 0.75**2))
    noise = NoiseLevel(torch.tensor(0.0), torch.tensor(1.0))
    assert noise.ratio == math.inf
    assert noise.snr == 0
    assert CLEAN.snr == math.inf


def test_a_linear_schedule_that_would_exceed_certainty_is_refused_with_advice():
    with pytest.raises(ValidationError) as caught:
        LinearScheduleConfig(num_steps=15)
    message = str(caught.value)
    assert "num_steps = 15" in message
    assert "0.02 * 1000 / 15 = 1.33333" in message
    assert "Use more than 20 steps" in message
    assert 'kind = "cosine"' in message
