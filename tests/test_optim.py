"""Laws of the optimizer: rates, skipped steps, exact state."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from pipelines.runtime.config.errors import ConfigError
from pipelines.runtime.training.checkpoint import Checkpoint
from pipelines.runtime.training.optim import (
    ConstantRate,
    CosineRate,
    InverseSquareRootRate,
    OptimConfig,
    Optimizer,
    deal,
    learning_rate,
    orthogonalised,
)


@dataclass
class FakeAccelerator:
    """All that the optimizer asks of an accelerator without mixed precision."""

    process_index: int = 0
    num_processes: int = 1
    scaler: None = None


ALGORITHMS = ("adamw", "muon")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 3)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def one_step(net: nn.Module, optimizer: Optimizer, update: int, *, poison: bool = False) -> torch.Tensor:
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(update))
    loss = net(x).square().mean()
    (loss * (math.nan if poison else 1.0)).backward()
    norm = optimizer.clip()
    optimizer.apply(update=update, total_updates=100, refused=(~torch.isfinite(norm)).float())
    return norm


def test_the_rate_warms_up_linearly_and_ends_as_its_kind_says() -> None:
    base = {"peak_lr": 2.0, "warmup_updates": 10}
    constant = OptimConfig(**base, rate=ConstantRate())
    cosine = OptimConfig(**base, rate=CosineRate(final=0.1))
    root = OptimConfig(**base, rate=InverseSquareRootRate(reference=25))
    assert learning_rate(constant, update=1, total_updates=110) == pytest.approx(0.2)
    assert learning_rate(constant, update=110, total_updates=110) == 2.0
    assert learning_rate(cosine, update=10, total_updates=110) == pytest.approx(2.0)
    assert learning_rate(cosine, update=61, total_updates=110) == pytest.approx(2.0 * 0.55)
    assert learning_rate(cosine, update=111, total_updates=110) == pytest.approx(0.2)
    assert learning_rate(root, update=25, total_updates=110) == 2.0
    assert learning_rate(root, update=100, total_updates=110) == pytest.approx(1.0)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_cosine_rate_is_that_of_torch_and_no_update_has_none(final: float) -> None:
    config = OptimConfig(peak_lr=2.0, warmup_updates=0, rate=CosineRate(final=final))
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=37, eta_min=2.0 * final)
    for update in range(1, 38):
        rate = learning_rate(config, update=update, total_updates=37)
        assert rate == pytest.approx(theirs.param_groups[0]["lr"])
        assert rate > 1e-3
        theirs.step()
        schedule.step()


def test_a_step_is_that_of_plain_adamw_with_clipping() -> None:
    config = OptimConfig(peak_lr=1e-2, warmup_updates=0, weight_decay=0.1, max_grad_norm=0.5)
    ours, theirs = network(), network()
    optimizer = Optimizer(ours, config, accelerator=FakeAccelerator())
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    plain = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, foreach=False, fused=False)
    for update in range(1, 6):
        one_step(ours, optimizer, update)
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(update))
        theirs(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_gradient_that_is_not_finite_changes_nothing(algorithm: str) -> None:
    net = network()
    optimizer = Optimizer(net, OptimConfig(algorithm=algorithm, warmup_updates=0), accelerator=FakeAccelerator())
    one_step(net, optimizer, 1)
    before = copy.deepcopy({**net.state_dict(), **optimizer.tensors()})
    norm = one_step(net, optimizer, 2, poison=True)
    assert not torch.isfinite(norm)
    after = {**net.state_dict(), **optimizer.tensors()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    one_step(net, optimizer, 3)
    assert any(not torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_state_survives_a_round_trip_to_the_bit(algorithm: str) -> None:
    config = OptimConfig(algorithm=algorithm, warmup_updates=0)
    net = network()
    optimizer = Optimizer(net, config, accelerator=FakeAccelerator())
    for update in range(1, 4):
        one_step(net, optimizer, update)
    weights = copy.deepcopy(net.state_dict())
    # What a checkpoint holds: contiguous tensors, whatever the network's memory format.
    stored = {name: value.clone(memory_format=torch.contiguous_format) for name, value in optimizer.tensors().items()}
    twin = network()
    twin.load_state_dict(weights)
    other = Optimizer(twin, config, accelerator=FakeAccelerator())
    other.load(stored)
    for update in range(4, 8):
        one_step(net, optimizer, update)
        one_step(twin, other, update)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_checkpoint_is_dealt_over_any_number_of_ranks(num_ranks: int, algorithm: str) -> None:
    net = network()
    whole = Optimizer(net, OptimConfig(algorithm=algorithm, warmup_updates=0), accelerator=FakeAccelerator())
    one_step(net, whole, 1)
    dealt = []
    for rank in range(num_ranks):
        held = Optimizer(
            network(), OptimConfig(algorithm=algorithm), accelerator=FakeAccelerator(rank, num_ranks), shards=True
        )
        held.load(whole.tensors())
        dealt.append(held.tensors())
    assert sum(map(len, dealt)) == len(whole.tensors())
    assert all(torch.equal(tensor, whole.tensors()[name]) for held in dealt for name, tensor in held.items())


def test_muon_is_the_published_recurrence() -> None:
    """Momentum, Nesterov's look ahead, the quintic on singular values, and a scale; on kernels as matrices."""
    net = network()
    config = OptimConfig(algorithm="muon", peak_lr=0.1, warmup_updates=0, weight_decay=0.01, max_grad_norm=1e9)
    optimizer = Optimizer(net, config, accelerator=FakeAccelerator())
    weight, momentum = net[2].weight.detach().double().flatten(1), torch.zeros(8, 72, dtype=torch.float64)
    for update in range(1, 4):
        twin = copy.deepcopy(net)
        x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(update))
        (gradient,) = torch.autograd.grad(twin(x).square().mean(), twin[2].weight)
        gradient = gradient.double().flatten(1)
        momentum = 0.95 * momentum + 0.05 * gradient
        left, values, right = torch.linalg.svd(0.05 * gradient + 0.95 * momentum, full_matrices=False)
        values = values / values.square().sum().sqrt()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        direction = left @ values.diag() @ right
        weight = weight - 0.1 * (0.2 * 72**0.5 * direction + 0.01 * weight)
        one_step(net, optimizer, update)
        torch.testing.assert_close(net[2].weight.detach().double().flatten(1), weight, rtol=1e-4, atol=1e-5)
    assert set(optimizer.tensors()) >= {"2.weight/momentum", "2.bias/exp_avg"}


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (7, 7)])
def test_orthogonalised_matrices_keep_their_directions(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ found @ right.T
    assert 0.6 < inner.diag().min() <= inner.diag().max() < 1.25
    assert (inner - inner.diag().diag()).abs().max() < 1e-4


def test_parameters_are_dealt_evenly() -> None:
    sizes = [5, 3, 9, 1, 1, 7, 2, 4, 8]
    for num_ranks in (1, 2, 4):
        ranks = deal(sizes, num_ranks)
        held = [sum(size for size, owner in zip(sizes, ranks, strict=True) if owner == rank) for rank in set(ranks)]
        assert len(held) == num_ranks
        assert max(held) - min(held) <= 2


def test_the_state_of_another_network_is_refused() -> None:
    net = network()
    optimizer = Optimizer(net, OptimConfig(), accelerator=FakeAccelerator())
    with pytest.raises(ValueError, match="of another network or algorithm: stranger/step"):
        optimizer.load({"stranger/step": torch.zeros(1)})
    muon = Optimizer(net, OptimConfig(algorithm="muon"), accelerator=FakeAccelerator())
    checkpoint = Checkpoint(path=Path("update-5"), update=5, parts={"optimizer": muon.tensors()}, state={})
    with pytest.raises(ConfigError, match=r"update-5, optimizer: The optimizer's state .* Take back what was changed"):
        checkpoint.load_into({"optimizer": optimizer}, changed=True)
