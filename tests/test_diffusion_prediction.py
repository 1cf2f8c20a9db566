"""Predictions and posteriors: every conversion against definitions that do not use it, and its way back."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from models.diffusion import posterior, prediction
from models.diffusion.posterior import learned_log_variance, posterior_variance, reverse_log_variance, step_variance
from models.diffusion.prediction import (
    TO_EPS,
    TO_X0,
    Estimate,
    estimate_from_output,
    split_learned_variance,
    training_target,
)
from models.diffusion.schedule import (
    CLEAN,
    CosineScheduleConfig,
    FlowMatchingConfig,
    LinearScheduleConfig,
    add_noise,
    scalar_level,
)

KINDS = ["eps", "x0", "v", "velocity", "score"]
CHAIN = LinearScheduleConfig().build()
PURE_NOISE = scalar_level(alpha=0.0, sigma=1.0)
LEVELS = {
    "first step": CHAIN.moment(0).level,
    "middle of the chain": CHAIN.moment(400).level,
    "last step": CHAIN.moment(999).level,
    "last step of cosine": CosineScheduleConfig().build().moment(999).level,
    "first step of flow": FlowMatchingConfig().build().moment(0).level,
    "middle of flow": FlowMatchingConfig().build().moment(499).level,
}
# What a prediction cannot say. At pure noise x holds nothing of the data; at clean data it holds nothing of the noise.
SILENT_AT_NOISE = {(a, b) for a in ("eps", "score") for b in ("x0", "v", "velocity")}
SILENT_AT_DATA = {("x0", b) for b in ("eps", "v", "velocity", "score")} | {
    (a, "score") for a in ("eps", "v", "velocity")
}
SILENT_AT_DATA |= {("score", "score")}


def draw(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=generator)
    return x0, eps


def convert(source: str, target: str):
    if source == target:
        return lambda value, x, level: value
    return getattr(prediction, f"{source}_to_{target}")


PAIRS = [(source, target) for source in KINDS for target in KINDS if source != target]


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_every_conversion_tells_the_truth_and_leads_back(source, target, level):
    x0, eps = draw()
    x = add_noise(x0, eps, level)
    value = training_target(x0, eps, level, source)
    converted = convert(source, target)(value, x, level)
    back = convert(target, source)(converted, x, level)
    # One rounding in eps is sigma / alpha roundings in x0, and the other way around: 2e4 at the last step of cosine.
    condition = float(torch.maximum(level.ratio, 1 / level.ratio))
    tolerance = max(1e-12, 1e-15 * condition)
    assert (back - value).abs().max() <= tolerance * value.abs().max().clamp(min=1)
    truth = training_target(x0, eps, level, target)
    assert (converted - truth).abs().max() <= tolerance * truth.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("end", "silent"), [(PURE_NOISE, SILENT_AT_NOISE), (CLEAN, SILENT_AT_DATA)], ids=["pure noise", "clean data"]
)
@pytest.mark.parametrize(("source", "target"), [*PAIRS, *((kind, kind) for kind in KINDS)])
def test_conversions_hold_at_both_ends_wherever_they_are_defined(source, target, end, silent):
    x0, eps = draw()
    x = add_noise(x0, eps, end)
    value = training_target(x0, eps, end, source) if source != "score" or end.sigma > 0 else eps  # any finite score
    converted = convert(source, target)(value, x, end)
    if (source, target) in silent and source != target:
        assert not torch.isfinite(converted).any()
        return
    assert torch.isfinite(converted).all()
    if source == "score" and end.sigma == 0:
        # The score enters with a factor sigma: it is not needed to know the data, and shows no noise.
        x0, eps = x, torch.zeros_like(eps)
        if target == "score":
            return
    torch.testing.assert_close(converted, training_target(x0, eps, end, target), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
def test_the_score_is_the_gradient_of_the_log_density(level):
    x0, eps = draw()
    x = add_noise(x0, eps, level).requires_grad_()
    density = torch.distributions.Normal(level.alpha * x0, level.sigma.expand_as(x0))
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    score = training_target(x0, eps, level, "score")
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)


def test_v_is_the_speed_along_the_circle_and_velocity_that_along_the_straight_line():
    x0, eps = draw()
    paths = {
        "v": lambda angle: scalar_level(alpha=math.cos(angle), sigma=math.sin(angle)),
        "velocity": lambda t: scalar_level(alpha=1 - t, sigma=t),
    }
    for kind, level_at in paths.items():
        ahead, behind = (add_noise(x0, eps, level_at(0.3 + h)) for h in (1e-5, -1e-5))
        speed = (ahead - behind) / 2e-5
        torch.testing.assert_close(training_target(x0, eps, level_at(0.3), kind), speed, rtol=0, atol=1e-9)


def test_v_equals_the_reference_implementation():
    x0, eps = draw()
    theirs = DDIMScheduler(trained_betas=CHAIN.betas.numpy())
    times = torch.tensor([0, 400, 999])
    ours = training_target(x0, eps, CHAIN.level(times, like=x0), "v")
    torch.testing.assert_close(ours, theirs.get_velocity(x0, eps, times), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_is_read_as_data_and_noise_for_each_sample_at_its_own_level(kind):
    x0, eps = draw()
    level = CHAIN.level(torch.tensor([3, 500, 998]), like=x0)
    x = add_noise(x0, eps, level)
    estimate = estimate_from_output(training_target(x0, eps, level, kind), x, level, kind)
    torch.testing.assert_close(estimate.x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-10)
    assert estimate.log_variance_weight is None
    assert TO_X0.keys() == TO_EPS.keys() == set(KINDS)


def test_the_second_half_of_the_channels_is_a_learned_variance_from_minus_one_to_one():
    value, raw = draw()
    half, weight = split_learned_variance(torch.cat([value, raw], dim=1), num_channels=4)
    assert torch.equal(half, value)
    torch.testing.assert_close(weight, (raw + 1) / 2)


# ---------------------------------------------------------------------------------------------------------- posterior

MOVES = {
    "neighbours": (CHAIN.moment(500).level, CHAIN.moment(499).level),
    "far apart": (CHAIN.moment(900).level, CHAIN.moment(100).level),
    "first two": (CHAIN.moment(1).level, CHAIN.moment(0).level),
    "last two": (CHAIN.moment(999).level, CHAIN.moment(998).level),
    "flow": (FlowMatchingConfig().build().moment(799).level, FlowMatchingConfig().build().moment(599).level),
}


@pytest.mark.parametrize(("now", "then"), MOVES.values(), ids=MOVES.keys())
def test_the_posterior_is_bayes_rule_for_two_gaussians(now, then):
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add, means are weighed by them."""
    x0, eps = draw()
    x = add_noise(x0, eps, now)
    scale = now.alpha / then.alpha
    noise = now.sigma**2 - scale**2 * then.sigma**2
    precision = scale**2 / noise + 1 / then.sigma**2
    mean = (scale / noise * x + then.alpha / then.sigma**2 * x0) / precision
    torch.testing.assert_close(posterior_variance(now=now, then=then), 1 / precision, rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior.x0_to_posterior_mean(x0, x, now=now, then=then), mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("now", "then"), MOVES.values(), ids=MOVES.keys())
