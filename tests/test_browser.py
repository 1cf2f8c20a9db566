"""MLflow's pages in a real browser: views of two runs of unequal length, without an empty chart."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clocks import FOREVER_SECONDS
from mlflow.tracking import MlflowClient
from test_tracking_mlflow import MlflowServer

from pipelines.evaluation.metrics import log_scores
from pipelines.model.grids import grid_png
from pipelines.runtime.tracking.tracker import Tracker, open_tracker
from pipelines.runtime.tracking.views import views_of
from pipelines.tools import sync

sync_api = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; on Debian: apt install chromium"),
]

STAGES = {"vae": "train_vae", "unet": "train_unet", "evaluation": "evaluate"}
CONTRACT = "96bca708b1aa"
SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "class_accuracy", "worst_class_accuracy")
SCREENSHOTS = os.environ.get("LATENTLINE_SCREENSHOTS")  # folder to keep them in


def start(root: Path, folder: str, params: dict, **tags: str) -> Tracker:
    tags = {"stage": STAGES[folder], "code_version": "12b02b2106e5", "hardware": "2 x AMD EPYC", **tags}
    return open_tracker(
        folder=root / folder,
        root=root,
        stage=STAGES[folder],
        experiment="fashion_mnist",
        tracking_uri="offline",
        params=params,
        tags=tags,
    )


def draw(tracker: Tracker, key: str, folder: Path, *, step: int, columns: int = 10, rows: int = 4) -> None:
    x = np.linspace(0, 1 + step / 300, 32)
    images = np.broadcast_to(np.sin(7 * np.outer(x, x))[..., None] * 120 + 128, (rows, columns, 32, 32, 1))
    path = folder / f"{key.replace('/', '-')}.png"
    path.write_bytes(grid_png(images.astype(np.uint8), column_labels=["shoe"] * columns, title=f"update {step}"))
    tracker.log_image(key, path, step=step)


def train(tracker: Tracker, folder: Path, *, updates: int, rate: float, names: tuple[str, ...]) -> None:
    """Log what a training of so many updates of 50 a flush logs."""
    vae = "val/psnr" in names
    draw(tracker, "val/reconstructions" if vae else "val/samples", folder, step=0, rows=2 if vae else 4)
    for first in range(0, updates, 50):
        records = [
            {
                "update": n,
                "batch": n - 1,
                "time": 1.79e9 + rate * n,
                **{name: 1 / (rate * n) ** 0.3 for name in names if name.startswith("train/")},
            }
            for n in range(first + 1, first + 51)
        ]
        records[-1] |= {"progress/images": (first + 50) * 64, "perf/images_per_s": 90 / rate + 0.01 * first}
        records[-1] |= {"perf/data_wait_fraction": 0.02, "health/refused_updates": 0.0}
        records[-1] |= {"health/active_channels": 8.0} if vae else {}
        tracker.log_records(records)
        if (first + 50) % 150 == 0:
            values = {name: 1 / (1 + rate * first) ** 0.3 for name in names if name.startswith("val/")}
            tracker.log_metrics(values, step=first + 50)
            key = "val/reconstructions" if vae else "val/samples"
            draw(tracker, key, folder, step=first + 50, rows=2 if vae else 4)
    draw(tracker, key.replace("val", "final"), folder, step=0, rows=2 if vae else 4)


def make_pipeline(root: Path, *, updates: int, rate: float) -> None:
    params = {"updates": updates, "global_batch": 64, "seed": 0, "optim": {"peak_lr": 1e-3 * rate}}
    losses = ("train/loss", "train/l1", "train/kl", "train/grad_norm", "val/psnr", "val/latent_std")
    tracker = start(root, "vae", params)
    time.sleep(3.5)  # until the load of the machine is measured
    train(tracker, root / "vae", updates=updates, rate=rate, names=losses)
    tracker.close("FINISHED")

    tracker = start(root, "unet", {**params, "denoiser": {"network": {"channels": [64, int(96 * rate)]}}})
    train(
        tracker,
        root / "unet",
        updates=updates,
        rate=rate,
        names=("train/loss", "train/grad_norm", "val/loss", "val/condition_gap", "val/frechet_distance"),
    )
    tracker.close("FINISHED")

    tracker = start(
        root, "evaluation", {"num_samples": 500, "sampler": {"kind": "ddim", "num_steps": 25}}, contract=CONTRACT
    )
    sweep = [
        {"guidance": g, **{name: {"value": 3 * rate + (g - 2) ** 2, "error": 0.3} for name in SCORES}}
        for g in (1.0, 1.5, 2.5, 4.0)
    ]
    floor = {"frechet_distance": {"value": 1.6, "error": 0.1}}
    log_scores(tracker, {"sweep": sweep, "default_guidance": 2.5, "floor": floor})
    draw(tracker, "eval/samples", root / "evaluation", step=0, rows=8)
    draw(tracker, "eval/guidance", root / "evaluation", step=0)
    tracker.close("FINISHED")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server that holds two pipelines of unequal length."""
    folder = tmp_path_factory.mktemp("site")
    server = MlflowServer(folder)
    try:
        server.start()
        uri = f"http://127.0.0.1:{server.port}"
        for name, updates, rate in (("narrow", 450, 1.0), ("wide", 300, 1.5)):
            make_pipeline(folder / "runs" / name, updates=updates, rate=rate)
            assert sync.main([str(folder / "runs" / name), "--tracking-uri", uri]) == 0
        yield uri
    finally:
        server.kill()


