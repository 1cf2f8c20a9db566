"""Kubernetes: the manifests are what the API takes, and what they say is enough to run all five stages.

The pods are processes in mount namespaces of their own: they see the image's files read-only and, besides, what the
manifest mounts. MLflow runs as docker/compose.yaml has it: on PostgreSQL and an S3 store.
"""

import contextlib
import os
import pwd
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, free_port, wait_until
from PIL import Image

from data.manifest import read_manifest
from pipelines.runtime.config.stage_config import STAGE_FOLDERS

FOLDER = REPOSITORY / "launch" / "kubernetes"
KINDS = {
    "TrainJob": "TrainerV1alpha1TrainJob",
    "TrainingRuntime": "TrainerV1alpha1TrainingRuntime",
    "PersistentVolumeClaim": "IoK8sApiCoreV1PersistentVolumeClaim",
}
IMAGE = Path("/opt/latentline")  # the working directory of docker/Dockerfile
USER = "1000"
# The same experiment, of a size for a test.
FLOAT32 = ("--precision", "float32")  # processors compute bf16 slowly
TRAINING = (
    *("--updates", "2", "--global_batch", "4", "--images_per_device", "2", "--log_every", "1"),
    *("--validate_every", "2", *FLOAT32),
)
UNET = {"channels": "[64, 64, 64, 64]", "blocks": "[1, 1, 1, 1]", "heads": "[1, 1, 1, 1]"}
PIXELS_ALONE = ("--objective.perceptual.kind", "none", "--objective.adversary.kind", "none")
SIZES = {
    "prepare_corpus": ("--source.val_fraction", "0.3", "--view.resolution", "32", "--samples_per_shard", "16"),
    "train_vae": (*TRAINING, "--network.channels", "[32, 32]", "--network.blocks_per_level", "1", *PIXELS_ALONE),
    "encode_latents": ("--batch_size", "4"),
    "train_unet": (*TRAINING, *(word for k, v in UNET.items() for word in (f"--denoiser.network.{k}", v))),
    "evaluate": ("--num_samples", "8", "--batch_size", "4", "--sweep", "[2.0]", "--sampler.num_steps", "2", *FLOAT32),
}


