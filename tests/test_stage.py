"""Laws of a stage's frame: what counts as the same request, and what a shared folder refuses."""

import contextlib
import copy
import errno
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPOSITORY, SMOKE, environment, run_here, run_stage, start_ranks, start_warm, wait_until
from manifests import commit_latents, commit_unet

from data.files import FolderLock, write_atomically
from pipelines.encode_latents import EncodeLatentsConfig
from pipelines.model.grids import grid_png
from pipelines.runtime.config.errors import ConfigError, Stopped, config_error_at
from pipelines.runtime.config.outcome import Outcome
from pipelines.runtime.config.stage_config import StageConfig
from pipelines.runtime.stage.fingerprint import (
    already_done,
    begin,
    differing_keys,
    fingerprint_of,
    ignored_values,
    keys_at_default,
)
from pipelines.runtime.stage.launch import StopSignal
from pipelines.runtime.stage.leases import Leases
from pipelines.runtime.stage.stage import Stage, running_stage
from pipelines.runtime.tracking.spool import EVENTS, read_spool
from pipelines.runtime.training.config import TrainingConfig
from pipelines.train_unet import TrainUNetConfig


def request(**config: object) -> dict[str, object]:
    return {"stage": "train_unet", "config": {"seed": 0, "optim": {"peak_lr": 1.0}, **config}, "parents": {"vae": "a"}}


def test_differences_are_named_by_dotted_key_with_both_values() -> None:
    now = request(seed=1, list=[{"a": 1}])
    assert differing_keys(request(), now) == [
        ("list.0.a", "list.0.a: was absent, is now 1"),
        ("seed", "seed: was 0, is now 1"),
    ]
    assert differing_keys(request(), {**request(), "parents": {"vae": "b"}})[0][0] == "parents.vae"
    # An input that an older version did not know leaves what is finished as it is; a guide makes other samples.
    assert differing_keys(request(), {**request(), "parents": {"vae": "a", "latents": "b"}}) == []
    assert differing_keys(request(), {**request(), "parents": {"vae": "a", "guide": "b"}})[0][0] == "parents.guide"


def test_an_unfinished_stage_continues_only_the_same_request(tmp_path: Path) -> None:
    assert not already_done(tmp_path, request(), allowed=())
    (tmp_path / "request.json").write_text(json.dumps(request()))
    assert not already_done(tmp_path, request(), allowed=())
    with pytest.raises(ConfigError, match=r"begun with another request:\n    seed: was 0, is now 1\n.*--allow-changed"):
        already_done(tmp_path, request(seed=1), allowed=())
    assert not already_done(tmp_path, request(seed=1), allowed=("seed",))


def test_a_finished_stage_is_done_for_the_same_request_and_no_other(tmp_path: Path) -> None:
    commit_unet(tmp_path, request())
    assert already_done(tmp_path, request(), allowed=())
    with pytest.raises(ConfigError, match="finished with another request"):
        already_done(tmp_path, request(seed=1), allowed=("seed",))


def training_config(root: Path, **changes: object) -> TrainingConfig:
    given = {"updates": 4, "global_batch": 2, "run": {"root": str(root)}, **changes}
    return TrainingConfig.model_validate_json(json.dumps(given))


def test_a_harmless_change_is_accepted_on_resume_and_told(tmp_path: Path) -> None:
    configs = [
        training_config(tmp_path),
        training_config(tmp_path, log_every=7, on_bad_update={"policy": "skip"}, seed=3),
    ]
    requests = [fingerprint_of("train_unet", config, {}) for config in configs]
    assert begin(tmp_path, requests[0], fingerprint_ignores=ignored_values(configs[0])) == []
    assert not already_done(
        tmp_path, requests[1], allowed=("seed",), fingerprint_ignores=TrainingConfig.fingerprint_ignores
    )
    assert begin(tmp_path, requests[1], fingerprint_ignores=ignored_values(configs[1])) == [
        "seed: was 0, is now 3",
        "log_every: was 50, is now 7",
        "on_bad_update.policy: was stop, is now skip",
    ]
    assert begin(tmp_path, requests[1], fingerprint_ignores=ignored_values(configs[1])) == []
    spiky = training_config(tmp_path, seed=3, on_bad_update={"spike_factor": 5.0})
    with pytest.raises(ConfigError, match=r"on_bad_update.spike_factor: was 0.0, is now 5.0\n  Change it back"):
        already_done(tmp_path, fingerprint_of("train_unet", spiky, {}), allowed=("seed",))


