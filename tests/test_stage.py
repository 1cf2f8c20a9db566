"""Laws of a stage's frame: what counts as the same request, and what a shared folder refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, SMOKE, environment, run_stage

from data.panels import panel_png
from pipelines.config import ConfigError
from pipelines.runtime.stage import already_done, blaming, differing_keys


def request(**config: object) -> dict[str, object]:
    return {"stage": "train_unet", "config": {"seed": 0, "optim": {"peak_lr": 1.0}, **config}, "parents": {"vae": "a"}}


def test_differences_are_named_by_dotted_key_with_both_values() -> None:
    now = request(seed=1, list=[{"a": 1}])
    assert differing_keys(request(), now) == [
        ("list.0.a", "list.0.a: was absent, is now 1"),
        ("seed", "seed: was 0, is now 1"),
    ]
    assert differing_keys(request(), {**request(), "parents": {"vae": "b"}})[0][0] == "parents.vae"


def test_an_unfinished_stage_continues_only_the_same_request(tmp_path: Path) -> None:
    assert not already_done(tmp_path, request(), allowed=())
    (tmp_path / "request.json").write_text(json.dumps(request()))
    assert not already_done(tmp_path, request(), allowed=())
    with pytest.raises(ConfigError, match=r"begun with another request:\n    seed: was 0, is now 1\n.*--allow-changed"):
        already_done(tmp_path, request(seed=1), allowed=())
    assert not already_done(tmp_path, request(seed=1), allowed=("seed",))


def test_a_finished_stage_is_done_for_the_same_request_and_no_other(tmp_path: Path) -> None:
    content = {"format_version": 1, "files": [], **request()}
    (tmp_path / "manifest.json").write_text(json.dumps({"content": content, "provenance": {}}))
    assert already_done(tmp_path, request(), allowed=())
    with pytest.raises(ConfigError, match="finished with another request"):
        already_done(tmp_path, request(seed=1), allowed=("seed",))


def test_a_mistake_below_is_blamed_on_the_key_that_mends_it() -> None:
    with pytest.raises(ConfigError, match=r"^inputs\.corpus: no such shard$"), blaming("inputs.corpus"):
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
        "import sys, time\nfrom data.commit import FolderLock\n"
        "FolderLock(sys.argv[1]).acquire(); print('locked', flush=True); time.sleep(60)\n"
    )
    folder = tmp_path / "corpus"
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    owner.stdout.readline()
    try:
        words = [sys.executable, "-c", "import pipelines.runtime.stage as s; s.LOCK_PATIENCE_SECONDS = 0.2\n"
                 "import pipelines.prepare_corpus as p; p.main()"]  # fmt: skip
        done = subprocess.run(
            [*words, "--config", str(SMOKE), "--run.root", str(tmp_path)],
            env=environment(), cwd=REPOSITORY, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        owner.kill()
        owner.wait()
    assert done.returncode == 2
    assert f"is in use by process {owner.pid}" in done.stderr
    assert not list(folder.glob("*.tar"))


def test_the_file_stop_ends_a_stage_as_resumable(tmp_path: Path) -> None:
    words = ("--run.root", str(tmp_path), "--samples_per_shard", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.prepare_corpus", "--config", str(SMOKE), *words],
        env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    folder = tmp_path / "corpus"
    while not list(folder.glob("parts/*.json")):
        assert process.poll() is None, "it ended before it could be stopped"
    (folder / "stop").touch()
    assert process.wait(timeout=60) == 75
    assert not (folder / "stop").exists()
    assert not (folder / "manifest.json").exists()
    assert run_stage("prepare_corpus", *words).returncode == 0


def test_a_panel_shows_every_cell_in_its_place() -> None:
    from io import BytesIO

    from PIL import Image

    cells = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 40 + np.zeros((2, 3, 16, 16, 1), dtype=np.uint8)
    picture = np.asarray(Image.open(BytesIO(panel_png(cells, column_labels=("a", "b", "c"), title="t"))).convert("L"))
    for row in range(2):
        for column in range(3):
            patch = picture[44 + 2 + row * 66 : 44 + 66 + row * 66, 2 + column * 66 : 66 + column * 66]
            assert (patch == cells[row, column, 0, 0, 0]).all()
