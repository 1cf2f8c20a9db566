"""FLOPs: counted for a training step, and the peak of a device, known or measured."""

import copy
import math
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.runtime.stage.launch import set_float32

# Dense matrix peaks a device, FLOP/s, from the vendors' data sheets: (bf16 or fp16, TF32, float32).
KNOWN_PEAKS = {
    "A100": (312e12, 156e12, 19.5e12),
    "H100": (989e12, 494.5e12, 67e12),
    "H200": (989e12, 494.5e12, 67e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "V100": (125e12, 15.7e12, 15.7e12),
}


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


def known_peak_flops(device: str, precision: str, *, tf32: bool) -> float:
    """Return a device's peak FLOP/s by its data sheet; infinity when it is not known."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        for known, (half, tf32_peak, single) in KNOWN_PEAKS.items():
            if known in name:
                return half if precision != "float32" else tf32_peak if tf32 else single
    return math.inf


@lru_cache(maxsize=4)
def peak_flops(device: str, precision: str, *, tf32: bool) -> float:
    """Return a device's peak FLOP/s, for a forecast: the data sheet's, else the best of a few matrix products.

    What is measured on a busy machine is less than the peak: nothing may be called a fraction of it.
    """
    known = known_peak_flops(device, precision, tf32=tf32)
    if known < math.inf:
        return known

    # Measure it: the fastest of a few products.
    set_float32(tf32=tf32)
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = 768
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
