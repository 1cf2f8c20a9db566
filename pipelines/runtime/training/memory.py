"""Memory of a training on one device at its peak, and the cheapest settings that fit a device.

An update is run on fake tensors, which have sizes and lifetimes but no numbers. Counted is what eager execution
allocates, with attention that keeps no scores; workspaces of cuDNN and fragmentation are left to the headroom.
"""

import itertools
import json
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.runtime.training.config import TrainingConfig
from pipelines.runtime.training.flops import flops_of
from pipelines.runtime.training.optim import deal, is_inner

FLOAT_BYTES = 4
HEADROOM = 0.1  # of a device: CUDA's context, cuDNN's workspaces, fragmentation, and the error of the forecast
# Costs in FLOP, by a GPU's data sheet and 35 % of 400 TFLOP/s: they only order settings, and were not measured.
PASS_COST = 4e12  # of the launches of a forward and backward pass: 3,000 kernels of 10 us
BROADCAST_COST = 1_400.0  # of a byte that sharding sends to all ranks, at 100 GB/s


class Settings(NamedTuple):
    """Settings that trade time for memory."""

    images: int  # of one forward pass
    shards: bool  # the optimizer's moments
    levels: tuple[int, ...]  # computed twice


class Sketch:
    """Networks of a training without numbers, and what an update of them takes.

    Args:
        config: Of the training.
        build: Makes the networks, with these levels checkpointed; averages are kept of the first.
        run: Computes a scalar from the networks, or the first, and a number of images.
        checkpointed: The key of the checkpointed levels, those of the configuration, and the number of levels.
    """

    def __init__(
        self,
        config: TrainingConfig,
        build: Callable[[tuple[int, ...]], nn.ModuleList],
        run: Callable[[nn.ModuleList, int], Tensor],
        *,
        checkpointed: tuple[str, tuple[int, ...], int],
    ) -> None:
        self.config, self.build, self.run = config, build, run
        self.key, self.levels, self.num_levels = checkpointed
        with torch.device("meta"):
            self._networks = networks = build(self.levels)
        counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
        self.weights, self.averages = FLOAT_BYTES * sum(counts), FLOAT_BYTES * counts[0] * len(config.averages)
        trained = sum(parameter.numel() for parameter in networks.parameters() if parameter.requires_grad)
        self.gradients = FLOAT_BYTES * trained
        self.flops, self._trace, self.optimizer = cache(self._flops), cache(self._traced), cache(self._optimizer)

    def present(self, *, devices: int) -> Settings:
        """Return the settings of the configuration."""
        images = self.config.images_per_device or -(-self.config.global_batch // devices)
        return Settings(images, self.config.shard_optimizer, self.levels)

    def peak(self, settings: Settings, *, devices: int) -> int:
        """Return the bytes on each of ``devices`` at the peak of an update."""
        # Storages grow linearly with the images: two traces tell all. With one image, copies may become views.
        two, three = self._trace(settings.levels, 2), self._trace(settings.levels, 3)
        tensors, gradients = (two + (settings.images - 2) * (three - two)).T

        # The gradients of earlier micro-batches are there from the start.
        is_whole = settings.images >= -(-self.config.global_batch // devices)
        during = int((tensors + gradients).max() if is_whole else tensors.max() + self.gradients)
        buckets = self.gradients if devices > 1 else 0  # of DDP
        return during + self.optimizer(devices if settings.shards else 1) + self.averages + buckets

    def cost(self, settings: Settings, *, devices: int) -> float:
        """Return what an update costs each device, in FLOP: of its passes, their launches and what sharding sends."""
        share = self.config.global_batch // devices
        sent = self.gradients if settings.shards else 0
        return share * self.flops(settings.levels) + share // settings.images * PASS_COST + sent * BROADCAST_COST

    def candidates(self, *, devices: int) -> list[Settings]:
        """Return all settings, cheapest first; levels are checkpointed from the widest map down."""
        share = self.config.global_batch // devices
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        levels = [tuple(range(count)) for count in range(self.num_levels + 1)]
        found = itertools.starmap(Settings, itertools.product(sizes, {False, devices > 1}, levels))
        return sorted(found, key=lambda settings: self.cost(settings, devices=devices))

    def choose(self, *, devices: int, limit: float) -> dict[Settings, int]:
        """Return the cheapest settings within ``limit`` bytes, last, and before them cheaper ones, with their memory.

        Of those that differ by the micro-batch alone only the smallest; where nothing fits, all are too large.
        """
        tried: dict[tuple[Any, ...], tuple[Settings, int]] = {}
        for settings in self.candidates(devices=devices):
            peak = self.peak(settings, devices=devices)
            tried[peak <= limit, *settings[1:]] = settings, peak
            if peak <= limit:
                break
        return dict(tried.values())

    def options(self, settings: Settings) -> str:
        """Write settings as options of the stage."""
        levels = json.dumps(settings.levels if self.num_levels > 1 else bool(settings.levels)).replace(" ", "")
        shards = json.dumps(settings.shards)
        return f"--images_per_device {settings.images} --shard_optimizer {shards} --{self.key} '{levels}'"

    def _optimizer(self, num_ranks: int) -> int:
        """Count the bytes of the optimizers' state on that of some ranks which holds most."""
        held, is_muon = [0] * num_ranks, self.config.optim.algorithm == "muon"
        for network in self._networks:
            trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
            ranks = deal([parameter.numel() for _, parameter in trained], num_ranks)
            for (name, parameter), rank in zip(trained, ranks, strict=True):
                # Muon keeps a momentum; AdamW a count of its steps and two moments.
                size = parameter.numel()
                held[rank] += size if is_muon and is_inner(name, parameter) else 2 * size + 1
        return FLOAT_BYTES * max(held)

    def _flops(self, levels: tuple[int, ...]) -> float:
        """Count a forward and backward pass of the first network for one image."""
        with torch.device("meta"):
            network = self.build(levels)[0]
            return flops_of(network, lambda shadow: self.run(nn.ModuleList([shadow]), 1))

    def _traced(self, levels: tuple[int, ...], images: int) -> np.ndarray:
        """Return bytes after each operation of a forward and backward pass: of all tensors, and of the gradients."""
        # Late: it brings torch's compiler, which takes seconds.
        from torch._subclasses.fake_tensor import FakeTensorMode

        dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        with FakeTensorMode(), MemoryTrace() as trace:
            networks = self.build(levels)
            for parameter in filter(lambda parameter: parameter.requires_grad, networks.parameters()):
                parameter.register_post_accumulate_grad_hook(trace.let_go)
            for module in networks.modules():
                if isinstance(module, nn.GroupNorm | nn.LayerNorm):  # as autocast does on a GPU, but not on a CPU
                    module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            trace.rows.clear()
            with torch.autocast("cpu", dtype=dtype, enabled=self.config.precision != "float32"):
                loss = self.run(networks, images)
            loss.backward()
        return np.array(trace.rows)


class MemoryTrace(TorchDispatchMode):
    """Bytes after each operation: of all tensors made in this mode, and of the gradients, which are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int]] = []
        self._sizes: dict[int, int] = {}
        self._gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata)
        self.rows.append((sum(self._sizes.values()), self._gradients))
        return result

    def let_go(self, parameter: Tensor) -> None:
        """Count the gradient of a parameter, and free it."""
        self._gradients += FLOAT_BYTES * parameter.numel()
        parameter.grad = None


def device_memory() -> int:
    """Return the bytes of the GPU that is here; 0 where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def gib(number: float) -> str:
    """Return a number of bytes for people."""
    return f"{number / 2**30:.3g} GiB"
