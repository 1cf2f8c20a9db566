"""Pages of runs in MLflow: descriptions, parameters, tags, colours and states, in a real store."""

import base64
import json
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.numpy import save_file

from data.files import sha256_of
from pipelines.evaluation.metrics import log_scores
from pipelines.runtime.config.command_line import config_from_command_line
from pipelines.runtime.stage.fingerprint import keys_at_default
from pipelines.runtime.tracking.tracker import NodeTracker, Tracker, open_tracker
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
    tracker = start(root, "unet", tags={"code_version": "12b02b2106e527a3e0", "world_size": "2"})
    tracker.log_input("vae", digest="ab" * 32, source="/disk/runs/demo/vae/", context="train_unet")
    tracker.log_metrics({"val/loss": 0.25, "health/refused_updates": 2.0}, step=30)
    identity = json.loads((root / "unet" / "run.json").read_text())
    identity["started"] -= 36_000  # ten hours ago
    (root / "unet" / "run.json").write_text(json.dumps(identity))
    for step in (10, 20):
        draw(tracker, "val/samples", root / "unet", step=step, grey=step)
    draw(tracker, "final/samples", root / "unet", step=0, grey=30)
    tracker.close("FINISHED")
    runs = send(root, store)
    run = runs["demo/unet"]
    assert "| stage | state | result | 20 device-hours |" in note(runs["demo"])
    first, result, picture, *commands = note(run).split("\n\n")
    assert first == f"A U-Net trained for 30 updates of 8 latents. From demo/vae {'ab' * 6}. 20 device-hours."
    assert result == "**loss 0.25 · refused updates 2**"
    [(path, run_id)] = re.findall(r"get-artifact\?path=(\S+)&run_uuid=(\w+)\)", picture)
    assert run_id == run.info.run_id
    client = MlflowClient(tracking_uri=store)
    listed = {entry.path for entry in client.list_artifacts(run_id, "images")}
    assert unquote(path) in listed
    shown = Image.open(client.download_artifacts(run_id, unquote(path)))
    assert shown.getpixel((0, 0)) == 30, "not the last grid"
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
        assert f"| [demo/{folder}]({page}) | \u00a0{state.lower()}\u00a0 |" in note(parent)
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
    assert "finished" in note(runs["demo"])


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
    assert shown["updates"] == str(config.updates)
    assert shown["denoiser.network.channels"] == "[64, 96]"
    assert shown["seed"] == "0"
    assert run.data.tags["changed.seed"] == "7"
    assert shown["hang_seconds"] == "60.0"
    assert len(shown) <= 30, sorted(shown)
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


def test_the_load_of_every_node_arrives_and_is_little(tmp_path: Path, store: str) -> None:
    root = tmp_path / "demo"
    tracker = start(root, "unet")
    node = NodeTracker(root / "unet", node="node1")
    spools = [root / "unet" / "tracking" / name for name in ("system.jsonl", "system-node1.jsonl")]
    deadline = time.monotonic() + 60
    while not all(spool.exists() for spool in spools) and time.monotonic() < deadline:
        time.sleep(0.1)
    tracker.close("FINISHED")
    node.close("FINISHED")
    sent = {name for name in send(root, store)["demo/unet"].data.metrics if name.startswith("system/")}
    of_one = {"cpu_utilization_percentage", "system_memory_usage_percentage", "process_memory_megabytes"}
    assert sent == {f"system/{node}{name}" for node in ("", "node1/") for name in of_one}


