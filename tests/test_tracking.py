"""The stage's side of tracking: spools, identities, latency, credentials. No server is needed here."""

import errno
import itertools
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from clocks import FOREVER_SECONDS, quietest_round, seconds_of
from PIL import Image

from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import RunIdentity, network_file_system, pipeline_identity, store_uri
from pipelines.runtime.tracking.sender import is_sent, metrics_of
from pipelines.runtime.tracking.spool import (
    EVENTS,
    FILES,
    METRICS,
    Sent,
    cut_torn_tail,
    read_spool,
    read_spool_backwards,
    unsent,
)
from pipelines.runtime.tracking.tracker import SilentTracker, Tracker, open_tracker

REPOSITORY = Path(__file__).parents[1]
Opener = Callable[..., Tracker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Opener]:
    """Opens a tracker that sends nothing; closes the last one."""
    opened: list[Tracker] = []

    def open_(uri: str = "offline", **changes) -> Tracker:
        root = tmp_path / "runs" / "demo"
        given = {"stage": "train_unet", "experiment": "tests", "params": {}, "tags": {}, **changes}
        opened.append(open_tracker(folder=root / "unet", root=root, tracking_uri=uri, **given))
        return opened[-1]

    yield open_
    if opened:
        opened[-1].close("FINISHED", wait_seconds=2)


def records(first: int, last: int, **more: float) -> list[dict[str, float]]:
    return [{"update": n, "batch": n, "time": 1e9 + n, "train/loss": 1 / n, **more} for n in range(first, last + 1)]


def metrics(tmp_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (tmp_path / "runs/demo/unet" / METRICS).read_text().splitlines()]


def test_records_are_written_as_they_are_and_in_full_precision(tmp_path: Path, start: Opener) -> None:
    given = [
        *records(1, 50),
        {"update": 51, "batch": 51, "time": 5.5, "train/loss": np.float64(0.1) + 0.2, "n": np.int64(3)},
    ]
    tracker = start()
    tracker.log_records(given)
    given[0]["train/loss"] = -1.0  # what the caller does afterwards with his dictionaries is his own affair
    tracker.flush()
    assert metrics(tmp_path) == [*records(1, 50), {**given[-1], "train/loss": 0.1 + 0.2}]


@pytest.mark.parametrize("kept", range(30))
def test_a_torn_tail_is_cut_to_the_last_whole_line(tmp_path: Path, kept: int) -> None:
    whole, torn = b'{"update": 1}\n{"update": 2}\n', b'{"update": 3, "loss": 0.5}\n\0\0\0'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(whole + torn[:kept])
    complete = whole + torn[:27] if kept >= 27 else whole
    assert cut_torn_tail(path) == len(whole) + kept - len(complete)
    assert path.read_bytes() == complete


def test_a_torn_tail_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n' + b"\0" * 300_000)
    cut_torn_tail(path)
    assert path.read_bytes() == b'{"update": 1}\n'


def test_reading_backwards_gives_the_lines_of_reading_forwards_reversed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lengths = np.random.default_rng(0).integers(0, 20_000, 200)
    path.write_text(
        "".join(json.dumps({"update": n, "text": "x" * int(length)}) + "\n" for n, length in enumerate(lengths))
    )
    forwards = [line for _, line in read_spool(path, start=0)]
    assert list(read_spool_backwards(path)) == forwards[::-1]


def test_updates_that_are_there_already_are_not_written_again(tmp_path: Path, start: Opener) -> None:
    first = start()
    first.log_records(records(1, 30))
    first.log_metrics({"val/loss": 0.5}, step=20)
    first.close("KILLED")
    with open(tmp_path / "runs/demo/unet" / METRICS, "a") as file:
        file.write('{"update": 31, "tr')

    again = start()
    again.resume_after(15)
    again.log_records(records(16, 40))
    again.log_metrics({"val/loss": 0.5, "val/new": 1.0}, step=20)
    again.log_metrics({"val/loss": 0.25}, step=40)
    again.flush()
    lines = metrics(tmp_path)
    assert [line for line in lines if "update" in line] == records(1, 40)
    logged = [{key: line[key] for key in line if key != "time"} for line in lines if "step" in line]
    assert logged == [
        {"step": 20, "val/loss": 0.5},
        {"step": 20, "val/new": 1.0},
        {"step": 40, "val/loss": 0.25},
    ]


