"""Batches ahead of their use: any pure function of the batch index, run in threads, in order and bounded."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """A batch, its index, and how long the consumer waited for it, seconds."""

    index: int
    batch: T
    wait_seconds: float


class Prefetch(Generic[T]):
    """Batches ``start``, ``start + 1``, ... without end and in order, made ahead of their use in threads.

    An exception of ``make_batch`` is raised in the consumer, in the place of that batch; the iterator is then closed.

    Args:
        make_batch: Pure function of the batch index; with several threads it must be safe to call at once.
        start: Index of the first batch.
        depth: Batches held or in the making; the bound of its memory.
        threads: How many are made at once.
        pin: Move tensors to page-locked memory, for copies that overlap with compute; None does it where CUDA is.
    """

    def __init__(
        self,
        make_batch: Callable[[int], T],
        *,
        start: int = 0,
        depth: int = 4,
        threads: int = 1,
        pin: bool | None = None,
    ) -> None:
        assert depth >= 1
        assert threads >= 1
        self._make, self._next = make_batch, start
        self._pin = torch.cuda.is_available() if pin is None else pin
        self._pool = ThreadPoolExecutor(min(threads, depth), thread_name_prefix="prefetch")
        self._pending: deque[tuple[int, Future[T]]] = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._pending.append((self._next, self._pool.submit(self._made, self._next)))
        self._next += 1

    def _made(self, index: int) -> T:
        batch = self._make(index)
        return pinned(batch) if self._pin else batch

    def __iter__(self) -> "Prefetch[T]":
        return self

    def __next__(self) -> Loaded[T]:
        if not self._pending:
            raise StopIteration
        index, future = self._pending.popleft()
        started = time.perf_counter()
        try:
            batch = future.result()
        except BaseException:
            self.close()
            raise
        waited = time.perf_counter() - started
        self._submit()
        return Loaded(index, batch, waited)

    def close(self) -> None:
        """Stop making batches and wait for those in the making. Closing twice is allowed."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Prefetch[T]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def pinned(batch: Any) -> Any:
    """Return ``batch`` with every tensor in it, through dicts, lists, tuples and dataclasses, in page-locked memory."""
    if isinstance(batch, torch.Tensor):
        return batch.pin_memory()
    if isinstance(batch, dict):
        return {key: pinned(value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(pinned, batch))
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{item.name: pinned(getattr(batch, item.name)) for item in fields(batch) if item.init})
    return batch
