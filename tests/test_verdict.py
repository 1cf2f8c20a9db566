"""Verdicts on simulated trainings: intervals cover the truth, few are false, and the seeds that are named suffice."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_here
from torch import Tensor

from models.metrics.estimate import Estimate
from models.metrics.frechet import frechet_distance
from models.metrics.kernel import kernel_distance
from models.metrics.neighbours import precision_recall
from pipelines.evaluation.replicates import Evaluation
from pipelines.evaluation.verdict import JUDGED, Difference, Luck, Measured, difference
from pipelines.tools.compare import CompareConfig, compared

IMAGES = 100  # of samples and of the reference, each


def simulated(
    rng: np.random.Generator, counts: tuple[int, int], *, training: float, gap: float = 0.0
) -> tuple[list[Measured], list[Measured]]:
    """Trainings of two sides by a random-effects model, in units of the sampling luck of one training.

    What an image does is partly the same in all trainings, partly in those of one side, partly in one alone.
    """
    parts, common = ("samples", "reference"), rng.standard_normal((2, IMAGES))
    sides = []
    for number, count in enumerate(counts):
        of_side, side = rng.standard_normal((2, IMAGES)), []
        for _ in range(count):
            alone = rng.standard_normal((2, IMAGES))
            influences = math.sqrt(0.5) * common + math.sqrt(0.2) * of_side + math.sqrt(0.3) * alone
            luck = float(influences.mean(axis=1).sum()) + training * math.sqrt(2 / IMAGES) * rng.standard_normal()
            value = 1.0 + gap * number * math.sqrt(2 / IMAGES) + luck
            centred = influences - influences.mean(axis=1, keepdims=True)
            by_part = dict(zip(parts, torch.from_numpy(centred), strict=True))
            side.append(Measured(value=value, error=math.sqrt(2 / IMAGES), influences=by_part))
        sides.append(side)
    return sides[0], sides[1]


def longer(*values: Any) -> Any:
    """A further case of a law that another case shows."""
    return pytest.param(*values, marks=pytest.mark.soak)


@pytest.mark.parametrize(
    ("counts", "training"),
    [((1, 1), 0.0), ((3, 3), 0.3), longer((3, 3), 3.0), longer((5, 5), 1.0), ((3, 6), 3.0), longer((4, 1), 1.0)],
)
def test_the_interval_of_a_difference_covers_it(counts: tuple[int, int], training: float) -> None:
    rng = np.random.default_rng(0)
    found = [difference(*simulated(rng, counts, training=training, gap=1)) for _ in range(600)]

    covered = [each.low <= math.sqrt(2 / IMAGES) <= each.high for each in found]
    assert 0.92 <= np.mean(covered) <= 0.985


def test_images_that_both_sides_share_cancel() -> None:
    rng = np.random.default_rng(1)
    pairs = [simulated(rng, (1, 1), training=0) for _ in range(20)]
    widths = [np.ptp([found.low, found.high]) for found in (difference(*pair) for pair in pairs)]

    alone = [[Measured(value=each.value, error=each.error) for side in pair for each in side] for pair in pairs]
    apart = [np.ptp([found.low, found.high]) for found in (difference([one], [other]) for one, other in alone)]
    assert np.mean(widths) / np.mean(apart) == pytest.approx(math.sqrt(0.5), rel=0.1)  # half of the variance is common


def sentence(rng: np.random.Generator, count: int, *, training: float, gap: float) -> list[Difference]:
    """Four metrics of which the first differs by ``gap``."""
    gaps = (gap, 0, 0, 0)
    return [difference(*simulated(rng, (count, count), training=training, gap=each), tests=4) for each in gaps]


@pytest.mark.parametrize(
    ("count", "training", "gap"), [(1, 0.0, 4.0), (3, 0.5, 7.0), longer(3, 3.0, 22.0), longer(5, 1.0, 5.0)]
)
def test_few_verdicts_are_false_and_most_real_differences_are_found(count: int, training: float, gap: float) -> None:
    rng = np.random.default_rng(2)
    equal = [sentence(rng, count, training=training, gap=0) for _ in range(200)]
    real = [sentence(rng, count, training=training, gap=gap)[0] for _ in range(200)]

    assert np.mean([any(each.decided for each in metrics) for metrics in equal]) <= 0.08
    assert np.mean([each.word(1) == "better" for each in real]) >= 0.8
    assert not any(each.word(-1) == "better" for each in real)


def test_the_choice_of_the_best_guidance_on_each_side_makes_no_verdict_false() -> None:
    """Four guidances that are equally good, and drawn apart: the most that a choice can be led by luck."""
    rng, decided = np.random.default_rng(6), []
    for _ in range(200):
        scales = [simulated(rng, (3, 3), training=1.0) for _ in range(4)]
        chosen = [
            min((scale[side] for scale in scales), key=lambda group: sum(m.value for m in group)) for side in (0, 1)
        ]
        decided.append(difference(*chosen).decided)
    assert np.mean(decided) <= 0.08


def test_as_many_seeds_as_are_named_find_the_difference() -> None:
    values = 1.8 + np.array([-1.0, 0.0, 1.0])  # of deviation 1
    sides = [[Measured(value=value, error=0) for value in side] for side in (values - 1.8, values)]
    found = difference(*sides)
    assert not found.decided
    assert found.more_seeds

    rng, count = np.random.default_rng(3), 3 + found.more_seeds
    again = [
        difference(*([Measured(value=v, error=0) for v in rng.normal(mean, 1, count)] for mean in (0, 1.8)))
        for _ in range(400)
    ]
    assert 0.75 <= np.mean([each.decided for each in again]) <= 0.9


def test_without_replicates_no_number_of_seeds_is_named_and_with_them_images_may_be_what_is_missing() -> None:
    rng = np.random.default_rng(4)
    single = difference(*simulated(rng, (1, 1), training=0))
    assert single.more_seeds is None
    assert single.more_samples is not None
    assert single.more_samples > 1

    agreeing = [[Measured(value=value, error=1) for _ in range(5)] for value in (1.0, 1.1)]
    found = difference(*agreeing)
    assert found.more_seeds is None
    assert found.more_samples == pytest.approx(((1.96 + 0.8416) / 0.1) ** 2 * 2, rel=1e-3)

    equal = difference(*[[Measured(value=1.0, error=0) for _ in range(3)]] * 2)
    assert not equal.decided
    assert (equal.more_seeds, equal.more_samples) == (None, None)


def test_trainings_that_agree_by_chance_are_no_certainty() -> None:
    rng = np.random.default_rng(5)
    sides = simulated(rng, (3, 3), training=0)
    same = [[Measured(value=value, error=m.error, influences=m.influences) for m in side]
            for value, side in zip((1.0, 1.05), sides, strict=True)]  # fmt: skip
    assert not difference(*same).decided


def measured(estimate: Estimate) -> Measured:
    return Measured(value=estimate.value, error=estimate.error, influences=estimate.influences)


@pytest.mark.parametrize("metric", ["frechet_distance", longer("kernel_distance"), longer("precision"), "recall"])
def test_the_interval_of_two_sets_from_the_same_noise_covers_their_difference(metric: str) -> None:
    def of(samples: Tensor, reference: Tensor) -> Estimate:
        match metric:
            case "frechet_distance":
                return frechet_distance(samples, reference)
            case "kernel_distance":
                return kernel_distance(samples, reference)
        return getattr(precision_recall(samples, reference), metric)

    generator, pairs = torch.Generator().manual_seed(0), []
    for _ in range(150):
        noise, other, reference = (torch.randn(n, 6, generator=generator) for n in (120, 120, 100))
        samples = (1.1 * noise + 0.3, 1.3 * (0.9 * noise + 0.19**0.5 * other))
        pairs.append([measured(of(each, reference)) for each in samples])
    found = [difference([first], [second]) for first, second in pairs]

    truth = np.mean([each.value for each in found])
    assert (
        0.9 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.995
    )  # the manifold's part is cautious


# ---- real trainings

TRAININGS, COMPARISONS = 24, 200
RECIPES = {
    "whole": 60,
    "half": 30,
}  # updates; the rate rises all the way, so that half of them are a quarter of the way


def trained(root: Path, name: str, *, updates: int, seed: int) -> Path:
    """Train a U-Net and evaluate it; return the folder of the evaluation."""
    training = ("--name", name, "--updates", str(updates), "--seed", str(seed), "--validate_every", "1000")
    network = ("--denoiser.network.attention", "[false, false]", "--denoiser.network.channels", "[24, 24]")
    batch = ("--global_batch", "32", "--images_per_device", "0", "--grid.rows", "1", "--flip_probability", "0")
    rate = ("--optim.peak_lr", "1e-3", "--optim.warmup_updates", "60", "--optim.rate.kind", "constant")
    drawing = ("--num_samples", "200", "--batch_size", "50", "--sampler.num_steps", "8", "--probe_images", "600")
    guidance = ("--guidance.scale", "1", "--sweep", "[]")
    run(root, "train_unet", *training, *network, *batch, *rate, "--denoiser.objective.prediction", "v")
    run(root, "evaluate", "--name", name, "--inputs.unet", str(root / f"unet-{name}"), *drawing, *guidance)
    return root / f"evaluation-{name}"


def run(root: Path, stage: str, *words: str) -> None:
    done = run_here(stage, "--run.root", str(root), "--run.threads", "1", *words)
    assert done.returncode == 0, done.stderr


def verdict_of(folder: Path, first: list[Path], second: list[Path]) -> dict[str, str]:
    """Compare two groups of evaluations as a user would, with their folders beside each other."""
    for side, group in (("first", first), ("second", second)):
        (folder / side).mkdir(parents=True)
        for number, evaluation in enumerate(group):
            (folder / side / ("evaluation" + f"-seed_{number}" * (number > 0))).symlink_to(evaluation)
    (found,) = compared(CompareConfig(runs=(str(folder / "first"), str(folder / "second")))).found["verdicts"]
    assert found["trainings"] == {"baseline": len(first), "run": len(second)}
    return {name: metric["verdict"] for name, metric in found["metrics"].items()}


def check_verdicts(root: Path, folder: Path) -> None:
    """Train both recipes, and compare random triples with triples."""
    run(root, "prepare_corpus", "--source.num_train", "1024", "--source.num_val", "256")
    vae = ("--network.channels", "[16, 32]", "--objective.kl_weight", "1e-5", "--updates", "300")
    run(root, "train_vae", *vae, "--validate_every", "1000")
    run(root, "encode_latents")
    groups: dict[str, list[Path]] = {name: [] for name in RECIPES}
    for seed in range(TRAININGS):
        for name, updates in RECIPES.items():
            groups[name].append(trained(root, f"{name}-{seed}", updates=updates, seed=seed))

    # Luck of all trainings of a recipe.
    for name, group in groups.items():
        for metric in [name for name in JUDGED if name in Evaluation.read(group[0]).sweep[1.0]]:
            side = [Evaluation.read(each).measured(metric, 1.0) for each in group]
            luck, mean = Luck.of(side), np.mean([each.value for each in side])
            assert luck.seed_deviation is not None
            sampling, by_seed = math.sqrt(luck.sampling), luck.seed_deviation
            print(f"{name} {metric}: {mean:.4g}, sampling {sampling:.2g}, seed {by_seed:.2g}, {by_seed / sampling:.2g}")

    # Equal recipes, then different ones.
    rng, false, real = random.Random(0), Counter[str](), Counter[str]()
    num_false = num_found = num_wrong = 0
    for number in range(COMPARISONS):
        drawn = rng.sample(groups["whole" if number % 2 else "half"], 6)
        found = verdict_of(folder / f"equal-{number}", drawn[:3], drawn[3:])
        false.update(name for name, word in found.items() if word != "cannot tell")
        num_false += any(word != "cannot tell" for word in found.values())
        found = verdict_of(folder / f"real-{number}", *(rng.sample(groups[name], 3) for name in ("half", "whole")))
        real.update(f"{name} {word}" for name, word in found.items() if word != "cannot tell")
        num_found += "better" in found.values()
        num_wrong += "worse" in found.values()
    rates = {name: count / COMPARISONS for name, count in (("false", num_false), ("found", num_found))}
    print(json.dumps({**rates, "worse": num_wrong / COMPARISONS, "false ones": false, "real ones": real}))
    assert rates["false"] <= 0.08
    assert rates["found"] >= 0.8


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_verdicts_on_random_triples_of_48_trainings_are_right(tmp_path: Path) -> None:
    check_verdicts(tmp_path / "run", tmp_path / "comparisons")