def test_views_are_written_once_and_those_of_users_are_left_alone(tmp_path: Path, store: str) -> None:
    root, client = tmp_path / "demo", MlflowClient(tracking_uri=store)
    start(root, "evaluation", tags={"contract": "96bca708b1aa"}).close("FINISHED")
    send(root, store)
    experiment = client.get_experiment_by_name(f"tests of {root.parent.name}")
    views = {
        key: json.loads(text) for key, text in experiment.tags.items() if key.startswith("mlflow.sharedViewState.")
    }
    named = {view["name"] for view in views.values()}
    assert named >= {"Which U-Net is better", "Samples side by side", "Evaluations over guidance (96bca708b1aa)"}
    for key, view in views.items():
        assert f"viewStateShareKey={key.rpartition('.')[2]}" in experiment.tags["mlflow.note.content"]
        state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
        sections = {section["uuid"] for section in state["compareRunSections"]}
        assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} <= sections
        assert len({chart["uuid"] for chart in state["compareRunCharts"]}) == len(state["compareRunCharts"])
        assert len(experiment.tags[key]) <= 20_000

    # Another evaluation under another contract, in an experiment in which a user has saved a view.
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.mine", json.dumps({"name": "mine"}))
    before = client.get_experiment(experiment.experiment_id).tags
    (root / "evaluation" / "tracking" / "sent.json").unlink()
    send(root, store)
    assert client.get_experiment(experiment.experiment_id).tags == before
    start(root, "evaluation-cold", tags={"contract": "00000000ffff"}).close("FINISHED")
    send(root, store)
    after = client.get_experiment(experiment.experiment_id).tags
    assert {key: after[key] for key in before if "sharedViewState" in key}.items() <= before.items()
    added = [json.loads(after[key])["name"] for key in after.keys() - before.keys()]
    assert added == ["Evaluations over guidance (00000000ffff)"]


