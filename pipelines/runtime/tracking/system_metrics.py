"""System metrics: load of the machine and of this process, under the names that MLflow's page for them knows."""

import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

MIB = 1 << 20
FIRST_AFTER_SECONDS = 2.0
EVERY_SECONDS = 10.0


class SystemSampler:
    """Reads counters that the kernel and torch's allocator keep anyway: no CUDA call, so no wait for the GPU."""

    def __init__(self, folder: Path, *, since: float) -> None:
        """``folder`` names the disk to measure; ``since`` (Unix seconds) is step 0 of the records."""
        self._folder = folder
        self._since = since
        self._process = psutil.Process()
        self._network = psutil.net_io_counters()
        self._due = 0.0

    def due(self) -> dict[str, float] | None:
        """Return a record when it is time for one; its step is in seconds since the run began.

        Call it from one thread only: psutil measures processor time between two calls of the same thread.
        """
        if time.monotonic() < self._due:
            return None
        if not self._due:  # the first call sets the mark to measure from
            psutil.cpu_percent()
            self._process.cpu_percent()
            self._due = time.monotonic() + FIRST_AFTER_SECONDS
            return None
        self._due = time.monotonic() + EVERY_SECONDS
        now = time.time()
        return {"step": int(now - self._since), "time": round(now, 3), **self._metrics()}

    def stop(self) -> None:
        """Return no more records."""
        self._due = float("inf")

    def _metrics(self) -> dict[str, float]:
        """Measure now. Megabytes are MiB; network traffic counts from the start of this process's run."""
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(self._folder))
        network = psutil.net_io_counters()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/process_cpu_percentage": self._process.cpu_percent(),
            "system/process_memory_megabytes": self._process.memory_info().rss / MIB,
            "system/system_memory_usage_megabytes": memory.used / MIB,
            "system/system_memory_usage_percentage": memory.percent,
            "system/disk_usage_percentage": disk.percent,
            "system/disk_available_megabytes": disk.free / MIB,
        }
        if network is not None and self._network is not None:
            values["system/network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MIB
            values["system/network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MIB
        return values | _gpu_metrics()


def _gpu_metrics() -> dict[str, float]:
    """Return this process's GPU memory, and each GPU's utilisation where NVIDIA's Python bindings are installed."""
    torch = sys.modules.get("torch")  # a stage that has not imported torch uses no GPU
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    device = torch.cuda.current_device()
    total = torch.cuda.get_device_properties(device).total_memory
    values = {
        f"system/gpu_{device}_memory_usage_megabytes": torch.cuda.memory_reserved(device) / MIB,
        f"system/gpu_{device}_memory_usage_percentage": 100 * torch.cuda.memory_reserved(device) / total,
        f"system/gpu_{device}_memory_peak_megabytes": torch.cuda.max_memory_allocated(device) / MIB,
    }
    with suppress(Exception):  # the bindings are optional, and NVML fails in many ways of its own in containers
        for index in range(torch.cuda.device_count()):
            values[f"system/gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
            values[f"system/gpu_{index}_power_usage_watts"] = torch.cuda.power_draw(index) / 1000
    return values
