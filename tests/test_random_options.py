"""One property of all options at once: killed and resumed, or on two ranks, a training is the one it would have been.

Each combination is drawn from its number, so that a failing one can be run again by its name.
"""

import random
import shutil
import signal
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import REPOSITORY, SMOKE, STAGES, Run, communicated, stage_command, start_ranks, start_warm, training_rows

from data.files import sha256_of

UPDATES = 9
NUM_COMBINATIONS = 12  # of each stage

TRAINING: dict[str, list[Any]] = {
    "images_per_device": [2, 4],  # splits both 8 and 4 images of a rank
    "optim": [
        {"algorithm": "muon", "rate": {"kind": "cosine"}},
        {"algorithm": "muon", "weight_decay": 0.01, "max_grad_norm": 0.1},
        {"rate": {"kind": "inverse_sqrt", "reference": 3}},
        {"beta1": 0.5, "weight_decay": 0.01},
    ],
    "shard_optimizer": [False, True],
    "averages": [
        [{"kind": "exponential", "decay": 0.9}],
        [{"kind": "power", "relative_std": 0.1}, {"kind": "exponential", "decay": 0.5, "warmup": False}],
    ],
    "order": [
        {"kind": "full"},
        {"kind": "blocked", "canonical_nodes": 2, "window": 32},
        {"kind": "weighted", "weights": {"circle": 3.0}},
        {"kind": "sequential"},
    ],
    "flip_probability": [0.0, 0.5],
    "prefetch_batches": [1, 4],
    "on_bad_update": [{"policy": "stop"}, {"policy": "skip"}, {"policy": "rewind"}],
    "replica_check_every": [2, 0],
    "seed": [0, 7],
}
OF_STAGE: dict[str, dict[str, list[Any]]] = {
    "train_vae": {
        "network.mid_attention": [False, True],
        "network.quant_convs": [False, True],
        "network.checkpointed": [False, True],
        "objective.kl_weight": [0.0, 1e-4],
        "objective.equivariance": [{"probability": 0.0}, {"probability": 0.5, "factors": [1, 2]}],
        "objective.latent_noise": [0.0, 1.0],
        "decode_threads": [1, 3],
    },
    "train_unet": {
        "denoiser.network.checkpointed_levels": [[], [0], [0, 1]],
        "denoiser.network.block": ["residual", "convnext"],
        "denoiser.network.time_injection": ["scale_shift", "shift"],
        "denoiser.conditioners": [[], [{"kind": "class", "drop_probability": 0.3}]],
        "denoiser.schedule+objective": [
            ({"kind": "flow_matching"}, {"prediction": "velocity", "times": {"kind": "logit_normal"}}),
            ({"kind": "cosine"}, {"prediction": "v", "weighting": {"kind": "min_snr"}}),
            ({"kind": "linear", "zero_terminal_snr": True}, {"prediction": "x0", "times": {"stratified": False}}),
            ({"kind": "scaled_linear"}, {"prediction": "eps", "variance": "learned"}),
            ({"kind": "cosine"}, {"prediction": "score", "weighting": {"kind": "p2"}}),
        ],
    },
}
ADVERSARY = {
    "kind": "patchgan",
    "start": {"update": 4},
    "discriminator": {"channels": 8, "downsamplings": 1, "norm_groups": 8},
}


def combination(stage: str, number: int) -> dict[str, Any]:
    """Draw a value of every option; return the keys of the stage's table."""
    rng = random.Random(f"{stage} {number}")
    drawn = {key: rng.choice(values) for key, values in {**TRAINING, **OF_STAGE[stage]}.items()}
    if stage == "train_vae" and rng.random() < 0.5:
        # Its weight is a ratio of norms over the images that a rank sees at once.
        drawn.update({"objective.adversary": ADVERSARY, "images_per_device": 0})
    if "denoiser.schedule+objective" in drawn:
        drawn["denoiser.schedule"], drawn["denoiser.objective"] = drawn.pop("denoiser.schedule+objective")
    return drawn


def write_experiment(path: Path, stage: str, drawn: dict[str, Any]) -> None:
    """Write the smoke experiment with these keys in the stage's table, and a short training."""
    experiment = tomllib.loads(SMOKE.read_text())
    table = experiment[stage]
    table.update(updates=UPDATES, global_batch=8, validate_every=UPDATES, checkpoint={"every_updates": 2})
    table.pop("validate_samples", None)
    for key, value in drawn.items():
        *parents, last = key.split(".")
        place = table
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = {"peak_lr": 1e-3, "warmup_updates": 2} | value if key == "optim" else value
    path.write_text(tomli_w.dumps(experiment))


@pytest.mark.soak
@pytest.mark.parametrize("number", range(NUM_COMBINATIONS))
@pytest.mark.parametrize("stage", OF_STAGE)
def test_killed_and_resumed_on_one_rank_or_two_it_is_the_training_that_it_would_have_been(
    stage: str, number: int, inputs: Run, tmp_path: Path
) -> None:
    drawn, experiment = combination(stage, number), tmp_path / "experiment.toml"
    write_experiment(experiment, stage, drawn)
    print(drawn)
    names = {"train_vae": ["corpus"], "train_unet": ["latents", "vae"]}[stage]
    given = [word for name in names for word in (f"--inputs.{name}", str(inputs.root / name))]

    def command(name: str) -> list[str]:
        return stage_command(stage, "--run.root", str(tmp_path / name), *given, config=experiment)[1:]

    def train(name: str, *, ranks: int) -> Path:
        started = start_ranks(*command(name), world_size=ranks) if ranks > 1 else [start_warm(*command(name))]
        printed = communicated(started)
        assert [process.returncode for process in started] == [0] * ranks, printed
        return tmp_path / name / STAGES[stage]

    whole = train("whole", ranks=1)

    # Killed at one of the moments when something becomes durable: the first checkpoint is after the 29th.
    moment = str(random.Random(number).randrange(32, 75))
    killed = start_warm(str(REPOSITORY / "tests/killed_at.py"), "flush", moment, stage, *command("resumed")[2:])
    printed = killed.communicate(timeout=180)
    assert killed.returncode == -signal.SIGKILL, printed
    assert any((tmp_path / "resumed" / STAGES[stage] / "checkpoints").glob("update-*")), "nothing to resume from"
    shutil.copytree(tmp_path / "resumed", tmp_path / "on two ranks")

    resumed = train("resumed", ranks=1)
    weights = f"{STAGES[stage]}.safetensors"
    assert losses(resumed) == losses(whole)
    assert sha256_of(resumed / weights) == sha256_of(whole / weights)

    of_two, of_one = (np.array([*losses(place).values()]) for place in (train("on two ranks", ranks=2), whole))
    joins = ADVERSARY["start"]["update"] if "objective.adversary" in drawn else UPDATES
    np.testing.assert_allclose(of_two[:joins], of_one[:joins], rtol=1e-4)
    # A game of two networks is chaotic: rounding grows from update to update.
    np.testing.assert_allclose(of_two[joins:], of_one[joins:], rtol=3e-2)


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of every update."""
    return {update: row["train/loss"] for update, row in sorted(training_rows(folder).items())}
