"""AdamW and Muon, their learning rate as a function of the update, and a step that can be refused on the device.

Its moments can be dealt over the ranks (ZeRO stage 1: Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1). A rank
then steps the parameters that are dealt to it and broadcasts them: the same bits, and the same checkpoint.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import BaseModel, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor, nn


class ConstantRate(BaseModel, frozen=True, extra="forbid"):
    """The peak rate to the end."""

    kind: Literal["constant"] = "constant"  # flat after the warm-up


class CosineRate(BaseModel, frozen=True, extra="forbid"):
    """Half a cosine from the peak to ``final`` of it (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)."""

    kind: Literal["cosine"] = "cosine"  # from the end of the warm-up to the end of the training
    final: NonNegativeFloat = 0.0  # rate after the last update, as a fraction of the peak


class InverseSquareRootRate(BaseModel, frozen=True, extra="forbid"):
    """Peak x sqrt(reference / update) after ``reference`` updates (Karras 2024, arXiv:2312.02696, eq. 67)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"  # open-ended training
    reference: Annotated[int, Field(ge=1)] = 70_000  # updates at the peak before the decay


RateSchedule = Annotated[ConstantRate | CosineRate | InverseSquareRootRate, Field(discriminator="kind")]


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), or Muon for matrices, with linear warm-up.

    Counts are optimizer updates.
    """

    algorithm: Literal["adamw", "muon"] = "adamw"  # of inner matrices and kernels; the others have AdamW
    peak_lr: PositiveFloat = 1e-4  # per update; not scaled by world size
    warmup_updates: NonNegativeInt = 1_000  # linear from 0 to the peak
    rate: RateSchedule = ConstantRate()  # what the rate does after the warm-up
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9  # decay of the gradient's mean, per update
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99  # decay of the gradient's square, per update
    epsilon: PositiveFloat = 1e-8  # added to the root of the mean square
    weight_decay: NonNegativeFloat = 0.0  # decoupled, per update and unit of rate; on matrices and kernels only
    max_grad_norm: PositiveFloat = 1.0  # L2 over all parameters


def learning_rate(config: OptimConfig, *, update: int, total_updates: int) -> float:
    """Return the rate of the ``update``-th update (the first is 1): a pure function, so there is no state to save."""
    warmup = min(1.0, update / config.warmup_updates) if config.warmup_updates else 1.0
    match config.rate:
        case ConstantRate():
            decay = 1.0
        case CosineRate(final=final):
            span = max(1, total_updates - config.warmup_updates)
            # What lies behind the update: the last one still learns, however small the final rate.
            progress = min(1.0, max(0, update - 1 - config.warmup_updates) / span)
            decay = final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case InverseSquareRootRate(reference=reference):
            decay = 1.0 / math.sqrt(max(1.0, update / reference))
    return config.peak_lr * warmup * decay


def is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon is for this parameter: a matrix or kernel of no first or last layer and no conditioner.

    Those of the discriminator are not told apart by their names; it is moved by Muon as a whole.
    """
    ends = ("conv_in", "conv_out", "conditioners")
    return parameter.ndim > 1 and not any(part in ends for part in name.split("."))


