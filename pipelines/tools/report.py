"""Report on runs as one page: the verdict, how they trained, samples side by side, and what they were made of.

    latentline report runs/demo runs/wide --output report.html

The page holds everything that it shows and needs no network; it is read without JavaScript, too, which adds the arrow
keys: left and right through seeds, up and down through guidance scales, [ and ] through updates. The first run is the
baseline, as in ``latentline compare``. The page is also logged to the runs in MLflow.
"""

import base64
import io
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from data.files import make_folder, write_atomically
from data.manifest import read_manifest
from data.shards.scan import mapped, scan_shard
from pipelines.evaluation.metrics import metrics_of_samples
from pipelines.evaluation.pictures import chart_svg, curves_chart, error_budget_chart, sweep_chart
from pipelines.evaluation.replicates import Side
from pipelines.evaluation.samples import key_prefix
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, CommandConfig
from pipelines.runtime.stage.lineage import ancestors_by_folder
from pipelines.runtime.tracking.identity import OFFLINE, RunIdentity
from pipelines.runtime.tracking.mlflow_store import MlflowStore
from pipelines.runtime.tracking.sender import Sender, StoreUnavailableError
from pipelines.runtime.tracking.spool import METRICS, read_spool_backwards
from pipelines.tools.compare import comparisons, reports_of, sides_of, verdicts_of
from pipelines.tools.sync import uri_of

log = logging.getLogger("latentline.report")

TEMPLATE = Path(__file__).parents[1] / "evaluation" / "report.html"
MOST_SEEDS = 16  # samples that are shown of each guidance
MOST_GRIDS = 6  # of the training that are shown of each run
PICTURE_BYTES = 3_500_000  # of all pictures together; fewer seeds are shown where they are larger
MOST_PIXELS = 16_383  # a side of a WebP
SMALL = 64  # pixels a side, up to which pictures are stored without loss
CURVES = ("train/loss", "val/loss", "val/frechet_distance", "val/psnr")


class ReportConfig(CommandConfig):
    """Runs to report on."""

    positional = "runs"

    runs: Annotated[tuple[str, ...], Field(min_length=1)]  # pipelines' folders, or those of evaluations
    output: str = "report.html"  # the page
    track: bool = True  # also log the page to the runs in MLflow


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(ReportConfig, report, table="report", about=__doc__, argv=argv)


def report(config: ReportConfig) -> Answer:
    """Write the page."""
    import jinja2  # late: --help needs none of it

    with config_error_at("report.runs"):
        sides, notes = sides_of(config.runs)
        if not sides:
            raise ValueError("; ".join(notes) or "no run there has a finished evaluation. Run pipelines.evaluate first")
        if len(sides) > len(ascii_uppercase):
            raise ValueError(f"{len(sides)} runs are too many for one page. Give at most {len(ascii_uppercase)}.")
        runs = [Run(side, letter) for side, letter in zip(sides, ascii_uppercase, strict=False)]
        samples = samples_of(runs)
        differences = comparisons([each for run in config.runs for each in reports_of(run)])
    with config_error_at("report.output"):
        make_folder(output := Path(config.output).absolute().parent)

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        runs=runs,
        verdicts=verdicts_of(sides),
        notes=notes,
        samples=samples,
        curves=chart_svg(curves_chart, {name: {run.label: run.curve(name) for run in runs} for name in CURVES}),
        sweep=chart_svg(sweep_chart, {run.label: run.figures["sweep"] for run in runs}, {}),
        error_budget=chart_svg(error_budget_chart, {run.label: run.error_budget for run in runs}),
        differences=differences,
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    path = output / Path(config.output).name
    with config_error_at("report.output"):
        write_atomically(path, page.encode())
    logged = [run.label for run in runs if config.track and run.log(path)]
    to = f", logged to {', '.join(logged)}" if logged else ""
    return Answer({"report": str(path), "logged": logged}, f"report: {path}, {path.stat().st_size / 1e6:.1f} MB{to}")


