"""From a launched process to an Accelerator: threads, devices, world size, and the ways to be told to stop."""

import ctypes
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
import torch._functorch.config
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import nn

from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.stage_config import RunConfig

Precision = Literal["float32", "bf16", "fp16"]
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
PR_SET_PDEATHSIG = 1
SECOND_SIGNAL_SECONDS = 0.5  # one Ctrl-C can come twice: from the terminal, and from a launcher that passes it on


def launched_world_size() -> int:
    """Return the number of processes the launcher started; known before torch.distributed is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_accelerator(run: RunConfig, *, precision: Precision = "float32") -> Accelerator:
    """Join the other processes and say how many there are.

    Raises:
        ConfigError: The world size is not ``run.num_processes``.
    """
    exit_with_launcher()
    world_size = launched_world_size()
    if run.num_processes and run.num_processes != world_size:
        raise ConfigError(
            f"run.num_processes = {run.num_processes}, but {world_size} process(es) were launched. On CPU, `accelerate "
            "launch --cpu --num_processes 2` starts one process without a word; do as launch/pipeline.sh does, "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2, or change run.num_processes."
        )
    torch.set_num_threads(threads_per_process(run))
    torch.use_deterministic_algorithms(run.deterministic)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    cpu_wanted = parse_flag_from_env("ACCELERATE_USE_CPU")
    backend = "nccl" if torch.cuda.is_available() and not cpu_wanted else "gloo"
    accelerator = Accelerator(
        mixed_precision="no" if precision == "float32" else precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT),
            # The networks' buffers are constants: to send them before each forward pass would be for nothing.
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ]
        if world_size > 1
        else None,
    )
    if accelerator.num_processes != world_size:
        raise ConfigError(f"{world_size} processes were launched, but only {accelerator.num_processes} joined.")
    return accelerator


def joined(network: nn.Module, accelerator: Accelerator, *, compiles: bool) -> nn.Module:
    """Wrap a network so that its gradients are averaged over the ranks; compile it first when asked for.

    Compiled in place: the bare network keeps its parameters' names.
    """
    if compiles:
        # The loss's terms are differentiated one by one, which needs their buffers more than once.
        torch._functorch.config.donated_buffer = False
        network.compile()
    with warnings.catch_warnings():
        # torch 2.13 has a new name for it, which neither accelerate 1.15 nor torch 2.10 knows.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        wrapped: nn.Module = accelerator.prepare_model(network)
    return wrapped


def threads_per_process(run: RunConfig) -> int:
    """Return the CPU threads this process computes with: training is bit-exact only for a fixed number of them."""
    if run.threads:
        return run.threads
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(1, len(os.sched_getaffinity(0)) // local)


def exit_with_launcher() -> None:
    """Ask the kernel to kill this process when its launcher dies: an orphan would hold the device and the folder.

    Only under a launcher (it sets LOCAL_RANK or ACCELERATE_*): a process started by hand may outlive its shell.
    """
    if sys.platform != "linux" or not any(
        name == "LOCAL_RANK" or name.startswith("ACCELERATE_") for name in os.environ
    ):
        return
    parent = os.getppid()
    # torch's launcher passes signals on and waits; accelerate's simple one just dies, so there SIGTERM asks to stop.
    by_torch = "TORCHELASTIC_RUN_ID" in os.environ
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL if by_torch else signal.SIGTERM)
    # It may have died before we asked, even while this process was still importing: then another is our parent by now.
    if os.getppid() != parent or (by_torch and not _runs_our_program(parent)):
        raise SystemExit("The launcher of this process is gone.")


def _runs_our_program(process: int) -> bool:
    """Return whether a process runs the same interpreter; torch's launcher does, in a container even as process 1."""
    try:
        return os.readlink(f"/proc/{process}/exe") == os.readlink("/proc/self/exe")
    except OSError:  # that of another user
        return False


class StopSignal:
    """A wish to stop, by SIGTERM, Ctrl-C or the file ``stop`` in the stage's folder. Training agrees on it by verdict.

    A second signal ends the process at once; what is committed stays good.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.file = folder / "stop"
        self.reason: str | None = None
        self._heard = 0.0
        self._accelerator = accelerator
        # A group of its own on the host, to leave together: the device may have work that nobody waits for.
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Take over SIGTERM and SIGINT for the duration of the block."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and time.monotonic() - self._heard > SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)
        if self.reason is None:
            self.reason, self._heard = signal.Signals(number).name, time.monotonic()

    def asked(self) -> bool:
        """Return whether this rank was asked to stop; other ranks may not know yet."""
        if self.reason is None and self.file.exists():
            self.reason = "the file 'stop'"
        return self.reason is not None

    def tell_everyone(self) -> None:
        """Let the other ranks know through the file, where there is no collective to agree by."""
        self.file.touch()

    def heard(self) -> bool:
        """Return whether this rank was asked; the file is looked for by the main process alone."""
        return self.asked() if self._accelerator.is_main_process else self.reason is not None


def agree_on(value: int, accelerator: Accelerator) -> int:
    """Return the main process's ``value`` on every rank. Sent as a tensor: nothing is unpickled from the network."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=accelerator.device)
    dist.broadcast(tensor, src=0)
    return int(tensor.item())


def any_rank(value: bool, accelerator: Accelerator) -> bool:
    """Return on every rank whether ``value`` is true on any. A collective."""
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor([int(value)], device=accelerator.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())
