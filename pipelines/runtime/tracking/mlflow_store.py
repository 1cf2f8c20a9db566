"""MLflow store: one stage's run, with its experiment and the pipeline's run above it. The only door to mlflow.

mlflow is imported when a store is first connected, so that nothing else waits for it.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from data.files import FolderLock, temporary_beside
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import RunIdentity, network_file_system, sqlite_file

log = logging.getLogger("latentline.tracking")

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


class Metric(NamedTuple):
    """One named number of a record."""

    name: str
    value: float
    milliseconds: int  # Unix time
    step: int


class RefusedError(Exception):
    """The store will never take this metric or event."""


class MlflowStore:
    """One stage's run in an MLflow store. Every method may be called again with the same content, and stores it once.

    Methods raise `RefusedError` for what no repetition mends, anything else for what may pass. ``name`` is the URI,
    without credentials.
    """

    def __init__(self, uri: str) -> None:
        for key, value in CLIENT_SETTINGS.items():  # before mlflow is imported, which reads some of them then
            os.environ.setdefault(key, value)
        self.name = without_credentials(uri)
        self._uri = uri
        self._client: Any = None  # until `connect`, which also sets the ids that the other methods need

    def connect(self, identity: RunIdentity) -> str:
        """Find or make the experiment, the pipeline's run and, below it, the stage's run."""
        self._open(identity.experiment)
        user = psutil.Process().username()
        origin = {"pipeline_id": identity.pipeline_id, "mlflow.user": user, "mlflow.source.type": "LOCAL"}
        self._parent_id = self._find_or_make_run(
            found_by={"pipeline_id": identity.pipeline_id, "stage": "pipeline"},
            name=identity.pipeline_name,
            started=identity.pipeline_started,
            tags={**origin, "mlflow.source.name": "launch/pipeline.sh"},
        )
        self._stage = identity.stage
        self._is_result = "/evaluation-" not in identity.name  # which are further evaluations of the same model
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

    def tag_experiment(self, experiment: str, key: str, value: str) -> None:
        """Find or make the experiment, and tag it: the least that a store must take."""
        self._open(experiment)
        self._client.set_experiment_tag(self._experiment, key, value)

    def _open(self, experiment: str) -> None:
        from mlflow.tracking import MlflowClient

        with _existing_database(self._uri):
            self._client = MlflowClient(tracking_uri=self._uri)
            self._experiment = self._find_or_make_experiment(experiment)

    def set_status(self, status: str, *, since: float) -> None:
        """Set the state of the run, and of the pipeline, which is in the state of the stage that changed last."""
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

    def log_metrics(self, metrics: Sequence[Metric]) -> None:
        """Send at most 1000 metrics; MLflow knows those again that it has, by their time, step and value."""
        from mlflow import entities

        sent = [entities.Metric(_valid_key(each.name), each.value, each.milliseconds, each.step) for each in metrics]
        with _refused_errors():
            self._client.log_batch(self._run_id, metrics=sent, synchronous=True)
            # A pipeline's run in MLflow shows its result, so that pipelines compare without being unfolded.
            results = [metric for metric in sent if metric.key.startswith(RESULT_PREFIX)]
            if results and self._is_result:
                self._client.log_batch(self._parent_id, metrics=results, synchronous=True)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags, each cut to what MLflow takes."""
        from mlflow.entities import RunTag

        self._log_texts(
            self._run_id, "tags", [RunTag(_valid_key(key), str(value)[:LONGEST_TAG]) for key, value in tags.items()]
        )

    def log_params(self, params: Mapping[str, str]) -> None:
        """Add parameters to the run, and below the stage's name to the pipeline.

        MLflow's parameters never change; one that did between two starts becomes the tag ``changed.KEY``.
        """
        params = {_valid_key(key): value[:LONGEST_PARAM] for key, value in params.items()}
        known = self._add_params(self._run_id, params)
        self.log_tags({f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value})
        self._add_params(self._parent_id, {_valid_key(f"{self._stage}.{key}"): value for key, value in params.items()})

    def _add_params(self, run_id: str, params: Mapping[str, str]) -> dict[str, str]:
        """Add those parameters that a run does not have; return those that it had."""
        from mlflow.entities import Param

        known: dict[str, str] = self._client.get_run(run_id).data.params
        self._log_texts(run_id, "params", [Param(key, value) for key, value in params.items() if key not in known])
        return known

    def _log_texts(self, run_id: str, kind: str, texts: Sequence[Any]) -> None:
        for start in range(0, len(texts), TEXTS_PER_REQUEST):
            with _refused_errors():
                self._client.log_batch(run_id, **{kind: texts[start : start + TEXTS_PER_REQUEST]}, synchronous=True)

    def log_input(self, name: str, *, digest: str, source: str, context: str) -> None:
        """Name a data set that the run reads. MLflow's digests are short; the whole one stands in the source."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name, digest[:SHORT_DIGEST], "local", json.dumps({"uri": source, "digest": digest}))
        with _refused_errors():
            self._client.log_inputs(self._run_id, [DatasetInput(data, [InputTag("mlflow.data.context", context)])])

    def log_artifact(self, path: Path, *, folder: str) -> None:
        """Send a file."""
        with _refused_errors():
            self._client.log_artifact(self._run_id, str(path), folder or None)

    def log_text(self, name: str, text: str) -> None:
        """Send a text as the file ``name``."""
        with _refused_errors():
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
        location = (database.parent / "mlartifacts" / _valid_key(name)).absolute().as_uri() if database else None
        if (found := self._client.get_experiment_by_name(name)) is None:
            try:
                tags = {"mlflow.experimentKind": "custom_model_development"}
                return str(self._client.create_experiment(name, artifact_location=location, tags=tags))
            except MlflowException as error:  # another run may have made it meanwhile
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
def _refused_errors() -> Iterator[None]:
    """Raise RefusedError for what MLflow will never take."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code in REFUSALS:
            raise RefusedError(str(error)) from None
        raise


@contextlib.contextmanager
def _existing_database(uri: str) -> Iterator[None]:
    """Hold the lock under which an sqlite store is made and migrated, and make it where it does not exist."""
    from mlflow import MlflowClient

    database = sqlite_file(uri)
    if database is None:
        yield
        return
    if kind := network_file_system(database):
        raise ValueError(f"{database} is on a network folder ({kind}), where sqlite corrupts")
    lock = FolderLock(database.parent / "mlartifacts")
    lock.acquire(patience_seconds=60)
    with lock:
        for left in database.parent.glob(f".{database.name}.*.tmp*"):  # by makers that were killed
            left.unlink(missing_ok=True)
        if not database.exists():
            log.info(f"MLflow: making the database {database} (once; it takes a few seconds, in the background).")
            # Under a temporary name, then renamed: one that is killed half-made is never opened again.
            temporary = temporary_beside(database)
            try:
                MlflowClient(tracking_uri=f"sqlite:///{temporary}").search_experiments(max_results=1)
                temporary.rename(database)
            finally:
                temporary.unlink(missing_ok=True)
        yield


def _valid_key(key: str) -> str:
    """Return ``key`` with what MLflow's names may not hold replaced by ``_``."""
    return re.sub(r"[^\w\-./ :]", "_", key)[:LONGEST_KEY]
