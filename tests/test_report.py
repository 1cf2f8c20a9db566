"""The report of two runs as one page, and the ancestors of a sample."""

import base64
import importlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run_here
from PIL import Image
from test_evaluate import evaluated, write_corpus, write_model

from data.manifest import read_manifest
from pipelines.evaluation.pictures import chart_svg, sweep_chart
from pipelines.runtime.stage.lineage import FinishedStage
from pipelines.tools.compare import sides_of
from pipelines.tools.report import Run, encoded, samples_of
from pipelines.tools.trace import text_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluations of one model from other noise, each in a run of its own with all that it came from."""
    root = tmp_path_factory.mktemp("runs")
    write_corpus(root / "one" / "corpus", ["a", "b"], [0, 1] * 20, [0, 1] * 6)
    write_model(root / "one", ["a", "b"])
    shutil.copytree(root / "one", root / "two")
    for number, name in enumerate(("one", "two")):
        code, said = evaluated(root / name, "--seed", str(number), "--sweep", "[1.0]")
        assert code == 0, said
    return root


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
Ran = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str]) -> Ran:
    """Run a tool in this process."""

    def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = importlib.import_module(f"pipelines.tools.{name}").main(words)
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


class _Page(HTMLParser):
    """Addresses and headings of a page, and whether every tag that is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses, self.headings, self._open = list[str](), list[str](), list[str]()
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)


