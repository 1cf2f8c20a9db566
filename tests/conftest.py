"""Real runs that several tests look at, and how tests start processes."""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from warm import WarmProcess, WarmPython

from pipelines.runtime.config.logs import set_up_logging

# Until the test modules are imported: of all that they bring nothing is garbage, and to look costs a fifth of the time.
gc.disable()

REPOSITORY = Path(__file__).resolve().parents[1]
SMOKE = REPOSITORY / "pipelines" / "configs" / "smoke.toml"
STAGES = {
    "prepare_corpus": "corpus",
    "train_vae": "vae",
    "encode_latents": "latents",
    "train_unet": "unet",
    "evaluate": "evaluation",
}
# What tests start by ``accelerate launch`` where they want several processes; the other stages as ranks without it.
LAUNCHED = ("train_unet",)
TIMEOUT_SECONDS = 180
# What takes longest, and so begins first. The second makes no use of the run that the first makes.
LONG_FILES = (
    *("test_pipeline", "test_tracking_mlflow", "test_stage", "test_text_pipeline", "test_ranks", "test_data_in_place"),
    *("test_encode_runs", "test_bad_stages", "test_vae_adversary", "test_sources_union", "test_data_remote"),
)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a stage: one thread, no launcher of ours, no MLflow server of the user's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "ACCELERATE_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "ACCELERATE_USE_CPU": "true", **extra}


def stage_command(stage: str, *words: str, processes: int = 1, config: Path = SMOKE) -> list[str]:
    """The command line of a stage: plain ``python -m`` for one process, ``accelerate launch`` for more.

    Its metrics stay in the stage's folder unless ``words`` names a store: most tests are not about MLflow.
    """
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
            *("--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", "-m"),
        ]
    return [
        *launcher,
        f"pipelines.{stage}",
        "--config",
        str(config),
        "--run.threads",
        "1",
        "--run.tracking_uri",
        "offline",
        *words,
    ]


@functools.cache
def warm_python() -> WarmPython:
    """The process that holds the imports, made when it is first wanted."""
    python = WarmPython(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())))
    atexit.register(python.close)
    return python


def start_warm(*words: str, cwd: Path = REPOSITORY, **extra: str) -> WarmProcess:
    """Start ``python words`` with ``extra`` in the environment of a stage; see ``warm.py``."""
    return warm_python().start(words, env=environment(**extra), cwd=cwd)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher would set for one rank of several on this machine."""
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in words.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }


def start_ranks(*words: str, world_size: int = 2, **extra: str) -> list[WarmProcess]:
    """Start ``python words`` as each of several ranks, for tests that are not about launchers."""
    port = free_port()
    return [start_warm(*words, **rank_environment(rank, world_size, port), **extra) for rank in range(world_size)]


def communicated(ranks: Sequence[WarmProcess], timeout: float = TIMEOUT_SECONDS) -> list[tuple[str, str]]:
    """Wait for all ranks; return what each wrote on standard output and standard error."""
    return [rank.communicate(timeout=timeout) for rank in ranks]


def start_stage(
    stage: str, *words: str, processes: int = 1, config: Path = SMOKE, cwd: Path = REPOSITORY
) -> list[WarmProcess]:
    """Start a stage, several processes of it by ``accelerate launch`` or as ranks without it; see ``LAUNCHED``."""
    if processes == 1 or stage in LAUNCHED:
        return [start_warm(*stage_command(stage, *words, processes=processes, config=config)[1:], cwd=cwd)]
    return start_ranks(*stage_command(stage, *words, config=config)[1:], world_size=processes)


def run_stage(
    stage: str, *words: str, processes: int = 1, config: Path = SMOKE, cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    """Run a stage to its end and return what it printed and its exit code."""
    started = start_stage(stage, *words, processes=processes, config=config, cwd=cwd)
    out, err = map("".join, zip(*communicated(started), strict=True))
    return subprocess.CompletedProcess(words, max(process.wait() for process in started), out, err)


def run_here(name: str, *words: str, config: Path | None = SMOKE) -> subprocess.CompletedProcess[str]:
    """Call the ``main`` of a tool or a stage in this process.

    What a process of its own adds is its start, which takes longer than all that such a call does. Stages whose bits or
    signals matter get one by ``run_stage``.
    """
    if config is not None:
        words = ("--config", str(config), "--run.tracking_uri", "offline", "--run.threads", "1", *words)
    module = f"pipelines.{name}" if name in STAGES else f"pipelines.tools.{name}"
    out, err = io.StringIO(), io.StringIO()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.object(sys, "argv", [module, *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = importlib.import_module(module).main() or 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            # A stage takes the threads of the machine, which slow down all later tests.
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def unrendered() -> contextlib.AbstractContextManager[Any]:
    """Let charts be made in this process and not rendered, which is half of a small evaluation, and matplotlib's."""
    return mock.patch("matplotlib.figure.Figure.savefig")