def test_all_forms_of_the_posterior_mean_agree_and_lead_back(now, then):
    x0, eps = draw()
    x = add_noise(x0, eps, now)
    mean = posterior.x0_to_posterior_mean(x0, x, now=now, then=then)
    for kind in KINDS:
        value = training_target(x0, eps, now, kind)
        same = getattr(posterior, f"{kind}_to_posterior_mean")(value, x, now=now, then=then)
        torch.testing.assert_close(same, mean, rtol=0, atol=1e-12)
        back = getattr(posterior, f"posterior_mean_to_{kind}")(mean, x, now=now, then=then)
        # One step of the chain hardly moves the mean, so what the mean says of the rest is amplified in turn.
        again = getattr(posterior, f"{kind}_to_posterior_mean")(back, x, now=now, then=then)
        torch.testing.assert_close(again, mean, rtol=0, atol=1e-12)
        assert (back - value).abs().max() <= 1e-15 / step_variance(now=now, then=then) ** 2 + 1e-12


def test_the_posterior_is_finite_at_both_ends():
    x0, eps = draw()
    cleaner = CHAIN.moment(500).level
    from_noise = posterior.x0_to_posterior_mean(x0, eps, now=PURE_NOISE, then=cleaner)
    torch.testing.assert_close(from_noise, cleaner.alpha * x0)  # pure noise says nothing: q(x_s | x_0) remains
    torch.testing.assert_close(posterior_variance(now=PURE_NOISE, then=cleaner), cleaner.sigma**2)
    back = posterior.posterior_mean_to_x0(from_noise, eps, now=PURE_NOISE, then=cleaner)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-12)

    first = CHAIN.moment(0).level
    x = add_noise(x0, eps, first)
    assert torch.equal(posterior.x0_to_posterior_mean(x0, x, now=first, then=CLEAN), x0)
    for kind in ("v", "velocity"):
        value = training_target(x0, eps, PURE_NOISE, kind)
        mean = getattr(posterior, f"{kind}_to_posterior_mean")(value, eps, now=PURE_NOISE, then=cleaner)
        torch.testing.assert_close(mean, from_noise, rtol=0, atol=1e-12)
        again = getattr(posterior, f"posterior_mean_to_{kind}")(mean, eps, now=PURE_NOISE, then=cleaner)
        torch.testing.assert_close(again, value, rtol=0, atol=1e-12)
    assert posterior_variance(now=first, then=CLEAN) == 0
    same = posterior.eps_to_posterior_mean(eps, x, now=first, then=CLEAN)
    torch.testing.assert_close(same, x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step", [1, 500, 999])
def test_all_variances_equal_the_reference_implementation(step):
    theirs = DDPMScheduler()
    now, then = CHAIN.moment(step).level, CHAIN.moment(step - 1).level
    smallest, largest = posterior_variance(now=now, then=then), step_variance(now=now, then=then)
    raw = torch.linspace(-1.2, 1.2, 7, dtype=torch.float64)
    estimate = Estimate(x0=raw, eps=raw, log_variance_weight=(raw + 1) / 2)
    ours = {
        variance: reverse_log_variance(estimate, smallest=smallest, largest=largest, variance=variance)
        for variance in ("posterior", "step", "learned")
    }
    kinds = {"posterior": "fixed_small", "step": "fixed_large"}
    for variance, kind in kinds.items():
        expected = theirs._get_variance(step, variance_type=kind).double().log()
        torch.testing.assert_close(ours[variance], expected, rtol=0, atol=1e-3)  # float32: 1 - alpha_bar has 4 digits
    expected = theirs._get_variance(step, predicted_variance=raw, variance_type="learned_range")
    torch.testing.assert_close(ours["learned"], expected, rtol=0, atol=1e-3)


def test_a_learned_variance_runs_from_the_smallest_to_the_largest():
    smallest, largest = torch.tensor(1e-4).double(), torch.tensor(1e-2).double()
    weight = torch.tensor([0.0, 0.5, 1.0]).double()
    log_variance = learned_log_variance(weight, smallest=smallest, largest=largest)
    torch.testing.assert_close(log_variance.exp(), torch.tensor([1e-4, 1e-3, 1e-2]).double())


def test_a_learned_variance_that_no_network_predicts_is_refused_with_advice():
    x = torch.zeros(1)
    with pytest.raises(ValueError, match='variance = "learned" was asked for, but the network predicts none') as caught:
        reverse_log_variance(Estimate(x, x), smallest=x + 1, largest=x + 2, variance="learned")
    assert 'Use variance = "posterior" or "step"' in str(caught.value)
    assert math.isfinite(reverse_log_variance(Estimate(x, x), smallest=x + 1, largest=x + 2, variance="step"))