def test_what_an_older_version_took_for_a_difference_is_none(tmp_path: Path) -> None:
    config = training_config(tmp_path)
    older = fingerprint_of("train_unet", config, {})
    older["config"]["on_bad_update"]["policy"] = "stop"
    commit_unet(tmp_path, older)
    assert already_done(
        tmp_path, fingerprint_of("train_unet", config, {}), allowed=(), fingerprint_ignores=config.fingerprint_ignores
    )


def test_a_finished_training_is_unfinished_when_more_updates_are_allowed(tmp_path: Path) -> None:
    commit_unet(tmp_path, request(updates=4))
    with pytest.raises(ConfigError, match=r"updates: was 4, is now 8\n.*give a larger --updates with --allow-changed"):
        already_done(tmp_path, request(updates=8), allowed=())
    assert not already_done(tmp_path, request(updates=8), allowed=("updates",))
    assert already_done(tmp_path, request(updates=4), allowed=("updates",))
    assert not already_done(tmp_path, request(updates=8, seed=1), allowed=("updates", "seed"))
    for changes, allowed in (({"updates": 3}, ("updates",)), ({"updates": 8, "seed": 1}, ("updates",))):
        with pytest.raises(ConfigError, match="was finished|was begun"):
            already_done(tmp_path, request(**changes), allowed=allowed)
    with pytest.raises(ConfigError, match="since then noise is another"):
        already_done(tmp_path, request(updates=8), allowed=("updates",), revisions=("noise is another",))


def test_a_key_that_an_older_version_did_not_know_is_no_difference_at_its_default(tmp_path: Path) -> None:
    def is_done(**changes: object) -> bool:
        config = training_config(tmp_path, **changes)
        now = fingerprint_of("train_unet", config, {})
        return already_done(tmp_path, now, allowed=(), at_default=keys_at_default(config))

    older = fingerprint_of("train_unet", training_config(tmp_path), {})
    del older["config"]["tf32"], older["config"]["optim"]["rate"]
    commit_unet(tmp_path, older)
    assert is_done()
    with pytest.raises(ConfigError, match="tf32: was absent, is now False"):
        is_done(tf32=False)
    with pytest.raises(ConfigError, match=r"optim.rate.reference: was absent, is now 70000"):
        is_done(optim={"rate": {"kind": "inverse_sqrt"}})
    with pytest.raises(ConfigError, match=r"averages.1.decay: was absent, is now"):
        is_done(averages=[{"kind": "exponential"}, {"kind": "exponential"}])


def test_what_another_version_began_is_not_continued_in_silence_and_what_it_finished_stands(tmp_path: Path) -> None:
    begun, done = tmp_path / "begun", tmp_path / "done"
    begun.mkdir()
    begin(begun, request(), fingerprint_ignores={})
    revisions = ("JPEGs are cropped elsewhere",)
    with pytest.raises(ConfigError, match="an older version began it; since then JPEGs are cropped elsewhere"):
        already_done(begun, request(), allowed=(), revisions=revisions)
    assert not already_done(begun, request(), allowed=("revisions",), revisions=revisions)
    assert begin(begun, request(), fingerprint_ignores={}, revisions=revisions) == [
        "revisions: an older version began it; since then JPEGs are cropped elsewhere"
    ]
    assert not already_done(begun, request(), allowed=(), revisions=revisions)
    # The lists of several parts of the code are joined, so that a new change may come anywhere.
    with pytest.raises(ConfigError) as refusal:
        already_done(begun, request(), allowed=(), revisions=("losses are weighted", *revisions))
    assert "since then losses are weighted" in str(refusal.value)
    assert "JPEGs" not in str(refusal.value)
    with pytest.raises(ConfigError, match="a newer version of Latentline began it"):
        already_done(begun, request(), allowed=(), revisions=())
    commit_unet(done, request())
    assert already_done(done, request(), allowed=(), revisions=revisions)


PRETRAINED = {"kind": "pretrained", "folder": "t5"}
COUNTS = {"updates": 1, "global_batch": 1}


