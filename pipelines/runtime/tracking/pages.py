"""Pages of MLflow: parameters, descriptions and colours by which a run explains itself.

A description is a pure function of what the store has of the run, so that a store that is filled again gets it again.
MLflow keeps tags that begin with ``mlflow.`` out of its tables: there lie the command and the picture of a description.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

NOTE = "mlflow.note.content"
NOTE_WRITTEN = "mlflow.latentline.note"  # digest of the description written last: one that a user changed is left alone
COMMAND = "mlflow.latentline.command"
PICTURE = "mlflow.latentline.picture"
MODEL_TRAINING = "workflowType=machine_learning"  # opens MLflow's pages for model training, not those for agents
SHORT_DIGEST = 12  # characters shown

#: Of a dozen pipelines that are compared each has its own: Okabe & Ito's, then darker ones.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"),
    *("#882255", "#117733", "#332288", "#999933", "#AA4499", "#44AA99"),
)

#: Parameters that every run shows, besides those that differ from their defaults.
HEADLINES = frozenset(
    {
        *("source.kind", "view.resolution", "updates", "global_batch", "precision", "seed", "optim.peak_lr"),
        *("network.channels", "network.latent_channels", "objective.kl_weight"),
        *("denoiser.network.channels", "denoiser.objective.prediction", "denoiser.objective.weighting.kind"),
        *("denoiser.schedule.kind", "num_samples", "sampler.kind", "sampler.num_steps", "guidance.scale"),
    }
)


@dataclass(frozen=True)
class StagePage:
    """Page of a stage's runs: a sentence with ``{PARAMETER}``, metrics of the result line, pictures, the best first."""

    sentence: str
    results: tuple[str, ...]
    pictures: tuple[str, ...]


PAGES = {
    "prepare_corpus": StagePage(
        "Images of the source {source.kind} packed into shards.",
        ("corpus/samples", "corpus/quarantined"),
        ("corpus/examples",),
    ),
    "train_vae": StagePage(
        "A VAE trained for {updates} updates of {global_batch} images.",
        ("val/psnr", "val/latent_std", "train/loss", "progress/images"),
        ("final/reconstructions", "val/reconstructions"),
    ),
    "encode_latents": StagePage(
        "Images encoded into latents by the VAE.",
        ("latents/samples", "latents/active_channels"),
        ("latents/statistics",),
    ),
    "train_unet": StagePage(
        "A U-Net trained for {updates} updates of {global_batch} latents.",
        ("val/frechet_distance", "val/loss", "val/condition_gap", "progress/images"),
        ("final/samples", "val/samples"),
    ),
    "evaluate": StagePage(
        "{num_samples} samples at each guidance ({sampler.kind}, {sampler.num_steps} steps), measured.",
        (
            *("eval/best/frechet_distance", "eval/best/guidance", "eval/floor/frechet_distance"),
            *("eval/best/precision", "eval/best/recall", "eval/best/class_accuracy", "eval/vae/psnr"),
        ),
        ("eval/samples",),
    ),
}


def page_of(stage: str) -> StagePage:
    """Return the page of a stage's runs; a bare one for a stage that has none."""
    return PAGES.get(stage, StagePage(f"A run of {stage}.", (), ()))


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """A run as the store has it."""

    run_id: str
    experiment: str  # its id
    name: str
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.tags.get("stage", "")

    @property
    def link(self) -> str:
        """Address of its page on any server."""
        return f"#/experiments/{self.experiment}/runs/{self.run_id}?{MODEL_TRAINING}"

    @property
    def result(self) -> str:
        """The result line: the stage's metrics with their errors."""
        found = [name for name in page_of(self.stage).results if name in self.metrics]
        return " · ".join(_shown(name, self.metrics) for name in found)

    @property
    def picture(self) -> str:
        """The picture of the description, as Markdown; empty without one."""
        path = self.tags.get(PICTURE)
        return f"![{self.name}](get-artifact?path={path}&run_uuid={self.run_id})" if path else ""


def shown_params(params: Iterable[str], *, at_default: Collection[str]) -> list[str]:
    """Return the parameters that pages show: headlines and what differs from its default; no place and no period."""
    return [
        key
        for key in params
        if (key in HEADLINES or key not in at_default)
        and not key.startswith(("run.", "inputs."))
        and not key.endswith(("_every", "every_updates"))
    ]


def run_note(run: RunPage) -> str:
    """Return the description of a stage's run; Markdown."""
    state = "" if run.status == "FINISHED" else f" **{run.status.lower()}** ({run.tags.get('outcome', 'at work')})"
    contract = f" · contract {run.tags['contract']}" if "contract" in run.tags else ""
    lines = [_filled(page_of(run.stage).sentence, run.params) + state]
    lines += [f"**{run.result}**{contract}"] if run.result else []
    lines += [run.picture] if run.picture else []
    if command := run.tags.get(COMMAND):
        repeat = f"python -m pipelines.{run.stage} --config config.toml --run.root runs/AGAIN"
        code = run.tags.get("code_version", "")[:SHORT_DIGEST]
        lines += [f"continue: `{command}`", f"repeat, with the artifact config.toml and code {code}: `{repeat}`"]
    return "\n\n".join(lines)


def pipeline_note(runs: Sequence[RunPage]) -> str:
    """Return the description of a pipeline's run: the table of its stages and the picture of the last that has one."""
    rows = [f"| [{run.name}]({run.link}) | {run.status.lower()} | {run.result} |" for run in runs]
    pictures = [run.picture for run in runs if run.picture]
    table = "\n".join(["| stage | state | result |", "|---|---|---|", *rows])
    return "\n\n".join([table, *pictures[-1:]])


def pipeline_status(runs: Sequence[RunPage]) -> str:
    """Return the state of a pipeline: the worst of its stages', each that of the best of the runs that shared it."""
    order = ("RUNNING", "FINISHED", "KILLED", "FAILED")
    states: dict[str, str] = {}
    for run in runs:
        stage = run.name.partition("/runs/")[0]
        states[stage] = min(states.get(stage, run.status), run.status, key=order.index)
    return "RUNNING" if "RUNNING" in states.values() else max(states.values(), key=order.index)


def digest_of_note(note: str) -> str:
    """Return the digest by which a description is known again."""
    return hashlib.sha256(note.encode()).hexdigest()[:SHORT_DIGEST]


def _filled(sentence: str, params: Mapping[str, str]) -> str:
    for key, text in params.items():
        sentence = sentence.replace("{" + key + "}", text)
    return sentence


def _shown(name: str, metrics: Mapping[str, float]) -> str:
    value, error = metrics[name], metrics.get(f"{name}_error")
    label = name.partition("/")[2].removeprefix("best/").replace("_", " ").replace("/", " ")
    if error is not None:
        return f"{label} {value:.3g} ± {error:.2g}"
    return f"{label} {value:,.0f}" if value == round(value) else f"{label} {value:.4g}"
