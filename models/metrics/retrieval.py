"""Retrieval of an image's own caption among others, by a linear map from image features to text features.

The map is fitted on real images with their captions. Letters: n images, m captions, d image and k text features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.metrics.estimate import Estimate, checked_features, mean_estimate, on_one_thread
from models.metrics.probe import mean_and_deviation

_STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-10, 5))  # of the penalty, per image


@dataclass(frozen=True)
class RidgeMap:
    """Ridge regression of standardised text features on standardised image features, (n d) -> (n k)."""

    image_mean: Tensor  # (d,) float64
    image_deviation: Tensor  # (d,); 1 for a feature that never varies
    text_mean: Tensor  # (k,)
    text_deviation: Tensor  # (k,)
    weight: Tensor  # (d k)
    strength: Tensor  # of the penalty, per image, that was chosen; scalar

    @classmethod
    @on_one_thread
    def fit(cls, images: Tensor, texts: Tensor) -> "RidgeMap":
        """The minimum of ``|texts - images weight|^2 + n strength |weight|^2``, both standardised.

        Of 15 strengths the one whose error is the least where each pair in turn is left out of the fit, by the closed
        form ``residual / (1 - leverage)`` (Allen 1974, 10.1080/00401706.1974.10489157).

        Args:
            images: Features of training images; (n d), any floating dtype.
            texts: Features of their captions; (n k).

        Raises:
            ValueError: Unequal counts, fewer than 3 pairs, NaN or infinite values.
        """
        images, texts = (
            checked_features(table, name=name, min_samples=3)
            for table, name in ((images, "image features"), (texts, "text features"))
        )
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images need as many captions, not {len(texts)}.")
        image_scale, text_scale = mean_and_deviation(images), mean_and_deviation(texts)
        x, y = _standardised(images, image_scale), _standardised(texts, text_scale)

        # In the axes of x every strength is a division.
        eigenvalues, axes = torch.linalg.eigh(x.T @ x)
        along = x @ axes  # (n d)
        shared, squared = along.T @ y, along.square()
        errors = []
        for strength in _STRENGTHS:
            divisors = eigenvalues.clamp_min(0) + len(x) * strength
            leverage = (squared / divisors).sum(dim=1) + 1 / len(x)  # that of the mean besides
            residual = y - along @ (shared / divisors[:, None])
            errors.append(float((residual / (1 - leverage)[:, None]).square().sum()))
        strength = _STRENGTHS[errors.index(min(errors))]
        weight = axes @ (shared / (eigenvalues.clamp_min(0) + len(x) * strength)[:, None])
        return cls(*image_scale, *text_scale, weight, torch.tensor(strength, dtype=torch.float64))

    @on_one_thread
    def retrieve(self, images: Tensor, own: Tensor, texts: Tensor, captions: Sequence[str]) -> "Retrieval":
        """Rank captions by their correlation with what the map makes of each image; count where its own one stands.

        A caption that occurs several times is one candidate. Where others correlate as well as the own one, it counts
        with the probability that it comes first in a random order of them. The errors are those of the images, with the
        map and the candidates as they are.

        Args:
            images: Features; (n d).
            own: Place of each image's caption among the candidates; (n,) integers.
            texts: Features of the candidates; (m k).
            captions: The candidates; m texts, equal ones with equal features.

        Raises:
            ValueError: Other numbers of features than at the fit, fewer than 2 images or different captions, NaN or
                infinite values.
        """
        images = checked_features(images, name="image features")
        texts = checked_features(texts, name="text features")
        if images.shape[1] != len(self.weight) or texts.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"The map was fitted from {len(self.weight)} to {self.weight.shape[1]} features, but these are "
                f"{images.shape[1]} and {texts.shape[1]}. Use the same extractor and text encoder for both."
            )
        # Each caption once.
        first_of = {caption: place for place, caption in reversed(list(enumerate(captions)))}
        places = {caption: place for place, caption in enumerate(first_of)}
        if len(places) < 2 or len(captions) != len(texts):
            raise ValueError(f"{len(texts)} captions, {len(places)} of them different: 2 or more are needed.")
        own = torch.tensor([places[captions[place]] for place in own.tolist()], device=images.device)
        candidates = (texts[list(first_of.values())] - self.text_mean.to(texts)) / self.text_deviation.to(texts)

        # The correlation of each image with each of them, and how many correlate better or as well.
        scaled = (images - self.image_mean.to(images)) / self.image_deviation.to(images)
        predicted = scaled @ self.weight.to(images)
        found = _unit(predicted) @ _unit(candidates).T  # (n m)
        of_own = found.gather(1, own[:, None])
        ties = (found - of_own).abs() <= 1e-12
        better = ((found > of_own) & ~ties).sum(dim=1)
        ties = ties.sum(dim=1)
        first, five = (mean_estimate(((count - better) / ties).clamp(0, 1)) for count in (1, 5))
        return Retrieval(first, five, len(places))


class Retrieval(NamedTuple):
    """Shares of images, in [0, 1]; by chance ``1 / num_candidates`` and ``5 / num_candidates``."""

    first: Estimate  # whose own caption comes first
    in_five: Estimate  # whose own caption is among the first five
    num_candidates: int  # different captions


def _standardised(features: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
    mean, deviation = scale
    return (features - mean) / deviation


def _unit(rows: Tensor) -> Tensor:
    # A row of zeros correlates with nothing.
    return torch.nn.functional.normalize(rows, dim=1, eps=1e-30)