def documents(kind: str) -> list[dict[str, Any]]:
    paths = sorted(FOLDER.glob("*.yaml"))
    return [
        found for path in paths for found in yaml.safe_load_all(path.read_text()) if found and found["kind"] == kind
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_api_takes_the_manifests_and_loses_nothing_of_them(kind: str) -> None:
    from kubeflow_trainer_api import models

    found = documents(kind)
    assert found
    for document in found:
        # A field that the API does not know, which its server refuses or drops, does not come back.
        assert getattr(models, KINDS[kind]).from_dict(document).to_dict() == document


def test_every_stage_has_one_train_job_with_the_runtime_it_names() -> None:
    jobs, runtimes = documents("TrainJob"), [document["metadata"]["name"] for document in documents("TrainingRuntime")]
    for job in jobs:
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", job["metadata"]["name"])
        reference = job["spec"]["runtimeRef"]
        assert (reference["apiGroup"], reference["kind"]) == ("trainer.kubeflow.org", "TrainingRuntime")
        assert reference["name"] in runtimes
        assert job["spec"]["trainer"]["args"][0].replace("_", "-") == job["metadata"]["name"]
    assert sorted(job["spec"]["trainer"]["args"][0] for job in jobs) == sorted(STAGE_FOLDERS)


def test_train_jobs_start_one_process_for_each_gpu_they_ask_for() -> None:
    for job in documents("TrainJob"):
        trainer = job["spec"]["trainer"]
        resources = trainer["resourcesPerNode"]
        gpus = resources["limits"].get("nvidia.com/gpu")
        assert resources["requests"].get("nvidia.com/gpu") == gpus  # Kubernetes refuses extended resources that differ.
        if gpus is not None:
            assert trainer["numProcPerNode"] == int(gpus)


def test_the_runtime_s_names_fit_each_other() -> None:
    (runtime,) = documents("TrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    # By these two names, and this label, the controller finds the container that a TrainJob's trainer changes.
    assert job["name"] == "node"
    assert job["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "node"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claimed = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claimed == {document["metadata"]["name"] for document in documents("PersistentVolumeClaim")}
    assert pod["terminationGracePeriodSeconds"] > 30  # A stage may take 30 s to commit its checkpoint.


# A whole pipeline


def dropped(user: int | str) -> list[str]:
    """The words that start a command as ``user`` without any privilege."""
    words = [f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    return ["setpriv", *words, "--"]


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A server of Debian's PostgreSQL on loopback; yields MLflow's address of its database."""
    binaries = max(Path("/usr/lib/postgresql").iterdir()) / "bin"
    user, port = pwd.getpwnam("postgres"), free_port()
    folder.mkdir()
    os.chown(folder, user.pw_uid, user.pw_gid)
    as_user = dropped(user.pw_uid)
    made = [*as_user, str(binaries / "initdb"), "--auth=trust", "--username=mlflow", f"--pgdata={folder}/data"]
    subprocess.run(made, check=True, capture_output=True, cwd="/")
    words = ["-D", f"{folder}/data", "-p", str(port), "-h", "127.0.0.1", "-k", ""]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen([*as_user, str(binaries / "postgres"), *words], stdout=log, stderr=log, cwd="/")
    try:
        ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: not subprocess.run(ready, capture_output=True).returncode, seconds=60, what="PostgreSQL")
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow server on PostgreSQL and an S3 store, as docker/compose.yaml has it."""
    import boto3
    from moto.server import ThreadedMotoServer

    for path in (tmp_path.parents[1], tmp_path.parent, tmp_path):  # for the users of the database and of the pods
        path.chmod(0o755)
    storage = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    storage.start()
    host, port = storage.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (settings | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="mlflow")
    address = f"127.0.0.1:{free_port()}"
    with postgresql(tmp_path / "postgresql") as database:
        words = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
        words += ["--artifacts-destination", "s3://mlflow", "--host", "127.0.0.1", "--port", address.partition(":")[2]]
        server = subprocess.Popen(words, start_new_session=True)
        try:
            wait_until(lambda: answers(f"http://{address}/health"), seconds=180, what="MLflow")
            yield f"http://{address}"
        finally:
            os.killpg(server.pid, 9)
            server.wait()
    storage.stop()


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False


class Cluster:
    """One node that runs TrainJobs: each pod has the image's files and the volumes of its manifest."""

    def __init__(self, folder: Path, secret: dict[str, str]) -> None:
        self.folder, self.secret = folder, secret
        self.image = folder / "image"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        kept = [
            line[1:] for line in (REPOSITORY / "docker/Dockerfile.dockerignore").read_text().splitlines() if "!" in line
        ]
        for name in filter(None, listed.stdout.split("\0")):
            if any(name == start or name.startswith(f"{start}/") for start in kept):
                (self.image / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPOSITORY / name, self.image / name)
        for place in (".venv", "runs"):
            (self.image / place).mkdir()

    def claim(self, name: str) -> Path:
        """The folder behind a persistent volume claim."""
        folder = self.folder / "claims" / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, int(USER), int(USER))
        return folder

    def run(self, job: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
        """Run a TrainJob to its end, with two ranks however many it asks for, and return its first pod."""
        runtime = next(
            r for r in documents("TrainingRuntime") if r["metadata"]["name"] == job["spec"]["runtimeRef"]["name"]
        )
        (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        pod = replicated["template"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        nodes = min(job["spec"]["trainer"]["numNodes"], 2)
        shared = {"PET_NNODES": nodes, "PET_NPROC_PER_NODE": 2 // nodes, "PET_MASTER_ADDR": "127.0.0.1"}
        shared["PET_MASTER_PORT"] = free_port()
        started = []
        for rank in range(nodes):
            script = self.script(pod, container, [*job["spec"]["trainer"]["args"], *more])
            # What the image, the secret and the controller set; the machine itself has no GPU.
            environment = {**self.of_the_image(), **self.of_the_secret(container)}
            environment |= {name: str(value) for name, value in {**shared, "PET_NODE_RANK": rank}.items()}
            environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            # With its first process, which becomes the launcher, a pod ends whole.
            words = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
            words += ["bash", "-euc", script]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(subprocess.Popen(words, env=environment, **pipes))  # type: ignore[call-overload]
        outputs = [process.communicate(timeout=600)[0] for process in started]
        return subprocess.CompletedProcess(started[0].args, started[0].returncode, "\n".join(outputs))

    def of_the_image(self) -> dict[str, str]:
        # PYTHONPATH stands for the image's own editable install: this environment was installed for another folder.
        return {"PATH": f"{IMAGE}/.venv/bin:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONPATH": str(IMAGE)}

    def of_the_secret(self, container: dict[str, Any]) -> dict[str, str]:
        named = {entry["secretRef"]["name"] for entry in container["envFrom"]}
        return self.secret if "latentline" in named else {}

    def script(self, pod: dict[str, Any], container: dict[str, Any], arguments: list[str]) -> str:
        """A shell script that makes the pod's file system, and becomes its command there."""
        root = "/mnt"
        lines = [f"mount -t tmpfs tmpfs {root}"]
        machine = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/dev", sys.base_prefix]
        for place in [place for place in machine if Path(place).exists()]:
            lines.append(f"mkdir -p {root}{place}; mount --rbind -o ro {place} {root}{place}")
        lines += [f"mkdir -m 1777 {root}/tmp; mkdir {root}/proc; mount -t proc proc {root}/proc"]
        for source, place in ((self.image, IMAGE), (Path(sys.prefix), IMAGE / ".venv")):
            lines.append(f"mkdir -p {root}{place}; mount --bind {source} {root}{place}")
            lines.append(f"mount -o remount,bind,ro {root}{place}")
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in container["volumeMounts"]:
            claim = volumes[mount["name"]].get("persistentVolumeClaim")
            if claim is None:
                continue  # an emptyDir in memory, for which this machine's /dev/shm stands
            target = f"{root}{mount['mountPath']}"
            lines.append(f"mkdir -p {target}; mount --bind {self.claim(claim['claimName'])} {target}")
            if mount.get("readOnly"):
                lines.append(f"mount -o remount,bind,ro {target}")
        context = pod["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"]) == (int(USER), int(USER))
        words = [*container["command"], *arguments]
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in [*dropped(USER), *words])
        lines.append(f"exec /usr/sbin/chroot {root} bash -c 'cd {container['workingDir']}; exec \"$@\"' pod {quoted}")
        return "\n".join(lines)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_train_jobs_run_all_five_stages_with_what_they_mount_and_no_more(tmp_path: Path, tracking_uri: str) -> None:
    import boto3
    from mlflow import MlflowClient

    if os.geteuid():
        pytest.skip("mount namespaces need root")
    cluster = Cluster(tmp_path / "cluster", {"MLFLOW_TRACKING_URI": tracking_uri})
    for number in range(40):
        path = cluster.claim("latentline-data") / "imagenet" / "train" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(path)
    jobs = {job["spec"]["trainer"]["args"][0]: job for job in documents("TrainJob")}
    for stage in STAGE_FOLDERS:
        done = cluster.run(jobs[stage], *SIZES[stage])
        assert done.returncode == 0, done.stdout[-6000:]
    root = cluster.claim("latentline-runs") / "imagenet256"
    assert read_manifest(root / "evaluation")
    client = MlflowClient(tracking_uri)
    (experiment,) = [found for found in client.search_experiments() if found.name == "imagenet256"]
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(STAGE_FOLDERS)
    assert {run.info.status for run in runs} == {"FINISHED"}
    stored = boto3.client("s3").list_objects_v2(Bucket="mlflow")["KeyCount"]
    assert stored >= len(STAGE_FOLDERS), "pictures and manifests go to the S3 store, by way of the server"
