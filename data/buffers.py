"""Memory for batches, used again: the kernel zeroes fresh pages one by one, which costs several times what filling
them does.
"""

import threading
import warnings
import weakref
from collections.abc import Sequence

import numpy as np
import torch

MOST_SPARE = 8  # buffers of one size that wait for their next use


class Buffers:
    """Arrays whose memory comes back when the last view of it is gone, whoever holds that; safe for threads."""

    def __init__(self) -> None:
        self._spare: dict[int, list[bytearray]] = {}
        self._lock = threading.Lock()
        # Shards are mapped read-only, and torch is only asked to read them.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")

    def take(self, size: int) -> np.ndarray:
        """Return ``size`` bytes with any content; uint8 (size,)."""
        with self._lock:
            spare = self._spare.setdefault(size, [])
            memory = spare.pop() if spare else bytearray(size)
        # Views of views refer to this one array, so that its end is the end of the last of them.
        lent = np.frombuffer(memory, dtype=np.uint8)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent

    def _give_back(self, memory: bytearray) -> None:
        # No lock: this runs wherever the last view dies, maybe inside ``take``; appending is atomic.
        spare = self._spare[len(memory)]
        if len(spare) < MOST_SPARE:
            spare.append(memory)

    def joined(self, parts: Sequence[tuple[memoryview, int]], size: int) -> np.ndarray:
        """Copy ``size`` bytes at an offset of each view into one array; uint8 (parts x size,).

        The interpreter's lock is released once, for the whole copy. Copying part by part would take it back hundreds of
        times, each time waiting for the training thread.
        """
        out = self.take(len(parts) * size)
        if out.size:
            sources = [torch.frombuffer(view, dtype=torch.uint8, count=size, offset=start) for view, start in parts]
            torch.cat(sources, out=torch.from_numpy(out))
        return out
