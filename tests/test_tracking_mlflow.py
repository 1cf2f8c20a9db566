"""Tracking against a real `mlflow server`, behind a TCP proxy that delays, refuses, swallows and lies."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from clocks import FOREVER_SECONDS, quietest_round, seconds_of
from conftest import start_ranks
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.numpy import save_file
from tiny_training import Recipe, Tiny

from pipelines.runtime.tracking.mlflow_store import CLIENT_SETTINGS, MlflowStore
from pipelines.runtime.tracking.spool import METRICS, SENT_FILE
from pipelines.runtime.tracking.tracker import Tracker, open_tracker
from pipelines.tools import sync
from pipelines.tools.benchmarks.paired_timing import Ratio

FAULTS = ("refuse", "blackhole", "slow", "503")
TURNS, TURN_STEPS = 320, 20
REPOSITORY = Path(__file__).parents[1]
os.environ.update(CLIENT_SETTINGS, MLFLOW_HTTP_REQUEST_TIMEOUT="30")  # for a machine that does much else


class FaultProxy:
    """Hands connections on to ``upstream`` in the ``mode`` of the moment: pass, refuse, blackhole, slow or 503."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.mode = "pass"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.mode == "refuse":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset, not an end
                return
            with socket.create_connection(("127.0.0.1", self.upstream)) as server:
                threading.Thread(target=self._copy, args=(server, client), daemon=True).start()
                self._copy(client, server)

    def _copy(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while payload := source.recv(1 << 16):
                while self.mode == "blackhole":
                    time.sleep(0.05)
                if self.mode == "slow":
                    time.sleep(0.3)
                if self.mode == "503":
                    source.sendall(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    break
                sink.sendall(payload)
            sink.shutdown(socket.SHUT_RDWR)


class MlflowServer:
    """A server process that can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        uri, artifacts = f"sqlite:///{self.folder}/server.db", str(self.folder / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
        command += ["--artifacts-destination", artifacts, "--port", str(self.port), "--workers", "1"]
        with open(self.folder / "server.log", "ab") as log:
            environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5),
            ):
                return
            time.sleep(0.1)
        raise RuntimeError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow server"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def proxy(server: MlflowServer) -> FaultProxy:
    return FaultProxy(server.port)


def start(root: Path, uri: str, *, stage: str = "train_unet", params: dict | None = None) -> Tracker:
    return open_tracker(
        folder=root / stage.removeprefix("train_"),
        root=root,
        stage=stage,
        experiment="tests",
        tracking_uri=uri,
        params=params or {"optim": {"peak_lr": 1e-3}},
        tags={"code_version": "1.2.3"},
        config_file=None,
    )


def log_updates(tracker: Tracker, first: int, last: int) -> None:
    tracker.log_records(
        [{"update": n, "batch": n, "time": 1e9 + n, "train/loss": 1 / n} for n in range(first, last + 1)]
    )


def mlflow_run(root: Path, uri: str, stage: str = "unet"):
    client = MlflowClient(tracking_uri=uri)
    return client, client.get_run(json.loads((root / stage / "run.json").read_text())["mlflow_run_id"])


def losses(root: Path, uri: str) -> list[tuple[int, float]]:
    client, run = mlflow_run(root, uri)
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss")]


def curve(last: int) -> list[tuple[int, float]]:
    """What the server has of the losses of `log_updates` up to update ``last``: all, then ever fewer."""
    sent = [*range(1, 1001), *range(1002, 2001, 2), *range(2005, 5001, 5), *range(5010, 10_001, 10)]
    return [(n, 1 / n) for n in sent if n <= last]


def test_everything_that_a_stage_logs_arrives_once(
    tmp_path: Path, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs" / "demo"
    tracker = start(root, proxy.uri, params={"network": {"channels": [32, 64]}, "conditioners": [{"kind": "class"}]})
    folder = root / "unet"
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, folder / "unet.safetensors")
    (folder / "manifest.json").write_text('{"content": {}}')
    tracker.log_input("latents", digest="ab" * 32, source="runs/demo/latents", context="training")
    for step in (10, 20):
        Image.new("L", (64, 32), step).save(folder / "grid.png")
        for _ in range(2):  # a replay brings it again
            tracker.log_image("samples/guidance 2", folder / "grid.png", step=step)
    log_updates(tracker, 1, 1500)  # more than one request takes
    tracker.log_metrics({"val/loss": 0.25, "val/odd": float("nan"), "eval/accuracy": 0.9}, step=1500)
    tracker.log_artifact(folder / "manifest.json", "provenance")
    tracker.log_model("unet", folder)
    tracker.set_tags({"digest.unet": "cd" * 32})
    tracker.close("FINISHED", wait_seconds=150)

    def law() -> None:
        client, run = mlflow_run(root, proxy.uri)
        assert losses(root, proxy.uri) == curve(1500)
        assert run.info.status == "FINISHED"
        assert run.info.run_name == "demo/unet"
        assert run.data.metrics["val/loss"] == 0.25
        assert np.isnan(run.data.metrics["val/odd"])
        assert run.data.params == {"network.channels": "[32, 64]", "conditioners.0.kind": "class"}
        assert run.data.tags["stage"] == "train_unet"
        assert run.data.tags["digest.unet"] == "cd" * 32
        parent = client.get_run(run.data.tags["mlflow.parentRunId"])
        assert (parent.info.run_name, parent.info.status) == ("demo", "FINISHED")
        assert parent.data.metrics == {"eval/accuracy": 0.9}  # the pipeline's own row shows its result
        assert not parent.data.params  # nothing that stands on its stages
        [data] = [given.dataset for given in run.inputs.dataset_inputs]
        assert (data.name, data.digest) == ("latents", "ab" * 6)
        assert json.loads(data.source) == {"uri": "runs/demo/latents", "digest": "ab" * 32}
        images = sorted(entry.path for entry in client.list_artifacts(run.info.run_id, "images"))
        assert [name.split("+")[:3] for name in images if name.endswith(".png")] == [
            ["images/samples~guidance 2", "step", step] for step in ("10", "20")
        ]
        assert len(images) == 4  # each with its preview
        shown = client.download_artifacts(run.info.run_id, next(n for n in images if "+20+" in n and ".png" in n))
        assert np.asarray(Image.open(shown)).max() == 20  # the picture of that step, though the file was drawn over
        assert [entry.path for entry in client.list_artifacts(run.info.run_id, "provenance")] == [
            "provenance/manifest.json"
        ]
        [model] = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
        assert (model.name, str(model.status)) == ("demo-unet", "READY")
        assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]

    law()
    (folder / "tracking" / "sent.json").unlink()  # as if the sender had died before it could remember anything
    assert sync.main([str(root), "--tracking-uri", proxy.uri]) == 0
    law()
    info = mlflow_run(root, proxy.uri)[1].info
    page = f"{proxy.uri}/#/experiments/{info.experiment_id}/runs/{info.run_id}?workflowType=machine_learning"
    assert f"sent to {page}\n" in capsys.readouterr().out


# Each has a sender of its own, which imports MLflow. Those that hang and that answer come always.
@pytest.mark.parametrize("faults", [("blackhole", "503"), pytest.param(("refuse", "slow"), marks=pytest.mark.soak)])
def test_a_sick_server_costs_the_step_nothing_and_loses_nothing(
    faults: tuple[str, ...], tmp_path: Path, server: MlflowServer
) -> None:
    proxies = {fault: FaultProxy(server.port) for fault in faults}
    trackers = {fault: start(tmp_path / fault, proxy.uri) for fault, proxy in proxies.items()}
    for fault, tracker in trackers.items():
        log_updates(tracker, 1, 50)
        wait_until(
            lambda fault=fault: METRICS in json.loads((tmp_path / fault / "unet" / SENT_FILE).read_text())["offsets"]
        )

    for fault, proxy in proxies.items():
        proxy.mode = fault
    numbers: dict[str, Iterator[int]] = {}
    for fault, tracker in trackers.items():
        numbers[fault] = itertools.count(51)

        def logging(tracker: Tracker = tracker, numbers: Iterator[int] = numbers[fault]) -> list[float]:
            seconds = []
            for n in itertools.islice(numbers, 250):
                seconds.append(seconds_of(lambda: log_updates(tracker, n, n)))  # noqa: B023 (called at once)
                time.sleep(0.002)
            return seconds

        seconds = quietest_round(logging, limit=5e-3)
        assert np.median(seconds) < 200e-6, fault  # the quickest answer of a server takes several times as long
        assert max(seconds) < 5e-3, fault

    def close(tracker: Tracker) -> float:
        began = time.monotonic()
        tracker.close("FINISHED", wait_seconds=2)
        return time.monotonic() - began

    with ThreadPoolExecutor(len(faults)) as pool:
        # The sender of a server that hangs never ends by itself; a busy machine needs a while to start and end threads.
        assert max(pool.map(close, trackers.values())) < 30
    for fault, proxy in proxies.items():
        proxy.mode = "pass"
        root = tmp_path / fault
        assert sync.main([str(root)]) == 0
        assert losses(root, proxy.uri) == curve(next(numbers[fault]) - 1), fault
        assert mlflow_run(root, proxy.uri)[1].info.status == "FINISHED"


def test_a_server_killed_in_mid_run_gets_everything_when_it_is_back(tmp_path: Path, server: MlflowServer) -> None:
    proxy = FaultProxy(server.port)
    check_restarts(tmp_path / "demo", server, proxy, restarts=1)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_server_killed_twenty_times_gets_everything_once(tmp_path: Path, server: MlflowServer) -> None:
    proxy = FaultProxy(server.port)
    check_restarts(tmp_path / "demo", server, proxy, restarts=20)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_steps_take_as_long_with_a_sick_server_as_with_a_healthy_one(tmp_path: Path, server: MlflowServer) -> None:
    """One training, its server sick and healthy by turns; the control compares healthy turns with healthy ones."""
    proxy, root = FaultProxy(server.port), tmp_path / "demo"
    config = {
        **{"updates": TURNS * TURN_STEPS, "log_every": 5, "images_per_device": 1, "replica_check_every": 0},
        **{"validate_every": 1_000_000, "checkpoint": {"every_updates": 1_000_000}},
    }
    tracker = start(root, proxy.uri)
    tiny = Tiny(root / "unet", Recipe(config=config), tracker=tracker)
    modes = [mode for turn in range(TURNS // 4) for mode in ("pass", FAULTS[turn % len(FAULTS)], "pass", "pass")]
    marks = [time.perf_counter()]

    def validate(update: int) -> None:
        marks.append(time.perf_counter())
        proxy.mode = modes[min(update // TURN_STEPS, TURNS - 1)]

    tiny.after_update = validate
    tiny.run()
    proxy.mode = "blackhole"
    began = time.monotonic()
    tracker.close("FINISHED")
    seconds = time.monotonic() - began
    # The first steps of a turn are left out: the sender still has the answers of the last one.
    turns = np.diff(marks).reshape(TURNS // 4, 4, TURN_STEPS)[..., 2:]
    healthy, sick, *others = np.moveaxis(np.median(turns, axis=-1), 1, 0)
    ratio, control = Ratio.of(list(sick / healthy)), Ratio.of(list(others[0] / others[1]))
    print(f"steps of {1e3 * np.median(turns):.2f} ms; sick / healthy {ratio}, control {control}; exit {seconds:.1f} s")
    assert ratio.median <= 1.02 + abs(control.median - 1)
    assert seconds < 10
    proxy.mode = "pass"
    assert sync.main([str(root)]) == 0
    assert [step for step, _ in losses(root, proxy.uri)] == [step for step, _ in curve(TURNS * TURN_STEPS)]


def check_restarts(root: Path, server: MlflowServer, proxy: FaultProxy, *, restarts: int) -> None:
    tracker = start(root, proxy.uri)
    for restart in range(restarts):
        log_updates(tracker, 200 * restart + 1, 200 * restart + 100)
        wait_until(lambda: METRICS in json.loads((root / "unet" / SENT_FILE).read_text())["offsets"])
        server.kill()
        log_updates(tracker, 200 * restart + 101, 200 * restart + 200)
        server.start()
    tracker.close("FINISHED")
    sync.main([str(root)])
    assert losses(root, proxy.uri) == curve(200 * restarts)


STAGE = """
import time
from pathlib import Path
from pipelines.runtime.tracking.tracker import open_tracker
root = Path({root!r})
tracker = open_tracker(
    folder=root / "unet", root=root, stage="train_unet", experiment="tests",
    tracking_uri={uri!r}, params={{}}, tags={{}},
)
tracker.resume_after({checkpoint})
tracker.log_records(
    [{{"update": n, "time": 1e9 + n, "train/loss": 1 / n}} for n in range({checkpoint} + 1, {last} + 1)]
)
tracker.flush()
if {ends}:
    tracker.close("FINISHED")
else:
    print("logged", flush=True)
    time.sleep(60)
"""


def run_stage(root: Path, uri: str, *, checkpoint: int, last: int, ends: bool) -> subprocess.Popen[str]:
    """Run a stage in a process of its own; return when it is over or has logged everything and hangs."""
    code = STAGE.format(root=str(root), uri=uri, checkpoint=checkpoint, last=last, ends=ends)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    process.stdout.readline()
    if ends:
        assert process.wait(timeout=FOREVER_SECONDS) == 0
    return process


def wait_until(condition: Callable[[], object], *, seconds: float = FOREVER_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError, MlflowException):
            if condition():
                return
        time.sleep(0.05)
    raise AssertionError("it did not come about in time")


def test_a_killed_stage_is_closed_as_killed_and_its_restart_continues_the_same_run(
    tmp_path: Path, proxy: FaultProxy
) -> None:
    root = tmp_path / "demo"
    stage = run_stage(root, proxy.uri, checkpoint=0, last=100, ends=False)
    wait_until(lambda: len(losses(root, proxy.uri)) == 100)
    first = mlflow_run(root, proxy.uri)[1].info
    assert first.status == "RUNNING"
    [sender] = [child.pid for child in psutil.Process(stage.pid).children()]
    stage.kill()
    stage.wait()
    wait_until(lambda: mlflow_run(root, proxy.uri)[1].info.status == "KILLED")
    wait_until(lambda: not psutil.pid_exists(sender))

    run_stage(root, proxy.uri, checkpoint=70, last=150, ends=True)
    assert sync.main([str(root)]) == 0  # what a busy machine did not send in the seconds that a stage's end waits
    again = mlflow_run(root, proxy.uri)[1].info
    assert (again.run_id, again.status) == (first.run_id, "FINISHED")
    assert losses(root, proxy.uri) == [(n, 1 / n) for n in range(1, 151)]
    lines = [json.loads(line)["update"] for line in (root / "unet" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 151))


def test_a_run_whose_main_process_is_killed_since_another_rank_failed_is_failed(tmp_path: Path) -> None:
    """As on GPUs, where the main process waits in a collective until the launcher kills it."""
    code = (
        "import json, sys, time\n"
        "from pipelines.runtime.stage.stage import running_stage\n"
        "from pipelines.runtime.training.config import TrainingConfig\n"
        "with running_stage(TrainingConfig.model_validate_json(sys.argv[1]), name='train_unet') as stage:\n"
        "    while not stage.is_main and not (stage.folder / 'fail').exists(): time.sleep(0.05)\n"
        "    if not stage.is_main: raise RuntimeError('out of memory')\n"
        "    time.sleep(600)\n"
    )
    root, uri = tmp_path / "demo", f"sqlite:///{tmp_path}/mlflow.db"
    run = {"root": str(root), "tracking_uri": uri, "threads": 1}
    main, other = start_ranks("-c", code, json.dumps({"updates": 1, "global_batch": 2, "run": run}))
    try:
        wait_until(lambda: json.loads((root / "unet" / "run.json").read_bytes())["mlflow_run_id"])
        assert mlflow_run(root, uri)[1].info.status == "RUNNING"
        (root / "unet" / "fail").touch()
        assert other.wait(timeout=FOREVER_SECONDS) == 1
        assert main.poll() is None
        [sender] = [child.pid for child in psutil.Process(main.pid).children()]
    finally:
        main.kill()
        other.kill()
    wait_until(lambda: not psutil.pid_exists(sender))
    assert sync.main([str(root)]) == 0  # closes it as the sender does, which a busy machine leaves no time for
    assert mlflow_run(root, uri)[1].info.status == "FAILED"


def test_sync_closes_a_run_as_killed_when_stage_and_sender_died_together(tmp_path: Path, proxy: FaultProxy) -> None:
    root = tmp_path / "demo"
    stage = run_stage(root, proxy.uri, checkpoint=0, last=100, ends=False)
    wait_until(lambda: len(losses(root, proxy.uri)) == 100)
    assert sync.main([str(root)]) == 0  # a living run is left to its own sender
    assert mlflow_run(root, proxy.uri)[1].info.status == "RUNNING"
    for process in [*psutil.Process(stage.pid).children(), psutil.Process(stage.pid)]:
        process.kill()
    stage.wait()
    assert mlflow_run(root, proxy.uri)[1].info.status == "RUNNING"
    assert sync.main([str(root)]) == 0
    run = mlflow_run(root, proxy.uri)[1]
    assert run.info.status == "KILLED"
    assert mlflow_run(root, proxy.uri)[0].get_run(run.data.tags["mlflow.parentRunId"]).info.status == "KILLED"


def test_sync_follows_an_offline_run_until_it_ends(tmp_path: Path, proxy: FaultProxy) -> None:
    root = tmp_path / "demo"
    stage = run_stage(root, "offline", checkpoint=0, last=100, ends=False)
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(sync.main, [str(root), "--tracking-uri", proxy.uri, "--follow"])
        wait_until(lambda: len(losses(root, proxy.uri)) == 100)
        assert mlflow_run(root, proxy.uri)[1].info.status == "RUNNING"
        assert not followed.done()
        stage.kill()
        stage.wait()
        assert followed.result(timeout=FOREVER_SECONDS) == 0
    assert mlflow_run(root, proxy.uri)[1].info.status == "KILLED"


def test_a_lost_store_is_filled_again_from_the_run_itself(tmp_path: Path, proxy: FaultProxy) -> None:
    root = tmp_path / "runs" / "demo"
    tracker = start(root, "offline")
    log_updates(tracker, 1, 50)
    tracker.close("FAILED")
    assert sync.main([str(root)]) == 2  # it names no store
    assert sync.main([str(root), "--tracking-uri", proxy.uri]) == 0
    lost = mlflow_run(root, proxy.uri)[1].info.run_id
    mlflow_run(root, proxy.uri)[0].delete_run(lost)
    assert sync.main([str(root), "--tracking-uri", proxy.uri]) == 0
    found = mlflow_run(root, proxy.uri)[1].info
    assert found.run_id != lost
    assert found.status == "FAILED"
    assert losses(root, proxy.uri) == [(n, 1 / n) for n in range(1, 51)]


def test_a_parameter_changed_on_resume_becomes_a_tag_and_a_lost_or_broken_file_is_counted(
    tmp_path: Path, proxy: FaultProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "demo"
    start(root, "offline", params={"peak_lr": 1e-3, "seed": 1}).close("KILLED")
    tracker = start(root, "offline", params={"peak_lr": 2e-3, "seed": 1})
    tracker.log_artifact(root / "never-written.json")
    (root / "no.png").write_text("no picture")
    tracker.log_image("val/samples", root / "no.png", step=1)
    log_updates(tracker, 1, 3)
    tracker.close("FINISHED")
    assert sync.main([str(root), "--tracking-uri", proxy.uri]) == 0
    run = mlflow_run(root, proxy.uri)[1]
    assert run.data.params == {"peak_lr": "0.001", "seed": "1"}
    assert {key: value for key, value in run.data.tags.items() if "changed" in key} == {"changed.peak_lr": "0.002"}
    assert len(losses(root, proxy.uri)) == 3
    assert "2 metrics or events refused" in capsys.readouterr().out
    assert "never-written.json" in (root / "unet" / "tracking" / "refused.log").read_text()


def test_what_killed_makers_of_a_database_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [tmp_path / f".mlflow.db.12-ab.tmp{end}" for end in ("", "-journal")]
    others = [tmp_path / name for name in (".mine.tmp", ".other.db.12-ab.tmp", "mlflow.db.old")]
    for path in (*left, *others):
        path.write_text("half")
    MlflowStore(f"sqlite:///{tmp_path}/mlflow.db").tag_experiment("tests", "key", "value")
    assert not [path for path in left if path.exists()]
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlartifacts", *(path.name for path in others)}


def test_stages_that_are_sent_at_once_share_one_parent(tmp_path: Path, proxy: FaultProxy) -> None:
    root = tmp_path / "demo"
    stages = ("one", "two", "three", "four")
    for stage in stages:
        start(root, "offline", stage=stage).close("FINISHED")
    with ThreadPoolExecutor(len(stages)) as pool:
        commands = [[str(root / stage), "--tracking-uri", proxy.uri] for stage in stages]
        assert list(pool.map(sync.main, commands)) == [0] * len(stages)
    assert len({mlflow_run(root, proxy.uri, stage)[1].data.tags["mlflow.parentRunId"] for stage in stages}) == 1


def test_a_further_evaluation_leaves_the_pipelines_result_alone(tmp_path: Path, proxy: FaultProxy) -> None:
    root = tmp_path / "demo"
    for stage, accuracy in (("evaluation", 0.9), ("evaluation-cold", 0.5)):
        tracker = start(root, "offline", stage=stage)
        tracker.log_metrics({"eval/accuracy": accuracy}, step=0)
        tracker.close("FINISHED")
    assert sync.main([str(root), "--tracking-uri", proxy.uri]) == 0
    client, run = mlflow_run(root, proxy.uri, "evaluation-cold")
    assert run.data.metrics["eval/accuracy"] == 0.5
    history = client.get_metric_history(run.data.tags["mlflow.parentRunId"], "eval/accuracy")
    assert [point.value for point in history] == [0.9]


def test_the_pipeline_is_in_the_state_of_the_stage_that_spoke_last(tmp_path: Path, proxy: FaultProxy) -> None:
    root = tmp_path / "demo"
    for stage, status in (("train_vae", "FINISHED"), ("encode", "FINISHED"), ("train_unet", "FAILED")):
        start(root, "offline", stage=stage).close(status)
    for stage in ("unet", "encode", "vae"):  # sent in another order than they ran in
        assert sync.main([str(root / stage), "--tracking-uri", proxy.uri]) == 0
    client, run = mlflow_run(root, proxy.uri, "vae")
    assert run.info.status == "FINISHED"
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert (parent.info.status, parent.info.end_time) == ("FAILED", mlflow_run(root, proxy.uri)[1].info.end_time)
