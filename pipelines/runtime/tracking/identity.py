"""Identity of a run: its id in ``run.json``, its pipeline in ``pipeline.json``, and the store that it is sent to."""

import contextlib
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import psutil

from data.files import read_json, write_json, write_json_once
from pipelines.runtime.config.redaction import without_credentials

RUN_FILE = "run.json"
PIPELINE_FILE = "pipeline.json"
AUTO = "auto"
OFFLINE = "offline"
NETWORK_FILE_SYSTEMS = re.compile(r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|9p|afs|fuse\.|wekafs|pvfs|orangefs")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Identity of the run in a stage's folder; kept in ``run.json`` from the first start over all restarts.

    ``tracking_uri`` holds no credentials. ``mlflow_run_id`` is empty until the sender has made or found the run.
    """

    run_id: str
    stage: str
    name: str
    experiment: str
    tracking_uri: str
    pipeline_id: str
    pipeline_name: str
    pipeline_started: float  # Unix seconds
    started: float  # Unix seconds
    mlflow_run_id: str = ""
    curve_density: int = 0  # updates up to which the store gets each; an older version's run was sent all

    def write(self, folder: Path) -> None:
        """Commit ``run.json`` in ``folder``."""
        write_json(folder / RUN_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "RunIdentity":
        """Return the identity of the run in ``folder``.

        Raises:
            FileNotFoundError: No run was ever started there.
            ValueError: ``run.json`` is damaged.
        """
        path, mend = folder / RUN_FILE, "Remove it, and the stage starts a new MLflow run."
        try:
            return cls(**read_json(path, mend=mend))
        except TypeError as error:
            raise ValueError(f"{path} is damaged ({error}). {mend}") from None


def run_identity(folder: Path, *, root: Path, stage: str, experiment: str, uri: str, curve_density: int) -> RunIdentity:
    """Return the identity of the run in ``folder``, made at its first start and continued at every other."""
    pipeline_id, pipeline_started = pipeline_identity(root)
    name = Path(os.path.abspath(root)).name
    uri = without_credentials(uri)
    try:
        old = RunIdentity.read(folder)
        identity = replace(old, experiment=experiment, tracking_uri=uri, curve_density=curve_density)
    except FileNotFoundError:
        old = None
        identity = RunIdentity(
            run_id=uuid.uuid4().hex,
            stage=stage,
            name=f"{name}/{os.path.relpath(folder, root)}",
            experiment=experiment,
            tracking_uri=uri,
            pipeline_id=pipeline_id,
            pipeline_name=name,
            pipeline_started=pipeline_started,
            started=round(time.time(), 3),
            curve_density=curve_density,
        )
    if identity != old:
        identity.write(folder)
    return identity


def pipeline_identity(root: Path) -> tuple[str, float]:
    """Return id and start (Unix seconds) of ``root/pipeline.json``, made by the first stage; by one of several."""
    path = root / PIPELINE_FILE
    root.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json_once(path, {"pipeline_id": uuid.uuid4().hex, "created": round(time.time(), 3)})
    mend = "Remove it, and the next stage starts a new pipeline in MLflow."
    pipeline = read_json(path, mend=mend)
    try:
        return str(pipeline["pipeline_id"]), float(pipeline["created"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). {mend}") from None


@contextlib.contextmanager
def pipeline_lock(root: Path) -> Iterator[None]:
    """Lock the search for the parent run among a pipeline's stages, so that they make one and not two."""
    with contextlib.ExitStack() as stack:
        # Goes on without in a stage's folder that was copied alone, and on a file system without locks: two parents are
        # ugly, not wrong.
        with contextlib.suppress(OSError):
            file = stack.enter_context(open(root / PIPELINE_FILE, "rb+"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def store_uri(tracking_uri: str, *, root: Path) -> str:
    """Return the URI of the store: as given, else from MLFLOW_TRACKING_URI, else sqlite beside ``root``.

    Raises:
        ValueError: It is no store that MLflow has, or an sqlite file on a network folder, which such folders corrupt,
            or one whose address leads elsewhere.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "") if tracking_uri == AUTO else tracking_uri
    if not uri:
        beside = Path(os.path.abspath(root)).parent / "mlflow.db"
        uri = f"sqlite:///{beside}"
        if (other := sqlite_file(uri)) != beside:
            raise ValueError(
                f"The MLflow store {beside} would become {other}: in the address of an sqlite store '?' and '%' have "
                f"meanings of their own. Name a store by run.tracking_uri or MLFLOW_TRACKING_URI, set run.tracking_uri "
                f"= {OFFLINE!r}, or choose another run.root."
            )
    if uri != OFFLINE and (uri.startswith("file:") or "://" not in uri) and not uri.startswith("databricks"):
        raise ValueError(
            f"run.tracking_uri = {uri!r} names no store: MLflow keeps no runs in plain folders. Give the address of a "
            f"server (http://HOST:5000), a database (sqlite:///PATH/mlflow.db), {AUTO!r} or {OFFLINE!r}."
        )
    if (database := sqlite_file(uri)) is not None and (kind := network_file_system(database)):
        raise ValueError(
            f"The MLflow store {database} would be an sqlite file on a network folder ({kind}), where sqlite corrupts. "
            "Start `mlflow server` and name it by run.tracking_uri or MLFLOW_TRACKING_URI, or name an sqlite file "
            f"on a local disk, or set run.tracking_uri = {OFFLINE!r} and send later with "
            "`python -m pipelines.tools.sync`."
        )
    return uri


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an sqlite URI; None for other stores."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", uri)
    return Path(unquote(match[1])) if match else None


def network_file_system(path: Path) -> str:
    """Return the type of the network file system that ``path`` lies on (``nfs4``, ``lustre``); empty when it is local.

    ``path`` need not exist yet.
    """
    resolved = path.resolve()
    # The innermost last; of two mounts on one point the later one last, which hides the earlier.
    mounts = sorted(psutil.disk_partitions(all=True), key=lambda mount: len(mount.mountpoint))
    kind = ["", *(mount.fstype for mount in mounts if resolved.is_relative_to(mount.mountpoint))][-1]
    return kind if NETWORK_FILE_SYSTEMS.match(kind) else ""
