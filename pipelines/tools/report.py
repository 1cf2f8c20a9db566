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
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from data.files import make_folder, read_json, write_atomically
from data.manifest import Manifest, read_manifest
from pipelines.evaluation.pictures import curves_svg, error_budget_svg, sweep_svg
from pipelines.evaluation.replicates import Side
from pipelines.evaluation.samples import key_prefix
from pipelines.runtime.config.command_line import Answer, run_tool
from pipelines.runtime.config.errors import config_error_at
from pipelines.runtime.config.stage_config import STAGE_FOLDERS, CommandConfig
from pipelines.runtime.tracking.identity import OFFLINE, RunIdentity
from pipelines.runtime.tracking.mlflow_store import MlflowStore
from pipelines.runtime.tracking.sender import Sender, StoreUnavailableError
from pipelines.runtime.tracking.spool import METRICS, read_spool_backwards
from pipelines.tools.compare import SHORT_DIGEST, Verdict, comparison, reports_of, sides_of
from pipelines.tools.sync import uri_of

log = logging.getLogger("latentline.report")

TEMPLATE = Path(__file__).parents[1] / "evaluation" / "report.html"
MOST_SEEDS = 16  # samples that are shown of each guidance
MOST_GRIDS = 6  # of the training that are shown of each run
PICTURE_BYTES = 3_500_000  # of all pictures together; fewer seeds are shown where they are larger
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
    with config_error_at("report.output"):
        make_folder(output := Path(config.output).absolute().parent)

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE.read_text()).render(
        runs=runs,
        verdicts=[Verdict.of(sides[0], side, rivals=len(sides) - 1) for side in sides[1:]],
        notes=notes,
        samples=Samples.of(runs),
        curves=curves_svg({name: {run.label: run.curve(name) for run in runs} for name in CURVES}),
        sweep=sweep_svg({run.label: run.figures["sweep"] for run in runs}),
        error_budget=error_budget_svg({run.label: run.error_budget for run in runs}),
        differences=differences(config.runs),
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    path = output / Path(config.output).name
    with config_error_at("report.output"):
        write_atomically(path, page.encode())
    logged = [run.label for run in runs if config.track and run.log(path)]
    text = f"report: {path}, {path.stat().st_size / 1e6:.1f} MB" + (
        f", logged to {', '.join(logged)}" if logged else ""
    )
    return Answer({"report": str(path), "logged": logged}, text)


@dataclass(frozen=True)
class Run:
    """One side of the report: the evaluation, what it evaluated, and where that came from."""

    side: Side
    letter: str

    @property
    def folder(self) -> Path:
        """Folder of the evaluation."""
        return self.side.evaluations[0].folder

    @property
    def label(self) -> str:
        """What the run is called on the page."""
        return f"{self.letter}: {self.side.name}"

    @property
    def figures(self) -> Mapping[str, Any]:
        """``metrics.json``."""
        return self.side.evaluations[0].figures

    @property
    def error_budget(self) -> dict[str, Mapping[str, Any]]:
        """Metrics after each step, the samples' last."""
        steps = dict(self.figures.get("error_budget") or {"encoded": self.figures.get("floor", {})})
        sweep = self.side.evaluations[0].sweep
        return steps | {
            f"guidance {scale:g}": sweep[scale] for scale in sorted({1.0, self.side.guidance} & sweep.keys())
        }

    @property
    def budget_names(self) -> list[str]:
        """Names of the figures of the error budget."""
        return list(dict.fromkeys(n for each in self.error_budget.values() for n in each if n != "guidance"))

    @property
    def samples_metrics(self) -> Mapping[str, Any]:
        """Figures of the samples at the guidance that is judged."""
        return self.side.evaluations[0].sweep[self.side.guidance]

    @cached_property
    def stages(self) -> dict[str, tuple[Path, Manifest]]:
        """Folder and manifest of the evaluation and of all that it came from, as far as they are still there."""
        found: dict[str, tuple[Path, Manifest]] = {}
        ahead = [self.folder]
        while ahead:
            folder = ahead.pop(0)
            try:
                manifest = read_manifest(folder)
            except (OSError, ValueError):
                continue
            if manifest.stage not in found:
                found[manifest.stage] = (folder, manifest)
                ahead += [Path(place) for place in manifest.provenance.get("inputs", {}).values() if place]
        return {name: found[name] for name in STAGE_FOLDERS if name in found}

    @property
    def lineage(self) -> list[dict[str, str]]:
        """A row for each stage: digest, folder, commands, machine, time."""
        return [_lineage_row(name, folder, manifest) for name, (folder, manifest) in self.stages.items()]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return updates and values of one metric of the trainings, thinned; of the U-Net where it has it."""
        for stage in ("train_unet", "train_vae"):
            path = self.stages[stage][0] / METRICS if stage in self.stages else None
            if path is not None and path.exists():
                points = {_step(row): row[name] for row in read_spool_backwards(path) if name in row}
                if points:
                    updates = sorted(points)
                    thinned = updates[:: max(1, len(updates) // 200)]
                    return [float(update) for update in thinned], [points[update] for update in thinned]
        return [], []

    def picture(self, name: str) -> str:
        """Return a picture of the evaluation as a data URI, "" where there is none."""
        path = self.folder / name
        return data_uri(path.read_bytes(), "png") if path.exists() else ""

    @property
    def grids(self) -> dict[int, Path]:
        """Sample grids of the training by update."""
        folder = self.stages["train_unet"][0] / "grids" if "train_unet" in self.stages else Path("none")
        return {int(path.stem.rsplit("-", 1)[1]): path for path in sorted(folder.glob("samples-*.png"))}

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


@dataclass(frozen=True)
class Samples:
    """The same seeds of all runs side by side, and grids of their trainings."""

    seeds: int
    heads: Sequence[str]  # class or caption of each seed
    strips: Mapping[float, Mapping[str, str]]  # guidance -> run's label -> the seeds in a row, as a data URI
    grids: Mapping[int, Mapping[str, str]]  # update -> run's label -> grid

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Samples":
        """Read the samples, as many as the page has room for."""
        scales = sorted(set.intersection(*(set(run.side.evaluations[0].sweep) for run in runs)))
        images = {run.label: {scale: read_samples(run.folder, scale) for scale in scales} for run in runs}
        seeds = min((len(found) for of_run in images.values() for found in of_run.values()), default=0)
        first = next(iter(next(iter(images.values())).values()), [])
        while True:
            strips = {
                scale: {label: strip([image for image, _ in of_run[scale][:seeds]]) for label, of_run in images.items()}
                for scale in scales
            }
            size = sum(len(uri) for of_scale in strips.values() for uri in of_scale.values())
            if size < PICTURE_BYTES * 2 / 3 or seeds <= 1:
                break
            seeds //= 2
        return cls(seeds, [head for _, head in first[:seeds]], strips, common_grids(runs, room=PICTURE_BYTES - size))


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


def read_samples(folder: Path, scale: float) -> list[tuple[Image.Image, str]]:
    """Return the first samples of a guidance with their class or caption, by index."""
    found: dict[str, dict[str, bytes]] = {}
    prefix = f"{key_prefix(scale)}-"
    for path in sorted(folder.glob("samples-*.tar")):
        with tarfile.open(path) as tar:
            for member in islice(_of_first_samples(tar, prefix), 8 * MOST_SEEDS):
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
        if len(found) >= MOST_SEEDS:
            break
    classes, images = read_manifest(folder).classes, []
    for members in (found[key] for key in sorted(found)[:MOST_SEEDS]):
        label = int(members.get("cls", b"-1"))
        head = classes[label] if 0 <= label < len(classes) else ""
        images.append(
            (Image.open(io.BytesIO(members["png"])).convert("RGB"), members.get("txt", head.encode()).decode())
        )
    return images


def _of_first_samples(tar: tarfile.TarFile, prefix: str) -> Iterator[tarfile.TarInfo]:
    for member in tar:
        if member.name.startswith(prefix) and int(member.name.removeprefix(prefix).partition(".")[0]) < MOST_SEEDS:
            yield member


def strip(images: Sequence[Image.Image]) -> str:
    """Return images side by side as one data URI."""
    return encoded(Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))) if images else ""


def encoded(image: Image.Image) -> str:
    """Return an image as a data URI: small ones without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=image.height <= SMALL, quality=85)
    return data_uri(buffer.getvalue(), "webp")


