"""Replica check: the ranks' weights, optimizer states and gradients are compared bit by bit, before checkpoints too.

It finds a flipped bit, ranks that read the same samples, a loss term without a gradient, an average that is not
updated: with any of them training goes on for weeks, and its losses look right.

Each rank sends one digest of all its fingerprints, and every fingerprint only where digests differ that should not: so
a check costs a rank as much as it has tensors and there are ranks, not their product.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipelines.runtime.stage.launch import gathered
from pipelines.runtime.training.checkpoint import Stateful, Weights
from pipelines.runtime.training.ema import Averages

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK_WORDS = 1 << 22


class ReplicaError(RuntimeError):
    """The ranks do not train one network; the message names rank and parameter."""


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Return two 64-bit sums over the bits of a tensor: the plain one, and one weighted by position; int64 (2,).

    Any single flipped bit changes both, an exchange of two values the second.
    """
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK_WORDS):
        part = words[start : start + CHUNK_WORDS].long()
        places = torch.arange(start, start + part.numel(), device=part.device) * 2 + 1
        total += torch.stack([part.sum(), (part * places).sum()])
    return total


class ReplicaCheck:
    """The replica check of one rank.

    Args:
        parts: What a checkpoint holds: the same on every rank.
        accelerator: Of this process.
        every: Updates between two checks; 0 checks the first update of a process only.
    """

    def __init__(self, parts: Mapping[str, Stateful], accelerator: Accelerator, *, every: int) -> None:
        self.parts, self.every, self._accelerator = parts, every, accelerator
        self.active = False
        self.next_update = 0  # the next one to be checked
        self._before: dict[str, Tensor] = {}
        self._networks: list[nn.Module] = []
        self._local: dict[str, Tensor] = {}
        self._reduced: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._terms_without_gradient: list[str] = []

    def begin(self, update: int) -> None:
        """Begin to check ``update``: compare what the ranks hold. A collective."""
        self.active = True
        self._networks, self._local, self._reduced, self._terms_without_gradient = [], {}, {}, []
        self._before = self.compare(f"before update {update}")

    def compare(self, when: str) -> dict[str, Tensor]:
        """Compare every tensor of which each rank has one, and return the fingerprints. A collective.

        Raises:
            ReplicaError: On every rank, naming the rank and the parameter that differ.
        """
        prints = {
            f"{part}, {name}": fingerprint(tensor.to(self._accelerator.device))
            for part, held in self.parts.items()
            if not getattr(held, "is_sharded", False)
            for name, tensor in held.tensors().items()
        }
        self._must_agree(prints, what="holds other bits than the other ranks", when=when)
        return prints

    def observe(self, network: nn.Module) -> None:
        """Record fingerprints of this rank's gradients of ``network``, before the all-reduce."""
        if any(network is known for known in self._networks):
            return
        number = len(self._networks)
        self._networks.append(network)
        for name, parameter in _trained(network):
            key = f"{number}, {name}"

            def record(gradient: Tensor, key: str = key) -> None:
                seen = self._local.get(key)
                self._local[key] = fingerprint(gradient) + (0 if seen is None else seen)

            self._handles.append(parameter.register_hook(record))

    def check_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Record the loss terms without a gradient at the network that was observed last."""
        if not self._networks:
            return

        # Differentiate each term by itself.
        parameters = [parameter for _, parameter in _trained(self._networks[-1])]
        for name, term in terms.items():
            if name in self._terms_without_gradient:
                continue
            gradients = (
                torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
                if term.requires_grad
                else ()
            )
            if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
                self._terms_without_gradient.append(name)

        # Forget what the hooks recorded of that.
        number = len(self._networks) - 1
        for key in [key for key in self._local if key.startswith(f"{number}, ")]:
            del self._local[key]

    def record_reduced(self) -> None:
        """Record fingerprints of the gradients as they are applied, after the all-reduce."""
        while self._handles:
            self._handles.pop().remove()
        for number, network in enumerate(self._networks):
            for name, parameter in _trained(network):
                if parameter.grad is None:
                    raise ReplicaError(f"The parameter {name} has no gradient: the loss does not depend on it.")
                self._reduced[f"{number}, {name}"] = fingerprint(parameter.grad)

    def end(self, update: int, *, moves: bool) -> None:
        """Compare gradients and results of the update that was checked. A collective.

        Args:
            update: Its number.
            moves: Whether anything is to move: the learning rate is above 0 and the update counts.

        Raises:
            ReplicaError: On every rank.
        """
        self.active = False
        self.next_update = (update // self.every + 1) * self.every if self.every else sys.maxsize

        # Gradients: the same on all ranks after the all-reduce, others before it, and some from each term.
        when = f"in update {update}"
        self._must_agree(self._reduced, what="applies other gradients than the other ranks", when=when)
        self._local_must_differ(when)
        silent = gathered(torch.tensor(len(self._terms_without_gradient)), self._accelerator)
        if silent.any():
            terms = ", ".join(self._terms_without_gradient) or "that it names"
            raise ReplicaError(f"No gradient comes {when} on rank {int(silent.argmax())} from the loss term {terms}.")

        # Results: the same on all ranks, and moved.
        after = self.compare(f"after update {update}")
        if not moves:
            return
        trained = [getattr(network, "module", network) for network in self._networks]
        for part, held in self.parts.items():
            if isinstance(held, Averages) or (isinstance(held, Weights) and held.network in trained):
                names = [name for name in after if name.startswith(f"{part}, ")]
                if all(self._before[name].equal(after[name]) for name in names):
                    raise ReplicaError(f"Nothing of {part} has moved {when}.")

    def _local_must_differ(self, when: str) -> None:
        if self._accelerator.num_processes == 1 or not self._local:
            return
        known: dict[int, int] = {}
        for rank, digest in enumerate(self._digests(torch.stack(list(self._local.values())))):
            if (other := known.setdefault(digest, rank)) != rank:
                raise ReplicaError(
                    f"Ranks {other} and {rank} have the same gradients {when}, before they are averaged: they train on "
                    "the same samples."
                )

    def _must_agree(self, prints: Mapping[str, Tensor], *, what: str, when: str) -> None:
        if self._accelerator.num_processes == 1 or not prints:
            return

        # As a rule nothing differs, and a number from each rank says so.
        own = torch.stack(list(prints.values()))
        if len(set(self._digests(own))) == 1:
            return

        # Name the first tensor that differs, and the rank that holds another one than most.
        by_rank = gathered(own, self._accelerator)  # (rank, tensor, 2)
        for number, name in enumerate(prints):
            column = [tuple(values) for values in by_rank[:, number].tolist()]
            ((usual, _),) = Counter(column).most_common(1)  # of two ranks that differ, rank 0 is taken for right
            if odd := [rank for rank, value in enumerate(column) if value != usual]:
                raise ReplicaError(
                    f"Rank {odd[0]} {what} {when}: {name}. Memory or network of that machine may be failing. Nothing "
                    "was saved since all ranks agreed; leave the machine out and run the same command again."
                )

    def _digests(self, prints: Tensor) -> list[int]:
        """Return a 64-bit hash of each rank's ``prints``, int64 (tensor, 2). A collective."""
        own = hashlib.blake2b(prints.cpu().numpy().tobytes(), digest_size=8).digest()
        return gathered(torch.tensor(int.from_bytes(own, "big", signed=True)), self._accelerator).tolist()


def _trained(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return (
        (name.removeprefix("module."), parameter)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    )
