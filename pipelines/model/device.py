"""The device of the networks: torch device, memory format and attention backend.

A stage or tool chooses its ``Device`` once and places every network there; ``run.attention`` is read here alone.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from models.attention import Backend, ChosenBackend, choose_attention_backend, use_attention_backend
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.stage import Stage

Network = TypeVar("Network", bound=nn.Module)

# accelerate's names of the dtypes that networks compute in.
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Device:
    """A torch device, and the attention backend of the networks on it."""

    torch: torch.device
    attention: Backend = "sdpa"

    def place(self, network: Network) -> Network:
        """Move a network there, channels last: what convolutions are fastest in, on CPUs as on GPUs."""
        use_attention_backend(network, self.attention)
        return network.to(self.torch).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def device_of(stage: Stage) -> Device:
    """Choose the device of a stage's networks, print why, and tag the MLflow run with it. Before any work.

    Raises:
        ConfigError: ``run.attention`` does not run on this rank's device.
    """
    accelerator = stage.accelerator
    choice = attention_on(accelerator.device, stage.config.run, precision=accelerator.mixed_precision)
    stage.log.info(f"attention by {choice.name}: {choice.reason}")
    stage.tracker.set_tags({"attention": choice.name})
    return Device(accelerator.device, choice.name)


def attention_on(device: torch.device, run: RunConfig, *, precision: str = "no") -> ChosenBackend:
    """Choose the attention backend that ``run`` asks for.

    Args:
        device: Device of the networks.
        run: Configuration with ``attention``.
        precision: accelerate's name of the dtype that networks compute in.

    Raises:
        ConfigError: It does not run there.
    """
    with config_error_at("run.attention"):
        return choose_attention_backend(run.attention, device=device, dtypes=(_DTYPES[precision],))
