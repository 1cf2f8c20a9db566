"""Base models of every command's configuration, and the tables of an experiment file."""

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, NonNegativeInt

STAGE_FOLDERS = {
    "prepare_corpus": "corpus",
    "train_vae": "vae",
    "encode_latents": "latents",
    "train_unet": "unet",
    "evaluate": "evaluation",
}
INPUT_FOLDERS = {"guide": "unet-guide"}  # of inputs that are not called like their folder: `train_unet --name guide`
TOOL_TABLES = ("sample", "export", "reconstruct", "benchmark", "doctor", "plan", "compare", "report", "trace", "sync")
CURVE_DENSITY = 1000

Name = Annotated[str, Field(min_length=1)]  # of a folder or an experiment; an empty one would be the working directory


class RunConfig(BaseModel, frozen=True, extra="forbid"):
    """Settings of a run that do not change its result, so that none of them ever counts as a difference."""

    root: Name = "runs/default"  # folder of the experiment; the stages' folders lie in it
    experiment: Name = "latentline"  # MLflow experiment
    tracking_uri: str = "auto"  # server or store; "auto": MLFLOW_TRACKING_URI, else sqlite beside run.root; "offline"
    curve_density: NonNegativeInt = CURVE_DENSITY  # updates that MLflow gets each, then ever fewer; 0 sends all
    register_as: str = (
        ""  # alias in MLflow's model registry for the final weights, such as "champion"; "" registers none
    )
    num_processes: NonNegativeInt = 0  # world size to insist on; 0 accepts what was launched
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # CPU threads of a process; 0 is its share of the machine's cores
    attention: Literal["auto", "sdpa", "xformers", "math"] = "auto"  # its backend; auto takes the first that runs here
    deterministic: bool = False  # GPU kernels that give the same bits each time, at some speed; those of CPUs do
    allow_changed: tuple[str, ...] = ()  # keys whose change is accepted on resume (also: --allow-changed KEY)


class CommandConfig(BaseModel, frozen=True, extra="forbid"):
    """Base of every command's configuration; alone that of a tool that needs no experiment."""

    positional: ClassVar[str] = ""  # key, a tuple of texts, that takes the words without a name


class StageConfig(CommandConfig):
    """Base of a stage's configuration, or of a tool's on one; ``inputs.NAME`` is a folder in ``run.root``."""

    # Dotted keys that do not change the result: left out of the fingerprint, so they may differ on resume.
    fingerprint_ignores: ClassVar[frozenset[str]] = frozenset()
    # A new key's default is what versions without it did, so that folders of theirs are the same work; else a revision.
    # How the result of one and the same configuration has changed from version to version of this code, oldest first:
    # what an older version began is not continued as another order, other bytes or another validation sample.
    revisions: ClassVar[tuple[str, ...]] = ()

    run: RunConfig = RunConfig()
