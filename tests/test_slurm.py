"""Two nodes of a real Slurm on this machine: its own daemons, keys and ports, gone when the tests have ended.

The sbatch files run as they are; what a test changes is given to ``sbatch``, as a user would.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, SMOKE, STAGES, Run, environment, run_stage, training_rows, wait_until

from data.files import sha256_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

DAEMONS = ("munged", "slurmctld", "slurmd")
STAGE_FILE = REPOSITORY / "launch" / "slurm" / "stage.sbatch"
# Two nodes on one host: each slurmd has its name, its port and its spool folder (%n).
CONFIGURATION = """
ClusterName=latentline
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits as long as the credentials of its last start are good: 120 s if nothing is said.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/builtin
SelectType=select/linear
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """The running cluster."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.folder / "slurm.conf"), LATENTLINE_PYTHON=sys.executable)

    def ask(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, stage: str, *words: str, options: tuple[str, ...] = ()) -> str:
        """Submit a stage on both nodes and return its job's number."""
        sbatch = ["sbatch", "--parsable", "--nodes", "2", "--output", str(self.folder / "%x-%j.log"), *options]
        words = ("--config", str(SMOKE), "--run.threads", "1", "--run.tracking_uri", "offline", *words)
        return self.ask(*sbatch, str(STAGE_FILE), stage, *words).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says about a job."""
        words = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, number: str, *, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is over for good."""
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        wait_until(
            lambda: self.job(number)["JobState"] not in running, seconds=seconds, what=f"the end of job {number}"
        )
        return self.job(number)

    def is_idle(self) -> bool:
        """Whether the controller answers and both nodes wait for work."""
        words = ["sinfo", "--noheader", "--format", "%T %D"]
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        return done.stdout.split() == ["idle", "2"]

    def log(self, number: str) -> str:
        return "".join(path.read_text() for path in self.folder.glob(f"*-{number}.log"))

    def processes(self) -> list[psutil.Process]:
        """Everything that lives under this cluster's configuration."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A controller and two nodes, with their own munge."""
    if os.geteuid():
        pytest.skip("Slurm's daemons need root")
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; Debian has them in slurm-wlm and munge")
    # Short, since the path of a socket has at most 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge wants it: any process may come to the socket
    cluster, daemons = Slurm(folder), []

    def start(*words: str) -> None:
        with open(folder / f"{Path(words[0]).name}-{len(daemons)}.log", "wb") as log:
            daemons.append(
                subprocess.Popen(words, env=cluster.environment, stdout=log, stderr=log, start_new_session=True)
            )

    try:
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=free_ports(3)))
        paths = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "key-file", "pid-file")]
        start("munged", "--foreground", *paths, f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed")
        wait_until((folder / "munge.socket").exists, seconds=20, what="the socket of munge")
        start("slurmctld", "-D")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        wait_until(cluster.is_idle, seconds=60, what=f"two idle nodes ({folder})")
        yield cluster
        subprocess.run(["scancel", "--signal=KILL", "--user=root"], env=cluster.environment, check=False)
        subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=False)
        wait_until(lambda: not cluster.ask("squeue", "--noheader").strip(), seconds=60, what="an empty queue")
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=20)
        left = cluster.processes()
        names = [" ".join(process.cmdline()) for process in left if process.is_running()]
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    assert not names, f"the jobs have ended, and this is left: {names}"


UPDATES = ("--updates", "120", "--checkpoint.every_updates", "10", "--validate_every", "1000")


def training_words(inputs: Run, root: Path) -> list[str]:
    words = [word for name in ("latents", "vae") for word in (f"--inputs.{name}", str(inputs.root / name))]
    return ["--run.root", str(root), *words, *UPDATES]