@pytest.mark.parametrize(
    ("model", "given", "key", "before"),
    [
        (
            TrainUNetConfig,
            {**COUNTS, "denoiser": {"conditioners": ({"kind": "class"}, {"kind": "text"})}},
            "denoiser.joint_drop_probability",
            0.0,
        ),
        (EncodeLatentsConfig, {"captions": {**PRETRAINED, "padding": "masked"}}, "captions.pooled", "own"),
        (EncodeLatentsConfig, {"captions": {**PRETRAINED, "pooled": "own"}}, "captions.padding", "masked"),
        (
            TrainUNetConfig,
            {**COUNTS, "denoiser": {"conditioners": ({"kind": "text", "encoder": {**PRETRAINED, "pooled": "own"}},)}},
            "denoiser.conditioners.0.encoder.padding",
            "masked",
        ),
    ],
)
def test_a_key_that_an_older_version_lacked_stands_for_what_that_version_did(
    model: type[StageConfig], given: dict, key: str, before: object, tmp_path: Path
) -> None:
    """What it began is not continued in silence, and goes on with that value."""
    stage, parent = ("train_unet", "latents") if model is TrainUNetConfig else ("encode_latents", "corpus")
    now = fingerprint_of(stage, model.model_validate({**given, "inputs": {parent: "", "vae": ""}}), {})

    def leaf(request: dict) -> tuple[dict, str]:
        *tables, last = key.split(".")
        return reduce(lambda tree, part: tree[int(part) if part.isdigit() else part], tables, request["config"]), last

    older, as_before = copy.deepcopy(now), copy.deepcopy(now)
    table, last = leaf(older)
    del table[last]
    begin(tmp_path, older, fingerprint_ignores={})
    with pytest.raises(ConfigError, match=rf"{key}: was {before}, is now (auto|0.1)\n  Change it back"):
        already_done(tmp_path, now, allowed=())
    table, last = leaf(as_before)
    table[last] = before
    assert not already_done(tmp_path, as_before, allowed=())


def test_one_condition_and_a_text_encoder_by_itself_are_the_work_of_before(tmp_path: Path) -> None:
    text = {"kind": "text", "encoder": {"kind": "minilm"}}
    given = {**COUNTS, "inputs": {"latents": "", "vae": ""}, "denoiser": {"conditioners": (text,)}}
    now = fingerprint_of("train_unet", TrainUNetConfig.model_validate(given), {})
    older = copy.deepcopy(now)
    del older["config"]["denoiser"]["joint_drop_probability"]
    del older["config"]["denoiser"]["conditioners"][0]["name"]
    begin(tmp_path, older, fingerprint_ignores={})
    assert not already_done(tmp_path, now, allowed=())


def test_a_folder_with_old_names_of_keys_is_the_same_work(tmp_path: Path) -> None:
    config = training_config(tmp_path, validate_every=7)
    now, ignored = fingerprint_of("train_unet", config, {}), ignored_values(config)
    was = {**now, "config": {**now["config"], "panel_every": 7, "panel": {"rows": 2}}}
    names = {"validate_every": "panel_every", "replica_check_every": "self_test_every"}
    harmless = {names.get(key, key): value for key, value in ignored.items()}
    (tmp_path / "request.json").write_text(json.dumps({**was, "harmless": harmless}))
    ignores = config.fingerprint_ignores | {"grid"}
    assert differing_keys(was, now, fingerprint_ignores=ignores) == []
    assert not already_done(tmp_path, now, allowed=(), fingerprint_ignores=ignores)
    again = {**now, "config": {**now["config"], "validate_every": 7, "grid": {"rows": 2}}}
    assert begin(tmp_path, again, fingerprint_ignores=ignored) == []
    commit_unet(tmp_path, was)
    assert already_done(tmp_path, now, allowed=(), fingerprint_ignores=ignores)