@pytest.fixture(scope="module")
def page(site: str) -> Iterator["sync_api.Page"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        # High enough for all charts: MLflow draws those in sight.
        yield browser.new_page(viewport={"width": 1600, "height": 3000})
        browser.close()


def has_data(card: "sync_api.Locator") -> bool:
    """Return whether a chart shows both runs: curves, bars, loaded pictures, or rows of a table."""
    curves = card.locator(".scatterlayer .trace, .barlayer .point").count()
    loaded = "images => images.filter(image => image.complete && image.naturalWidth > 0).length"
    return max(curves, card.locator("img").evaluate_all(loaded), card.get_by_role("row").count()) >= 2


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", list(views_of([CONTRACT])))
def test_a_view_opens_without_an_empty_chart(name: str, site: str, page: "sync_api.Page", tmp_path: Path) -> None:
    tags = MlflowClient(tracking_uri=site).get_experiment_by_name("fashion_mnist").tags
    links = dict(re.findall(r"\[([^]]+)\]\((\S+)\)", tags["mlflow.note.content"]))
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto("about:blank")
    page.goto(f"{site}/{links[name]}")
    # No GPU here, so that its charts and its utilisation are left out.
    charts = views_of([CONTRACT])[name]["compareRunCharts"]
    expected = [chart for chart in charts if not re.search("gpu|mfu", chart.get("metricKey", ""))]
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    cards.first.wait_for(timeout=FOREVER_SECONDS * 1000)
    deadline = time.monotonic() + FOREVER_SECONDS
    while sum(map(has_data, cards.all())) < len(expected) and time.monotonic() < deadline:
        page.wait_for_timeout(500)
    assert [card.inner_text() for card in cards.all() if not has_data(card)] == []
    name = re.sub(r"\W+", "-", name)
    top = {"x": 0, "y": 0, "width": 1600, "height": 1500}
    page.screenshot(path=Path(SCREENSHOTS or tmp_path, f"{name}.png"), clip=top, timeout=FOREVER_SECONDS * 1000)
    assert cards.count() == len(expected)
    assert "No charts in this section" not in page.inner_text("body")
    assert not errors


def test_the_page_of_a_run_shows_its_description_with_a_picture(site: str, page: "sync_api.Page") -> None:
    client = MlflowClient(tracking_uri=site)
    runs = client.search_runs([client.get_experiment_by_name("fashion_mnist").experiment_id])
    [run] = [run.info for run in runs if run.info.run_name == "wide"]
    page.goto("about:blank")
    page.goto(f"{site}/#/experiments/{run.experiment_id}/runs/{run.run_id}?workflowType=machine_learning")
    page.get_by_role("link", name="wide/evaluation").last.wait_for(timeout=FOREVER_SECONDS * 1000)
    picture = page.locator("img[src^='get-artifact']")
    picture.wait_for(timeout=FOREVER_SECONDS * 1000)
    assert picture.evaluate("image => image.naturalWidth") > 300
    assert "frechet distance 4.75 ± 0.3" in page.inner_text("body")
