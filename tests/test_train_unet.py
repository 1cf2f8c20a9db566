"""One update of the U-Net: what it logs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning.class_label import ClassConditionerConfig
from models.denoiser import Denoiser, DenoiserConfig
from models.diffusion.objective import ObjectiveConfig
from models.unet import UNetConfig
from pipelines.train_unet import LatentDraw, one_update


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