@pytest.fixture(scope="module")
def undisturbed(inputs: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of two processes that nothing stops, without Slurm."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    done = run_stage("train_unet", *training_words(inputs, root), processes=2)
    assert done.returncode == 0, done.stderr
    return root / "unet"


def check_same(folder: Path, whole: Path) -> None:
    losses = [{u: row["train/loss"] for u, row in training_rows(place).items()} for place in (folder, whole)]
    assert losses[0] == losses[1]
    assert sha256_of(folder / "unet.safetensors") == sha256_of(whole / "unet.safetensors")


def ranks(slurm: Slurm) -> list[psutil.Process]:
    return [process for process in slurm.processes() if "RANK" in process.environ()]


def job_in_mid_run(slurm: Slurm, inputs: Run, root: Path, *options: str) -> tuple[str, Path]:
    """Submit a training to two nodes and return the job and its folder when there is a checkpoint to come back to."""
    folder = root / "unet"
    job = slurm.submit("train_unet", *training_words(inputs, root), options=options)
    wait_until(lambda: any(folder.glob("checkpoints/update-????????")), seconds=120, what="a checkpoint")
    assert slurm.job(job)["NumNodes"] == "2"
    return job, folder


def test_a_stage_on_two_slurm_nodes_is_requeued_in_mid_run_and_ends_as_if_undisturbed(
    slurm: Slurm, inputs: Run, undisturbed: Path, tmp_path: Path
) -> None:
    job, folder = job_in_mid_run(slurm, inputs, tmp_path / "run")
    slurm.ask("scontrol", "requeue", job)
    ended = slurm.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), slurm.log(job)
    assert "continuing after update" in slurm.log(job)
    check_same(folder, undisturbed)


def test_slurm_s_warning_before_the_time_limit_commits_requeues_and_ends_as_if_undisturbed(
    slurm: Slurm, inputs: Run, undisturbed: Path, tmp_path: Path
) -> None:
    # The file wants its signal 180 s before the limit, and Slurm looks every 30 s: it comes 30 to 60 s after the start.
    job, folder = job_in_mid_run(slurm, inputs, tmp_path / "run", "--time", "4")
    for process in ranks(slurm):
        process.suspend()  # as if there were more to do than the limit allows
    wait_until(lambda: "asked to stop" in slurm.log(job), seconds=90, what="the signal before the time limit")
    for process in ranks(slurm):
        process.resume()
    ended = slurm.finish(job)
    assert ended["JobState"] == "COMPLETED", slurm.log(job)
    assert int(ended["Restarts"]) >= 1
    assert "the stage stopped with a checkpoint; back into the queue" in slurm.log(job)
    check_same(folder, undisturbed)


def test_a_cancelled_slurm_job_commits_and_stays_away_until_it_is_submitted_again(
    slurm: Slurm, inputs: Run, undisturbed: Path, tmp_path: Path
) -> None:
    job, folder = job_in_mid_run(slurm, inputs, tmp_path / "run")
    slurm.ask("scancel", job)
    assert slurm.finish(job)["JobState"] == "CANCELLED"
    wait_until(lambda: not ranks(slurm), seconds=30, what="the end of the ranks")
    assert json.loads((folder / "outcome.json").read_bytes())["state"] == "stopped"
    assert not (folder / "stop").exists()
    again = slurm.submit("train_unet", *training_words(inputs, tmp_path / "run"))
    assert slurm.finish(again)["JobState"] == "COMPLETED", slurm.log(again)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0")
    check_same(folder, undisturbed)


def submit_all(slurm: Slurm, root: Path, *words: str) -> list[str]:
    options = ["--nodes", "2", "--output", str(slurm.folder / "%x-%j.log")]
    given = ["--run.root", str(root), "--run.threads", "1", "--run.tracking_uri", "offline", *words]
    lines = slurm.ask("bash", "launch/slurm/submit.sh", str(SMOKE), *options, "--", *given).splitlines()
    assert [line.split()[0] for line in lines] == list(STAGES)
    return [line.split()[1] for line in lines]


def test_all_stages_submitted_to_slurm_follow_each_other(slurm: Slurm, tmp_path: Path) -> None:
    jobs = submit_all(slurm, tmp_path / "run")
    for before, job in pairwise(jobs):
        assert slurm.job(job)["Dependency"].startswith(f"afterok:{before}")
    ended = [slurm.finish(job) for job in jobs]
    assert [job["JobState"] for job in ended] == ["COMPLETED"] * len(STAGES), slurm.log("*")
    assert [job["NumNodes"] for job in ended] == ["1", "2", "2", "2", "2"]
    for before, after in pairwise(ended):
        assert before["EndTime"] <= after["StartTime"]
    assert all((tmp_path / "run" / folder / "manifest.json").is_file() for folder in STAGES.values())
    assert "2 process(es)" in slurm.log(jobs[3])


def test_a_stage_that_fails_on_slurm_takes_the_later_ones_out_of_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "run" / "corpus").mkdir(parents=True)
    (tmp_path / "run" / "corpus" / "manifest.json").write_text("{")
    jobs = submit_all(slurm, tmp_path / "run")
    states = [slurm.finish(job)["JobState"] for job in jobs]
    assert states == ["FAILED"] + ["CANCELLED"] * (len(STAGES) - 1), slurm.log(jobs[0])
