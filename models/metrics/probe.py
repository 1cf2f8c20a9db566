"""A linear classifier on fixed features, fitted on real images only: the class that an image shows."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models.metrics.estimate import Estimate, checked_features, mean_estimate, on_one_thread


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardised features, fitted to convergence: no learning rate, no seed.

    Works on the CPU, wherever the features are: thousands of small steps would wait for a GPU.
    """

    mean: Tensor  # (d,) float64
    deviation: Tensor  # (d,) float64; 1 for a feature that never varies
    weight: Tensor  # (k d) float64, for standardised features
    bias: Tensor  # (k,) float64

    @classmethod
    @on_one_thread
    def fit(cls, features: Tensor, labels: Tensor, *, num_classes: int, l2: float = 3e-3) -> "LinearProbe":
        """The minimum of ``mean cross-entropy + l2 / 2 |weight|^2``, by L-BFGS in float64 from zero.

        The loss is strictly convex in the weights, so the answer depends on the data alone.

        Args:
            features: (n d), any floating dtype.
            labels: (n,) integers in [0, num_classes).
            num_classes: k.
            l2: Strength of the penalty; the bias is free.

        Raises:
            ValueError: Labels out of range or of another count, a class without a sample, NaN or infinite features.
        """
        features = checked_features(features, name="features").cpu()
        labels = _checked_labels(labels, num_samples=len(features), num_classes=num_classes)
        missing = sorted(set(range(num_classes)) - set(labels.unique().tolist()))
        if missing:
            raise ValueError(
                f"No sample of class {', '.join(map(str, missing[:10]))} to fit a probe on (of {num_classes} classes). "
                "Give images of every class."
            )
        mean, deviation = mean_and_deviation(features)
        weight, bias = _minimised((features - mean) / deviation, labels, num_classes=num_classes, l2=l2)
        return cls(mean=mean, deviation=deviation, weight=weight, bias=bias)

    @on_one_thread
    def predict(self, features: Tensor) -> Tensor:
        """Most probable class of each row; (n d) -> (n,) int64.

        Raises:
            ValueError: Another number of features than at the fit, NaN or infinite values.
        """
        features = checked_features(features, name="features", min_samples=1).cpu()
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"The probe was fitted on {len(self.mean)} features, but these have {features.shape[1]}. "
                "Use the same extractor for both."
            )
        return (((features - self.mean) / self.deviation) @ self.weight.T + self.bias).argmax(dim=1)

    def accuracy(self, features: Tensor, labels: Tensor) -> Estimate:
        """Fraction of rows whose predicted class is ``labels`` (n,), in [0, 1], with its standard error.

        Raises:
            ValueError: As :meth:`predict`, or labels out of range or of another count.
        """
        labels = _checked_labels(labels, num_samples=len(features), num_classes=len(self.bias))
        return mean_estimate((self.predict(features) == labels).double())


def mean_and_deviation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature by which a table (n d) is standardised; 1 where a feature never varies."""
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    # A constant feature varies by rounding at most; dividing by that would turn rounding into a feature.
    constant = deviation <= 1e-12 * features.abs().amax(dim=0)
    return mean, torch.where(constant, 1.0, deviation)


def _minimised(features: Tensor, labels: Tensor, *, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Weights (k d) and biases (k,) where the largest slope of the penalised loss is below 1e-6."""
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    # The long history halves the number of steps, since features correlate strongly; the bound is never met as a rule.
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=3_000,
        tolerance_grad=1e-6,
        tolerance_change=0.0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(features @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return weight.detach(), bias.detach()


def _checked_labels(labels: Tensor, *, num_samples: int, num_classes: int) -> Tensor:
    if labels.shape != (num_samples,):
        raise ValueError(f"{num_samples} samples need labels of shape ({num_samples},), not {tuple(labels.shape)}.")
    labels = labels.detach().to("cpu", torch.int64)
    if num_samples and ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f"Labels run from {int(labels.min())} to {int(labels.max())}, but must be in 0..{num_classes - 1}. "
            "Check num_classes against the corpus."
        )
    return labels
