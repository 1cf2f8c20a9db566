"""Checks of ``pipelines.tools.doctor`` on one machine. Each check yields (level, text)."""

import contextlib
import fcntl
import hashlib
import os
import platform
import resource
import shutil
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from data.manifest import MANIFEST_NAME, CorpusManifest, digest_of
from models.attention import probe_backend
from pipelines.model.experiment import misfits
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.config.stage_config import STAGE_FOLDERS
from pipelines.runtime.stage.fingerprint import inputs_of
from pipelines.runtime.stage.provenance import REPOSITORY
from pipelines.runtime.tracking.identity import OFFLINE, sqlite_file, store_uri
from pipelines.runtime.tracking.mlflow_store import MlflowStore
from pipelines.runtime.training.memory import device_memory, gib
from pipelines.tools.plan import StageConfigs, StagePlan, facts_of, forecast, manifest_or_none, trainings_of

Level = Literal["ok", "warning", "failed"]
Findings = Iterator[tuple[Level, str]]
ENOUGH_OPEN_FILES = 4_096
ENOUGH_SHARED_MEMORY = 2**30
STORE_SECONDS = 5.0
CODE_FOLDERS = ("pipelines", "models", "data")


def software(device: torch.device) -> Findings:
    """Python, torch, CUDA and the ways in which processes can talk."""
    new = sys.version_info >= (3, 11)
    yield "ok" if new else "failed", f"Python {platform.python_version()}, torch {torch.__version__} on {device}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device).total_memory
        yield "ok", f"{name}, {memory / 2**30:.0f} GiB, capability {major}.{minor}, CUDA {torch.version.cuda}"
        if dist.is_nccl_available():
            yield "ok", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        else:
            yield "failed", "this torch has no NCCL: GPUs cannot talk"
    if dist.is_gloo_available():
        yield "ok", "gloo is there"
    else:
        yield "failed", "this torch has no gloo, by which the ranks agree to stop"


def attention(device: torch.device) -> Findings:
    """The attention backends, forward and backward, against plain arithmetic."""
    types = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    for dtype in types:
        for backend in ("sdpa", "xformers", "math"):
            failure = probe_backend(backend, device=device, dtype=dtype)
            if not failure:
                yield "ok", f"{backend} agrees with plain arithmetic in {dtype}"
            elif backend == "xformers":
                yield "ok", f"xformers cannot be used here ({failure.split(':')[0]}); nothing needs it"
            else:
                yield "failed", f"{backend} in {dtype}: {failure}"