def kill_tree(*processes: subprocess.Popen[Any] | WarmProcess) -> None:
    """SIGKILL processes that lead sessions of their own, and all that they started."""
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait(timeout=30)


def wait_until(condition: Callable[[], bool], *, seconds: float, what: str) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


@dataclass(frozen=True)
class Run:
    """A finished pipeline run."""

    root: Path
    output: Mapping[str, str]

    def folder(self, stage: str) -> Path:
        return self.root / STAGES[stage]

    def manifest(self, stage: str) -> dict[str, Any]:
        return json.loads((self.folder(stage) / "manifest.json").read_bytes())

    def rows(self, stage: str) -> dict[int, dict[str, Any]]:
        """Training lines of ``metrics.jsonl`` by update."""
        return training_rows(self.folder(stage))


def training_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """Training lines of a folder's ``metrics.jsonl`` by update; each update must be there once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line["update"] for line in lines if "update" in line]
    assert len(updates) == len(set(updates)), "an update was written twice"
    return {line["update"]: line for line in lines if "update" in line}


def run_pipeline(root: Path, *, processes: int, stages: Mapping[str, str] = STAGES, tracked: str = "") -> Run:
    """Run stages one after the other, ``tracked`` with a sender to the store beside ``root``, the others offline."""
    output = {}
    for stage in stages:
        words = ("--run.tracking_uri", "auto") if stage == tracked else ()
        done = run_stage(stage, "--run.root", str(root), *words, processes=processes)
        assert done.returncode == 0, f"{stage} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        assert "FutureWarning" not in done.stderr, f"{stage} shows its user a warning:\n{done.stderr}"
        output[stage] = done.stdout
    return Run(root=root, output=output)


@pytest.fixture(autouse=True)
def log_lines() -> None:
    """Show log lines on standard output and standard error, as every command does."""
    set_up_logging("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all tests but those that are for them, and from the processes that they start."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return one worker more than cores, for ``-n logical``: each waits much, for servers, disks and watchdogs."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; workers take whole files, so that what a file's tests share is made once."""
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among what was imported."""
    gc.freeze()
    gc.enable()


def shared_by_workers(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Run]) -> Run:
    """Return a run that the first worker who wants it makes, while the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "output.json"
        if not made.exists():
            run = make(folder / "run")
            made.write_text(json.dumps(run.output))
        return Run(root=folder / "run", output=json.loads(made.read_text()))


@pytest.fixture(scope="session")
def two_process_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All stages of the smoke experiment with two processes.

    One stage has a sender, which imports MLflow in a process of its own: seven seconds that the others are spared.
    """
    return shared_by_workers(
        tmp_path_factory, "two processes", lambda root: run_pipeline(root, processes=2, tracked="train_unet")
    )


@pytest.fixture(scope="session")
def one_process_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The first two stages in one process each; the others are run on the inputs of ``two_process_run``."""
    first = {stage: STAGES[stage] for stage in ("prepare_corpus", "train_vae")}
    return shared_by_workers(
        tmp_path_factory, "one process", lambda root: run_pipeline(root, processes=1, stages=first)
    )


@pytest.fixture(scope="session")
def inputs(two_process_run: Run) -> Run:
    """Corpus, VAE and latents of the smoke experiment, for tests that train on them again and again."""
    return two_process_run