def data_uri(content: bytes, kind: str) -> str:
    """Return a picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def differences(runs: Sequence[str]) -> list[str]:
    """Return the stages in which the runs differ, each as a table in text."""
    reports = [each for run in runs for each in reports_of(run)]
    stages = dict.fromkeys(each.stage for each in reports)
    return [comparison([each for each in reports if each.stage == stage]) for stage in stages]


def _step(row: Mapping[str, Any]) -> int:
    return int(row.get("update", row.get("step", 0)))


def _lineage_row(name: str, folder: Path, manifest: Manifest) -> dict[str, str]:
    about = manifest.provenance
    outcome = read_json(folder / "outcome.json", mend="Remove it.") if (folder / "outcome.json").exists() else {}
    identity = RunIdentity.read(folder) if (folder / "run.json").exists() else None
    hours = (about["ended"] - about["began"]) / 3600 if {"began", "ended"} <= about.keys() else 0.0
    processes = int(about.get("world_size", 1))
    return {
        "stage": name,
        "digest": manifest.digest[:SHORT_DIGEST],
        "folder": str(folder),
        "command": outcome.get("resume_command", ""),
        "mlflow": identity.mlflow_run_id if identity else "",
        "machine": f"{processes} process(es), {about.get('hardware', '')}, torch {about.get('torch', '')}",
        "time": f"{60 * hours:.1f} min" if hours < 2 else f"{hours:.1f} h",
        "cost": f"{hours * processes:.3g}",
        "code": str(about.get("code_version", ""))[:SHORT_DIGEST],
    }


if __name__ == "__main__":
    sys.exit(main())
