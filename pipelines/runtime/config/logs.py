"""Log lines for people: time, level, and the command with its rank before each line, ``12:34:56 INFO train_unet[0/2]``.

INFO goes to standard output, from rank 0 alone; warnings and errors go to standard error, from every rank. Modules log
to ``latentline.AREA`` (``stage``, ``training``, ``tracking``), stages and tools to ``latentline.NAME``. Loggers of
other libraries are left alone. A stream that is closed, or whose reader goes (``| head``), costs lines, never the work.
"""

import logging
import os
import sys
import time
from typing import TextIO

FIRST_RANK_SECONDS = 30.0


def set_up_logging(name: str, *, stream: TextIO | None = None) -> None:
    """Show this process's log lines under the ``name`` of its stage or tool.

    Args:
        name: Of the command.
        stream: Takes all lines, instead of standard output and standard error.
    """
    _open_missing_streams()
    rank, root = os.environ.get("RANK", "0"), logging.getLogger("latentline")
    root.handlers = [_Terminal(f"{name}[{rank}/{os.environ.get('WORLD_SIZE', '1')}]", stream)]
    root.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    root.propagate = False  # a library may have given the root logger a handler, which would print it again


def say_mistake(name: str, error: Exception) -> None:
    """Say the user's mistake that ends a command, where all ranks find the same: once a machine.

    Under a launcher it is a log line like any other, since the logs of several machines are read together. The launcher
    ends all processes when one leaves, so the others let the first of the machine say it and write the outcome.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return
        time.sleep(FIRST_RANK_SECONDS)  # in which the launcher ends this process, unless the mistake is its own
    if "RANK" in os.environ:
        set_up_logging(name)
        logging.getLogger("latentline").error(error)
    else:
        print_line(f"{name}: {error}", to=sys.stderr)


def print_line(text: str, *, to: TextIO | None = None) -> None:
    """Print to standard output, or ``to``; into nothing from when its reader has gone.

    Raises:
        OSError: It is a file that cannot be written to, such as on a full disk; it is given up, too.
    """
    stream = to or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        # The stream keeps what it could not write, and would raise at every later flush, the last as Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise


def print_answer(name: str, text: str) -> None:
    """Print what a command was asked for, on the main process; end it with code 2 where that cannot be written."""
    try:
        if text and os.environ.get("RANK", "0") == "0":
            print_line(text)
    except OSError as error:
        print_line(f"{name}: standard output: {error.strerror}", to=sys.stderr)
        raise SystemExit(2) from None


def _open_missing_streams() -> None:
    """Open what was closed of standard input, output and error: a file of ours would be given its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115 (for the life of the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


class _Terminal(logging.Handler):
    """Prints to the standard streams of the moment: a progress bar takes their place, to keep its line below ours."""

    def __init__(self, source: str, stream: TextIO | None) -> None:
        super().__init__()
        self._source, self._stream = source, stream

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record, each of its lines with the prefix: the ranks' lines mix in one file."""
        try:
            head = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname} {self._source}"
            text = "\n".join(f"{head} {line}".rstrip() for line in self.format(record).splitlines())
            stream = self._stream or (sys.stderr if record.levelno >= logging.WARNING else sys.stdout)
            print_line(text, to=stream)
        except OSError:
            pass  # what is at work does not end because of its log
        except Exception:
            self.handleError(record)
