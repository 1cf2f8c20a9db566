"""Classifier-free guidance: push a conditional prediction away from the unconditional one.

Scale 0 is unconditional, 1 is conditional, above 1 extrapolates. At 0 and at 1 the other branch is never computed.
Autoguidance has a weaker network with the same conditions in the place of the unconditional one: it leads away from the
mistakes of that network, not from other classes.

Sources: Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, whose w is our scale - 1; Kynkäänniemi et al. 2024
(arXiv:2404.07724) for the interval; Karras et al. 2024 (arXiv:2406.02507), eq. 1, for autoguidance; Lin et al. 2024
(arXiv:2305.08891), section 3.4, for the rescaling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from models.diffusion.schedule import Moment

Predict = Callable[[Tensor, Moment, Tensor], Tensor]
"""A network with its conditions: (x (n c h w), moment, is_null (n,) bool) -> output (n c h w) or (n 2c h w).

Where ``is_null`` holds, the condition is the null condition. For a batched call n is twice the number of samples: rows
b to 2b - 1 are the same samples as rows 0 to b - 1, so the conditions must be repeated n // b times.
"""


GuidanceScale = Annotated[float, Field(ge=0, le=1e6)]


class GuidanceConfig(BaseModel, frozen=True, extra="forbid"):
    """Classifier-free guidance of a sampler."""

    scale: GuidanceScale = 1.0  # 0 unconditional, 1 conditional, above 1 extrapolates
    interval: tuple[float, float] = (
        0.0,
        1.0,
    )  # guide where sigma_t, the noise's std, lies in it; else scale 1
    rescale: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the conditional prediction's contrast to restore
    batched: bool = True  # both branches in one call of twice the batch, or in two calls (half the memory)

    @model_validator(mode="after")
    def _interval_is_ordered(self) -> GuidanceConfig:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"guidance.interval = [{low}, {high}] is no interval of noise levels: sigma_t runs from 0 (clean) to 1 "
                f"(pure noise). Use [low, high] with 0 <= low <= high <= 1; a noise-to-data ratio s (the sigma of "
                f"Karras et al.) is s / sqrt(1 + s^2) here."
            )
        return self


def guided_output(
    predict: Predict, x: Tensor, moment: Moment, guidance: GuidanceConfig, *, weaker: Predict | None = None
) -> Tensor:
    """The output of ``predict`` for ``x`` (b c h w) under guidance; (b c h w), or (b 2c h w) with a learned variance.

    The branches are combined as the network's own output, which equals combining eps, x0 or v: for a given x each is an
    affine function of the other. Only the rescaling depends on that choice; Lin et al. apply it to the output, too.
    ``weaker`` is the network of autoguidance, which then stands for the unconditional branch, with the condition.
    """
    low, high = guidance.interval
    scale = guidance.scale if low <= moment.level.sigma <= high else 1.0
    conditional = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if scale == 1:
        return predict(x, moment, conditional)
    if scale == 0:
        return predict(x, moment, ~conditional) if weaker is None else weaker(x, moment, conditional)
    if weaker is not None:
        with_condition, without = predict(x, moment, conditional), weaker(x, moment, conditional)
    elif guidance.batched:
        both = predict(torch.cat([x, x]), moment, torch.cat([conditional, ~conditional]))
        with_condition, without = both.chunk(2)
    else:
        with_condition, without = predict(x, moment, conditional), predict(x, moment, ~conditional)

    c = x.shape[1]
    guided = extrapolate(with_condition[:, :c], without[:, :c], scale=scale)
    guided = restore_contrast(guided, with_condition[:, :c], share=guidance.rescale)
    # A learned variance is no direction in data space: it is the conditional branch's, as in GLIDE.
    return torch.cat([guided, with_condition[:, c:]], dim=1)


def extrapolate(conditional: Tensor, null: Tensor, *, scale: float) -> Tensor:
    """Ho & Salimans 2022, eq. 6: from ``null`` through ``conditional`` and beyond; all (b c h w)."""
    return null + scale * (conditional - null)


def restore_contrast(guided: Tensor, conditional: Tensor, *, share: float) -> Tensor:
    """Bring each sample's standard deviation back towards the conditional prediction's. Lin et al. 2024, section 3.4.

    Args:
        guided: Guided prediction; (b c h w).
        conditional: Conditional prediction; (b c h w).
        share: phi of the paper: 0 leaves ``guided`` as it is, 1 restores the deviation fully.
    """
    if share == 0:
        return guided
    elements = tuple(range(1, guided.dim()))
    wanted, found = (each.std(dim=elements, keepdim=True) for each in (conditional, guided))
    ratio = torch.where(found > 0, wanted / found, 1.0)  # a constant, as of a new network, stays what it is
    return share * (guided * ratio) + (1 - share) * guided