def test_a_finished_stage_is_done_though_what_it_started_from_is_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training_config(tmp_path)
    commit_unet(tmp_path / "unet", fingerprint_of("train_unet", config, {}))

    def check(parents: object) -> None:
        raise ConfigError("start.folder is gone")

    with pytest.raises(SystemExit) as end, running_stage(config, name="train_unet", check=check):
        pass
    assert end.value.code == 0
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "state", "code", "reason"),
    [
        (ConfigError("inputs.corpus: not there"), "failed", 2, "inputs.corpus: not there"),
        (RuntimeError("out of memory"), "failed", 1, "RuntimeError: out of memory"),
        (Stopped("SIGTERM"), "stopped", 75, "SIGTERM"),
        (OSError("https://me:pass@host/a?key=1 is gone"), "failed", 1, "https://***@host/a?*** is gone"),
        (None, "done", 0, ""),
    ],
)
def test_the_outcome_of_a_stage_says_why(
    error: Exception | None, state: str, code: int, reason: str, tmp_path: Path
) -> None:
    config = training_config(tmp_path, run={"root": str(tmp_path), "tracking_uri": "offline"})
    with contextlib.suppress(SystemExit), running_stage(config, name="train_unet"):
        if error is not None:
            raise error
    outcome = json.loads((tmp_path / "unet" / "outcome.json").read_bytes())
    assert (outcome["state"], outcome["exit_code"], outcome["reason"]) == (state, code, reason)
    events = [event for _, event in read_spool(tmp_path / "unet" / EVENTS, start=0)]
    assert [event["tags"]["outcome"] for event in events if "outcome" in event.get("tags", {})] == [reason or state]


def test_the_version_is_gits_only_where_the_work_tree_is_ours(tmp_path: Path) -> None:
    user, packages = tmp_path / "user", tmp_path / "user" / ".venv" / "packages"
    for package in ("pipelines", "models", "data"):
        shutil.copytree(REPOSITORY / package, packages / package, ignore=shutil.ignore_patterns("__pycache__"))

    def git(folder: Path, *words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=b", *words]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    program = (
        "import sys\nfrom pipelines.runtime.stage.provenance import code_version\n"
        "for line in sys.stdin: print(code_version.__wrapped__(), flush=True)"
    )
    asker = subprocess.Popen(
        [sys.executable, "-B", "-c", program],
        # As a hook of the user's repository would start it.
        env=environment(PYTHONPATH=str(packages), GIT_DIR=str(user / ".git")),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert asker.stdin is not None
    assert asker.stdout is not None

    def version() -> str:
        asker.stdin.write("?\n")
        return asker.stdout.readline().strip()

    with asker:
        for folder, named in ((user, False), (packages, True)):
            git(folder, "init")
            git(folder, "add", "--all")
            git(folder, "commit", "-m", "first")
            assert (version() == git(folder, "rev-parse", "HEAD")) == named
        with open(packages / "pipelines" / "evaluate.py", "a") as file:
            file.write("\n")
        assert version() == git(packages, "rev-parse", "HEAD") + "+changes"


def test_a_mistake_below_is_blamed_on_the_key_that_mends_it() -> None:
    with pytest.raises(ConfigError, match=r"^inputs\.corpus: no such shard$"), config_error_at("inputs.corpus"):
        raise ValueError("no such shard")


def test_where_and_how_a_run_happens_does_not_change_its_digest(tmp_path: Path) -> None:
    digests = []
    for name, words in (("a", ()), ("b", ("--run.experiment", "other", "--bad_samples", "quarantine"))):
        done = run_stage("prepare_corpus", "--run.root", str(tmp_path / name), *words)
        assert done.returncode == 0, done.stderr
        digests.append(json.loads((tmp_path / name / "corpus" / "manifest.json").read_bytes())["content"])
    assert digests[0] == digests[1]


def test_a_folder_in_use_is_refused_with_its_owners_name(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom data.files import FolderLock\n"
        "FolderLock(sys.argv[1]).acquire(); print('locked', flush=True); time.sleep(60)\n"
    )
    folder = tmp_path / "corpus"
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    owner.stdout.readline()
    try:
        code = (
            "import pipelines.runtime.stage.stage as s; s.LOCK_PATIENCE_SECONDS = 0.2\n"
            "import pipelines.prepare_corpus as p; p.main()"
        )
        second = start_warm("-c", code, "--config", str(SMOKE), "--run.root", str(tmp_path))
        _, said = second.communicate(timeout=120)
    finally:
        owner.kill()
        owner.wait()
    assert second.returncode == 2
    assert f"is in use by process {owner.pid}" in said
    assert not list(folder.glob("*.tar"))


def test_the_file_stop_ends_a_stage_as_resumable(tmp_path: Path) -> None:
    words = ("--run.root", str(tmp_path), "--samples_per_shard", "4", "--run.tracking_uri", "offline")
    process = start_warm("-m", "pipelines.prepare_corpus", "--config", str(SMOKE), *words)
    folder = tmp_path / "corpus"
    while not list(folder.glob("parts/*.json")):
        assert process.poll() is None, "it ended before it could be stopped"
    (folder / "stop").touch()
    assert process.wait(timeout=120) == 75
    assert not (folder / "stop").exists()
    assert not (folder / "manifest.json").exists()
    assert run_stage("prepare_corpus", *words).returncode == 0


def test_a_panel_shows_every_cell_in_its_place() -> None:
    from io import BytesIO

    from PIL import Image

    cells = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 40 + np.zeros((2, 3, 16, 16, 1), dtype=np.uint8)
    picture = np.asarray(Image.open(BytesIO(grid_png(cells, column_labels=("a", "b", "c"), title="t"))).convert("L"))
    for row in range(2):
        for column in range(3):
            patch = picture[44 + 2 + row * 66 : 44 + 66 + row * 66, 2 + column * 66 : 66 + column * 66]
            assert (patch == cells[row, column, 0, 0, 0]).all()


def test_a_password_in_the_tracking_uri_is_written_nowhere(tmp_path: Path) -> None:
    uri = "http://me:hunter2@127.0.0.1:9"
    done = run_stage("prepare_corpus", "--run.root", str(tmp_path), "--run.tracking_uri", uri)
    assert done.returncode == 0, done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.toml" and b"***@127.0.0.1:9" in path.read_bytes() for path in written)
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_mended_samples_are_looked_at_again_and_a_changed_listing_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    for index in range(12):
        folder = tmp_path / "images" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index}.png")
    broken = tmp_path / "images" / "a" / "4.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    words = [
        *("--run.root", str(tmp_path / "run"), "--source.kind", "image_folder", "--source.val_fraction", "0.3"),
        *("--source.path", str(tmp_path / "images"), "--samples_per_shard", "4", "--bad_samples", "quarantine"),
        *("--max_bad_fraction", "0"),
    ]
    done = run_stage("prepare_corpus", *words)
    assert done.returncode == 2
    assert "1 of 12 samples are bad" in done.stderr
    broken.write_bytes(whole)
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a" / "0_early.png")
    done = run_stage("prepare_corpus", *words)
    assert done.returncode == 2
    assert "could be stored twice or not at all" in done.stderr
    (tmp_path / "images" / "a" / "0_early.png").unlink()
    assert run_stage("prepare_corpus", *words).returncode == 0