def test_a_server_too_old_for_views_gets_none(tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.__version__", "3.14.0")
    start(tmp_path / "demo", "vae").close("FINISHED")
    assert "VAE" in note(send(tmp_path / "demo", store)["demo/vae"])
    tags = MlflowClient(tracking_uri=store).get_experiment_by_name(f"tests of {tmp_path.name}").tags
    assert not [key for key in tags if "sharedViewState" in key or "note" in key]


def train_and_evaluate(root: Path, *, alias: str, curve: Mapping[int, float] | None = None) -> None:
    """Log what a training and the evaluation of its U-Net log."""
    tracker = start(root, "unet")
    tracker.log_input("latents", digest="ab" * 32, source="runs/demo/latents", context="train_unet")
    tracker.log_metrics({"val/loss": 0.5}, step=10)
    tracker.log_metrics({"val/loss": 0.25}, step=30)
    (root / "unet" / "config.json").write_text("{}")
    save_file({"weight": np.ones(3, np.float32)}, root / "unet" / "unet.safetensors")
    tracker.log_model("unet", root / "unet", alias=alias)
    tracker.set_tags({"digest.unet": "cd" * 6})
    tracker.close("FINISHED")
    tracker = start(root, "evaluation", tags={"digest.unet": "cd" * 6})
    tracker.log_input("corpus", digest="ef" * 32, source="runs/demo/corpus", context="evaluate")
    tracker.log_metrics({"eval/best/frechet_distance": 2.99, "eval/frechet_distance": 3.26}, step=0)
    for update, distance in (curve or {}).items():
        tracker.log_metrics({"eval/updates/frechet_distance": distance}, step=update)
    tracker.close("FINISHED")


def models_of(root: Path, store: str) -> list:
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name(f"tests of {root.parent.name}")
    return client.search_logged_models([experiment.experiment_id])


def test_a_model_has_its_metrics_and_data_and_a_link_to_its_weights(tmp_path: Path, store: str) -> None:
    root = tmp_path / "demo"
    train_and_evaluate(root, alias="")
    runs = send(root, store)
    (root / "evaluation" / "tracking" / "sent.json").unlink()
    (root / "unet" / "tracking" / "sent.json").unlink()
    send(root, store)
    [model] = models_of(root, store)
    assert model.name == "demo-unet"
    measured = {(metric.key, metric.value, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert measured == {
        ("val/loss", 0.25, "latents", "ab" * 6),
        ("eval/best/frechet_distance", 2.99, "corpus", "ef" * 6),
    }
    assert len(model.metrics) == 2, "sent twice, it stands twice"
    assert model.tags["folder"] == str((root / "unet").resolve())
    assert model.tags["weights"] == sha256_of(root / "unet" / "unet.safetensors")[:12]
    client = MlflowClient(tracking_uri=store)
    assert not client.list_logged_model_artifacts(model.model_id), "nobody asked for the bytes"
    assert not client.search_model_versions(f"run_id = '{runs['demo/unet'].info.run_id}'")
    evaluation = client.get_run(runs["demo/evaluation"].info.run_id)
    assert [given.model_id for given in evaluation.inputs.model_inputs] == [model.model_id]


def test_each_kept_checkpoint_is_a_model_with_what_was_measured_at_its_update(tmp_path: Path, store: str) -> None:
    root = tmp_path / "demo"
    for update in (10, 20, 30):  # nothing was measured at 20; 30 was published
        file = {"name": "unet_averages.safetensors", "sha256": f"{update:064}"}
        folder = root / "unet" / "checkpoints" / f"update-{update:08}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"update": update, "files": [file]}))
    train_and_evaluate(root, alias="", curve={10: 7.0})
    run = send(root, store)["demo/unet"]
    before = {model.name: model for model in models_of(root, store)}
    for stage in ("unet", "evaluation"):
        (root / stage / "tracking" / "sent.json").unlink()
    evaluation = send(root, store)["demo/evaluation"]
    models = {model.name: model for model in models_of(root, store)}
    assert {name: model.to_dictionary() for name, model in models.items()} == {
        name: model.to_dictionary() for name, model in before.items()
    }
    measured = {
        name: sorted((metric.key, metric.value, metric.step) for metric in model.metrics or ())
        for name, model in models.items()
    }
    assert measured == {
        "demo-unet-update-10": [("eval/updates/frechet_distance", 7.0, 10), ("val/loss", 0.5, 10)],
        "demo-unet-update-20": [],
        "demo-unet": [("eval/best/frechet_distance", 2.99, 0), ("val/loss", 0.25, 30)],
    }
    first = models["demo-unet-update-10"]
    assert first.tags["weights"] == "0" * 12
    assert first.tags["folder"] == str((root / "unet/checkpoints/update-00000010").resolve())
    client = MlflowClient(tracking_uri=store)
    assert {output.model_id: output.step for output in client.get_run(run.info.run_id).outputs.model_outputs} == {
        model.model_id: int(model.tags["update"]) for model in models.values()
    }
    given = {each.model_id for each in client.get_run(evaluation.info.run_id).inputs.model_inputs}
    assert given == {models["demo-unet"].model_id, first.model_id}
    assert not any(client.list_logged_model_artifacts(model.model_id) for model in models.values())

    client.delete_logged_model_tag(models["demo-unet"].model_id, "update")  # as an older version left it
    (root / "unet" / "tracking" / "sent.json").unlink()
    send(root, store)
    assert {model.model_id for model in models_of(root, store)} == {model.model_id for model in models.values()}


def test_a_model_with_an_alias_becomes_one_registered_version(tmp_path: Path, store: str) -> None:
    root, client = tmp_path / "demo", MlflowClient(tracking_uri=store)
    train_and_evaluate(root, alias="champion")
    send(root, store)
    (root / "unet" / "tracking" / "sent.json").unlink()
    send(root, store)
    [model] = models_of(root, store)
    name = f"tests of {tmp_path.name}-unet"
    assert client.get_model_version_by_alias(name, "champion").source == f"models:/{model.model_id}"
    assert len(client.search_model_versions(f"name = '{name}'")) == 1
    sent = {entry.path for entry in client.list_logged_model_artifacts(model.model_id)}
    assert sent == {"unet.safetensors", "config.json"}


def test_the_best_of_a_sweep_is_logged_with_its_guidance_and_errors(tmp_path: Path) -> None:
    tracker = start(tmp_path / "demo", "evaluation")
    distances = {1.0: 4.0, 1.5: 2.99, 2.5: 3.26}
    sweep = [{"guidance": at, "frechet_distance": {"value": d, "error": d / 10}} for at, d in distances.items()]
    curve = [{"update": 500, "frechet_distance": {"value": 7.0, "error": 0.5}}]
    log_scores(tracker, {"sweep": sweep, "default_guidance": 2.5, "floor": {}, "curve": curve})
    tracker.close("FINISHED")
    lines = (tmp_path / "demo" / "evaluation" / "metrics.jsonl").read_text().splitlines()
    logged = {(record["step"], key): value for record in map(json.loads, lines) for key, value in record.items()}
    assert logged[0, "eval/frechet_distance"] == 3.26
    assert logged[0, "eval/best/frechet_distance"] == 2.99
    assert logged[0, "eval/best/frechet_distance_error"] == pytest.approx(0.299)
    assert logged[0, "eval/best/guidance"] == 1.5
    for at, distance in distances.items():  # a chart takes the guidance as its x axis
        assert logged[round(100 * at), "eval/sweep/guidance"] == at
        assert logged[round(100 * at), "eval/sweep/frechet_distance"] == distance
    assert logged[500, "eval/updates/frechet_distance_error"] == 0.5
