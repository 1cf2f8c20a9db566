"""Attention: one function over interchangeable backends, and the blocks that use it.

Shapes: b batch, n heads, s sequence, d width of a head, c channels (n d), h and w height and width.

The backend is a property of the machine, not of the model: networks start on ``sdpa``, which runs everywhere.
``choose_attention_backend`` finds one that has run on the device, ``use_attention_backend`` lets a network use it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.layers import set_to_zero

Backend = Literal["sdpa", "xformers", "math"]
RequestedBackend = Literal["auto", "sdpa", "xformers", "math"]

# What "auto" tries, best first.
_PREFERENCE: dict[str, tuple[Backend, ...]] = {"cuda": ("sdpa", "xformers", "math"), "cpu": ("sdpa", "math")}


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, backend: Backend = "sdpa") -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Args:
        q: Queries (b n s d).
        k: Keys (b n t d).
        v: Values (b n t d).
        mask: Which of the t keys may be attended to, bool (b t); None for all. Each row needs at least one.
        backend: Which implementation computes it; all agree to rounding.

    Returns:
        (b n s d), in the dtype of ``q``.
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    if backend == "xformers":
        return _attend_by_xformers(q, k, v, mask)
    logits = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)  # (b n s t)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], float("-inf"))
    return logits.softmax(dim=-1).to(v.dtype) @ v


def _attend_by_xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    # Imported on use: importing it warns and probes the GPU, which nobody who did not ask for it should wait for.
    from xformers.ops import memory_efficient_attention

    bias = None
    if mask is not None:
        b, n, s, t = *q.shape[:3], k.shape[2]
        # The kernels want rows that start at multiples of 8 elements.
        padded = q.new_zeros(b, n, s, -(-t // 8) * 8)
        bias = padded[..., :t].masked_fill_(~mask[:, None, None, :], float("-inf"))
    q, k, v = (rearrange(x, "b n s d -> b s n d") for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v, attn_bias=bias), "b s n d -> b n s d")


class ChosenBackend(NamedTuple):
    """A backend that has run on the device, and why it was chosen."""

    name: Backend
    reason: str


def choose_attention_backend(
    requested: RequestedBackend, *, device: torch.device, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> ChosenBackend:
    """Return a backend that has run on ``device`` in each of ``dtypes``, forward and backward.

    ``auto`` takes the first that runs, in the order that suits the device.

    Raises:
        ValueError: The backend that was asked for does not run there; the message holds the reason.
    """
    if requested != "auto":
        if failure := _failure(requested, device, dtypes):
            raise ValueError(
                f"attention backend {requested!r} does not run on {device.type} in {failure}. "
                f"Use 'auto' or 'sdpa', or install what it needs (xformers: pip install 'latentline[gpu]')."
            )
        return ChosenBackend(requested, "asked for; forward and backward ran")
    failures: list[str] = []
    for backend in _PREFERENCE.get(device.type, ("sdpa", "math")):
        failure = _failure(backend, device, dtypes)
        if not failure:
            after = f", after {'; '.join(failures)}" if failures else ""
            return ChosenBackend(backend, f"first to run forward and backward on {device.type}{after}")
        failures.append(f"{backend} failed in {failure}")
    raise ValueError(f"no attention backend runs on {device.type}: {'; '.join(failures)}.")


def _failure(backend: Backend, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """The first dtype in which ``backend`` does not run, and why; "" where it runs in all."""
    for dtype in dtypes:
        if failure := probe_backend(backend, device=device, dtype=dtype):
            return f"{str(dtype).removeprefix('torch.')} ({failure})"
    return ""


def use_attention_backend(network: nn.Module, backend: Backend) -> None:
    """Let every attention in ``network`` be computed by ``backend``."""
    for module in network.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.backend = backend


def probe_backend(backend: Backend, *, device: torch.device, dtype: torch.dtype) -> str:
    """Run ``backend`` forward and backward with a mask on small tensors, against plain arithmetic.

    Returns:
        "" when output and gradients agree, else what went wrong.
    """
    try:
        found, expected = (_output_and_gradients(one, device=device, dtype=dtype) for one in (backend, "math"))
    except Exception as failure:
        # Anything at all may come out of a foreign kernel, and each of it means the same here: it does not run.
        return f"{type(failure).__name__}: {str(failure).strip().splitlines()[0] if str(failure).strip() else ''}"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for name, right in expected.items():
        if name not in found:
            return f"it gives no {name}"
        error = (found[name] - right).abs().max().item() / max(1.0, right.abs().max().item())
        if not error <= tolerance:  # NaN is not either
            return f"its {name} differs from plain arithmetic by {error:.1e}"
    return ""


def _output_and_gradients(backend: Backend, *, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {
        name: torch.linspace(-1, 1, 2 * 2 * 16 * 32, device=device, dtype=dtype)
        .roll(turn)
        .reshape(2, 2, 16, 32)
        .requires_grad_()
        for name, turn in (("query", 0), ("key", 333), ("value", 777))
    }
    mask = (torch.arange(16, device=device) < 9).expand(2, 16)
    out = attend(*inputs.values(), mask=mask, backend=backend)
    out.float().square().sum().backward()
    gradients = {f"gradient of the {name}": x.grad.float() for name, x in inputs.items() if x.grad is not None}
    return {"output": out.detach().float(), **gradients}


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    backend: Backend = "sdpa"

    def __init__(self, channels: int, *, heads: int, bias: bool) -> None:
        """``bias`` is that of the query, key and value projections; the output projection always has one."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b s c) to (b s c)."""
        q, k, v = rearrange(self.qkv(x), "b s (three n d) -> three b n s d", three=3, n=self.heads)
        return self.out(rearrange(attend(q, k, v, backend=self.backend), "b n s d -> b s (n d)"))


