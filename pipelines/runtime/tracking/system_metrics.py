"""System metrics: a node's processors, memory and GPUs, under the names that MLflow's page for them knows."""

import logging
import sys
import time
from contextlib import suppress

import psutil

log = logging.getLogger("latentline.tracking")

MIB = 1 << 20
FIRST_AFTER_SECONDS = 2.0
EVERY_SECONDS = 60.0  # few: they come first on a run's page, and a run takes days


class SystemSampler:
    """Reads counters that the kernel and torch's allocator keep anyway: no CUDA call, so no wait for the GPU."""

    def __init__(self, node: str = "") -> None:
        """``node`` names the node where it is not that of the main process; a part of the metrics' names."""
        self._prefix = f"system/{node}/" if node else "system/"
        self._process = psutil.Process()
        self._due = 0.0

    def due(self) -> dict[str, float] | None:
        """Return a record when it is time for one; none any more after an error, which is logged.

        Call it from one thread only: psutil measures processor time between two calls of the same thread.
        """
        if time.monotonic() < self._due:
            return None
        try:
            if not self._due:  # the first call sets the mark to measure from
                psutil.cpu_percent()
                self._due = time.monotonic() + FIRST_AFTER_SECONDS
                return None
            self._due = time.monotonic() + EVERY_SECONDS
            metrics = {f"{self._prefix}{name}": value for name, value in self._metrics().items()}
            return {"time": round(time.time(), 3), **metrics}
        except Exception as error:  # of whatever kind: it must not end the thread that writes the metrics
            log.warning(f"System metrics end here: {error!r}")
            self._due = float("inf")
            return None

    def _metrics(self) -> dict[str, float]:
        """Measure now. Megabytes are MiB."""
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_percentage": psutil.virtual_memory().percent,
            "process_memory_megabytes": self._process.memory_info().rss / MIB,
            **_gpu_metrics(),
        }


def _gpu_metrics() -> dict[str, float]:
    """Return this process's GPU memory, and the GPUs' utilisation where NVIDIA's Python bindings are installed."""
    torch = sys.modules.get("torch")  # a stage that has not imported torch uses no GPU
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    values = {"gpu_memory_usage_percentage": 100 * torch.cuda.memory_reserved(device) / total}
    with suppress(Exception):  # the bindings are optional, and NVML fails in many ways of its own in containers
        busy = [float(torch.cuda.utilization(index)) for index in range(torch.cuda.device_count())]
        values["gpu_utilization_percentage"] = sum(busy) / len(busy)
        if len(busy) > 1:  # one that waits shows here
            values["gpu_utilization_lowest_percentage"] = min(busy)
    return values
