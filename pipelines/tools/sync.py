"""Send what runs have recorded to MLflow, once each, whatever happened before.

    python -m pipelines.tools.sync runs/demo                 every stage of a pipeline
    python -m pipelines.tools.sync runs/demo/unet --follow   go on sending until that run ends

Reads a stage's spools (``pipelines.runtime.tracking.spool``) from where the last sender came, and writes
``tracking/sent.json`` and the MLflow run's id into ``run.json``. A run whose process is gone without a word is closed as KILLED. Sending
something again stores nothing twice, so a sender may die at any moment. A running stage has a sender of its own.
Exit code 0: everything is sent. 1: something is left, since the store does not answer. 2: there is nothing to send.
"""

import argparse
import contextlib
import getpass
import json
import os
import re
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import FolderLock, temporary_beside
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import (
    OFFLINE,
    RUN_FILE,
    RunIdentity,
    network_file_system,
    sqlite_file,
)
from pipelines.runtime.tracking.sender import (
    ORPHAN_SECONDS,
    Metric,
    RefusedError,
    Sender,
    StoreSilentError,
    is_running,
    say,
    send_once,
    send_until_ended,
    send_while_owned,
)
from pipelines.runtime.tracking.spool import SENDER_LOCK, Sent, unsent

CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the sender repeats by itself, and wants to know
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
TEXTS_PER_REQUEST = 100  # MLflow's limits
LONGEST_KEY, LONGEST_PARAM, LONGEST_TAG = 250, 6000, 8000  # characters
SHORT_DIGEST = 16  # characters that MLflow's pages show; it takes 36
RESULT_PREFIX = "eval/"
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # of MLflow's error codes, those that no repetition mends


