"""Python processes that have torch and the stages' other libraries imported when they begin.

A stage of the smoke experiment computes for two seconds and imports for four. ``WarmPython`` imports once and then
forks itself for each process it is asked for: one of its own, with its own signals, files, environment and exit code,
that only has not to import again. Not for tests of what a process imports or finds on its path.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
# What may be run as ``__main__``: all that these import stays, they themselves do not.
MAINS = (
    *("pipelines.prepare_corpus", "pipelines.train_vae", "pipelines.encode_latents", "pipelines.train_unet"),
    *("pipelines.evaluate", "pipelines.tools.doctor", "accelerate.commands.launch"),
)
# What a stage imports when it comes to need it.
LATER = ("matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.bert.modeling_bert", "tokenizers")
MAX_REQUEST_BYTES = 1 << 17


class WarmProcess:
    """A process forked by ``WarmPython``, with the part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, args: Sequence[str], status: IO[bytes], streams: tuple[IO[str], IO[str]]) -> None:
        self.args, self._status, self._streams = args, status, streams
        self.pid = int(status.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its exit code, -n after signal n.

        Raises:
            subprocess.TimeoutExpired: It did not end within ``timeout`` seconds.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            self.returncode = int(self._status.readline())
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def printed(self) -> str:
        """Return what it has written on standard output so far."""
        # By offset: the place in the file is shared with the process that writes.
        out = self._streams[0].fileno()
        return os.pread(out, os.fstat(out).st_size, 0).decode()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end and return what it wrote on standard output and standard error."""
        self.wait(timeout)
        for stream in self._streams:
            stream.seek(0)
        return self._streams[0].read(), self._streams[1].read()


class WarmPython:
    """A connection to the process that forks the others, which ends with the last of those who are connected.

    Args:
        name: Of the process: who comes first makes it, and the other workers of a run of tests share it.
    """

    def __init__(self, name: str) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        address = f"\0latentline tests {name}"  # no file: it goes with the process
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.suppress(OSError):
            listener.bind(address)
            listener.listen()
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        while self._channel.connect_ex(address):  # the other worker is between bind and listen
            time.sleep(0.01)

    def start(self, words: Sequence[str], *, env: Mapping[str, str], cwd: str | Path = REPOSITORY) -> WarmProcess:
        """Start ``python words``, the leader of a session of its own.

        Args:
            words: ``-m MODULE``, ``-c CODE`` or ``SCRIPT``, then its arguments.
            env: Its whole environment.
            cwd: Its working directory.
        """
        streams = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when it has ended)
        ours, theirs = os.pipe()
        request = json.dumps({"words": list(words), "env": dict(env), "cwd": str(cwd)}).encode()
        assert len(request) < MAX_REQUEST_BYTES
        socket.send_fds(self._channel, [request], [theirs, *(stream.fileno() for stream in streams)])
        os.close(theirs)
        return WarmProcess([sys.executable, *words], os.fdopen(ours, "rb", buffering=0), streams)

    def close(self) -> None:
        """End the process that forks; those that it forked go on."""
        self._channel.close()
        if self._process:
            self._process.wait()


def preload() -> None:
    """Import all that ``MAINS`` import, at once or later."""
    gc.disable()  # of all this nothing is garbage
    for name in (*LATER, *MAINS):
        importlib.import_module(name)
    for name in MAINS:
        package, _, module = name.rpartition(".")
        del sys.modules[name]
        delattr(sys.modules[package], module)
    # Else each fork looks through all of this once more when it ends: a second and a half.
    gc.collect()
    gc.freeze()
    gc.enable()


def requested(listener: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request and tell how it ended; return the request in it, None here when all is over."""
    waited = select.poll()
    waited.register(listener, select.POLLIN)
    channels: dict[int, socket.socket] = {}
    running: dict[int, tuple[int, int]] = {}  # by a descriptor that says when it has ended: its number, where to tell
    while True:
        for ready, _ in waited.poll():
            if ready == listener.fileno():
                channel, _ = listener.accept()
                channels[channel.fileno()] = channel
                waited.register(channel, select.POLLIN)
            elif ready in running:
                pid, status = running.pop(ready)
                _, code = os.waitpid(pid, 0)
                with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(code))
                waited.unregister(ready)
                os.close(ready)
                os.close(status)
            else:
                message, descriptors, _, _ = socket.recv_fds(channels[ready], MAX_REQUEST_BYTES, 3)
                if not message:
                    waited.unregister(ready)
                    channels.pop(ready).close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for kept, (_, status) in running.items():
                        os.close(kept)
                        os.close(status)
                    for channel in (listener, *channels.values()):
                        channel.close()
                    return attended(json.loads(message), descriptors)
                status, *streams = descriptors
                for stream in streams:
                    os.close(stream)
                os.write(status, b"%d\n" % pid)
                ended = os.pidfd_open(pid)
                waited.register(ended, select.POLLIN)
                running[ended] = pid, status
        if not channels and not running:
            return None


def attended(request: dict[str, Any], descriptors: Sequence[int]) -> dict[str, Any]:
    """Take the request's files for those of this process, and make it the leader of a session."""
    status, out, err = descriptors
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for place, descriptor in enumerate((nothing, out, err)):
        os.dup2(descriptor, place)
    for descriptor in (nothing, status, out, err):
        os.close(descriptor)
    return request


def run(request: dict[str, Any]) -> None:
    """Do in this process what ``python words`` does after its start."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    first, *rest = request["words"]
    # As the interpreter does it: the working directory for a module, the script's folder for a script.
    sys.path[0] = str(Path(first).parent)
    sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if first in ("-m", "-c"):
        sys.path[0] = os.getcwd()
        what, *rest = rest
    sys.argv = [first, *rest]
    if first == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif first == "-c":
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(first, run_name="__main__")


def run_and_leave(request: dict[str, Any]) -> NoReturn:
    """Run the words and end as the interpreter does, but leave it to the kernel to free what was imported.

    That takes the interpreter half a second.
    """
    code = 0
    try:
        run(request)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and code is not end.code:
            print(end.code, file=sys.stderr)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as end:
        preload()
        asked = requested(end)
    if asked:
        run_and_leave(asked)
