"""The U-Net's training: which samples go without which conditions, and what one update logs."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.randomness import SampleDraws
from models.conditioning.class_label import ClassConditionerConfig
from models.conditioning.text import TextConditionerConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.objective import ObjectiveConfig
from models.unet import UNetConfig
from pipelines.train_unet import LatentDraw, draw_dropped, one_update


@pytest.mark.parametrize("variance", ["fixed", "learned"])
def test_an_update_logs_its_loss_its_error_its_bound_and_who_was_dropped(variance: str) -> None:
    torch.manual_seed(0)
    network = UNetConfig(
        channels=(8,), blocks=(1,), attention=(False,), heads=(1,), transformer_depth=(1,), norm_groups=4
    )
    config = DenoiserConfig(
        network=network, conditioners=(ClassConditionerConfig(),), objective=ObjectiveConfig(variance=variance)
    )
    denoiser = Denoiser(config, latent_channels=2, latent_size=4, num_classes=3)
    draw = LatentDraw(
        x0=torch.randn(4, 2, 4, 4),
        noise=torch.randn(4, 2, 4, 4),
        times=torch.tensor([0, 10, 500, 999]),
        conditions={"labels": torch.tensor([0, 1, 2, 0])},
        dropped=torch.tensor([[True], [False], [False], [False]]),
    )
    logged: dict[str, Tensor] = {}
    training: Any = SimpleNamespace(
        stage=SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu"))),
        micro_batches=lambda wrapped: [slice(0, 4)],
        backward=lambda loss: None,
        log=logged.update,
        step=lambda optimizers: None,
    )
    unet: Any = SimpleNamespace(wrapped=denoiser, optimizer=None)
    one_update(training, unet, draw)
    expected = denoiser(draw.x0, draw.noise, draw.times, draw.conditions, draw.dropped)
    assert logged["train/loss"] == expected.loss.mean()
    assert logged["train/error"] == expected.error.mean()
    assert logged["train/dropped_fraction_0"] == 0.25
    assert ("train/bound" in logged) == (variance == "learned")
    if expected.bound is not None:
        assert logged["train/bound"] == expected.bound.mean()


def test_all_conditions_are_dropped_at_once_as_often_as_configured_and_each_on_its_own() -> None:
    own = (ClassConditionerConfig(drop_probability=0.2), TextConditionerConfig(drop_probability=0.1))
    dropped = draw_dropped(SampleDraws(0, 3, range(20_000)), DenoiserConfig(conditioners=own))
    assert dropped.shape == (20_000, 2)
    joint = 0.1  # the default with several
    expected = {
        (True, True): joint + (1 - joint) * 0.2 * 0.1,
        (True, False): (1 - joint) * 0.2 * 0.9,
        (False, True): (1 - joint) * 0.8 * 0.1,
        (False, False): (1 - joint) * 0.8 * 0.9,
    }
    for pattern, probability in expected.items():
        found = (dropped == pattern).all(axis=1).mean()
        assert abs(found - probability) < 4 * (probability / 20_000) ** 0.5  # standard errors


def test_without_a_joint_drop_each_condition_is_dropped_as_before() -> None:
    """One conditioner has no joint drop of its own accord; the draws of several are not shifted by it."""
    one, two = (ClassConditionerConfig(),), (ClassConditionerConfig(), TextConditionerConfig())
    for config in (DenoiserConfig(conditioners=one), DenoiserConfig(conditioners=two, joint_drop_probability=0.0)):
        dropped = draw_dropped(SampleDraws(0, 3, range(500)), config)
        uniforms = SampleDraws(0, 3, range(500)).uniforms("drop", (len(config.conditioners),))
        assert np.array_equal(dropped, uniforms < 0.1)
    jointly = draw_dropped(SampleDraws(0, 3, range(500)), DenoiserConfig(conditioners=two))
    assert (jointly[~jointly.all(axis=1)] == dropped[~jointly.all(axis=1)]).all()