class Muon:
    """Momentum whose singular values are brought to 1: every direction of a matrix learns equally fast.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with Nesterov's momentum; scaled to the size of
    AdamW's steps, so that one rate suits both (Liu et al. 2025, arXiv:2502.16982, eq. 4). All in float32: torch's own
    takes no kernels, computes in bf16 and cannot refuse a step.
    """

    momentum = 0.95

    def __init__(self, parameters: Sequence[nn.Parameter], *, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.state = {parameter: torch.zeros_like(parameter) for parameter in parameters}

    @torch.no_grad()
    def step(self, *, rate: float, refused: Tensor) -> None:
        """Apply the gradients of those parameters that have one, and forget them; where ``refused`` is 1, only that."""
        refuses = refused > 0
        for parameter, momentum in self.state.items():
            if parameter.grad is None:
                continue
            after = momentum.lerp(parameter.grad, 1 - self.momentum)
            direction = orthogonalised(parameter.grad.lerp(after, self.momentum).flatten(1)).view_as(parameter)
            scale = 0.2 * math.sqrt(max(len(parameter), parameter[0].numel()))
            step = rate * (scale * direction + self.weight_decay * parameter)
            momentum.copy_(torch.where(refuses, momentum, after))
            parameter.sub_(torch.where(refuses, 0.0, step))
            parameter.grad = None


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring all singular values of a matrix (r c) near 1, by five Newton-Schulz steps of Jordan et al. 2024.

    Each step multiplies the matrix by a polynomial of its Gram matrix. The polynomials are gathered in the smaller
    dimension and multiplied to the matrix once, which for a 3 x 3 kernel takes 0.4 of the time of five products.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    wide = wide / torch.linalg.matrix_norm(wide).clamp(min=1e-7)
    gram = wide @ wide.T
    identity = product = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    for _ in range(5):
        polynomial = 3.4445 * identity - 4.7750 * gram + 2.0315 * (gram @ gram)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    result = product @ wide
    return result.T if is_tall else result


def deal(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """Return the rank that gets each parameter: the largest is dealt first, always to the rank that has least."""
    dealt, ranks = [0] * num_ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        ranks[index] = dealt.index(min(dealt))
        dealt[ranks[index]] += sizes[index]
    return ranks


class Optimizer:
    """Clipped, fused AdamW over the parameters of one network, or Muon for those that suit it.

    A refused step changes nothing: the kernel reads the refusal on the device (``found_inf``), so that no bad number
    reaches the weights, and the host need not wait for it.

    Args:
        network: What is trained; its parameters are the same on every rank.
        config: Rate and moments.
        accelerator: Of this process.
        shards: Deal the moments over the ranks; this one then keeps those of its own parameters.
    """

    def __init__(
        self, network: nn.Module, config: OptimConfig, *, accelerator: Accelerator, shards: bool = False
    ) -> None:
        self.config = config
        self.is_sharded = shards and accelerator.num_processes > 1
        self._rank = accelerator.process_index
        self.names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        sizes = [parameter.numel() for parameter in self.parameters]
        self._ranks = deal(sizes, accelerator.num_processes) if self.is_sharded else [self._rank] * len(sizes)

        # Muon's parameters are AdamW's, too, so that one scaler sees them all; but not with a gradient, nor moments.
        named = zip(self.names, self.parameters, strict=True)
        self._inner = {
            parameter for name, parameter in named if config.algorithm == "muon" and is_inner(name, parameter)
        }
        own = [parameter for parameter, rank in zip(self.parameters, self._ranks, strict=True) if rank == self._rank]
        inner = [parameter for parameter in own if parameter in self._inner]
        self.muon = Muon(inner, weight_decay=config.weight_decay)

        # Weight decay is for matrices and kernels, not for biases and norms.
        decayed = [parameter for parameter in self.parameters if parameter.ndim > 1]
        plain = [parameter for parameter in self.parameters if parameter.ndim <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.peak_lr,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self.scaler: torch.amp.GradScaler | None = accelerator.scaler

    def clip(self) -> Tensor:
        """Bring the gradients to their true scale and clip them; return their L2 norm before (scalar, on device)."""
        if self.scaler is not None:
            self.scaler.unscale_(self.adamw)
        return nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm, foreach=True)

    def apply(self, *, update: int, total_updates: int, refused: Tensor) -> None:
        """Apply the clipped gradients and forget them.

        Args:
            update: The present update, from 1.
            total_updates: Length of the training.
            refused: Scalar float32 on the device; where it is 1, weights and moments stay as they are.
        """
        rate = learning_rate(self.config, update=update, total_updates=total_updates)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.found_inf = refused  # type: ignore[attr-defined]

        # A parameter without a gradient is passed over, and gets no moments.
        for parameter, rank in zip(self.parameters, self._ranks, strict=True):
            if rank != self._rank:
                parameter.grad = None
        self.muon.step(rate=rate, refused=refused)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.is_sharded:
            sent = zip(self.parameters, self._ranks, strict=True)
            for work in [dist.broadcast(_flat(parameter), src=rank, async_op=True) for parameter, rank in sent]:
                work.wait()

    def gathered(self) -> dict[str, Tensor]:
        """Return the state of all ranks, as one rank that holds it all would: on the main process. A collective."""
        if not self.is_sharded:
            return self.tensors()
        state: dict[str, Tensor] = {}
        for name, parameter, rank in zip(self.names, self.parameters, self._ranks, strict=True):
            for key, like in self._blank(parameter).items():
                value = self._state(parameter)[key] if rank == self._rank else torch.empty_like(like)
                dist.broadcast(_flat(value), src=rank)
                if self._rank == 0:
                    state[f"{name}/{key}"] = value.detach().cpu()
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that this rank holds, by parameter name."""
        state: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self._state(parameter).items():
                state[f"{name}/{key}"] = value
        return state

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what is remembered of a parameter, by the names of ``_blank``."""
        if parameter in self._inner:
            return {"momentum": self.muon.state[parameter]} if parameter in self.muon.state else {}
        return self.adamw.state.get(parameter, {})

    def _blank(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return tensors of the shapes and layouts of what is remembered of a parameter."""
        if parameter in self._inner:
            return {"momentum": parameter}
        return {"step": torch.zeros((), device=parameter.device), "exp_avg": parameter, "exp_avg_sq": parameter}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``gathered`` returned, on any number of ranks.

        Raises:
            ValueError: The state belongs to another network or algorithm.
        """
        blanks = zip(self.names, map(self._blank, self.parameters), strict=True)
        known = {f"{name}/{key}" for name, blank in blanks for key in blank}
        if strangers := sorted(tensors.keys() - known) or sorted(known - tensors.keys()):
            raise ValueError(f"The optimizer's state is of another network or algorithm: {', '.join(strangers[:3])}.")

        # The fused kernel walks parameter and moments side by side: they must have one memory layout.
        for name, parameter, rank in zip(self.names, self.parameters, self._ranks, strict=True):
            if rank != self._rank:
                continue
            blank = self._blank(parameter)
            state = {key: torch.empty_like(like).copy_(tensors[f"{name}/{key}"]) for key, like in blank.items()}
            if parameter in self._inner:
                self.muon.state[parameter] = state["momentum"]
            else:
                self.adamw.state[parameter] = state


def _flat(tensor: Tensor) -> Tensor:
    """View a dense tensor as its memory, whatever the order of its dimensions there."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


class LossScale:
    """The scale of fp16 losses as a part of a checkpoint."""

    optional = True  # absent where the training began without fp16

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    def tensors(self) -> dict[str, Tensor]:
        """Return scale and growth count; waits for the device."""
        state = self.scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"], dtype=torch.float64),
            "growth": torch.tensor(state["_growth_tracker"], dtype=torch.int64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``tensors`` returned."""
        scale, growth = float(tensors["scale"]), int(tensors["growth"])
        self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": growth})