def test_a_rewind_adds_lines_and_its_replay_does_not(tmp_path: Path, start: Opener) -> None:
    first = start()
    first.log_records(records(1, 80))
    first.log_records(records(61, 75, attempt=2))
    first.close("KILLED")
    again = start()
    assert again.resume_after(60) == 2  # the checkpoint is older than the rewind: both attempts are gone through again
    again.log_records(records(61, 80))
    again.log_records(records(61, 90, attempt=2))
    again.flush()
    assert metrics(tmp_path) == [*records(1, 80), *records(61, 90, attempt=2)]


def test_resuming_reads_only_what_is_replayed(tmp_path: Path, start: Opener) -> None:
    path = tmp_path / "runs/demo/unet" / METRICS
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:  # a terabyte of hole stands for the years before the checkpoint
        file.seek(1 << 40)
        file.write(b"\n" + "".join(json.dumps(record) + "\n" for record in records(990, 1000)).encode())
    tracker = start()
    tracker.resume_after(995)
    tracker.log_records(records(996, 1001))
    tracker.flush()
    with open(path, "rb") as file:
        file.seek(1 << 40)
        assert [json.loads(line) for line in file.read().decode().splitlines()[1:]] == records(990, 1001)


def test_logging_takes_microseconds_even_when_the_disk_hangs(tmp_path: Path, start: Opener) -> None:
    folder = tmp_path / "runs/demo/unet"
    tracker = start()
    tracker.log_records(records(1, 1))
    tracker.flush()
    (folder / METRICS).unlink()
    os.mkfifo(folder / METRICS)  # opening a pipe that nobody reads takes for ever
    numbers = itertools.count(2)

    def logging() -> list[float]:
        return [seconds_of(lambda n=n: tracker.log_records(records(n, n))) for n in itertools.islice(numbers, 2000)]

    seconds = quietest_round(logging, limit=5e-3)
    assert np.median(seconds) < 50e-6
    assert max(seconds) < 5e-3
    last = next(numbers) - 1
    with open(os.open(folder / METRICS, os.O_RDWR), "rb") as pipe:  # the disk is back
        lines = [json.loads(pipe.readline()) for _ in range(2, last + 1)]
    assert lines == records(2, last)


def test_many_lines_at_once_do_not_take_the_interpreter_from_the_step(start: Opener) -> None:
    before = set(threading.enumerate())
    tracker = start()
    [writer] = set(threading.enumerate()) - before
    assert writer.ident is not None
    clock = time.pthread_getcpuclockid(writer.ident)  # on a busy machine it stands still with the writer
    metrics = {f"train/term_{number}": 1 / (3 + number) for number in range(20)}
    numbers = itertools.count(1)

    def steps() -> list[float]:
        """What the writer worked during each of many short steps, seconds."""
        tracker.log_records(
            [{"update": n, "batch": n, "time": 1e9, **metrics} for n in itertools.islice(numbers, 5000)]
        )
        end, marks = time.monotonic() + 0.15, [time.clock_gettime(clock)]
        while time.monotonic() < end:
            sum(number for number in range(300))
            marks.append(time.clock_gettime(clock))
        tracker.flush()
        return list(np.diff(marks))

    # The law says 5 ms, but that is just what a thread waits for one that does not let go.
    assert max(quietest_round(steps, limit=4e-3)) < 4e-3


