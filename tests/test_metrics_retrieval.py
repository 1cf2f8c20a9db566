"""Retrieval of captions: the map against refits without each pair, ranks against their definition, chance."""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from models.metrics.retrieval import RidgeMap


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def linear_world(num_pairs: int, *, noise: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n 12) and texts (n 5) that both show the same five causes; the images with noise."""
    causes = normals(num_pairs, 5, seed=seed)
    shown = causes @ normals(5, 12, seed=1000)
    return 3 * (shown + noise * normals(num_pairs, 12, seed=seed + 1)) + 7, causes * torch.arange(1, 6) - 2


def captions_of(texts: Tensor) -> list[str]:
    return [f"caption {number}" for number in range(len(texts))]


@pytest.mark.parametrize("noise", [0.05, 1.0, 20.0])
def test_the_strength_of_the_map_is_the_best_where_each_pair_is_left_out(noise: float) -> None:
    images, texts = linear_world(40, noise=noise, seed=2)

    found = RidgeMap.fit(images, texts)

    # Standardised as a whole, then fitted anew without each pair, with the mean that is left as the constant.
    x, y = ((table - table.mean(0)) / table.std(0) for table in (images, texts))

    def left_out(strength: float) -> float:
        total = 0.0
        for row in range(40):
            rest = np.delete(np.arange(40), row)
            xm, ym = x[rest].mean(0), y[rest].mean(0)
            gram = (x[rest] - xm).T @ (x[rest] - xm) + 40 * strength * torch.eye(12, dtype=torch.float64)
            weight = np.linalg.solve(gram.numpy(), ((x[rest] - xm).T @ (y[rest] - ym)).numpy())
            total += float((y[row] - ym - (x[row] - xm) @ torch.from_numpy(weight)).square().sum())
        return total

    strengths = [10 ** (exponent / 2) for exponent in range(-10, 5)]
    errors = [left_out(strength) for strength in strengths]
    assert found.strength == pytest.approx(strengths[int(np.argmin(errors))])
    expected = np.linalg.solve(
        (x.T @ x + 40 * found.strength * torch.eye(12, dtype=torch.float64)).numpy(), (x.T @ y).numpy()
    )
    np.testing.assert_allclose(found.weight.numpy(), expected, rtol=1e-8)
    assert {0.05: found.strength < 1e-2, 1.0: 1e-3 < found.strength < 1, 20.0: found.strength > 0.3}[noise]


def test_in_a_linear_world_every_image_finds_its_own_caption() -> None:
    ridge = RidgeMap.fit(*linear_world(200, noise=0.0, seed=2))
    images, texts = linear_world(60, noise=0.0, seed=4)

    found = ridge.retrieve(images, torch.arange(60), texts, captions_of(texts))

    assert (found.first, found.in_five, found.num_candidates) == ((1, 0), (1, 0), 60)


def test_with_noise_the_fitted_map_retrieves_as_well_as_the_known_one() -> None:
    ridge = RidgeMap.fit(*linear_world(2_000, noise=1.0, seed=2))
    images, texts = linear_world(400, noise=1.0, seed=4)

    found = ridge.retrieve(images, torch.arange(400), texts, captions_of(texts))

    # The posterior mean of the causes, from the equations of the world.
    shown = normals(5, 12, seed=1000)
    causes = ((images - 7) / 3) @ torch.linalg.solve(
        shown.T @ shown + torch.eye(12, dtype=torch.float64).double(), shown.T
    )
    cosines = torch.nn.functional.cosine_similarity(causes[:, None], ((texts + 2) / torch.arange(1, 6))[None], dim=2)
    known = (cosines.argmax(dim=1) == torch.arange(400)).double().mean()
    assert 0.1 < float(known) < 0.9
    assert abs(found.first.value - float(known)) <= 2 * found.first.error
    assert found.first.error == pytest.approx(math.sqrt(found.first.value * (1 - found.first.value) / 399))
    assert found.first.value < found.in_five.value < 1


def test_without_a_relation_captions_are_retrieved_by_chance() -> None:
    ridge = RidgeMap.fit(normals(300, 12), normals(300, 5, seed=1))
    texts, own = normals(50, 5, seed=2), torch.arange(4_000) % 50

    found = ridge.retrieve(normals(4_000, 12, seed=3), own, texts, captions_of(texts))

    assert abs(found.first.value - 1 / 50) <= 3 * found.first.error
    assert abs(found.in_five.value - 5 / 50) <= 3 * found.in_five.error


def test_a_caption_that_occurs_several_times_is_one_candidate_and_right_at_every_place() -> None:
    ridge = RidgeMap.fit(*linear_world(200, noise=0.3, seed=2))
    images, texts = linear_world(30, noise=0.3, seed=4)
    once = ridge.retrieve(images, torch.arange(30), texts, captions_of(texts))

    # The images name the second of two places of their captions.
    twice, names = torch.cat([texts, texts]), captions_of(texts) * 2

    assert ridge.retrieve(images, torch.arange(30) + 30, twice, names) == once


def test_other_captions_with_the_same_features_share_the_place() -> None:
    ridge = RidgeMap.fit(*linear_world(200, noise=0.0, seed=2))
    images, texts = linear_world(20, noise=0.0, seed=4)
    doubled = texts.repeat_interleave(2, dim=0)

    found = ridge.retrieve(images, torch.arange(20) * 2, doubled, captions_of(doubled))

    assert (found.first.value, found.in_five.value, found.num_candidates) == (0.5, 1, 40)


def test_retrieval_is_the_same_bits_under_any_number_of_threads() -> None:
    images, texts = normals(600, 130), normals(600, 80, seed=1)
    num_threads, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ridge = RidgeMap.fit(images, texts)
            found.append([ridge.weight, ridge.retrieve(images, torch.arange(600), texts, captions_of(texts))])
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_mistakes_in_the_pairs_are_named() -> None:
    ridge = RidgeMap.fit(normals(9, 4), normals(9, 3, seed=1))

    with pytest.raises(ValueError, match="9 images need as many captions, not 8"):
        RidgeMap.fit(normals(9, 4), normals(8, 3))
    with pytest.raises(ValueError, match="from 4 to 3 features, but these are 5 and 3. Use the same extractor"):
        ridge.retrieve(normals(9, 5), torch.arange(9), normals(9, 3), captions_of(normals(9, 3)))
    with pytest.raises(ValueError, match=re.escape("9 captions, 1 of them different: 2 or more are needed")):
        ridge.retrieve(normals(9, 4), torch.arange(9), normals(9, 3), ["the same"] * 9)
