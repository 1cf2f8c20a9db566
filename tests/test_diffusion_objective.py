"""The objective: times, weights and losses against closed forms and longhand references."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models.diffusion.likelihood import NATS_PER_BIT, variational_bound
from models.diffusion.objective import (
    LogitNormalTimes,
    MinSNRWeighting,
    ObjectiveConfig,
    P2Weighting,
    TruncatedSNRWeighting,
    UniformTimes,
    UniformWeighting,
    check_objective,
    check_sampling_start,
    denoising_loss,
    loss_weights,
    strata,
    times_from_uniforms,
)
from models.diffusion.prediction import estimate_from_output, training_target
from models.diffusion.schedule import (
    CosineScheduleConfig,
    FlowMatchingConfig,
    LinearScheduleConfig,
    ScaledLinearScheduleConfig,
    add_noise,
    scalar_level,
)

CHAIN = CosineScheduleConfig().build()
FLOW = FlowMatchingConfig().build()
KINDS = ["eps", "x0", "v", "velocity", "score"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- times


@settings(max_examples=60, deadline=None)
@given(global_batch=st.integers(1, 2048))
def test_every_part_of_the_way_is_dealt_to_one_sample_of_a_global_batch(global_batch):
    dealt = strata(torch.arange(global_batch), batch=7, global_batch=global_batch)
    assert torch.equal(dealt.sort().values, torch.arange(global_batch))


@pytest.mark.parametrize(("global_batch", "ranks"), [(256, 4), (256, 8), (96, 3), (1000, 8)])
def test_the_share_of_every_rank_covers_all_noise_levels_evenly(global_batch, ranks):
    shares = strata(torch.arange(global_batch), batch=7, global_batch=global_batch).double() / global_batch
    for share in shares.chunk(ranks):
        n = len(share)
        distance = stats.kstest(share.numpy(), "uniform").statistic
        assert distance < 6 / n  # of the order of 1 / n, where independent draws have 1 / sqrt(n)


@pytest.mark.parametrize(("global_batch", "part"), [(256, 4), (256, 1), (96, 8), (100, 1), (7, 1)])
def test_a_shard_of_a_blocked_order_meets_as_many_noise_levels_as_if_they_were_drawn(global_batch, part):
    """Its samples come at the few positions of one stream, batch after batch."""
    for first_position in (0, global_batch - part):
        for first_batch in (0, 1_000):
            positions = torch.arange(first_position, first_position + part)
            batches = range(first_batch, first_batch + global_batch // part // 2)
            met = {int(s) for b in batches for s in strata(positions, batch=b, global_batch=global_batch)}
            num_samples = part * len(batches)
            independent = global_batch * (1 - (1 - 1 / global_batch) ** num_samples)
            assert len(met) >= independent
            through = range(first_batch, first_batch + global_batch)
            met = {int(s) for b in through for s in strata(positions[:1], batch=b, global_batch=global_batch)}
            assert met == set(range(global_batch))


@pytest.mark.parametrize("times", [UniformTimes(), LogitNormalTimes(mean=0.3), UniformTimes(stratified=False)])
@pytest.mark.parametrize("process", [CHAIN, FLOW])
def test_a_time_depends_on_its_own_draw_and_position_only(process, times):
    u, positions = uniforms(12), torch.arange(12)
    whole = times_from_uniforms(u, batch=0, positions=positions, global_batch=12, times=times, process=process)
    parts = [
        times_from_uniforms(u[part], batch=0, positions=positions[part], global_batch=12, times=times, process=process)
        for part in (slice(0, 5), slice(5, 12))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_stratified_times_hit_every_part_of_the_chain_once():
    times = times_from_uniforms(
        uniforms(250), batch=0, positions=torch.arange(250), global_batch=250, times=UniformTimes(), process=CHAIN
    )
    assert times.dtype == torch.int64
    assert torch.equal((times // 4).sort().values, torch.arange(250))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("process", [CHAIN, FLOW])
def test_times_follow_their_distribution(process, stratified):
    n = 20_000
    expected = {
        UniformTimes(stratified=stratified): stats.uniform(),
        LogitNormalTimes(mean=-0.5, std=0.8, stratified=stratified): None,
    }
    for times, distribution in expected.items():
        drawn = times_from_uniforms(
            uniforms(n), batch=0, positions=torch.arange(n), global_batch=n, times=times, process=process
        )
        assert drawn.min() >= 0
        assert drawn.max() <= process.num_steps - (process is CHAIN)
        fractions = (drawn.double() + (0.5 if process is CHAIN else 0)) / process.num_steps
        if distribution is None:
            fractions, distribution = torch.logit(fractions), stats.norm(-0.5, 0.8)
        assert stats.kstest(fractions.numpy(), distribution.cdf).statistic < (0.002 if stratified else 1.7 / n**0.5)


def test_extreme_draws_stay_within_the_process():
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for times in (UniformTimes(stratified=False), LogitNormalTimes(std=10.0, stratified=False)):
        for process in (CHAIN, FLOW):
            drawn = times_from_uniforms(
                extremes, batch=0, positions=torch.arange(2), global_batch=2, times=times, process=process
            )
            level = process.level(drawn, like=torch.zeros(2, 1, 1, 1))
            assert torch.isfinite(level.alpha).all()
            assert drawn[0] == 0


# ----------------------------------------------------------------------------------------------------------- weights


def snr_at(steps: torch.Tensor) -> torch.Tensor:
    return CHAIN.alpha_bars[steps] / (1 - CHAIN.alpha_bars[steps])


STEPS = torch.tensor([0, 10, 300, 500, 900, 999])


def weights(weighting, prediction) -> torch.Tensor:
    return loss_weights(weighting, CHAIN.level(STEPS, like=torch.zeros(6, 1, 1, 1).double()), prediction).flatten()


def test_min_snr_weights_equal_the_published_ones():
    snr = snr_at(STEPS)
    capped = snr.clamp(max=5)
    for prediction, expected in {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}.items():
        torch.testing.assert_close(weights(MinSNRWeighting(), prediction), expected, rtol=1e-9, atol=0)


def test_other_weights_equal_the_published_ones():
    snr = snr_at(STEPS)
    torch.testing.assert_close(weights(TruncatedSNRWeighting(), "x0"), snr.clamp(min=1), rtol=1e-9, atol=0)
    p2 = P2Weighting(k=2.0, gamma=0.5)
    torch.testing.assert_close(weights(p2, "eps"), (2 + snr) ** -0.5, rtol=1e-9, atol=0)
    assert torch.equal(weights(UniformWeighting(), "v"), torch.ones(6).double())
    torch.testing.assert_close(weights(P2Weighting(gamma=0.0), "eps"), torch.ones(6).double())


@pytest.mark.parametrize("weighting", [MinSNRWeighting(), TruncatedSNRWeighting(), P2Weighting()])
@pytest.mark.parametrize("process", [CHAIN, FLOW], ids=["chain", "flow"])
def test_a_weighting_means_the_same_for_every_prediction(process, weighting):
    """The loss of one belief about the data does not depend on the quantity in which it is expressed."""
    times = torch.tensor([50, 400, 700])
    x0, eps, wrong = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), draw(3, 4, 2, 2, seed=2)
    level = process.level(times, like=x0)
    x = add_noise(x0, eps, level)
    losses = []
    for kind in KINDS:
        output = training_target(wrong, (x - level.alpha * wrong) / level.sigma, level, kind)
        objective = ObjectiveConfig(prediction=kind, weighting=weighting)
        losses.append(
            denoising_loss(output, x=x, x0=x0, eps=eps, times=times, process=process, objective=objective).loss
        )
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=0)


def test_weights_at_both_ends_are_the_limits():
    noise, data = scalar_level(alpha=0.0, sigma=1.0), scalar_level(alpha=1.0, sigma=0.0)
    min_snr, p2 = MinSNRWeighting(gamma=5.0), P2Weighting()
    for weighting, kind, level, limit in [
        (min_snr, "eps", noise, 1.0),
        (min_snr, "x0", noise, 0.0),
        (min_snr, "v", noise, 0.0),
        (min_snr, "velocity", noise, 0.0),
        (min_snr, "eps", data, 0.0),
        (min_snr, "x0", data, 5.0),
        (min_snr, "v", data, 0.0),
        (min_snr, "score", data, 0.0),
        (p2, "eps", noise, 1.0),
        (p2, "x0", data, 1.0),
        (TruncatedSNRWeighting(), "v", noise, 1.0),
        (TruncatedSNRWeighting(), "v", data, 1.0),
    ]:
        assert loss_weights(weighting, level, kind) == pytest.approx(limit, abs=1e-12), (weighting.kind, kind)


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("process", [CHAIN, FLOW], ids=["chain", "flow"])
def test_the_loss_is_the_mean_squared_error_of_the_prediction_for_each_sample(process, kind):
    times = torch.tensor([5, 500, 990])
    x0, eps, output = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), draw(3, 4, 2, 2, seed=2)
    level = process.level(times, like=x0)
    x = add_noise(x0, eps, level)
    objective = ObjectiveConfig(prediction=kind)
    given = {"x": x, "x0": x0, "eps": eps, "times": times, "process": process, "objective": objective}
    loss = denoising_loss(output, **given)
    alpha, sigma = level.alpha, level.sigma
    target = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "velocity": eps - x0, "score": -eps / sigma}[kind]
    for i in range(3):
        expected = torch.nn.functional.mse_loss(output[i], target[i])
        torch.testing.assert_close(loss.error[i], expected)
        torch.testing.assert_close(loss.loss[i], expected)
    assert loss.bound is None
    perfect = denoising_loss(target, **given)
    assert torch.equal(perfect.loss, torch.zeros(3).double())


# -------------------------------------------------------------------------------------------------- learned variance

SHORT = CosineScheduleConfig(num_steps=12).build()
HYBRID = ObjectiveConfig(prediction="eps", variance="learned")


def hybrid(output: torch.Tensor, times: torch.Tensor, objective: ObjectiveConfig = HYBRID):
    n = len(times)
    x0, eps = draw(n, 2, 2, 2), draw(n, 2, 2, 2, seed=1)
    x = add_noise(x0, eps, SHORT.level(times, like=x0)).to(output.dtype)
    return denoising_loss(output, x=x, x0=x0, eps=eps, times=times, process=SHORT, objective=objective)


def test_the_hybrid_loss_equals_the_authors_formulas():
    """Nichol & Dhariwal 2021 with the betas of the chain, written out in numpy."""
    times = torch.arange(12)
    output = draw(12, 4, 2, 2, seed=2)
    x0, eps = draw(12, 2, 2, 2).numpy(), draw(12, 2, 2, 2, seed=1).numpy()

    betas = SHORT.betas.numpy()
    alpha_bars = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bars[:-1])
    posterior = betas * (1 - before) / (1 - alpha_bars)
    posterior_log = np.log(np.append(posterior[1], posterior[1:]))
    of_x0 = betas * np.sqrt(before) / (1 - alpha_bars)
    of_x = (1 - before) * np.sqrt(1 - betas) / (1 - alpha_bars)

    for t in range(12):
        x = np.sqrt(alpha_bars[t]) * x0[t] + np.sqrt(1 - alpha_bars[t]) * eps[t]
        said_eps, said_variance = output[t, :2].numpy(), output[t, 2:].numpy()
        said_x0 = (x - np.sqrt(1 - alpha_bars[t]) * said_eps) / np.sqrt(alpha_bars[t])
        share = (said_variance + 1) / 2
        log_variance = share * np.log(betas[t]) + (1 - share) * posterior_log[t]
        mean = of_x0[t] * said_x0 + of_x[t] * x
        true_mean = of_x0[t] * x0[t] + of_x[t] * x
        if t == 0:
            nats = -stats.norm(mean, np.exp(log_variance / 2)).logpdf(x0[t])
        else:
            ratio = np.exp(posterior_log[t] - log_variance)
            distance = (true_mean - mean) ** 2 * np.exp(-log_variance)
            nats = 0.5 * (-1 + log_variance - posterior_log[t] + ratio + distance)
        bits = nats.mean() / math.log(2)
        ours = hybrid(output, times)
        assert ours.bound[t].item() == pytest.approx(bits, rel=1e-9)
        simple = ((said_eps - eps[t]) ** 2).mean()
        assert ours.loss[t].item() == pytest.approx(simple + 1e-3 * 12 * bits, rel=1e-9)
        assert ours.error[t].item() == pytest.approx(simple, rel=1e-12)


def test_the_bound_teaches_the_variance_only_and_the_error_the_prediction_only():
    output = draw(12, 4, 2, 2, seed=2).requires_grad_()
    loss = hybrid(output, torch.arange(12))
    (of_bound,) = torch.autograd.grad(loss.bound.sum(), output, retain_graph=True)
    assert torch.equal(of_bound[:, :2], torch.zeros_like(of_bound[:, :2]))
    assert torch.isfinite(of_bound).all()
    assert (of_bound[:, 2:] != 0).all()
    (of_error,) = torch.autograd.grad(loss.error.sum(), output)
    assert torch.equal(of_error[:, 2:], torch.zeros_like(of_error[:, 2:]))
    assert (of_error[:, :2] != 0).all()


def test_the_hybrid_loss_keeps_single_precision_accurate():
    output = draw(12, 4, 2, 2, seed=2)
    single = hybrid(output.float(), torch.arange(12))
    assert single.bound.dtype == torch.float32
    torch.testing.assert_close(single.bound.double(), hybrid(output, torch.arange(12)).bound, rtol=2e-5, atol=1e-5)


def test_the_average_bound_of_training_is_the_bound_of_evaluation():
    """Over all T steps with the same noise, T times the mean of the training terms is the bound without its prior."""
    x0 = draw(1, 2, 2, 2)
    noises = draw(12, 2, 2, 2, seed=1)
    output = draw(12, 4, 2, 2, seed=2)

    def denoise(x, moment):
        return estimate_from_output(output[int(moment.time)][None], x, moment.level, "eps")

    moments = [SHORT.moment(step) for step in reversed(range(12))]
    bound = variational_bound(denoise, x0, moments, variance="learned", fresh_noise=lambda i: noises[11 - i][None])
    times = torch.arange(12)
    repeated = x0.expand(12, -1, -1, -1)
    x = add_noise(repeated, noises, SHORT.level(times, like=x0))
    trained = denoising_loss(output, x=x, x0=repeated, eps=noises, times=times, process=SHORT, objective=HYBRID)
    expected = (bound.total - bound.prior).item() / NATS_PER_BIT
    assert 12 * trained.bound.mean().item() == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------------------------------- what cannot be trained


@pytest.mark.parametrize("kind", ["eps", "score"])
@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (LinearScheduleConfig(zero_terminal_snr=True), "zero_terminal_snr = true"),
        (FlowMatchingConfig(), "flow_matching"),
    ],
)
def test_predicting_the_noise_in_pure_noise_is_refused_with_advice(schedule, reason, kind):
    with pytest.raises(ValueError, match=f'objective.prediction = "{kind}"') as caught:
        check_objective(ObjectiveConfig(prediction=kind), schedule)
    assert f"ends in pure noise ({reason})" in str(caught.value)
    assert 'Use "v", "velocity" or "x0"' in str(caught.value)


def test_a_learned_variance_of_a_flow_is_refused_with_advice():
    with pytest.raises(ValueError, match=r'objective\.variance = "learned"') as caught:
        check_objective(ObjectiveConfig(variance="learned"), FlowMatchingConfig())
    assert 'Use variance = "fixed", or a linear, scaled_linear or cosine schedule' in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_combination_is_accepted(kind):
    check_objective(ObjectiveConfig(prediction=kind, variance="learned"), CosineScheduleConfig())
    if kind not in ("eps", "score"):
        check_objective(ObjectiveConfig(prediction=kind), FlowMatchingConfig())


def test_a_last_step_without_weight_is_refused_and_one_with_hardly_any_is_warned_about():
    """The reference: min(SNR, gamma) / (SNR + 1) is alpha_bar at the last step of a chain."""
    min_snr = ObjectiveConfig(prediction="v", weighting=MinSNRWeighting())
    pure_noise = CosineScheduleConfig(zero_terminal_snr=True).build()
    with pytest.raises(ValueError, match=r'"min_snr" with prediction = "v" .* never trained') as caught:
        check_sampling_start(min_snr, pure_noise)
    assert 'Use weighting.kind = "uniform" or "truncated_snr"' in str(caught.value)
    capped = snr_at(torch.arange(1000)).clamp(max=5) / (snr_at(torch.arange(1000)) + 1)
    assert f"{CHAIN.alpha_bars[-1] / capped.median():.1g} of the median weight" in check_sampling_start(min_snr, CHAIN)
    assert "hardly trained" in check_sampling_start(min_snr.model_copy(update={"prediction": "velocity"}), FLOW)
    for process in (CHAIN, FLOW, pure_noise):
        for weighting in (UniformWeighting(), TruncatedSNRWeighting()):
            for kind in ("v", "velocity", "x0"):
                assert not check_sampling_start(ObjectiveConfig(prediction=kind, weighting=weighting), process)
    assert "multiply the network's errors" in check_sampling_start(ObjectiveConfig(prediction="eps"), CHAIN)
    for schedule in (ScaledLinearScheduleConfig(), LinearScheduleConfig()):
        assert not check_sampling_start(
            ObjectiveConfig(prediction="eps", weighting=MinSNRWeighting()), schedule.build()
        )
    assert not check_sampling_start(min_snr, ScaledLinearScheduleConfig().build())  # Stable Diffusion's