class Run:
    """One side of the report: its evaluation, what that evaluated, and where it came from."""

    def __init__(self, side: Side, letter: str) -> None:
        self.side, self.letter, self.label = side, letter, f"{letter}: {side.name}"
        self.folder, self.figures = side.own.folder, side.own.figures
        found = ancestors_by_folder(self.folder)
        #: The evaluation's stage and those that it came from, in their order.
        self.stages = {name: found[name] for name in STAGE_FOLDERS if name in found}
        error_budget = self.figures.get("error_budget") or {"encoded": self.figures.get("floor", {})}
        #: Metrics after each step, the samples' last.
        self.error_budget = error_budget | metrics_of_samples(side.own.sweep, side.guidance)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Return updates and values of one metric of the trainings, thinned; of the U-Net where it has it."""
        for stage in ("train_unet", "train_vae"):
            records = read_spool_backwards(self.stages[stage].folder / METRICS) if stage in self.stages else ()
            points: dict[int, float] = {}
            for row in records:
                if name in row:  # the newest of an update that was repeated after a rewind
                    points.setdefault(int(row.get("update", row.get("step", 0))), row[name])
            if points:
                updates = sorted(points)[:: max(1, len(points) // 200)]
                return updates, [points[update] for update in updates]
        return [], []

    def picture(self, name: str) -> str:
        """Return a picture of the evaluation as a data URI, "" where there is none."""
        path = self.folder / name
        return data_uri(path.read_bytes(), "png") if path.exists() else ""

    @property
    def grids(self) -> dict[int, Path]:
        """Sample grids of the training by update."""
        paths = self.stages["train_unet"].folder.glob("grids/samples-*.png") if "train_unet" in self.stages else ()
        return {int(path.stem.rsplit("-", 1)[1]): path for path in paths}

    def log(self, path: Path) -> bool:
        """Log the page to the evaluation's run in MLflow; a store that is not there is said and costs nothing else."""
        try:
            uri = uri_of(RunIdentity.read(self.folder))
            if uri == OFFLINE:
                return False
            Sender(self.folder, MlflowStore(uri)).send_file(path)
        except (StoreUnavailableError, ValueError, OSError) as error:
            log.warning(f"{self.folder}: the report is not logged to MLflow ({error})")
            return False
        return True


def samples_of(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the same seeds of all runs side by side, as many as the page has room for, and grids of their trainings.

    ``seeds``, their number; ``heads``, class or caption of each; ``strips``, by guidance and run's label the seeds in a
    row as a data URI; ``grids``, by update and run's label.
    """
    scales = sorted(set.intersection(*(set(run.side.own.sweep) for run in runs)))
    samples = {run.label: read_samples(run.folder, scales) for run in runs}
    seeds = min((len(of_scale) for of_run in samples.values() for of_scale in of_run.values()), default=0)
    widths = [image.width for of_run in samples.values() for of_scale in of_run.values() for image, _ in of_scale]
    seeds = min(seeds, max(1, MOST_PIXELS // max(widths, default=1)))
    while True:
        strips = {
            scale: {label: strip([image for image, _ in of_run[scale][:seeds]]) for label, of_run in samples.items()}
            for scale in scales
        }
        size = sum(len(uri) for of_scale in strips.values() for uri in of_scale.values())
        if size < PICTURE_BYTES * 2 / 3 or seeds <= 1:
            break
        seeds //= 2
    heads = [head for _, head in samples[runs[0].label][scales[0]][:seeds]] if scales else []
    return {"seeds": seeds, "heads": heads, "strips": strips, "grids": common_grids(runs, room=PICTURE_BYTES - size)}


def common_grids(runs: Sequence[Run], *, room: int) -> dict[int, dict[str, str]]:
    """Return the grids of the updates that all trainings have drawn, the last ones first in room."""
    updates = sorted(set.intersection(*(set(run.grids) for run in runs)))
    spread = [updates[place] for place in np.linspace(0, len(updates) - 1, min(MOST_GRIDS, len(updates))).astype(int)]
    found: dict[int, dict[str, str]] = {}
    for update in reversed(spread):
        of_update = {run.label: encoded(Image.open(run.grids[update]).convert("RGB")) for run in runs}
        room -= sum(map(len, of_update.values()))
        if room < 0:
            break
        found[update] = of_update
    return dict(sorted(found.items()))


def read_samples(folder: Path, scales: Sequence[float]) -> dict[float, list[tuple[Image.Image, str]]]:
    """Return the first samples of each guidance with their class or caption, by index.

    Raises:
        BadSample: A tar is damaged.
    """
    classes, found = read_manifest(folder).classes, {key_prefix(scale): dict[int, Any]() for scale in scales}
    for path in sorted(folder.glob("samples-*.tar")):
        with open(path, "rb") as file, mapped(file) as tar:
            samples = scan_shard(tar, shard=path.name)
            if faults := [fault for sample in samples for fault in sample.faults]:
                raise faults[0]
            for sample in samples:
                kind, _, index = sample.key.rpartition("-")
                if kind in found and int(index) < MOST_SEEDS:
                    members = {suffix: tar[at.offset : at.offset + at.size] for suffix, at in sample.members.items()}
                    name = classes[int(members["cls"])] if "cls" in members else ""
                    image = Image.open(io.BytesIO(members["png"])).convert("RGB")
                    found[kind][int(index)] = (image, members.get("txt", name.encode()).decode())
    return {scale: [image for _, image in sorted(found[key_prefix(scale)].items())] for scale in scales}


def strip(images: Sequence[Image.Image]) -> str:
    """Return images side by side as one data URI."""
    return encoded(Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))) if images else ""


def encoded(image: Image.Image) -> str:
    """Return an image as a data URI: small ones without loss, those beyond WebP's limit scaled down."""
    buffer = io.BytesIO()
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))  # others stay as they are
    image.save(buffer, format="WEBP", lossless=image.height <= SMALL, quality=85)
    return data_uri(buffer.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


if __name__ == "__main__":
    sys.exit(main())