def test_a_report_is_one_page_that_asks_for_nothing_and_says_what_compare_says(
    runs: Path, tmp_path: Path, tool: Ran
) -> None:
    done = tool("report", str(runs / "one"), str(runs / "two"), "--output", str(tmp_path / "r.html"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "r.html").read_text()
    page = _Page(text)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\(http|fetch\(", text)
    assert page.headings == [
        *("Verdict", "Samples of the same seeds", "Training", "Figures over guidance", "Error budget"),
        *("Copies of training images", "What differs", "Contract", "Lineage, machine and cost"),
    ]
    compared = tool("compare", str(runs / "one"), str(runs / "two"))
    assert compared.stdout.splitlines()[0] in text.replace("&#39;", "'")
    assert len(text) < 5_000_000

    # The same seeds of both runs, at each guidance that both have.
    assert len(re.findall(r'class="strip" data-scale="(1|2)"', text)) == 4


def test_a_report_is_written_whatever_the_store_says(runs: Path, tmp_path: Path, tool: Ran) -> None:
    shutil.copytree(runs / "one", tmp_path / "one")
    run = json.loads((tmp_path / "one" / "evaluation" / "run.json").read_bytes())
    run["tracking_uri"] = "http://127.0.0.1:9"
    (tmp_path / "one" / "evaluation" / "run.json").write_text(json.dumps(run))
    done = tool("report", str(tmp_path / "one"), "--output", str(tmp_path / "r.html"))
    assert done.returncode == 0
    assert "the report is not logged to MLflow (MLflow at http://127.0.0.1:9" in done.stderr
    assert (tmp_path / "r.html").exists()
    done = tool("report", *[str(tmp_path / "one")] * 27, "--output", str(tmp_path / "many.html"))
    assert (done.returncode, "27 runs are too many for one page" in done.stderr) == (2, True)


@pytest.mark.soak
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium; on Debian: apt install chromium")
def test_a_report_of_three_runs_is_read_by_all_with_and_without_javascript(
    runs: Path, tmp_path: Path, tool: Ran
) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the extra 'browser' is not installed")
    shutil.copytree(runs / "two", tmp_path / "three")
    written = tool(
        "report",
        *(str(runs / name) for name in ("one", "two")),
        str(tmp_path / "three"),
        "--output",
        str(tmp_path / "r.html"),
    )
    assert written.returncode == 0, written.stderr
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for scheme, script in (("light", True), ("dark", True), ("light", False)):
            page = browser.new_context(color_scheme=scheme, java_script_enabled=script).new_page()
            asked: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(f"file://{tmp_path / 'r.html'}")
            assert [url for url in asked if not url.startswith("data:")] == [f"file://{tmp_path / 'r.html'}"]
            assert page.locator("h2").count() == 9
            assert all(picture.is_visible() for picture in page.locator("img.strip").all())
            if script:
                found = axe.Axe().run(page).response["violations"]
                assert not [each["id"] for each in found if each["impact"] in ("serious", "critical")]
                before = page.inner_text("#shown")
                page.keyboard.press("ArrowRight")
                page.keyboard.press("ArrowUp")
                assert page.inner_text("#shown") != before
        browser.close()


def test_a_report_of_runs_without_an_evaluation_says_so(runs: Path, tmp_path: Path, tool: Ran) -> None:
    done = tool("report", str(runs / "one" / "unet"), "--output", str(tmp_path / "r.html"))
    assert done.returncode == 2
    assert "report.runs" in done.stderr
    assert not (tmp_path / "r.html").exists()


def test_a_report_of_a_run_that_is_not_there_says_so(runs: Path, tmp_path: Path, tool: Ran) -> None:
    done = tool("report", str(runs / "one"), str(runs / "typo"), "--output", str(tmp_path / "r.html"))
    assert done.returncode == 2
    assert f"report.runs: {runs / 'typo'} is neither a stage's folder nor a pipeline's" in done.stderr


def test_a_curve_has_the_newest_record_of_an_update_that_was_repeated(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "one", tmp_path / "one")
    (side,), _ = sides_of([str(tmp_path / "one")])
    run = Run(side, "A")
    unet = read_manifest(tmp_path / "one" / "unet")
    run.stages["train_unet"] = FinishedStage(tmp_path / "one" / "unet", unet)
    records = [(1, 4.0), (2, 9.0), (3, 9.5), (2, 3.0), (3, 2.0)]  # a rewind to update 1
    lines = [json.dumps({"update": update, "time": 0.0, "train/loss": loss}) + "\n" for update, loss in records]
    (tmp_path / "one" / "unet" / "metrics.jsonl").write_text("".join(lines))
    assert run.curve("train/loss") == ([1, 2, 3], [4.0, 3.0, 2.0])


def test_pictures_beyond_the_limit_of_webp_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = {1.0: [(Image.new("RGB", (1024, 8)), "a")] * 16}
    monkeypatch.setattr("pipelines.tools.report.read_samples", lambda *_: samples)
    side = SimpleNamespace(own=SimpleNamespace(sweep={1.0: {}}))
    run: Any = SimpleNamespace(label="A: one", folder=Path(), grids={}, side=side)
    shown = samples_of([run])
    assert (shown["seeds"], len(shown["heads"])) == (15, 15)
    wide = base64.b64decode(encoded(Image.new("RGB", (20_000, 40))).partition(",")[2])
    assert Image.open(io.BytesIO(wide)).size == (16_383, 33)


def test_a_chart_names_a_run_whose_folder_looks_like_mathematics() -> None:
    sweep = [{"guidance": 1.0, "precision": {"value": 0.5, "error": 0.1}}]
    assert "a$b_{$c" in chart_svg(sweep_chart, {"A: a$b_{$c": sweep}, {})


def test_a_report_names_a_tar_of_samples_that_was_cut(runs: Path, tmp_path: Path, tool: Ran) -> None:
    shutil.copytree(runs / "one", tmp_path / "one")
    tar = tmp_path / "one" / "evaluation" / "samples-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    done = tool("report", str(tmp_path / "one"), "--output", str(tmp_path / "r.html"))
    assert (done.returncode, "samples-000000.tar" in done.stderr) == (2, True), done.stderr


def test_a_sample_that_is_farther_than_any_copy_is_traced() -> None:
    near = {"key": "k", "shard": "s", "distance": None}
    said = text_of({"sample": "a", "ancestors": [], "missing": {}, "nearest": near}, searched=".")
    assert said.endswith("nearest training image: k in s, not equal to it, as a copy would be")


def test_a_sample_is_traced_to_all_that_it_was_made_of(runs: Path, tmp_path: Path, tool: Ran) -> None:
    shutil.copytree(runs / "one", tmp_path / "moved")
    digests = {name: read_manifest(runs / "one" / name).digest for name in ("vae", "unet", "corpus", "evaluation")}
    drawn = run_here(
        *("sample", "--run.root", str(runs / "one"), "--number", "1", "--sampler.num_steps", "2"),
        *("--output", str(tmp_path / "drawn")),
    )
    assert drawn.returncode == 0, drawn.stderr
    (picture,) = (tmp_path / "drawn").glob("000000*.png")
    card = tmp_path / "README.md"
    card.write_text("".join(f"| `{read_manifest(runs / 'one' / name).weights}` |\n" for name in ("vae", "unet")))
    tar = tmp_path / "moved" / "evaluation" / "samples-000000.tar"
    beginnings = {
        f"{tar}:guidance_2-000003": {"unet", "vae"},
        str(picture): {"unet", "vae"},
        str(card): {"unet", "vae"},
        str(tmp_path / "moved" / "evaluation"): {"unet", "vae", "corpus", "evaluation"},
    }
    for beginning, wanted in beginnings.items():
        done = tool("trace", beginning, "--search", str(tmp_path), "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        (found,) = json.loads(done.stdout)["samples"]
        assert {row["digest"] for row in found["ancestors"]} == {digests[name] for name in wanted}
        assert all(str(tmp_path / "moved") in row["folder"] for row in found["ancestors"])
        assert not found["missing"]

    # One that has gone is named.
    shutil.rmtree(tmp_path / "moved" / "vae")
    done = tool("trace", f"{tar}:guidance_2-000003", "--search", str(tmp_path))
    assert done.returncode == 1
    assert "missing: vae" in done.stdout
    foreign, cut = tmp_path / "foreign.png", tmp_path / "cut.tar"
    Image.new("L", (2, 2)).save(foreign)
    cut.write_bytes(tar.read_bytes()[:700])
    unknown = ((f"{tar}:nobody", "holds no nobody.json"), ("nowhere", "no tar member, PNG"))
    for nothing, why in (*unknown, (str(foreign), "does not say what drew it"), (f"{cut}:a", "does not say what drew")):
        done = tool("trace", nothing, "--search", str(tmp_path))
        assert (done.returncode, why in done.stderr) == (2, True), done.stderr