def test_what_a_full_disk_refuses_is_written_whole_when_there_is_room(
    tmp_path: Path, start: Opener, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start()
    tracker.log_records(records(1, 20))
    tracker.flush()
    path = tmp_path / "runs/demo/unet" / METRICS
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))  # room for a line and a half
    try:
        tracker.log_records(records(21, 40))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            tracker.flush()
        assert metrics(tmp_path) == records(1, 20)
        tracker.log_records(records(41, 60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.flush()
    assert metrics(tmp_path) == records(1, 60)
    assert f"{METRICS} cannot be written" in capsys.readouterr().err


def test_an_image_is_kept_as_it_was_and_known_again_when_it_is_replayed(tmp_path: Path, start: Opener) -> None:
    drawn = tmp_path / "grid.png"
    tracker = start()
    for shade in (1, 1, 2):  # drawn, drawn again by a replay, drawn otherwise after a rewind
        Image.new("L", (4, 4), shade).save(drawn)
        tracker.log_image("samples/grid", drawn, step=7)
    drawn.unlink()
    tracker.flush()
    folder = tmp_path / "runs/demo/unet"
    logged = [line for _, line in read_spool(folder / FILES, start=0) if line["kind"] == "image"]
    assert [np.asarray(Image.open(folder / line["path"])).max() for line in logged] == [1, 1, 2]
    first, again, other = [{key: line[key] for key in line if key != "time"} for line in logged]
    assert first == again
    assert first["path"] != other["path"]
    assert {(line["key"], line["step"]) for line in logged} == {("samples/grid", 7)}
    with pytest.raises(ValueError, match=r"Image key 'step=7': only letters, digits"):
        tracker.log_image("step=7", drawn, step=7)


def test_a_run_keeps_its_identity_over_restarts_and_stages_share_the_pipeline(tmp_path: Path, start: Opener) -> None:
    first = start()
    first.close("FAILED")
    again = start()
    root = tmp_path / "runs" / "demo"
    other = open_tracker(
        folder=root / "vae", root=root, stage="train_vae", experiment="e", tracking_uri="offline", params={}, tags={}
    )
    assert again.run_id == first.run_id != other.run_id
    pipelines = {RunIdentity.read(root / stage).pipeline_id for stage in ("unet", "vae")}
    assert pipelines == {json.loads((root / "pipeline.json").read_text())["pipeline_id"]}
    kinds = [line["kind"] for _, line in read_spool(root / "unet" / EVENTS, start=0)]
    assert [kind for kind in kinds if kind in ("start", "close")] == ["start", "close", "start"]
    other.close("FINISHED")


def test_two_trackers_never_write_one_folder(start: Opener) -> None:
    start()
    with pytest.raises(BlockingIOError, match="is in use by process"):
        start()


def test_of_many_first_stages_one_makes_the_pipeline(tmp_path: Path) -> None:
    for attempt in range(20):
        with ThreadPoolExecutor(8) as pool:
            ids = set(pool.map(pipeline_identity, [tmp_path / f"run{attempt}"] * 8))
        assert len(ids) == 1
        assert [path.name for path in (tmp_path / f"run{attempt}").iterdir()] == ["pipeline.json"]


def test_the_store_is_the_configured_one_then_the_environments_then_sqlite_beside_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment")
    assert store_uri("http://configured", root=tmp_path) == "http://configured"
    assert store_uri("auto", root=tmp_path) == "http://environment"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    assert store_uri("auto", root=Path("runs/demo")) == f"sqlite:///{tmp_path}/runs/mlflow.db"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((name, None) for name in ('it\'s "a"; b', "#1 of 2", "50% more", "100%", "a@b:c")),
        ("a?b", "a"),
        ("a%20b", "a b"),
    ],
)
def test_the_default_store_lies_beside_the_root_or_is_refused(
    name: str, other: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.engine import make_url

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    database = tmp_path / name / "mlflow.db"
    if other is None:
        assert make_url(store_uri("auto", root=tmp_path / name / "run")).database == str(database)
        return
    with pytest.raises(ValueError, match=rf"store {re.escape(str(database))} would become {tmp_path}/{other}"):
        store_uri("auto", root=tmp_path / name / "run")
    assert str(make_url(f"sqlite:///{database}").database).startswith(f"{tmp_path}/{other}"), "as MLflow would do"


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///tmp/mlruns", "of line"])
def test_a_uri_that_names_no_store_is_refused(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"run.tracking_uri = '{uri}' names no store.*http://HOST:5000.*'offline'"):
        store_uri(uri, root=tmp_path)


MOUNTS = [
    ("/", "ext4"),
    ("/home", "nfs4"),
    ("/home/local disk", "xfs"),
    ("/scratch", "lustre"),
    ("/remote", "fuse.sshfs"),
    ("/data", "nfs"),
    ("/data", "ext4"),  # mounted over the one before
]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/runs/mlflow.db", ""),
        ("/home/me/runs/mlflow.db", "nfs4"),
        ("/homes/me/mlflow.db", ""),  # a name that only begins like the mount's
        ("/home/local disk/mlflow.db", ""),
        ("/scratch/mlflow.db", "lustre"),
        ("/remote/mlflow.db", "fuse.sshfs"),
    ],
)
def test_network_folders_are_told_from_local_ones(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = [SimpleNamespace(mountpoint=point, fstype=type_) for point, type_ in MOUNTS]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    assert network_file_system(Path(path)) == kind


def test_an_sqlite_store_on_a_network_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("pipelines.runtime.tracking.identity.network_file_system", lambda path: "nfs4")
    with pytest.raises(
        ValueError, match=r"mlflow.db would be an sqlite file on a network folder \(nfs4\).*mlflow server"
    ):
        open_tracker(folder=tmp_path / "unet", root=tmp_path, stage="train_unet", experiment="e", params={}, tags={})
    assert list(tmp_path.iterdir()) == []  # refused before anything is made


def test_credentials_reach_no_file_and_no_terminal(
    tmp_path: Path, start: Opener, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = "http://somebody:opensesame@127.0.0.1:9"  # nobody listens there
    config = tmp_path / "config.toml"
    config.write_text(f'[run]\ntracking_uri = "{uri}"\n')
    tracker = start(uri, params={"run": {"tracking_uri": uri}}, tags={"store": uri}, config_file=config)
    tracker.log_input("corpus", digest="0" * 64, source="s3://key:opensesame@bucket/corpus", context="training")
    folder = tmp_path / "runs"
    deadline = time.monotonic() + FOREVER_SECONDS
    while not any("127.0.0.1" in log.read_text() for log in folder.rglob("sender.log")) and time.monotonic() < deadline:
        time.sleep(0.1)  # until the sender has complained, with a trace of the request
    tracker.close("FINISHED", wait_seconds=5)
    texts = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert any("***@127.0.0.1" in text for text in texts.values())
    assert [path for path, text in texts.items() if "opensesame" in text] == []
    said = capfd.readouterr()
    assert "opensesame" not in said.out + said.err
    assert re.search(
        r"\d+ records and events are not sent yet to http://\*\*\*@127.0.0.1:9.*-m pipelines.tools.sync",
        said.err,
    )


def test_stages_do_not_import_mlflow() -> None:
    code = "import sys, pipelines.runtime.tracking.tracker; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize(
    "line", [None, {"time": 1.0, "x": 1}, {"step": 1, "x": 1}, {"step": 1, "time": 2.0, "x": "high"}]
)
def test_a_line_that_is_no_record_is_told(line: dict | None) -> None:
    with pytest.raises(ValueError, match="no record of metrics"):
        metrics_of(line)


def test_the_silent_tracker_takes_everything_that_the_real_one_does() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Tracker) - public(SilentTracker) <= {"event", "start_sending"}