def limits() -> Findings:
    """Open files and shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"; raise it by `ulimit -n {min(hard, 65_536)}`" if soft < ENOUGH_OPEN_FILES else ""
    yield "warning" if advice else "ok", f"{soft} open files{advice}"
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        small = free < ENOUGH_SHARED_MEMORY
        advice = "; NCCL needs it (docker: --shm-size=8g)" if small else ""
        yield "warning" if small else "ok", f"{free / 2**30:.1f} GiB of shared memory{advice}"


def experiment(stages: StageConfigs) -> Findings:
    """Whether the stages suit each other and the corpus, and all extras, weights and encoders are here."""
    found = list(misfits(stages._asdict(), facts_of(stages)))
    yield from (("failed", text) for text in found)
    if not found:
        yield "ok", "the tables suit each other, and what they need is installed"


def workers(threads: int) -> Findings:
    """Processes and their threads against the cores of this machine."""
    cores, processes = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    text = f"{processes} process(es) x {threads} thread(s) on {cores} cores"
    if processes * threads > cores:
        yield "warning", f"{text}: they wait for each other; lower run.threads or start fewer"
    else:
        yield "ok", text


def file_operations(root: Path) -> Findings:
    """What every commit needs of the file system: flush, rename over another file, hard link, lock."""
    there = nearest_folder(root)
    step = "make a folder in"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=there) as name:
            first, second = Path(name) / "first", Path(name) / "second"
            second.write_bytes(b"old")
            step = "flush a file in"
            with open(first, "wb") as file:
                file.write(b"new")
                file.flush()
                os.fsync(file.fileno())
            step = "rename a file over another in"
            first.rename(second)
            if second.read_bytes() != b"new":
                raise OSError("the old file is still there")
            step = "make a hard link in"
            os.link(second, first)
            step = "lock a file in"
            with open(second, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        yield "failed", f"cannot {step} {there}: {error}"
    else:
        yield "ok", f"flush, rename, link and lock work in {there}"


def nearest_folder(root: Path) -> Path:
    """Return ``root``, or what of the way to it is there already: no folder, where ``root`` cannot be made."""
    return next(place for place in (root, *root.absolute().parents) if place.is_symlink() or place.exists())


def free_space(stages: StageConfigs, root: Path) -> Findings:
    """Space under ``run.root`` against what the stages that are not finished will write."""
    plans = {stage: StagePlan(stage=stage, state="") for stage in stages._fields}
    forecast(stages, plans)
    there = nearest_folder(root)
    free = shutil.disk_usage(there).free
    unfinished = [stage for stage, folder in STAGE_FOLDERS.items() if not (root / folder / MANIFEST_NAME).exists()]
    needed = sum(plans[stage].disk_bytes for stage in unfinished)
    text = f"{free / 2**30:.1f} GiB free in {there}, {needed / 2**30:.2f} GiB expected"
    yield "failed" if free < needed else "warning" if free < 2 * needed else "ok", text


def gpu_memory(stages: StageConfigs, *, world_size: int) -> Findings:
    """Memory of a GPU, where there is one, against what each training will take of it."""
    if memory := device_memory():
        plans = {stage: StagePlan(stage=stage, state="") for stage in stages._fields}
        for stage, sketch in forecast(stages, plans).items():
            peak = sketch.peak(sketch.present(devices=world_size), devices=world_size)
            advice = "; `latentline plan` finds settings that fit" if peak > memory else ""
            yield "warning" if advice else "ok", f"{stage}: {gib(peak)} expected of a GPU's {gib(memory)}{advice}"


def mlflow_store(tracking_uri: str, root: Path, *, experiment: str) -> Findings:
    """Whether the store can be reached and written; training does not need it, so only a wrong URI fails."""
    try:
        uri = store_uri(tracking_uri, root=root)
    except ValueError as error:  # sqlite on a network folder among others
        yield "failed", str(error)
        return
    name = without_credentials(uri)
    if uri == OFFLINE:
        yield "ok", "offline: runs are sent later by pipelines.tools.sync"
    elif (database := sqlite_file(uri)) is not None:
        yield sqlite_finding(database)
    elif uri.startswith("http"):
        yield server_finding(uri, experiment=experiment)
    else:
        yield "warning", f"{name} was not tried: only sqlite files and servers are"


def sqlite_finding(database: Path) -> tuple[Level, str]:
    """Whether an sqlite store can be written, or made."""
    if not database.exists():
        there = nearest_folder(database)
        writable = os.access(there, os.W_OK)
        return "ok" if writable else "failed", f"{database} will be made" if writable else f"{there} is not writable"
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=STORE_SECONDS, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        return "warning", f"{database} cannot be written now: {error}"
    return "ok", f"{database} can be written"


def server_finding(uri: str, *, experiment: str) -> tuple[Level, str]:
    """Try an MLflow server: whether it answers, and lets an experiment be made and tagged."""
    name, later = without_credentials(uri), "training works without it, and pipelines.tools.sync sends later"
    try:
        MlflowStore(uri).tag_experiment(experiment, "doctor", socket.gethostname())
    except Exception as error:  # MLflow's, and those of the libraries below it
        return "warning", f"{name} does not take an experiment ({without_credentials(str(error))}); {later}"
    return "ok", f"{name} answers and can be written"


def shards(stages: StageConfigs, *, world_size: int) -> Findings:
    """Whether the work divides among the ranks: shards for encoding, batches for training."""
    for stage, config in trainings_of(stages).items():
        unit = world_size * (config.images_per_device or 1)
        if config.global_batch % unit:
            yield (
                "failed",
                f"{stage}.global_batch = {config.global_batch} is no multiple of {unit} on {world_size} ranks",
            )
        else:
            yield "ok", f"{stage}: {config.global_batch // world_size} images a rank"
    nodes = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    streams = getattr(stages.train_unet.order, "canonical_nodes", nodes)
    if streams % nodes:
        yield (
            "warning",
            f"train_unet.order.canonical_nodes = {streams} does not divide among {nodes} machines: shards are fetched "
            "by several of them",
        )
    corpus = manifest_or_none(inputs_of(stages.encode_latents)["corpus"], CorpusManifest)
    if corpus is not None:
        number = sum(entry.name.endswith(".tar") for entry in corpus.files)
        few = number < world_size
        advice = (
            f"; {world_size - number} ranks will idle, use a smaller prepare_corpus.samples_per_shard" if few else ""
        )
        yield "warning" if few else "ok", f"{number} shards to encode on {world_size} ranks{advice}"


def experiment_digests(stages: StageConfigs) -> dict[str, str]:
    """Return sha256 digests of what must be the same on every rank."""
    code = hashlib.sha256()
    for path in sorted(path for folder in CODE_FOLDERS for path in (REPOSITORY / folder).rglob("*.py")):
        code.update(f"{path.relative_to(REPOSITORY)}\n".encode() + path.read_bytes())
    packages = sorted(f"{found.metadata['Name']}=={found.version}" for found in distributions())
    configs = {stage: config.model_dump(mode="json") for stage, config in stages._asdict().items()}
    return {"configuration": digest_of(configs), "code": code.hexdigest(), "set of packages": digest_of(packages)}
