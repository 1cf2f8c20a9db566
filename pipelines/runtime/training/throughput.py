"""Throughput: images a second, model-FLOP utilisation, time waited for data, and the slowest rank."""

import copy
import math
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.runtime.stage.launch import gathered

STRAGGLER_FACTOR = 1.5  # own time beyond this many times the median's is worth a line
STRAGGLER_SECONDS = 0.02  # an update; less is noise
MOST_RANKS_IN_FULL = 16

# Dense matrix peaks a device, FLOP/s, from the vendors' data sheets: (bf16 or fp16, float32 without TF32).
KNOWN_PEAKS = {
    "A100": (312e12, 19.5e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "L40S": (362e12, 91.6e12),
    "V100": (125e12, 15.7e12),
}


class Throughput:
    """Times of the updates since the last flush.

    A rank's own time is from the start of an update to the all-reduce of its gradients: what comes after is as long
    for all, since the fast wait for the slow there.

    Args:
        accelerator: Of this process.
        precision: What the network computes in.
        global_batch: Images an update.
        flops_per_image: Of one training step, or 0 when not known.
    """

    def __init__(self, accelerator: Accelerator, *, precision: str, global_batch: int, flops_per_image: float) -> None:
        self._accelerator, self._device = accelerator, accelerator.device
        self._global_batch, self._flops = global_batch, flops_per_image
        self._peak = known_peak_flops(str(self._device), precision)
        self._own_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._began, self._updates, self._waited, self._own = time.monotonic(), 0, 0.0, 0.0
        self._own_events.clear()
        self._is_own = False

    def begin_update(self, *, waited: float) -> None:
        """Begin the time of an update, whose batch was waited for so many seconds."""
        self._updates, self._waited = self._updates + 1, self._waited + waited
        self._update_began, self._is_own = time.monotonic(), True
        if self._device.type == "cuda":
            self._begin = torch.cuda.Event(enable_timing=True)
            self._begin.record()

    def before_all_reduce(self) -> None:
        """End this rank's own time, before the first all-reduce of gradients in an update; later ones do not count."""
        if not self._is_own:
            return
        self._is_own = False
        if self._device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._own_events.append((self._begin, end))
        else:
            self._own += time.monotonic() - self._update_began

    def metrics(self) -> dict[str, float]:
        """Return the interval's metrics, the same on every rank, and begin a new one. A collective."""
        seconds, updates = max(time.monotonic() - self._began, 1e-9), max(self._updates, 1)
        images_per_s, world_size = self._updates * self._global_batch / seconds, self._accelerator.num_processes
        if self._own_events:
            self._own_events[-1][1].synchronize()
            self._own = sum(begin.elapsed_time(end) for begin, end in self._own_events) / 1e3

        # Of all ranks together.
        metrics = {
            "perf/images_per_s": images_per_s,
            "perf/data_wait_fraction": self._waited / seconds,
            "perf/flops_per_image": float(self._flops),
        }
        if self._peak < math.inf:
            metrics["perf/mfu"] = images_per_s * self._flops / (world_size * self._peak)

        # Of each rank.
        if world_size > 1:
            own, waited = self._own / updates, self._waited / updates
            times, waits = gathered(torch.tensor([own + waited, waited]), self._accelerator).T.tolist()
            slowest = max(range(world_size), key=times.__getitem__)
            metrics |= {
                "perf/slowest_rank": float(slowest),
                "perf/slowest_rank_seconds": times[slowest],
                "perf/slowest_rank_data_wait_seconds": waits[slowest],
                "perf/median_rank_seconds": sorted(times)[(world_size - 1) // 2],
            }
            for rank in range(world_size) if world_size <= MOST_RANKS_IN_FULL else ():
                metrics[f"perf/own_seconds/rank_{rank}"] = times[rank]
                metrics[f"perf/data_wait_seconds/rank_{rank}"] = waits[rank]
        self.restart()
        return metrics


def straggler(metrics: dict[str, float]) -> tuple[int, str] | None:
    """Return the rank that delays the others, and a sentence on how much; None when none does."""
    slowest, median = metrics.get("perf/slowest_rank_seconds", 0.0), metrics.get("perf/median_rank_seconds", 0.0)
    if not median or slowest <= STRAGGLER_FACTOR * median or slowest - median <= STRAGGLER_SECONDS:
        return None
    return int(metrics["perf/slowest_rank"]), (
        f"delays the others: {slowest:.3g} s an update before its gradients are reduced (of that "
        f"{metrics['perf/slowest_rank_data_wait_seconds']:.3g} s waiting for data), the median rank {median:.3g} s"
    )


def flops_of(network: nn.Module, call: Callable[[nn.Module], Tensor]) -> float:
    """Count the FLOPs of ``call(network).backward()`` without computing it, on the meta device.

    Args:
        network: Copied, then moved to ``meta``.
        call: Runs the copy on meta tensors and returns a scalar.
    """
    shadow = copy.deepcopy(network).to("meta").train()
    counter = FlopCounterMode(display=False)
    with counter:
        call(shadow).backward()
    return float(counter.get_total_flops())


def known_peak_flops(device: str, precision: str) -> float:
    """Return a device's peak FLOP/s by its data sheet; infinity when it is not known."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        for known, (half, single) in KNOWN_PEAKS.items():
            if known in name:
                return single if precision == "float32" else half
    return math.inf


@lru_cache(maxsize=4)
def peak_flops(device: str, precision: str) -> float:
    """Return a device's peak FLOP/s, for a forecast: the data sheet's, else the best of a few matrix products.

    What is measured on a busy machine is less than the peak: nothing may be called a fraction of it.
    """
    known = known_peak_flops(device, precision)
    if known < math.inf:
        return known

    # Measure it: the fastest of a few products.
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 768
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
