"""Samplers: whole trajectories of a deterministic dummy network, equal to the reference implementation.

| ours                              | theirs (diffusers)                | tolerance, relative            |
|-----------------------------------|-----------------------------------|--------------------------------|
| ddim, eta 0 and 0.6               | DDIMScheduler                     | 1e-9                           |
| ddim_inversion                    | DDIMInverseScheduler              | 1e-9                           |
| ddpm, all three variances         | DDPMScheduler                     | 1e-9                           |
| euler, heun                       | Euler-, HeunDiscreteScheduler     | 1e-5, theirs steps in float32  |
| dpm_solver_pp, chain and flow     | DPMSolverMultistepScheduler       | 1e-5, theirs steps in float32  |
| euler, heun of a flow             | FlowMatchEuler-, FlowMatchHeun... | 1e-5, theirs steps in float32  |
| spaced_steps                      | timesteps of DDIMScheduler        | equal                          |
"""

import math

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from models.diffusion.prediction import Estimate, estimate_from_output
from models.diffusion.samplers import (
    ddim,
    ddim_inversion,
    ddpm,
    dpm_solver_pp,
    euler,
    heun,
)
from models.diffusion.schedule import (
    CosineScheduleConfig,
    LinearScheduleConfig,
    Moment,
    ScaledLinearScheduleConfig,
    scalar_level,
)
from models.diffusion.spacing import sampling_moments, spaced_steps

LINEAR = LinearScheduleConfig().build()
CHAINS = {
    "linear": LINEAR,
    "scaled linear": ScaledLinearScheduleConfig().build(),
    "cosine": CosineScheduleConfig().build(),
    "zero terminal SNR": LinearScheduleConfig(zero_terminal_snr=True).build(),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def no_noise(index: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


def network(x: torch.Tensor, time) -> torch.Tensor:
    """A deterministic dummy network."""
    mixed = x.roll(1, dims=1) + 0.5 * x.flip(3)
    return torch.tanh(0.7 * x + 0.2 * mixed + 0.3 * math.cos(float(time) / 300)) + 0.1


def dummy(prediction: str):
    def denoise(x: torch.Tensor, moment: Moment) -> Estimate:
        return estimate_from_output(network(x, moment.time), x, moment.level, prediction)

    return denoise


NOISE = draw(2, 4, 3, 3)
THEIR_PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
KARRAS = {"timestep_spacing": "linspace", "use_karras_sigmas": True}


def reference(scheduler_class, process, *, num_steps: int, **options):
    """A scheduler of theirs on our table; their own, float32, is compared in test_diffusion_schedule.py."""
    scheduler = scheduler_class(**options)
    scheduler.alphas_cumprod = process.alpha_bars
    scheduler.set_timesteps(num_steps)
    return scheduler


def their_trajectory(scheduler, x: torch.Tensor, model=network, **options) -> list[torch.Tensor]:
    trajectory = []
    for time in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, time), time, x, **options).prev_sample
        trajectory.append(x)
    return trajectory


def assert_same_trajectory(steps, theirs: list[torch.Tensor], *, tolerance: float) -> None:
    ours = [step.x for step in steps]
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("schedule", CHAINS)
def test_ddim_equals_the_reference_implementation(schedule, spacing, kind):
    process = CHAINS[schedule]
    scheduler = reference(
        DDIMScheduler,
        process,
        num_steps=20,
        timestep_spacing=spacing,
        prediction_type=THEIR_PREDICTION[kind],
        clip_sample=False,
    )
    moments = sampling_moments(process, num_steps=20, spacing=spacing)
    assert [moment.time for moment in moments] == scheduler.timesteps.tolist()
    if kind == "eps" and moments[0].level.alpha == 0:
        return  # eps says nothing of the data in pure noise: both are nan
    ours = ddim(dummy(kind), NOISE, moments, eta=0, fresh_noise=no_noise)
    assert_same_trajectory(ours, their_trajectory(scheduler, NOISE), tolerance=1e-9)


def test_stochastic_ddim_equals_the_reference_implementation():
    scheduler = reference(
        DDIMScheduler,
        LINEAR,
        num_steps=20,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )
    moments = sampling_moments(LINEAR, num_steps=20, spacing="trailing")
    noises = draw(20, *NOISE.shape, seed=3)
    theirs, x = [], NOISE
    for index, time in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, time), time, x, eta=0.6, variance_noise=noises[index]).prev_sample
        theirs.append(x)
    ours = ddim(dummy("v"), NOISE, moments, eta=0.6, fresh_noise=lambda i: noises[i])
    assert_same_trajectory(ours, theirs, tolerance=1e-9)


def with_variance(x: torch.Tensor, time) -> torch.Tensor:
    value = network(x, time)
    return torch.cat([value, value.flip(1) / 2], dim=1)


