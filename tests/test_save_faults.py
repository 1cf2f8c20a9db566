"""Real faults of the disk under a save: full, read-only, failing and killed in each of its system calls."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import environment, training_rows
from tiny_training import Recipe, Tiny

from pipelines.runtime.tracking.tracker import open_tracker
from pipelines.runtime.training.checkpoint import CheckpointConfig, Checkpoints

# All that a save asks of files; `test_no_call_of_a_save_is_forgotten` says when there is another.
CALLS = (
    *("mkdir", "openat", "write", "ftruncate", "fsync", "rename", "renameat", "unlinkat", "rmdir", "getdents64"),
    *("close", "read", "newfstatat", "lseek", "fcntl", "ioctl"),
)

# Imports once, then forks for each case, so that hundreds of cases take seconds. Each child saves updates 2 and 3.
FORKER = """
import os, signal, sys, torch
from pathlib import Path
from pipelines.runtime.training.checkpoint import CheckpointConfig, Checkpoints

def save(store, update):
    store.save(update, {"model": {"w": torch.full((3,), float(update))}}, {"next_batch": update})
    store.wait()

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for line in sys.stdin:
    folder = Path(line.strip())
    store = Checkpoints(folder, CheckpointConfig(keep_last=1), writes=True)
    save(store, 1)
    child = os.fork()
    if child:
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    try:
        signal.sigwait([signal.SIGUSR1])  # which is no call that fails
        failures = 0
        for update in (2, 3):
            try:
                save(store, update)
            except OSError:
                failures += 1
        os._exit(10 + failures)
    finally:
        os._exit(99)
"""


class Forker:
    """Runs cases under strace."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder: Path, *words: str) -> int:
        """Save under ``strace WORDS`` and return the exit code, -9 when it was killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        folder.mkdir()
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        child = self.process.stdout.readline().strip()
        log = folder.parent / f"{folder.name}.strace"
        tracer = subprocess.Popen(
            ["strace", "-f", "-p", child, "-o", str(log), *words], stderr=subprocess.PIPE, text=True
        )
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(int(child), signal.SIGUSR1)
        code = int(self.process.stdout.readline())
        tracer.communicate(timeout=120)
        return code


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    if subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode:
        pytest.skip("strace cannot trace here")
    forker = Forker()
    yield forker
    forker.process.communicate(timeout=120)


def calls_of_a_save(forker: Forker, folder: Path, *, which: str = ",".join(CALLS)) -> Counter[str]:
    """Count the calls that two undisturbed saves make."""
    assert forker.run(folder, "-e", f"trace={which}") == 10
    lines = (folder.parent / f"{folder.name}.strace").read_text().splitlines()
    return Counter(line.split("(")[0].split()[-1] for line in lines if "(" in line and "resumed" not in line)


def test_no_call_of_a_save_is_forgotten(forker: Forker, tmp_path: Path) -> None:
    every = calls_of_a_save(forker, tmp_path / "calls", which="%file,%desc")
    assert every.keys() - {"mmap"} <= set(CALLS), "mmap gives memory to the writer's thread"


def check_case(forker: Forker, folder: Path, call: str, place: int, fault: str) -> bool:
    """Let one call fail or kill; return whether it had an effect."""
    code = forker.run(folder, "-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={place}")
    store = Checkpoints(folder, CheckpointConfig(keep_last=1), writes=True)
    newest = store.newest_intact()
    case = f"{call} number {place}, {fault}: exit code {code}, checkpoints {os.listdir(folder)}"
    assert newest >= 1, case
    assert store.read(newest).state["next_batch"] == newest, case
    assert not [name for name in os.listdir(folder) if name.startswith(("damaged", "."))], case
    if code == 10:
        assert newest == 3, case
    elif fault.startswith("error"):
        assert code in (11, 12), case  # an OSError and nothing else
    else:
        assert code == -signal.SIGKILL, case
    return code != 10


def test_a_save_that_fails_or_is_killed_in_a_system_call_leaves_a_good_checkpoint(
    forker: Forker, tmp_path: Path
) -> None:
    counts = calls_of_a_save(forker, tmp_path / "calls")
    effects = 0
    for call in ("mkdir", "openat", "write", "fsync", "rename", "unlinkat"):
        for number, place in enumerate(sorted({1, counts[call] // 3 + 1, counts[call] // 2})):
            fault = ("error=ENOSPC", "signal=KILL", "error=EIO")[number]
            effects += check_case(forker, tmp_path / f"{call}-{place}", call, place, fault)
    assert effects >= 10


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fault", ["error=EIO", "error=ENOSPC", "error=EROFS", "signal=KILL"])
def test_every_system_call_of_a_save_in_turn(fault: str, forker: Forker, tmp_path: Path) -> None:
    counts = calls_of_a_save(forker, tmp_path / "calls")
    effects = [
        check_case(forker, tmp_path / f"{call}-{place}", call, place, fault)
        for call in CALLS
        for place in range(1, counts[call] + 1)
    ]
    assert sum(effects) > 40, "too few of them had any effect"  # strace counts the two saves apart


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def test_a_full_disk_ends_the_training_with_a_clear_error_and_a_good_checkpoint(small_disk: Path) -> None:
    tiny = Tiny(small_disk / "run", Recipe())
    tiny.after_update = lambda update: fill(small_disk) if update == 15 else None
    with pytest.raises(
        OSError, match="No space left on device.*the newest is of update 10.*make room or mend the disk"
    ):
        tiny.run()
    assert Checkpoints(small_disk / "run/checkpoints", CheckpointConfig(), writes=False).newest_intact() == 10
    (small_disk / "filler").unlink()
    assert Tiny(small_disk / "run", Recipe()).run().training.update == 40


def test_training_goes_on_for_its_grace_while_the_disk_is_full(
    small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = small_disk / "run"
    tracker = open_tracker(
        folder=folder, root=small_disk, stage="tiny", experiment="e", tracking_uri="offline", params={}, tags={}
    )
    recipe = Recipe(config={"checkpoint": {"every_updates": 10, "grace_updates": 16}})
    tiny = Tiny(folder, recipe, tracker=tracker)

    def disturb(update: int) -> None:
        if update == 15:
            fill(small_disk)
        if update == 30:
            (small_disk / "filler").unlink()

    tiny.after_update = disturb
    assert tiny.run().training.update == 40
    tracker.close("FINISHED")
    assert sorted(training_rows(folder)) == list(range(1, 41))
    assert "Training goes on for" in capfd.readouterr().err
    assert Checkpoints(small_disk / "run/checkpoints", CheckpointConfig(), writes=False).newest_intact() == 40


def test_a_folder_that_becomes_read_only_ends_the_training_when_the_grace_is_over(small_disk: Path) -> None:
    tiny = Tiny(small_disk / "run", Recipe(config={"checkpoint": {"every_updates": 10, "grace_updates": 5}}))

    def disturb(update: int) -> None:
        if update == 15:
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    tiny.after_update = disturb
    with pytest.raises(OSError, match="Read-only file system"):
        tiny.run()
    assert 25 <= tiny.training.update <= 30
    assert Checkpoints(small_disk / "run/checkpoints", CheckpointConfig(), writes=False).newest_intact() == 10