class CrossAttention(nn.Module):
    """Multi-head attention of a sequence to the tokens of a condition."""

    backend: Backend = "sdpa"

    def __init__(self, channels: int, *, token_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(token_width, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """x (b s c), tokens (b t token_width), token_mask bool (b t) to (b s c)."""
        q = rearrange(self.q(x), "b s (n d) -> b n s d", n=self.heads)
        k, v = rearrange(self.kv(tokens), "b t (two n d) -> two b n t d", two=2, n=self.heads)
        return self.out(rearrange(attend(q, k, v, mask=token_mask, backend=self.backend), "b n s d -> b s (n d)"))


class FeedForward(nn.Module):
    """Gated perceptron of four times the width (GEGLU; Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.expand = nn.Linear(channels, 8 * channels)
        self.reduce = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b s c) to (b s c)."""
        values, gates = self.expand(x).chunk(2, dim=-1)
        return self.reduce(values * F.gelu(gates))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, around a shortcut; starts as the identity."""

    def __init__(self, channels: int, *, heads: int, norm_groups: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=norm_eps)
        self.attention = SelfAttention(channels, heads=heads, bias=True)
        set_to_zero(self.attention.out)

    def forward(self, x: Tensor, tokens: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """(b c h w) to the same; takes tokens only to be interchangeable with ``TransformerBlock``."""
        height = x.shape[2]
        y = self.attention(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        return x + rearrange(y, "b (h w) c -> b c h w", h=height)


class TransformerBlock(nn.Module):
    """``depth`` transformer layers with cross-attention over the positions of a feature map, around a shortcut.

    Rombach et al. 2022 (arXiv:2112.10752), section 3.3 and appendix E.2.1. Starts as the identity.
    """

    def __init__(self, channels: int, *, heads: int, depth: int, token_width: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.layers = nn.ModuleList(
            TransformerLayer(channels, heads=heads, token_width=token_width) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)
        set_to_zero(self.proj_out)

    def forward(self, x: Tensor, tokens: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """x (b c h w), tokens (b t token_width), token_mask bool (b t) to (b c h w)."""
        height = x.shape[2]
        y = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for layer in self.layers:
            y = layer(y, tokens, token_mask)
        return x + rearrange(self.proj_out(y), "b (h w) c -> b c h w", h=height)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each normalised first and added to its input."""

    def __init__(self, channels: int, *, heads: int, token_width: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(channels, heads=heads, bias=False)
        self.norm_2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(channels, token_width=token_width, heads=heads)
        self.norm_3 = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        """x (b s c), tokens (b t token_width), token_mask bool (b t) to (b s c)."""
        x = x + self.self_attention(self.norm_1(x))
        x = x + self.cross_attention(self.norm_2(x), tokens, token_mask)
        return x + self.feed_forward(self.norm_3(x))