@pytest.mark.parametrize(
    ("variance", "theirs", "num_steps"),
    [
        ("posterior", "fixed_small", 1000),
        *(("posterior", "fixed_small", 50), ("step", "fixed_large", 50), ("learned", "learned_range", 50)),
    ],
)
def test_ddpm_equals_the_reference_implementation(variance, theirs, num_steps):
    model = with_variance if variance == "learned" else network
    scheduler = reference(
        DDPMScheduler,
        LINEAR,
        num_steps=num_steps,
        timestep_spacing="leading",
        prediction_type="v_prediction",
        variance_type=theirs,
        clip_sample=False,
    )
    trajectory = their_trajectory(scheduler, NOISE, model, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    ours = ddpm(
        lambda x, moment: estimate_from_output(model(x, moment.time), x, moment.level, "v"),
        NOISE,
        sampling_moments(LINEAR, num_steps=num_steps, spacing="leading"),
        variance=variance,
        fresh_noise=lambda i: torch.randn(NOISE.shape, generator=generator, dtype=NOISE.dtype),
    )
    assert_same_trajectory(ours, trajectory, tolerance=1e-9)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
@pytest.mark.parametrize("method", [euler, heun], ids=["euler", "heun"])
def test_euler_and_heun_equal_the_reference_implementation(method, spacing, kind):
    scheduler = reference(
        EulerDiscreteScheduler if method is euler else HeunDiscreteScheduler,
        LINEAR,
        num_steps=20,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=THEIR_PREDICTION[kind],
        **(KARRAS if spacing == "karras" else {"timestep_spacing": spacing}),
    )
    moments = sampling_moments(LINEAR, num_steps=20, spacing=spacing)
    ratios = torch.stack([moment.level.ratio for moment in moments])
    torch.testing.assert_close(ratios.float(), scheduler.sigmas.unique().flip(0)[:-1], rtol=1e-6, atol=0)
    ours = list(method(dummy(kind), NOISE, moments, **({"straight": False} if method is heun else {})))

    # Their latents are x / alpha, and their Heun's step is two.
    their = their_trajectory(scheduler, NOISE / moments[0].level.alpha)
    their = their if method is euler else [*their[1::2], their[-1]]
    their = [step.level.alpha * x for step, x in zip(ours, their, strict=True)]
    assert_same_trajectory(ours, their, tolerance=1e-5)  # they step in float32


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_dpm_solver_equals_the_reference_implementation(spacing, kind):
    scheduler = reference(
        DPMSolverMultistepScheduler,
        LINEAR,
        num_steps=20,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=THEIR_PREDICTION[kind],
        **(KARRAS if spacing == "karras" else {"timestep_spacing": spacing}),
    )
    moments = sampling_moments(LINEAR, num_steps=20, spacing=spacing)
    # With Karras spacing they round the time that the network is told to a whole step.
    assert all(abs(m.time - time) < 0.501 for m, time in zip(moments, scheduler.timesteps.tolist(), strict=True))
    moments = [Moment(float(time), m.level) for m, time in zip(moments, scheduler.timesteps, strict=True)]
    ours = dpm_solver_pp(dummy(kind), NOISE, moments)
    assert_same_trajectory(ours, their_trajectory(scheduler, NOISE), tolerance=1e-5)  # they step in float32


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_inversion_equals_the_reference_implementation(spacing, kind):
    scheduler = reference(
        DDIMInverseScheduler,
        LINEAR,
        num_steps=20,
        timestep_spacing=spacing,
        prediction_type=THEIR_PREDICTION[kind],
        clip_sample=False,
    )
    moments = sampling_moments(LINEAR, num_steps=20, spacing=spacing)
    ours = ddim_inversion(dummy(kind), NOISE, moments)
    assert_same_trajectory(ours, their_trajectory(scheduler, NOISE), tolerance=1e-9)


@pytest.mark.parametrize("method", [euler, heun], ids=["euler", "heun"])
def test_flow_samplers_equal_the_reference_implementation(method):
    scheduler = (FlowMatchEulerDiscreteScheduler if method is euler else FlowMatchHeunDiscreteScheduler)()
    scheduler.set_timesteps(20)
    ts = scheduler.sigmas.unique().double().flip(0)[:-1].tolist()
    moments = [Moment(1000 * t, scalar_level(alpha=1 - t, sigma=t)) for t in ts]
    ours = method(dummy("velocity"), NOISE, moments, **({"straight": True} if method is heun else {}))
    their = their_trajectory(scheduler, NOISE)
    their = their if method is euler else [*their[1::2], their[-1]]
    assert_same_trajectory(ours, their, tolerance=1e-5)  # they step in float32


def test_dpm_solver_on_a_flow_equals_the_reference_implementation():
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(20)
    ts = scheduler.sigmas[:-1].double().tolist()
    times = scheduler.timesteps.tolist()
    moments = [Moment(time, scalar_level(alpha=1 - t, sigma=t)) for time, t in zip(times, ts, strict=True)]
    ours = dpm_solver_pp(dummy("velocity"), NOISE, moments)
    assert_same_trajectory(ours, their_trajectory(scheduler, NOISE), tolerance=1e-5)  # they step in float32


@pytest.mark.parametrize("num_steps", [1, 7, 50, 333, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_equal_the_reference_implementation(spacing, num_steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    ours = spaced_steps(num_train_steps=1000, num_steps=num_steps, spacing=spacing)
    if spacing == "linspace" and num_steps == 1:
        assert ours == [999]  # theirs is 0, from which no image comes
    else:
        assert ours == scheduler.timesteps.tolist()