def test_a_second_start_leaves_the_outcome_of_the_owner_alone(tmp_path: Path) -> None:
    owner = FolderLock(tmp_path)
    owner.acquire()
    Outcome("failed", code=2).write(tmp_path, is_main=True)
    assert not (tmp_path / "outcome.json").exists()
    owner.release()

    first, second = Outcome(working=True), Outcome(working=True)
    first.set("failed", code=2)
    first.write(tmp_path, is_main=False)
    second.set("stopped")
    second.write(tmp_path, is_main=True)
    assert json.loads((tmp_path / "outcome.json").read_bytes())["exit_code"] == 2
    assert (second.state, second.code) == ("failed", 1)


# Folders that cannot be, and what is said of each.
BAD_ROOTS = {
    "file": "lies below {root}, which is no folder.",
    "file/a/b": "lies below {above}/file, which is no folder.",
    "/dev/null/run": "lies below /dev/null, which is no folder.",
    "link to nothing": "{root} is a link to nothing.",
    "link to itself": "Too many levels of symbolic links",
    "x" * 300: "File name too long",
    "read-only": "cannot be written to: its owner or its file system does not allow it.",
}


@pytest.mark.parametrize("stage", ["prepare_corpus", "evaluate"])
@pytest.mark.parametrize("name", BAD_ROOTS)
def test_a_folder_that_cannot_be_made_or_written_to_is_named_first(
    name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / name
    (tmp_path / "file").touch()
    (tmp_path / "link to nothing").symlink_to(tmp_path / "nothing")
    (tmp_path / "link to itself").symlink_to(tmp_path / "link to itself")
    if name == "read-only":  # as it is for all but root, who may be running this
        monkeypatch.setattr("os.access", lambda path, mode: False)
    done = run_here(stage, "--run.root", str(root))
    assert done.returncode == 2
    assert done.stderr.startswith(f"{stage}: run.root: ")
    assert BAD_ROOTS[name].format(root=root, above=tmp_path) in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert len(done.stderr) < 2_000


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EROFS, 1)])
def test_a_disk_that_fails_in_the_work_is_a_sentence_and_the_folder_is_left_whole(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0, device="cpu")
    monkeypatch.setattr("pipelines.runtime.stage.stage.start_accelerator", lambda *_, **__: here)
    config = StageConfig.model_validate({"run": {"root": str(tmp_path), "tracking_uri": "offline"}})
    with pytest.raises(SystemExit) as end, running_stage(config, name="prepare_corpus"):
        write_atomically(tmp_path / "corpus" / "a.tar", b"whole")
        fsync, failed = os.fsync, OSError(number, os.strerror(number))
        monkeypatch.setattr("data.files.os.fsync", lambda _: (_ for _ in ()).throw(failed))
        try:
            write_atomically(tmp_path / "corpus" / "b.tar", b"half")
        finally:
            monkeypatch.setattr("data.files.os.fsync", fsync)
    said = capsys.readouterr().err
    assert end.value.code == code
    assert f"{tmp_path / 'corpus' / 'b.tar'}: {os.strerror(number)}. Nothing committed is lost; once" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "corpus" / "outcome.json").read_bytes())["exit_code"] == code
    assert {path.name for path in (tmp_path / "corpus").glob("*.tar*")} == {"a.tar"}


