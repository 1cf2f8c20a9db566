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
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import psutil

from data.files import FolderLock, read_json, sha256_of, temporary_beside
from pipelines.runtime.config.redaction import without_credentials
from pipelines.runtime.tracking.identity import RunIdentity, network_file_system, sqlite_file
from pipelines.runtime.tracking.pages import (
    MODEL_TRAINING,
    PICTURE,
    SHORT_DIGEST,
    RunPage,
    changed_note,
    page_of,
    pages,
    pipeline_note,
    pipeline_status,
    run_note,
)
from pipelines.runtime.tracking.views import (
    FIRST_VERSION,
    MOST_VIEWS,
    VIEW_TAG,
    experiment_note,
    id_of,
    is_view,
    tag_of,
    views_of,
)

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
METRICS_PER_REQUEST = 1000  # MLflow's limit
MOST_MODELS = 1000  # of a run, that are found again
RESULT_PREFIX = "eval/"
OF_CHECKPOINTS = "eval/updates/"  # at the update of each
MODEL_METRICS = ("val/", "eval/best/", OF_CHECKPOINTS)
COLOUR, LOCAL_ID = "mlflow.runColor", "mlflow.latentline.id"
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
        origin = {"mlflow.user": user, "mlflow.source.type": "LOCAL"}
        parent = self._find_or_make_run(
            identity.pipeline_id,
            older=f"tags.stage = 'pipeline' and tags.pipeline_id = '{identity.pipeline_id}'",
            name=identity.pipeline_name,
            started=identity.pipeline_started,
            tags={**origin, "stage": "pipeline", "mlflow.source.name": "launch/pipeline.sh"},
        )
        self._parent_id, self._stage = str(parent.info.run_id), identity.stage
        self._is_result = "/evaluation-" not in identity.name  # which are further evaluations of the same model
        run = self._find_or_make_run(
            identity.run_id,
            older=f"tags.local_run_id = '{identity.run_id}'",
            name=identity.name,
            started=identity.started,
            tags={
                **origin,
                "stage": identity.stage,
                "mlflow.parentRunId": self._parent_id,
                "mlflow.source.name": f"pipelines.{identity.stage}",
                COLOUR: self._colour_of(parent),
            },
        )
        self._run_id = str(run.info.run_id)
        return self._run_id

    @property
    def link(self) -> str:
        """Address of the run's page; a database has none until `mlflow ui` serves it, and is named itself."""
        page = f"{self.name}/#/experiments/{self._experiment}/runs/{self._run_id}?{MODEL_TRAINING}"
        return page if self.name.startswith("http") else self.name

    def _colour_of(self, parent: Any) -> str:
        """Return the colour that a pipeline's runs share: of the next that the experiment's pipelines do not have."""
        if COLOUR not in parent.data.tags:
            pipelines = self._client.search_runs([self._experiment], "tags.stage = 'pipeline'")
            colours = pages()["colours"]
            parent.data.tags[COLOUR] = colours[(len(pipelines) - 1) % len(colours)]
            self._client.set_tag(parent.info.run_id, COLOUR, parent.data.tags[COLOUR])
        return str(parent.data.tags[COLOUR])

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
        """Set the state of the run, and describe it and its pipeline anew."""
        self._set_status(self._run_id, status, milliseconds=int(1000 * since))
        if status == "FINISHED" and self._stage == "evaluate":
            self._link_evaluated_models()
        self.describe()

    def describe(self) -> None:
        """Write the descriptions of the run and of its pipeline, whose state is that of its stages."""
        children = f"tags.mlflow.parentRunId = '{self._parent_id}'"
        found = self._client.search_runs([self._experiment], children, order_by=["attributes.start_time ASC"])
        runs = [self._page_of(run) for run in found]
        ended = max(run.info.end_time or 0 for run in found)
        self._set_status(self._parent_id, pipeline_status(runs), milliseconds=ended)
        self._write_note(self._page_of(self._client.get_run(self._parent_id)), pipeline_note(runs))
        [own] = [run for run in runs if run.run_id == self._run_id]
        self._write_note(own, run_note(own))
        self._write_views({run.tags["contract"] for run in runs if "contract" in run.tags})

    def _write_views(self, contracts: Collection[str]) -> None:
        """Write the experiment's views that are not there, and links to all; none where MLflow cannot show them."""
        if not self._shows_views:
            return
        experiment = self._client.get_experiment(self._experiment)
        tags, set_tag = dict(experiment.tags), self._client.set_experiment_tag
        for name, state in views_of(contracts).items():
            key, text = VIEW_TAG + id_of(name), tag_of(name, state, milliseconds=experiment.creation_time)
            if tags.get(key) != text and (key in tags or sum(map(is_view, tags)) < MOST_VIEWS):
                set_tag(self._experiment, key, text)
                tags[key] = text
        for key, text in changed_note(tags, experiment_note(tags, experiment=self._experiment)).items():
            set_tag(self._experiment, key, text)

    @cached_property
    def _shows_views(self) -> bool:
        """Whether the server, or the MLflow that will open the database, lists saved views."""
        import mlflow
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        version = mlflow.__version__
        if self.name.startswith("http"):
            version = http_request(get_default_host_creds(self._uri), "/version", "GET").text
        numbers = re.match(r"(\d+)\.(\d+)", version)
        return numbers is not None and (int(numbers[1]), int(numbers[2])) >= FIRST_VERSION

    def _set_status(self, run_id: str, status: str, *, milliseconds: int) -> None:
        if status == "RUNNING":
            self._client.update_run(run_id, status=status)
        else:
            self._client.set_terminated(run_id, status, milliseconds)

    def _page_of(self, run: Any) -> RunPage:
        info, data = run.info, run.data
        return RunPage(
            run_id=info.run_id,
            experiment=info.experiment_id,
            name=info.run_name,
            status=info.status,
            params=data.params,
            metrics=data.metrics,
            tags=data.tags,
            hours=max(0, (info.end_time or 0) - info.start_time) / 3.6e6,
            inputs={
                "/".join(json.loads(given.dataset.source)["uri"].rstrip("/").split("/")[-2:]): given.dataset.digest
                for given in run.inputs.dataset_inputs
            },
        )

    def _write_note(self, run: RunPage, note: str) -> None:
        self._log_texts(run.run_id, "tags", _tags(changed_note(run.tags, note[:LONGEST_TAG])))

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
        self._log_texts(self._run_id, "tags", _tags(tags))

    def log_params(self, params: Mapping[str, str], *, shown: Collection[str]) -> None:
        """Add the parameters that are ``shown`` to the run.

        MLflow's parameters never change; one that did between two starts becomes the tag ``changed.KEY``.
        """
        from mlflow.entities import Param

        params = {_valid_key(key): value[:LONGEST_PARAM] for key, value in params.items()}
        known: dict[str, str] = self._client.get_run(self._run_id).data.params
        new = [Param(key, params[key]) for key in map(_valid_key, shown) if key not in known]
        self._log_texts(self._run_id, "params", new)
        self.log_tags({f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value})

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
        if key in page_of(self._stage)["pictures"]:
            self.log_tags({PICTURE: quote(f"images/{whole.name}")})
            self.describe()

    def log_model(self, name: str, folder: Path, *, alias: str = "") -> None:
        """Log weights and the kept checkpoints beside them as models of the run; finish unfinished ones.

        A model holds a link to its folder, and what was validated after its update. The bytes of the weights are sent
        where there is an ``alias``: then they become the version of the registered model EXPERIMENT-NAME that has it.
        """
        from mlflow.entities import LoggedModelOutput

        # The weights are those of the last checkpoint.
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
        if len(files) == 1:
            raise FileNotFoundError(f"no *.safetensors in {folder}")
        kept = {file.parent: read_json(file, mend="") for file in folder.glob("checkpoints/update-*/manifest.json")}
        weights = {written["update"]: (place, _averages_in(written)) for place, written in kept.items()}
        final = max(weights, default=0)
        weights[final] = folder, sha256_of(files[0])

        # Models that are not there yet.
        run, models = self._client.get_run(self._run_id), self._models_of(self._run_id)
        if 0 in models:  # of an older version, which logged the final one without its update
            models[final] = models.pop(0)
        for update, (place, digest) in weights.items():
            models[update] = models.get(update) or self._client.create_logged_model(
                self._experiment,
                name=run.info.run_name.replace("/", "-") + (f"-update-{update}" if update != final else ""),
                source_run_id=self._run_id,
                tags={"folder": str(place.resolve()), "weights": digest[:SHORT_DIGEST], "update": str(update)},
                model_type=self._stage,
                params=run.data.params,
            )
            for file in files if alias and update == final else ():
                self._client.log_model_artifact(models[update].model_id, str(file))
            if models[update].status != "READY":
                self._client.finalize_logged_model(models[update].model_id, "READY")

        # Their links and metrics.
        outputs = [LoggedModelOutput(model.model_id, step=update) for update, model in models.items()]
        known = {output.model_id for output in (run.outputs.model_outputs if run.outputs else ())}
        if new := [output for output in outputs if output.model_id not in known]:
            self._client.log_outputs(self._run_id, new)
        self._log_model_metrics(models, run)
        if alias:
            self._register(f"{self._client.get_experiment(self._experiment).name}-{name}", models[final], alias=alias)

    def _register(self, name: str, model: Any, *, alias: str) -> None:
        """Make a model a version of a registered one, unless it is one, and give it the alias."""
        import mlflow

        mlflow.set_tracking_uri(self._uri)  # where a database resolves models:/
        name = _valid_key(name).replace("/", "-").replace(":", "-")
        if not self._client.search_registered_models(f"name = '{name}'"):
            self._client.create_registered_model(name)
        found = self._client.search_model_versions(f"name = '{name}' and run_id = '{self._run_id}'")
        version = (
            found[0]
            if found
            else self._client.create_model_version(
                name, f"models:/{model.model_id}", run_id=self._run_id, model_id=model.model_id
            )
        )
        self._client.set_registered_model_alias(name, alias, version.version)

    def _link_evaluated_models(self) -> None:
        """Give an evaluation's metrics to the models that it evaluated, where this experiment has those."""
        from mlflow.entities import LoggedModelInput

        run = self._client.get_run(self._run_id)
        trained = f"tags.stage = 'train_unet' and tags.`digest.unet` = '{run.data.tags.get('digest.unet')}'"
        for found in self._client.search_runs([self._experiment], trained, max_results=1):
            if models := self._models_of(found.info.run_id):
                measured = {models[max(models)].model_id, *self._log_model_metrics(models, run)}
                self._client.log_inputs(self._run_id, models=[LoggedModelInput(each) for each in sorted(measured)])

    def _models_of(self, run_id: str) -> dict[int, Any]:
        """Return the models of a run by update."""
        own = f"source_run_id = '{run_id}'"
        found = self._client.search_logged_models([self._experiment], own, max_results=MOST_MODELS)
        return {int(model.tags.get("update", 0)): model for model in found}

    def _log_model_metrics(self, models: Mapping[int, Any], run: Any) -> set[str]:
        """Give models what a run measured at their updates, and its data set; return the ids of those that it measured.

        To the final model belong the last values.
        """
        from mlflow.entities import Metric

        data = [given.dataset for given in run.inputs.dataset_inputs if given.dataset.name in ("corpus", "latents")]
        on = {"dataset_name": data[0].name, "dataset_digest": data[0].digest} if data else {}
        known = {
            (model.model_id, metric.key, metric.timestamp, metric.step)
            for model in models.values()
            for metric in model.metrics or ()
        }
        measured: list[Any] = []
        for name in run.data.metrics:
            if name.startswith(MODEL_METRICS):
                at = {metric.step: metric for metric in self._client.get_metric_history(run.info.run_id, name)}
                if not name.startswith(OF_CHECKPOINTS):
                    at[max(models)] = at[max(at)]
                measured += [
                    Metric(name, at[update].value, at[update].timestamp, at[update].step, model_id=model.model_id, **on)
                    for update, model in models.items()
                    if update in at
                ]
        new = [each for each in measured if (each.model_id, each.key, each.timestamp, each.step) not in known]
        for start in range(0, len(new), METRICS_PER_REQUEST):
            self._client.log_batch(run.info.run_id, metrics=new[start : start + METRICS_PER_REQUEST], synchronous=True)
        return {each.model_id for each in measured}

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
        self, local_id: str, *, older: str, name: str, started: float, tags: Mapping[str, str]
    ) -> Any:
        """Return the oldest run that bears ``local_id``, or tags of ``older`` versions, else a new one."""
        for condition in (f"tags.`{LOCAL_ID}` = '{local_id}'", older):
            order = ["attributes.start_time ASC"]
            if found := self._client.search_runs([self._experiment], condition, order_by=order, max_results=1):
                return found[0]
        tags = {**tags, LOCAL_ID: local_id}
        return self._client.create_run(self._experiment, int(1000 * started), tags, run_name=name)


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


def _averages_in(manifest: Mapping[str, Any]) -> str:
    """Return the digest of the averaged weights in a checkpoint's manifest."""
    return next((str(file["sha256"]) for file in manifest["files"] if "_averages." in file["name"]), "")


def _tags(tags: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(_valid_key(key), str(value)[:LONGEST_TAG]) for key, value in tags.items()]


def _valid_key(key: str) -> str:
    """Return ``key`` with what MLflow's names may not hold replaced by ``_``."""
    return re.sub(r"[^\w\-./ :]", "_", key)[:LONGEST_KEY]