class MlflowStore:
    """One stage's run in an MLflow store (see `pipelines.runtime.tracking.sender.Store`)."""

    def __init__(self, uri: str, tell: Callable[[str], None] = say) -> None:
        """``tell`` takes what the user should know."""
        self._tell = tell
        self.name = without_credentials(uri)
        self._uri = uri
        self._client: Any = None
        self._experiment = ""
        self._run_id = ""
        self._parent_id = ""
        self._stage = ""
        self._gives_the_result = False

    def connect(self, identity: RunIdentity) -> str:
        """Find or make the experiment, the pipeline's run and, below it, the stage's run."""
        from mlflow.tracking import MlflowClient

        with making_the_database(self._uri, self._tell):
            self._client = MlflowClient(tracking_uri=self._uri)
            self._experiment = self._find_or_make_experiment(identity.experiment)
        origin = {
            "pipeline_id": identity.pipeline_id,
            "mlflow.user": user_name(),
            "mlflow.source.type": "LOCAL",
        }
        self._parent_id = self._find_or_make_run(
            found_by={"pipeline_id": identity.pipeline_id, "stage": "pipeline"},
            name=identity.pipeline_name,
            started=identity.pipeline_started,
            tags={**origin, "mlflow.source.name": "launch/pipeline.sh"},
        )
        self._stage = identity.stage
        self._gives_the_result = "/evaluation-" not in identity.name  # which are further looks at the same model
        self._run_id = self._find_or_make_run(
            found_by={"local_run_id": identity.run_id},
            name=identity.name,
            started=identity.started,
            tags={
                **origin,
                "stage": identity.stage,
                "mlflow.parentRunId": self._parent_id,
                "mlflow.source.name": f"pipelines.{identity.stage}",
            },
        )
        return self._run_id

    def set_status(self, status: str, *, since: float) -> None:
        """Set the state of the run, and of the pipeline, which is in the state of the stage that spoke last."""
        milliseconds = int(1000 * since)
        runs = [self._run_id]
        if milliseconds >= int(self._client.get_run(self._parent_id).data.tags.get("status_since", 0)):
            self._client.set_tag(self._parent_id, "status_since", str(milliseconds))
            runs.append(self._parent_id)
        for run_id in runs:
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status, milliseconds)

    def log_metrics_batch(self, points: Sequence[Metric]) -> None:
        """Send at most 1000 points; MLflow knows those again that it has, by their time, step and value."""
        from mlflow.entities import Metric

        metrics = [Metric(valid_key(point.key), point.value, point.milliseconds, point.step) for point in points]
        with refusals():
            self._client.log_batch(self._run_id, metrics=metrics, synchronous=True)
            # A pipeline's row in MLflow shows its result, so that pipelines compare without being unfolded.
            results = [metric for metric in metrics if metric.key.startswith(RESULT_PREFIX)]
            if results and self._gives_the_result:
                self._client.log_batch(self._parent_id, metrics=results, synchronous=True)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, each cut to what MLflow takes."""
        from mlflow.entities import RunTag

        texts = [RunTag(valid_key(key), str(value)[:LONGEST_TAG]) for key, value in tags.items()]
        for start in range(0, len(texts), TEXTS_PER_REQUEST):
            with refusals():
                self._client.log_batch(self._run_id, tags=texts[start : start + TEXTS_PER_REQUEST], synchronous=True)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Add parameters to the run, and below the stage's name to the pipeline.

        MLflow's parameters never change; one that did between two starts becomes the tag ``changed.KEY``.
        """
        known = self._client.get_run(self._run_id).data.params
        params = {valid_key(key): value[:LONGEST_PARAM] for key, value in params.items()}
        self._add_params(self._run_id, {key: value for key, value in params.items() if key not in known})
        self.log_tags({f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value})
        settled = self._client.get_run(self._parent_id).data.params
        whole = {valid_key(f"{self._stage}.{key}"): value for key, value in params.items()}
        self._add_params(self._parent_id, {key: value for key, value in whole.items() if key not in settled})

    def _add_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        texts = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(texts), TEXTS_PER_REQUEST):
            with refusals():
                self._client.log_batch(run_id, params=texts[start : start + TEXTS_PER_REQUEST], synchronous=True)

    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Name a data set that the run reads. MLflow's digests are short; the whole one stands in the source."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name, digest[:SHORT_DIGEST], "local", json.dumps({"uri": source, "digest": digest}))
        with refusals():
            self._client.log_inputs(self._run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_artifact(self, path: Path, *, folder: str) -> None:
        """Send a file."""
        with refusals():
            self._client.log_artifact(self._run_id, str(path), folder or None)

    def log_text(self, name: str, text: str) -> None:
        """Send a text as the file ``name``."""
        with refusals():
            self._client.log_text(self._run_id, text, name)

    def log_image(self, key: str, path: Path, *, step: int, milliseconds: int) -> None:
        """Send a picture and its preview under the names by which MLflow's pages find keys and steps.

        ``MlflowClient.log_image`` takes a new random name at every call: sending again would show a picture twice.
        """
        from PIL import Image, UnidentifiedImageError

        unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{self._run_id} {key} {step} {milliseconds}")
        stem = f"{key.replace('/', '~')}+step+{step}+timestamp+{milliseconds}+{unique}"
        with tempfile.TemporaryDirectory() as folder:
            whole, preview = Path(folder, f"{stem}.png"), Path(folder, f"{stem}+compressed.webp")
            shutil.copyfile(path, whole)
            try:
                with Image.open(path) as image:
                    image.thumbnail((256, 256))
                    image.save(preview)
            except UnidentifiedImageError as error:
                raise RefusedError(str(error)) from None
            self.log_artifact(whole, folder="images")
            self.log_artifact(preview, folder="images")
        self.log_tags({"mlflow.loggedImages": "true"})

    def log_model(self, name: str, folder: Path) -> None:
        """Send weights as a logged model of the run; one that a broken connection left unfinished is finished."""
        from mlflow.entities import LoggedModelOutput

        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
        if len(files) == 1:
            raise FileNotFoundError(f"no *.safetensors in {folder}")
        found = self._client.search_logged_models([self._experiment], f"source_run_id = '{self._run_id}'")
        model = next((model for model in found if model.name == name), None)
        if model is None:
            model = self._client.create_logged_model(
                self._experiment,
                name=name,
                source_run_id=self._run_id,
                model_type=self._stage,
                params=self._client.get_run(self._run_id).data.params,
            )
        for file in files:
            self._client.log_model_artifact(model.model_id, str(file))
        self._client.finalize_logged_model(model.model_id, "READY")
        outputs = self._client.get_run(self._run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else ())}:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=0)])

    def _find_or_make_experiment(self, name: str) -> str:
        """Return the experiment's id. Artefacts of an sqlite store lie beside the database."""
        from mlflow.exceptions import MlflowException

        database = sqlite_file(self._uri)
        location = (database.parent / "mlartifacts" / valid_key(name)).absolute().as_uri() if database else None
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                tags = {"mlflow.experimentKind": "custom_model_development"}
                return str(self._client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException as error:
                found = self._client.get_experiment_by_name(name)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
        return str(found.experiment_id)

    def _find_or_make_run(
        self, *, found_by: Mapping[str, str], name: str, started: float, tags: Mapping[str, str]
    ) -> str:
        """Return the id of the oldest run that bears the tags ``found_by``."""
        condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in found_by.items())
        order = ["attributes.start_time ASC"]
        if found := self._client.search_runs([self._experiment], condition, order_by=order, max_results=1):
            return str(found[0].info.run_id)
        made = self._client.create_run(self._experiment, int(1000 * started), {**tags, **found_by}, run_name=name)
        return str(made.info.run_id)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Tell what MLflow will never take from what it may take later."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in REFUSALS:
            raise RefusedError(str(error)) from None
        raise


