"""Classifier-free guidance: which branches are called, and what becomes of them."""

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from pydantic import ValidationError

from models.diffusion.guidance import GuidanceConfig, guided_output, restore_contrast
from models.diffusion.prediction import eps_to_v, estimate_from_output
from models.diffusion.schedule import LinearScheduleConfig

MOMENT = LinearScheduleConfig().build().moment(500)
X = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Network:
    """A deterministic network with one condition, that remembers how it was called."""

    def __init__(self, *, learned_variance: bool = False) -> None:
        self.calls: list[list[bool]] = []
        self.learned_variance = learned_variance

    def __call__(self, x, moment, is_null):
        assert moment is MOMENT
        self.calls.append(is_null.tolist())
        label = torch.where(is_null, 0.1, LABELS.repeat(len(x) // len(LABELS)))[:, None, None, None]
        value = torch.tanh(x * (1 + label)) + label
        return torch.cat([value, value / 7], dim=1) if self.learned_variance else value


def branches() -> tuple[torch.Tensor, torch.Tensor]:
    null = torch.tensor([True] * 3)
    return Network()(X, MOMENT, ~null), Network()(X, MOMENT, null)


def test_guidance_at_scale_one_never_calls_the_null_branch():
    network = Network()
    assert torch.equal(guided_output(network, X, MOMENT, GuidanceConfig(scale=1.0)), branches()[0])
    assert network.calls == [[False] * 3]


def test_guidance_at_scale_zero_is_unconditional_in_one_call():
    network = Network()
    assert torch.equal(guided_output(network, X, MOMENT, GuidanceConfig(scale=0.0)), branches()[1])
    assert network.calls == [[True] * 3]


@pytest.mark.parametrize("scale", [0.5, 3.0, 7.5])
def test_guidance_goes_from_the_null_prediction_through_the_conditional_one(scale):
    conditional, null = branches()
    guided = guided_output(Network(), X, MOMENT, GuidanceConfig(scale=scale))
    torch.testing.assert_close(guided, (1 - scale) * null + scale * conditional)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_batched_call_equals_two_calls(rescale):
    batched, separate = Network(), Network()
    one = guided_output(batched, X, MOMENT, GuidanceConfig(scale=3.0, rescale=rescale, batched=True))
    two = guided_output(separate, X, MOMENT, GuidanceConfig(scale=3.0, rescale=rescale, batched=False))
    assert torch.equal(one, two)
    assert batched.calls == [[False] * 3 + [True] * 3]
    assert separate.calls == [[False] * 3, [True] * 3]


def test_outside_its_interval_of_noise_levels_guidance_is_conditional_in_one_call():
    sigma = float(MOMENT.level.sigma)
    for interval in ((0.0, sigma - 0.01), (sigma + 0.01, 1.0)):
        network = Network()
        guided = guided_output(network, X, MOMENT, GuidanceConfig(scale=3.0, interval=interval))
        assert torch.equal(guided, branches()[0])
        assert network.calls == [[False] * 3]
    inside = guided_output(Network(), X, MOMENT, GuidanceConfig(scale=3.0, interval=(sigma, sigma)))
    assert torch.equal(inside, guided_output(Network(), X, MOMENT, GuidanceConfig(scale=3.0)))


def test_guiding_eps_equals_guiding_v_and_x0():
    guidance = GuidanceConfig(scale=4.0)
    eps = guided_output(Network(), X, MOMENT, guidance)
    from_eps = estimate_from_output(eps, X, MOMENT.level, "eps")
    v = guided_output(
        lambda x, moment, is_null: eps_to_v(Network()(x, moment, is_null), x, moment.level), X, MOMENT, guidance
    )
    from_v = estimate_from_output(v, X, MOMENT.level, "v")
    torch.testing.assert_close(from_v.x0, from_eps.x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(from_v.eps, from_eps.eps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_equals_the_reference_implementation(share):
    conditional, null = branches()
    guided = null + 5 * (conditional - null)
    ours = restore_contrast(guided, conditional, share=share)
    torch.testing.assert_close(ours, rescale_noise_cfg(guided, conditional, guidance_rescale=share))


def test_full_rescaling_restores_the_contrast_of_each_sample():
    conditional, _ = branches()
    guided = guided_output(Network(), X, MOMENT, GuidanceConfig(scale=5.0, rescale=1.0))
    torch.testing.assert_close(guided.flatten(1).std(dim=1), conditional.flatten(1).std(dim=1))


@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_a_learned_variance_stays_that_of_the_conditional_branch(rescale):
    guidance = GuidanceConfig(scale=3.0, rescale=rescale)
    plain = guided_output(Network(), X, MOMENT, guidance)
    guided = guided_output(Network(learned_variance=True), X, MOMENT, guidance)
    assert torch.equal(guided[:, :4], plain)
    assert torch.equal(guided[:, 4:], branches()[0] / 7)


@pytest.mark.parametrize("interval", [(0.6, 0.4), (-0.1, 0.5), (0.5, 2.0)])
def test_an_interval_that_is_none_is_refused_with_advice(interval):
    with pytest.raises(ValidationError) as caught:
        GuidanceConfig(interval=interval)
    message = str(caught.value)
    assert f"guidance.interval = [{interval[0]}, {interval[1]}]" in message
    assert "0 <= low <= high <= 1" in message
    assert "s / sqrt(1 + s^2)" in message


def test_a_constant_prediction_has_no_contrast_to_restore() -> None:
    constant = torch.ones(2, 3, 4, 4)
    assert torch.equal(restore_contrast(constant, torch.randn(2, 3, 4, 4), share=1.0), constant)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_autoguidance_goes_from_the_weaker_network_with_the_condition_through_the_better_one(scale):
    """Karras et al. 2024, eq. 1."""
    network, weaker = Network(), Network()
    guided = guided_output(
        network, X, MOMENT, GuidanceConfig(scale=scale), weaker=lambda x, *rest: 0.5 * weaker(x, *rest)
    )
    conditional, _ = branches()
    torch.testing.assert_close(guided, (1 - scale) * 0.5 * conditional + scale * conditional)
    assert network.calls == [[False] * 3] * (scale != 0)
    assert weaker.calls == [[False] * 3] * (scale != 1)