@pytest.fixture
def runs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[Stage]]:
    """Starts runs of a stage that can be joined, all in this process; ``first`` is done between check and lock."""
    here = SimpleNamespace(is_main_process=True, num_processes=1, process_index=0, device="cpu")
    monkeypatch.setattr(StopSignal, "handling_signals", lambda stop: contextlib.nullcontext())
    monkeypatch.setattr("pipelines.runtime.stage.stage.JOIN_PATIENCE_SECONDS", 0.0)

    def start(first: Callable[[], object] = lambda: None, joinable: bool = True) -> AbstractContextManager[Stage]:
        monkeypatch.setattr("pipelines.runtime.stage.stage.start_accelerator", lambda *_, **__: (first(), here)[1])
        config = StageConfig.model_validate({"run": {"root": str(tmp_path), "tracking_uri": "offline"}})
        return running_stage(config, name="encode_latents", joinable=joinable)

    return start


@pytest.mark.parametrize("owner_first", [True, False])
def test_the_file_stop_stops_all_runs_on_a_folder_and_not_the_next_one(
    owner_first: bool, tmp_path: Path, runs_here: Callable[..., AbstractContextManager[Stage]]
) -> None:
    runs = [runs_here(), runs_here()]
    stages = [run.__enter__() for run in runs]
    file = tmp_path / "latents" / "stop"
    stages[1].stop.request_on_all_ranks()
    assert [stage.stop.requested() for stage in stages] == [False, True], "the ranks of one run are asked"
    file.touch()
    for run, stage in list(zip(runs, stages, strict=True))[:: 1 if owner_first else -1]:
        assert stage.stop.requested()
        with pytest.raises(SystemExit) as end:
            run.__exit__(Stopped, Stopped(stage.stop.reason), None)
        assert end.value.code == 75
    (tmp_path / "latents" / "parts").mkdir()
    with Leases(tmp_path / "latents" / "parts") as leases, leases.lease("a"), runs_here() as stage:
        assert stage.stop.requested(), "another run is still at work, and is to find it"
    with runs_here() as stage:
        assert not stage.stop.requested()
    file.touch()
    os.utime(file, (time.time() + 1, time.time() + 1))
    with runs_here() as stage:
        assert stage.stop.requested(), "it was made for this start"


@pytest.mark.parametrize("at_work", [False, True])
def test_another_request_that_began_between_check_and_lock_is_not_mixed_with(
    at_work: bool, tmp_path: Path, runs_here: Callable[..., AbstractContextManager[Stage]]
) -> None:
    """The other run has ended by then, or is joined; that one takes the lock before it writes what it does."""
    folder, other = tmp_path / "latents", FolderLock(tmp_path / "latents")
    theirs = {"stage": "encode_latents", "config": {"seed": 7}, "parents": {}}

    def begin_another() -> None:
        writes = threading.Timer(0.5, begin, (folder, theirs), {"fingerprint_ignores": {}})
        writes.start()
        other.acquire() if at_work else writes.join()

    with pytest.raises(SystemExit) as end, runs_here(begin_another):
        pytest.fail("it works on another request's folder")
    other.release()
    assert end.value.code == 2
    ((outcome,),) = (list(folder.rglob("outcome.json")),)
    assert "begun with another request:\n    seed: was 7, is now absent" in json.loads(outcome.read_bytes())["reason"]
    assert json.loads((folder / "request.json").read_bytes())["config"] == {"seed": 7}


