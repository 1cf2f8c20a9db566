"""Spacing: the noise levels at which a sampler calls the network."""

from __future__ import annotations

from typing import Literal

from models.diffusion.schedule import Moment, Process

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "karras"]


def spaced_steps(*, num_train_steps: int, num_steps: int, spacing: Spacing) -> list[int]:
    """Choose ``num_steps`` of the steps 0 ... T - 1, noisiest first.

    ``leading``, ``trailing`` and ``linspace`` are those of Lin et al. 2024 (arXiv:2305.08891), table 2; only
    ``leading`` does not start at the noisiest step. ``quadratic`` is dense where the data is nearly clean: Song et al.
    2021 (arXiv:2010.02502), appendix D.2.
    """
    T, n = num_train_steps, num_steps
    if n > T:
        raise ValueError(
            f"a sampler of num_steps = {n} cannot take more steps than the {T} of its schedule. "
            f'Use at most {T}, or spacing = "karras", which is not bound to the steps of the schedule.'
        )
    match spacing:
        case "leading":
            steps = [i * (T // n) for i in range(n)]
        case "trailing":
            steps = [round(T - i * T / n) - 1 for i in reversed(range(n))]
        case "linspace":
            steps = [round(i * (T - 1) / (n - 1)) for i in range(n)] if n > 1 else [T - 1]
        case "quadratic":
            steps = [int((T - 1) * (i / (n - 1)) ** 2) for i in range(n)] if n > 1 else [T - 1]
            for i in range(1, n):
                steps[i] = max(steps[i], steps[i - 1] + 1)  # squares crowd near zero; no step is taken twice
        case "karras":
            raise ValueError('spacing = "karras" chooses noise levels, not steps: see karras_ratios')
    return steps[::-1]


def karras_ratios(*, highest: float, lowest: float, num_steps: int, rho: float = 7.0) -> list[float]:
    """Noise-to-data ratios, evenly spaced after taking the rho-th root, highest first. Karras et al. 2022, eq. 5."""
    if num_steps == 1:
        return [highest]
    low, high = lowest ** (1 / rho), highest ** (1 / rho)
    return [(high + i / (num_steps - 1) * (low - high)) ** rho for i in range(num_steps)]


def sampling_moments(process: Process, *, num_steps: int, spacing: Spacing) -> list[Moment]:
    """The moments at which a sampler asks the network, noisiest first; clean data is not among them."""
    if spacing != "karras":
        steps = spaced_steps(num_train_steps=process.num_steps, num_steps=num_steps, spacing=spacing)
        return [process.moment(step) for step in steps]
    highest = float(process.moment(process.num_steps - 1).level.ratio)
    if highest == float("inf"):
        raise ValueError(
            'spacing = "karras" needs a finite noise-to-data ratio to start from, but this schedule ends in pure noise '
            '(zero_terminal_snr, or flow matching). Use spacing = "trailing".'
        )
    lowest = float(process.moment(0).level.ratio)
    ratios = karras_ratios(highest=highest, lowest=lowest, num_steps=num_steps)
    return [process.moment_at_ratio(ratio) for ratio in ratios]