@contextlib.contextmanager
def making_the_database(uri: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time make an sqlite store, and say that it takes a moment."""
    database = sqlite_file(uri)
    if database is None:
        yield
        return
    if kind := network_file_system(database):
        raise ValueError(f"{database} is on a network folder ({kind}), where sqlite corrupts")
    lock = FolderLock(database.parent / "mlartifacts")
    lock.acquire(patience_seconds=60)
    try:
        if not database.exists():
            tell(f"MLflow: making the database {database} (once; it takes a few seconds, and the run does not wait).")
            make_database(database)
        yield
    finally:
        lock.release()


def make_database(path: Path) -> None:
    """Make an sqlite store under a temporary name and rename it: one that is killed half-made is never opened again."""
    from mlflow import MlflowClient

    temporary = temporary_beside(path)
    try:
        MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments(max_results=1)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def valid_key(key: str) -> str:
    """Return ``key`` with what MLflow's names may not hold replaced by ``_``."""
    return re.sub(r"[^\w\-./ :]", "_", key)[:LONGEST_KEY]


def user_name() -> str:
    """Return the user's name; containers may run as a number that has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.tools.sync", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="a stage's folder, or a folder above some")
    parser.add_argument("--tracking-uri", default="", help="another store than the one that the run was started with")
    parser.add_argument("--follow", action="store_true", help="go on sending until the run ends")
    parser.add_argument("--with-owner", action="store_true", help=argparse.SUPPRESS)  # how a stage starts its sender
    options = parser.parse_args(argv)
    os.environ.update({key: os.environ.get(key, value) for key, value in CLIENT_SETTINGS.items()})
    if options.with_owner:
        return send_while_owned(options.paths[0], lambda tell: MlflowStore(os.environ["MLFLOW_TRACKING_URI"], tell))
    folders = [folder for path in options.paths for folder in run_folders(path)]
    if not folders:
        print(f"No run lies in {', '.join(map(str, options.paths))}: no {RUN_FILE} there or below.", file=sys.stderr)
        return 2
    if options.follow and len(folders) > 1:
        print(f"--follow takes one run, and these are {len(folders)}: {', '.join(map(str, folders))}", file=sys.stderr)
        return 2
    return max(sync(folder, tracking_uri=options.tracking_uri, follow=options.follow) for folder in folders)


def run_folders(path: Path) -> list[Path]:
    """Return the stage folders at ``path`` or at most two levels below (runs/, runs/NAME, runs/NAME/STAGE)."""
    return sorted(file.parent for depth in ("", "*/", "*/*/") for file in path.glob(depth + RUN_FILE))


def sync(folder: Path, *, tracking_uri: str, follow: bool) -> int:
    """Send one run and say how it went; return the exit code."""
    uri = tracking_uri or uri_of(RunIdentity.read(folder))
    if uri == OFFLINE:
        print(f"{folder}: was run with tracking_uri = {OFFLINE!r}; name a store by --tracking-uri.", file=sys.stderr)
        return 2
    lock = FolderLock(folder / SENDER_LOCK)
    try:
        lock.acquire(patience_seconds=0 if is_running(folder) else 2 * ORPHAN_SECONDS)
    except BlockingIOError:
        print(f"{folder}: the sender of its running stage is at it.")
        return 0
    try:
        sender = Sender(folder, MlflowStore(uri))
        killed = send_until_ended(sender) if follow else send_once(sender)
    except StoreSilentError as silent:
        print(f"{folder}: {unsent(folder, Sent.read(folder))} entries are left. {silent}", file=sys.stderr)
        return 1
    finally:
        lock.release()
    notes = ["closed as KILLED" * killed, f"{sender.sent.refused} entries refused" * bool(sender.sent.refused)]
    print("; ".join([f"{folder}: sent to {sender.store.name}", *filter(None, notes)]))
    return 0


def uri_of(identity: RunIdentity) -> str:
    """Return the run's store; credentials, which a run does not record, come with MLFLOW_TRACKING_URI."""
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    return given if without_credentials(given) == identity.tracking_uri else identity.tracking_uri


if __name__ == "__main__":
    sys.exit(main())