def test_what_was_finished_between_check_and_lock_is_left_as_it_is(
    tmp_path: Path, runs_here: Callable[..., AbstractContextManager[Stage]]
) -> None:
    finish = partial(commit_latents, tmp_path / "latents", [], config={}, parents={})
    with pytest.raises(SystemExit) as end, runs_here(finish, joinable=False):
        pytest.fail("it works on a finished folder")
    assert end.value.code == 0
    assert json.loads((tmp_path / "latents" / "outcome.json").read_bytes())["state"] == "done"


def test_a_store_that_cannot_be_beside_the_root_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "a?b" / "run"
    done = run_here("prepare_corpus", "--run.root", str(root), "--run.tracking_uri", "auto")
    assert done.returncode == 2
    assert f"run.tracking_uri: The MLflow store {tmp_path}/a?b/mlflow.db would become {tmp_path}/a: " in done.stderr
    assert {path.name for path in (root / "corpus").iterdir()} == {"lock", "outcome.json"}


def test_an_outcome_that_cannot_be_written_hides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for outcome in (Outcome(), Outcome(working=True)):
        outcome.write(tmp_path / "file" / "corpus", is_main=True)
        assert "outcome.json cannot be written: " in capsys.readouterr().err


def test_a_stop_reaches_a_rank_that_is_still_at_a_long_part(tmp_path: Path) -> None:
    """Rank 0 stops at its own border at once; rank 1, slower, must still find the request, and both must end."""
    code = (
        "import os, sys, time\n"
        "import pipelines.prepare_corpus as stage\n"
        "write = stage.write_shard\n"
        "def slow(*words):\n"
        "    if os.environ['RANK'] == '1': time.sleep(4)\n"
        "    return write(*words)\n"
        "stage.write_shard = slow\n"
        "stage.main()\n"
    )
    script = tmp_path / "slow.py"
    script.write_text(code)
    ranks = start_ranks(
        *(str(script), "--config", str(SMOKE), "--run.root", str(tmp_path), "--run.tracking_uri", "offline"),
        *("--samples_per_shard", "8"),
    )
    folder = tmp_path / "corpus"
    while not list(folder.glob("parts/*.json")):
        assert ranks[0].poll() is None, "it ended before it could be stopped"
        time.sleep(0.01)
    (folder / "stop").touch()
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [75, 75]
    finally:
        for rank in ranks:
            rank.kill()
    outcome = json.loads((folder / "outcome.json").read_bytes())
    assert (outcome["state"], outcome["exit_code"]) == ("stopped", 75)
    assert not (folder / "stop").exists()


PAGE_FAULTS = """
import resource
import torch
from pipelines.runtime.config.stage_config import RunConfig
from pipelines.runtime.stage.launch import start_accelerator

start_accelerator(RunConfig())
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(size << 18) for size in (1, 2, 4) for _ in range(16)]  # size in MiB; 112 in all
    del activations
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")
def test_memory_that_an_update_frees_is_there_for_the_next_one() -> None:
    script = [sys.executable, "-c", PAGE_FAULTS]
    found = subprocess.run(script, check=True, capture_output=True, text=True, cwd=REPOSITORY, env=environment())
    # Of 28,672; a block or two may find no place between what stays.
    assert int(found.stdout) < 3_000


def test_a_second_signal_ends_at_once_and_what_one_ctrl_c_sends_twice_does_not() -> None:
    """The first asks to stop; a launcher passes on the Ctrl-C that the terminal has sent already."""
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pipelines.runtime.config.stage_config import RunConfig\n"
        "from pipelines.runtime.stage.launch import StopSignal, start_accelerator\n"
        "stop = StopSignal(Path(sys.argv[1]), start_accelerator(RunConfig()))\n"
        "with stop.handling_signals():\n"
        "    print('listening', flush=True)\n"
        "    while not stop.requested(): time.sleep(0.01)\n"
        "    print(stop.reason, flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = start_warm("-c", code, "nowhere")
    wait_until(lambda: process.printed() == "listening\n", seconds=60, what="the start")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: process.printed() == "listening\nSIGINT\n", seconds=60, what="the reason")
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
