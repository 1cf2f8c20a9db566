"""Attention: every backend computes the same, and choosing one tells the truth."""

import builtins
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import attention
from models.attention import (
    AttentionBlock,
    CrossAttention,
    SelfAttention,
    TransformerBlock,
    attend,
    choose_attention_backend,
    probe_backend,
    use_attention_backend,
)
from models.unet import UNet, UNetConfig

CPU = torch.device("cpu")


def qkv(*, keys: int = 7, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, keys, 8), (2, 3, keys, 8))
    q, k, v = (torch.randn(shape, generator=draw).requires_grad_(requires_grad) for shape in shapes)
    return q, k, v


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Vaswani et al. 2017, eq. 1, one query at a time, over the keys that there are."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        there = mask[b]
        for n in range(q.shape[1]):
            for s in range(q.shape[2]):
                weights = torch.softmax(k[b, n, there] @ q[b, n, s] / q.shape[-1] ** 0.5, dim=0)
                out[b, n, s] = weights @ v[b, n, there]
    return out


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_attention_is_the_formula(backend: attention.Backend) -> None:
    q, k, v = qkv()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0]]).bool()
    torch.testing.assert_close(attend(q, k, v, mask=mask, backend=backend), by_the_formula(q, k, v, mask))
    torch.testing.assert_close(attend(q, k, v, backend=backend), by_the_formula(q, k, v, torch.ones_like(mask)))


def test_backends_agree_in_values_and_gradients() -> None:
    mask = torch.arange(7).expand(2, 7) < torch.tensor([[7], [2]])
    results = []
    for backend in ("sdpa", "math"):
        given = qkv(requires_grad=True)
        out = attend(*given, mask=mask, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_xformers_is_called_in_its_own_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU; here its documented interface stands in: (b s n d), and an additive bias (b n s t)."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor | None) -> Tensor:
        if attn_bias is not None:
            assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
            assert attn_bias.dtype == q.dtype
            assert attn_bias.stride(-2) % 8 == 0  # its kernels refuse other alignments
        logits = torch.einsum("bsnd,btnd->bnst", q, k) / q.shape[-1] ** 0.5
        weights = torch.softmax(logits if attn_bias is None else logits + attn_bias, dim=-1)
        return torch.einsum("bnst,btnd->bsnd", weights, v)

    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", memory_efficient_attention, False)
    q, k, v = qkv()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0, 0]]).bool()
    for given in (None, mask):
        torch.testing.assert_close(
            attend(q, k, v, mask=given, backend="xformers"), attend(q, k, v, mask=given, backend="math")
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
def test_backends_agree_on_a_gpu(backend: attention.Backend, dtype: torch.dtype) -> None:
    if failure := probe_backend(backend, device=torch.device("cuda"), dtype=dtype):
        pytest.skip(failure)
    mask = torch.arange(7, device="cuda").expand(2, 7) < torch.tensor([[7], [2]], device="cuda")
    results = []
    for name in (backend, "math"):
        given = [x.detach().to("cuda", dtype).requires_grad_() for x in qkv()]
        out = attend(*given, mask=mask, backend=name)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), given)))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_auto_takes_the_first_that_runs_and_says_so() -> None:
    choice = choose_attention_backend("auto", device=CPU)
    assert choice.name == "sdpa"
    assert "forward and backward on cpu" in choice.reason


def test_auto_passes_over_a_backend_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: q + k)
    choice = choose_attention_backend("auto", device=CPU)
    assert choice.name == "math"
    assert "sdpa failed in float32 (its output differs from plain arithmetic" in choice.reason


def test_auto_passes_over_a_backend_whose_gradients_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: real(q, k.detach(), v, attn_mask)
    )
    assert "no gradient of the key" in probe_backend("sdpa", device=CPU, dtype=torch.float32)
    monkeypatch.setattr(
        attention.F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask: real(q, 2 * k - k.detach(), v, attn_mask),
    )
    choice = choose_attention_backend("auto", device=CPU)
    assert choice.name == "math"
    assert "sdpa failed in float32 (its gradient of the key differs from plain arithmetic" in choice.reason


def test_asking_for_a_backend_that_cannot_run_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"'xformers' does not run on cpu in float32 \(\w*Error: .*'auto'"):
        choose_attention_backend("xformers", device=CPU)


def test_the_chosen_backend_reaches_every_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    config = UNetConfig(
        channels=(8, 16), blocks=(1, 1), attention=(True, True), heads=(1, 2), transformer_depth=(1, 1), norm_groups=4
    )
    network = UNet(config, in_channels=4, out_channels=4, token_width=6)
    use_attention_backend(network, "math")
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", None)  # would fail if anything still called it
    network(torch.zeros(1, 4, 8, 8), torch.zeros(1), tokens=torch.zeros(1, 2, 6))


def test_xformers_is_not_imported_until_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real_import = builtins.__import__

    def watch(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("xformers"):
            asked.append(name)
            raise ImportError("not installed")
        return real_import(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    monkeypatch.delitem(sys.modules, "xformers.ops", raising=False)
    monkeypatch.setattr(builtins, "__import__", watch)
    choose_attention_backend("auto", device=CPU)
    assert asked == []
    assert "ImportError: not installed" in probe_backend("xformers", device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["attention", "transformer"])
def test_a_new_attention_block_is_the_identity(kind: str) -> None:
    block = (
        AttentionBlock(8, heads=2, norm_groups=2, norm_eps=1e-5)
        if kind == "attention"
        else TransformerBlock(8, heads=2, depth=2, token_width=6, norm_groups=2)
    )
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(block(x, torch.randn(2, 3, 6)), x)


def test_attention_modules_match_those_of_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 5, 8, generator=draw), torch.randn(2, 4, 6, generator=draw)
    ours = SelfAttention(8, heads=2, bias=True)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])

    crossing = CrossAttention(8, token_width=6, heads=2)
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, bias=False, kdim=6, vdim=6)
    key, value = crossing.kv.weight.chunk(2)
    weights = {"q_proj_weight": crossing.q.weight, "k_proj_weight": key, "v_proj_weight": value}
    theirs.load_state_dict(weights | {"out_proj.weight": crossing.out.weight})
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    expected = theirs(x, tokens, tokens, key_padding_mask=~mask)[0] + crossing.out.bias
    torch.testing.assert_close(crossing(x, tokens, mask), expected)
