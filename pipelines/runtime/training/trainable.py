"""A network in training: bare, wrapped for the ranks, and its optimizer."""

import warnings
from typing import Generic, TypeVar

import torch
import torch._functorch.config
from accelerate import Accelerator
from torch import nn

from pipelines.runtime.training.checkpoint import Stateful, Weights
from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.optim import Optimizer

Network = TypeVar("Network", bound=nn.Module)


class Trainable(Generic[Network]):
    """A network in training, on its device, with its optimizer; the bare one keeps its parameters' names."""

    def __init__(self, network: Network, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.network = network
        self.optimizer = Optimizer(network, config.optim, accelerator=accelerator, shards=config.shard_optimizer)
        self.wrapped = joined(network, accelerator, compiles=config.compile)

    def parts(self, name: str) -> dict[str, Stateful]:
        """Return weights and optimizer as parts of a checkpoint."""
        return {name: Weights(self.network), f"{name}_optimizer": self.optimizer}


def joined(network: nn.Module, accelerator: Accelerator, *, compiles: bool | str) -> nn.Module:
    """Wrap a network so that its gradients are averaged over the ranks; compile it first, in place, when asked to."""
    if compiles:
        # The loss's terms are differentiated one by one, which needs their buffers more than once.
        torch._functorch.config.donated_buffer = False
        network.compile(mode=None if compiles is True else compiles)
    with warnings.catch_warnings():
        # torch 2.13 has a new name for it, which neither accelerate 1.15 nor torch 2.10 knows.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped: nn.Module = accelerator.prepare_model(network)
    return wrapped