def test_nothing_is_left_running_when_a_tracker_is_closed(start: Opener) -> None:
    before = threading.active_count()
    for _ in range(20):
        start().close("FINISHED")
    assert threading.active_count() == before


SENDER = "import sys, time; sys.stdin.readline(); time.sleep(2)"


@pytest.mark.parametrize(
    ("uri", "status", "finishes"),
    [
        ("sqlite:///{}/mlflow.db", "FINISHED", True),
        ("sqlite:///{}/mlflow.db", "FAILED", True),
        ("sqlite:///{}/mlflow.db", "KILLED", False),  # told to stop, and soon killed
        ("http://127.0.0.1:9", "FINISHED", False),
    ],
)
def test_a_slow_sender_is_waited_for_where_its_store_is_local(
    uri: str, status: str, finishes: bool, tmp_path: Path, start: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the first stage makes the database: the sender ends its work, and its file does not stay half made."""
    monkeypatch.setattr("pipelines.runtime.tracking.tracker.CLOSE_WAIT_SECONDS", 0.2)
    senders, popen = [], subprocess.Popen

    def slow(*_: object, **given: Any) -> Any:
        senders.append(popen([sys.executable, "-c", SENDER], stdin=given["stdin"]))
        return senders[-1]

    monkeypatch.setattr("pipelines.runtime.tracking.tracker.subprocess.Popen", slow)
    start(uri.format(tmp_path)).close(status)
    assert (senders[0].returncode == 0) == finishes


@pytest.mark.parametrize(("failures", "code"), [(0, 0), (2, 0), (3, 1)])
def test_a_store_that_refuses_a_short_stage_s_first_attempt_is_tried_again(
    failures: int, code: int, tmp_path: Path, start: Opener
) -> None:
    start().close("FINISHED")
    folder = tmp_path / "runs" / "demo" / "unet"
    program = (
        "import sys\nfrom pathlib import Path\n"
        "import pipelines.runtime.tracking.sender_process as process\n"
        "class Busy:\n"
        f"    name, failures = 'store', {failures}\n"
        "    def connect(self, identity):\n"
        "        self.failures -= 1\n"
        "        if self.failures >= 0: raise OSError('database is locked')\n"
        "        return 'run'\n"
        "    def __getattr__(self, name): return lambda *words, **named: None\n"
        "process.MlflowStore = lambda uri: Busy()\n"
        "sys.exit(process.send_while_owned(Path(sys.argv[1])))\n"
    )
    sender = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdin=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
    )
    assert sender.stdin is not None
    sender.stdin.write(b"close\n")
    sender.stdin.flush()
    assert sender.wait(timeout=FOREVER_SECONDS) == code
    assert (unsent(folder, Sent.read(folder)) == 0) == (code == 0)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"offsets": []}', b'{"offsets": {"a": "b"}}'])
def test_a_damaged_memory_of_the_sender_only_sends_again(content: bytes, tmp_path: Path, start: Opener) -> None:
    tracker = start()
    (tmp_path / "runs/demo/unet/tracking/sent.json").write_bytes(content)
    assert Sent.read(tmp_path / "runs/demo/unet") == Sent()
    tracker.close("FINISHED")


def test_credentials_are_taken_out_of_any_url() -> None:
    said = "postgresql+psycopg2://user:p%40ss@db:5432/mlflow and https://token@host, but me@example.org stays"
    assert (
        without_credentials(said)
        == "postgresql+psycopg2://***@db:5432/mlflow and https://***@host, but me@example.org stays"
    )
    signed = "https://host/a.tar?key=secret 'postgresql://me:b@d@db/mlflow?sslmode=require'"
    assert without_credentials(signed, queries=True) == "https://host/a.tar?*** 'postgresql://***@db/mlflow?***'"
    assert without_credentials(signed).endswith("'postgresql://***@db/mlflow?sslmode=require'")
    for said in ("postgresql://me:pa/ss@host/db", "postgresql://***@host/db"):
        assert without_credentials(said) == "postgresql://***@host/db"
    assert (
        without_credentials("postgresql://host/db?user=me&password=b@d/x")
        == "postgresql://host/db?user=me&password=***"
    )
    assert without_credentials('http://host:80/a and me@b, \'{"a":"http://host:80/a","b":"me@b"}\'').count("***") == 0


def test_the_store_gets_a_curve_that_thins_out_as_a_function_of_the_update_alone() -> None:
    expected = [*range(1, 11), *range(12, 21, 2), *range(25, 51, 5), *range(60, 101, 10), *range(120, 201, 20)]
    assert [update for update in range(1, 201) if is_sent(update, density=10)] == expected
    assert all(is_sent(update, density=0) for update in range(1, 2000))
    assert sum(is_sent(update, density=1000) for update in range(1, 1_000_001)) == 1000 + 3 * 1600
    assert all(is_sent(update, density=1000) for update in range(100, 50_001, 100))  # metrics of a flush stand at these


def test_a_record_is_sent_without_what_is_thinned_and_what_only_one_rank_measured() -> None:
    record = {"update": 2001, "batch": 2001, "time": 1e9, "train/loss": 0.5, "perf/mfu": 0.4, "perf/wait/rank_3": 1.0}
    assert [metric.name for metric in metrics_of(record)] == ["train/loss", "perf/mfu"]
    assert [metric.name for metric in metrics_of(record, density=1000)] == ["perf/mfu"]
    [load] = metrics_of({"time": 1_000_090.5, "system/node1/cpu_utilization_percentage": 50.0}, started=1e6)
    assert (load.step, load.milliseconds) == (90, 1_000_090_500)
