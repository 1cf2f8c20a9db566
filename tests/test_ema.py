"""Laws of the averages: equal to the plain recurrence, and of the width that was asked for."""

import math

import pytest
import torch
from torch import nn

from pipelines.runtime.training.ema import Averages, ExponentialAverage, PowerAverage, decay_at, power_exponent


def test_the_fused_update_is_the_plain_recurrence() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2).double()
    configs = (
        ExponentialAverage(decay=0.9),
        ExponentialAverage(decay=0.5, warmup=False),
        PowerAverage(relative_std=0.1),
    )
    averages = Averages(network, configs)
    expected = [network.weight.detach().clone() for _ in configs]
    for update in range(1, 30):
        with torch.no_grad():
            network.weight.add_(torch.randn(2, 3, dtype=torch.float64))
        averages.update(network, update=update)
        for index, config in enumerate(configs):
            decay = decay_at(config, update=update)
            expected[index] = decay * expected[index] + (1 - decay) * network.weight.detach()
    for network_average, reference in zip(averages.networks, expected, strict=True):
        torch.testing.assert_close(network_average.weight, reference, rtol=1e-12, atol=1e-12)


def test_the_first_update_of_a_power_average_forgets_the_start() -> None:
    assert decay_at(PowerAverage(), update=1) == 0.0


@pytest.mark.parametrize("relative_std", [0.05, 0.1, 0.2, 0.25])
def test_a_power_average_has_the_width_it_is_named_after(relative_std: float) -> None:
    total, weights = 4_000, [0.0]
    for update in range(1, total + 1):
        decay = decay_at(PowerAverage(relative_std=relative_std), update=update)
        weights = [*weights, 1 - decay] if update < 2 else weights
    # Weight of update u in the average after the last: (1 - decay_u) times all later decays.
    profile, later = torch.zeros(total, dtype=torch.float64), 1.0
    for update in range(total, 0, -1):
        decay = decay_at(PowerAverage(relative_std=relative_std), update=update)
        profile[update - 1] = (1 - decay) * later
        later *= decay
    times = torch.arange(1, total + 1, dtype=torch.float64) / total
    mean = (profile * times).sum()
    assert math.isclose(float(profile.sum()), 1.0, rel_tol=1e-9)
    assert math.isclose(float(((profile * (times - mean) ** 2).sum()) ** 0.5), relative_std, rel_tol=0.01)


def test_the_exponents_are_those_of_the_paper() -> None:
    # Karras 2024, section 3.1: gamma = 6.94 for a width of 0.10 and 16.97 for 0.05.
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)


def test_averages_survive_a_round_trip() -> None:
    network = nn.Linear(3, 2)
    averages = Averages(network, (ExponentialAverage(), PowerAverage()))
    with torch.no_grad():
        network.weight.add_(1.0)
    averages.update(network, update=5)
    twin = Averages(nn.Linear(3, 2), (ExponentialAverage(), PowerAverage()))
    twin.load({name: tensor.clone() for name, tensor in averages.tensors().items()})
    assert all(torch.equal(a, b) for a, b in zip(averages.tensors().values(), twin.tensors().values(), strict=True))
