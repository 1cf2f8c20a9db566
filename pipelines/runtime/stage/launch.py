"""Launch of a stage's process: accelerator, threads, world size, signals to stop, and what ranks exchange."""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor

from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.config.stage_config import RunConfig

Precision = Literal["float32", "bf16", "fp16"]
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MOST_OPEN_FILES = 65_536
SECOND_SIGNAL_SECONDS = 0.5  # one Ctrl-C can come twice: from the terminal, and from a launcher that passes it on


def launched_world_size() -> int:
    """Return the number of processes the launcher started; known before torch.distributed is."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_accelerator(run: RunConfig, *, precision: Precision = "float32", tf32: bool = False) -> Accelerator:
    """Set up this process and join the others.

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
    keep_freed_memory()
    allow_open_files()
    set_float32(tf32=tf32)
    if run.deterministic != torch.are_deterministic_algorithms_enabled():  # torch imports its compiler to set it: 2 s
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


def keep_freed_memory() -> None:
    """Let the C library keep the memory that is freed, for its next use.

    glibc gives back what lies free at the end of its heap: all activations, once a backward pass is over. The next
    update then takes each of their pages anew from the kernel, which zeroes it: up to a tenth of an update's time.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_TRIM_THRESHOLD, -1)  # gives nothing back
        library.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # bytes, the most that it takes: what is larger is given back


def allow_open_files() -> None:
    """Raise the number of files that this process may open as far as it may: shards stay open while there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def set_float32(*, tf32: bool) -> None:
    """Set what float32 matrix products and convolutions are computed in on GPUs: TF32 or float32.

    torch's own default is TF32 for convolutions only. Set by the names that torch 2.10 to 2.13 share: its newer
    ``fp32_precision`` must not be mixed with them, and torch itself still reads these.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def threads_per_process(run: RunConfig) -> int:
    """Return the CPU threads this process computes with: training is bit-exact only for a fixed number of them."""
    return run.threads or cores_per_process()


def cores_per_process() -> int:
    """Return this process's share of the cores that it may use."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return max(1, len(os.sched_getaffinity(0)) // local)


def exit_with_launcher() -> None:
    """Ask the kernel to kill this process when its launcher dies: an orphan would hold the device and the folder.

    Only under a launcher, by what users do not set themselves: a process started by hand may outlive its shell.
    """
    if sys.platform != "linux" or not {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():
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
    """A request to stop, by SIGTERM, Ctrl-C or the file ``stop`` in the stage's folder; training ranks agree on it.

    A second signal ends the process at once; what is committed stays good.

    Args:
        folder: Of the stage; the file there stops all runs on it.
        accelerator: Of this process.
        own: Folder of this run's records, where it has another one: its ranks pass a request on to each other there.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, *, own: Path | None = None) -> None:
        self.file, self.passed_on = folder / "stop", (own or folder) / "stop-all-ranks"
        if accelerator.is_main_process:
            self.passed_on.unlink(missing_ok=True)  # of a run that was killed; nobody has passed on anything yet
        self.reason: str | None = None
        self._received = 0.0
        # A group of its own on the host, to leave together: the device may have work that nobody waits for.
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT for the duration of the block."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and time.monotonic() - self._received > SECOND_SIGNAL_SECONDS:
            os._exit(128 + number)
        if self.reason is None:
            self.reason, self._received = signal.Signals(number).name, time.monotonic()

    def requested(self, *, look: bool = True) -> bool:
        """Return whether this rank was asked to stop, after a ``look`` for the file; other ranks may not know yet."""
        for file, reason in ((self.file, "the file 'stop'"), (self.passed_on, "asked by another rank")):
            if look and self.reason is None and file.exists():
                self.reason = reason
        return self.reason is not None

    def request_on_all_ranks(self) -> None:
        """Pass the request on to this run's other ranks by a file, where there is no collective to agree by."""
        self.passed_on.touch()


def poll_seconds(waited: float) -> float:
    """Return how long to wait before the next look at a shared file system, after ``waited`` seconds without success.

    The wait grows with what was waited already, so that it costs a quarter of that at most, and 5 s.
    """
    return min(max(0.05, waited / 4), 5.0)


def gathered(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return every rank's ``values`` on every rank, stacked: (rank, ...). A collective; nothing is unpickled."""
    table = torch.zeros(accelerator.num_processes, *values.shape, dtype=values.dtype, device=accelerator.device)
    table[accelerator.process_index] = values
    if accelerator.num_processes > 1:
        dist.all_reduce(table)
    return table


def from_main(value: int, accelerator: Accelerator) -> int:
    """Return the main process's ``value`` on every rank. A collective."""
    return int(gathered(torch.tensor(value), accelerator)[0])


def json_from_main(make: Callable[[], Any], accelerator: Accelerator) -> Any:
    """Return on every rank the JSON value that ``make`` returns on the main process. A collective.

    Raises:
        ValueError: On every rank, when ``make`` raises a ValueError or an OSError.
    """
    answer: dict[str, Any] = {}
    if accelerator.is_main_process:
        try:
            answer["value"] = make()
        except (ValueError, OSError) as error:
            answer["mistake"] = str(error)
    payload = json.dumps(answer).encode()
    table = torch.zeros(from_main(len(payload), accelerator), dtype=torch.uint8, device=accelerator.device)
    if accelerator.is_main_process:
        table += torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(table.device)
    if accelerator.num_processes > 1:
        dist.broadcast(table, src=0)
    answer = json.loads(table.cpu().numpy().tobytes())
    if "mistake" in answer:
        raise ValueError(answer["mistake"])
    return answer["value"]


def any_rank(value: bool, accelerator: Accelerator) -> bool:
    """Return on every rank whether ``value`` is true on any. A collective."""
    return bool(gathered(torch.tensor(int(value)), accelerator).any())
