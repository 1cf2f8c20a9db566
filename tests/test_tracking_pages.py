"""Pages of runs in MLflow: descriptions, parameters, tags, colours and states, in a real store."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.stage.fingerprint import keys_at_default
from pipelines.runtime.tracking.tracker import Tracker, open_tracker
from pipelines.tools import sync
from pipelines.train_unet import TrainUNetConfig

STAGES = {"vae": "train_vae", "unet": "train_unet", "evaluation": "evaluate", "evaluation-cold": "evaluate"}
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def start(root: Path, folder: str, *, params: dict | None = None, tags: dict | None = None, **more) -> Tracker:
    return open_tracker(
        folder=root / folder,
        root=root,
        stage=STAGES.get(folder, STAGES["vae"]),
        experiment=f"tests of {root.parent.name}",
        tracking_uri="offline",
        params=params or {"updates": 30, "global_batch": 8},
        tags={"stage": STAGES.get(folder, STAGES["vae"]), **(tags or {})},
        **more,
    )


def send(root: Path, store: str) -> dict[str, Run]:
    """Send a pipeline; return its runs by name."""
    assert sync.main([str(root), "--tracking-uri", store]) == 0
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name(f"tests of {root.parent.name}")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def note(run: Run) -> str:
    return run.data.tags.get("mlflow.note.content", "")


def draw(tracker: Tracker, key: str, folder: Path, *, step: int, grey: int) -> None:
    Image.new("L", (32, 32), grey).save(folder / "grid.png")
    tracker.log_image(key, folder / "grid.png", step=step)


def test_a_run_says_what_was_done_with_its_result_picture_and_commands(tmp_path: Path, store: str) -> None:
    root = tmp_path / "demo"
    tracker = start(root, "unet", tags={"code_version": "12b02b2106e527a3e0"})
    tracker.log_metrics({"val/loss": 0.25}, step=30)
    for step in (10, 20):
        draw(tracker, "val/samples", root / "unet", step=step, grey=step)
    tracker.close("FINISHED")
    run = send(root, store)["demo/unet"]
    first, result, picture, *commands = note(run).split("\n\n")
    assert first == "A U-Net trained for 30 updates of 8 latents."
    assert result == "**loss 0.25**"
    [(path, run_id)] = re.findall(r"get-artifact\?path=(\S+)&run_uuid=(\w+)\)", picture)
    assert run_id == run.info.run_id
    client = MlflowClient(tracking_uri=store)
    listed = {entry.path for entry in client.list_artifacts(run_id, "images")}
    assert unquote(path) in listed
    shown = Image.open(client.download_artifacts(run_id, unquote(path)))
    assert shown.getpixel((0, 0)) == 20, "not the last grid"
    assert unquote(path).startswith("images/final~samples+step+0+"), "no step that all runs share"
    assert [command.partition(" ")[0] for command in commands] == ["continue:", "repeat,"]
    assert "12b02b2106e5:" in commands[1]


@pytest.mark.parametrize(
    ("states", "pipeline"),
    [
        ({"vae": "FINISHED", "unet": "FINISHED", "evaluation": "KILLED"}, "KILLED"),
        ({"vae": "FINISHED", "evaluation": "KILLED", "evaluation-cold": "FINISHED"}, "KILLED"),
        ({"unet": "FAILED", "evaluation": "KILLED", "evaluation-cold": "FINISHED"}, "FAILED"),
        ({"latents": "FINISHED", "latents/runs/ab": "KILLED", "unet": "FINISHED"}, "FINISHED"),
    ],
)
def test_a_pipeline_shows_its_stages_and_is_in_the_state_of_the_worst(
    states: dict[str, str], pipeline: str, tmp_path: Path, store: str
) -> None:
    root = tmp_path / "demo"
    for folder, state in states.items():
        tracker = start(root, folder)
        tracker.log_metrics({"val/psnr": 26.5, "eval/best/frechet_distance": 2.99}, step=1)
        tracker.log_metrics({"eval/best/frechet_distance_error": 0.23}, step=1)
        tracker.close(state)
    runs = send(root, store)
    for folder in states:  # a joined run's folder lies below its stage's
        assert sync.main([str(root / folder), "--tracking-uri", store]) == 0
    runs = send(root, store)
    parent = runs["demo"]
    assert parent.info.status == pipeline
    assert not parent.data.params
    for folder, state in states.items():
        run = runs[f"demo/{folder}"]
        page = f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
        assert f"| [demo/{folder}]({page}) | {state.lower()} |" in note(parent)
    assert ("frechet distance 2.99 ± 0.23" in note(parent)) == any("evaluation" in folder for folder in states)


def test_a_description_that_a_user_wrote_is_left_alone(tmp_path: Path, store: str) -> None:
    root = tmp_path / "demo"
    start(root, "vae").close("FINISHED")
    run = send(root, store)["demo/vae"]
    assert "VAE" in note(run)
    MlflowClient(tracking_uri=store).set_tag(run.info.run_id, "mlflow.note.content", "the one for the paper")
    (root / "vae" / "tracking" / "sent.json").unlink()
    runs = send(root, store)
    assert note(runs["demo/vae"]) == "the one for the paper"
    assert "| finished |" in note(runs["demo"])


def test_a_run_shows_headlines_and_what_differs_from_the_defaults(tmp_path: Path, store: str) -> None:
    config = config_from_command_line(
        TrainUNetConfig,
        table="train_unet",
        about="",
        argv=["--config", str(REPOSITORY / "pipelines/configs/demo.toml"), "--validate_every", "13"],
    )
    params, at_default = config.model_dump(mode="json"), keys_at_default(config)
    start(tmp_path / "demo", "unet", params=params, at_default=at_default).close("KILLED")
    # Another start, with a headline and another key changed.
    changed = {**params, "seed": 7, "hang_seconds": 60.0}
    start(tmp_path / "demo", "unet", params=changed, at_default=at_default - {"hang_seconds"}).close("FINISHED")
    run = send(tmp_path / "demo", store)["demo/unet"]
    shown = run.data.params
    assert shown["updates"] == "1300"
    assert shown["denoiser.network.channels"] == "[64, 96]"
    assert shown["seed"] == "0"
    assert run.data.tags["changed.seed"] == "7"
    assert shown["hang_seconds"] == "60.0"
    assert len(shown) <= 25, sorted(shown)
    assert not [key for key in shown if key.startswith(("run.", "inputs.")) or "every" in key]
    assert "optim.beta1" not in shown  # at its default; config.toml has it


def test_the_stages_of_a_pipeline_share_a_colour_that_others_do_not_have(tmp_path: Path, store: str) -> None:
    colours = []
    for name in ("one", "two", "three"):
        for folder in ("vae", "unet"):
            start(tmp_path / "x" / name, folder).close("FINISHED")
        runs = send(tmp_path / "x" / name, store)
        own = {run.data.tags["mlflow.runColor"] for key, run in runs.items() if key.startswith(name)}
        assert len(own) == 1
        colours += own
    assert len(set(colours)) == 3


def test_a_sender_names_the_page_of_its_run(tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path / "demo", "vae").close("FINISHED")
    run = send(tmp_path / "demo", store)["demo/vae"].info
    page = f"#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning"
    assert page in capsys.readouterr().out


def test_state_and_description_come_back_with_a_store_that_is_filled_again(tmp_path: Path, store: str) -> None:
    root = tmp_path / "demo"
    for folder in ("vae", "unet"):
        tracker = start(root, folder)
        draw(tracker, "val/samples", root / folder, step=1, grey=1)
        tracker.close("FINISHED" if folder == "vae" else "FAILED")
    before = send(root, store)["demo"]
    client = MlflowClient(tracking_uri=store)
    for folder in ("vae", "unet"):
        client.delete_run(json.loads((root / folder / "run.json").read_text())["mlflow_run_id"])
    client.delete_run(before.info.run_id)
    after = send(root, store)
    assert after["demo"].info.status == before.info.status == "FAILED"
    for run in after.values():
        assert run.info.run_id in note(after["demo"]) or run.info.run_name == "demo"
