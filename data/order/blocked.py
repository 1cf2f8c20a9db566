"""Blocked shuffle for remote shards: streams of shards, interleaved, each shuffled within a bounded window.

In an epoch the shards lie in random order, end to end, and this row of samples is cut into ``streams`` stretches of
equal length. A global batch has as many parts, and part ``c`` comes from stretch ``c``, in every batch. A job of n
nodes, n dividing the number of streams, gives each node the same whole parts of all batches: so a node reads its own
stretches only, and all nodes together fetch each shard once an epoch, but for those that a cut divides.
"""

from collections.abc import Sequence

import numpy as np

from data.order.permutation import permute, round_keys


class BlockedStreams:
    """The epochs of a blocked shuffle.

    Args:
        shard_sizes: Samples of each shard.
        seed: Seed of the stage.
        batch: Samples of a global batch.
        streams: Parts of a batch, and stretches of the row of shards.
        window: Samples of a stream that are shuffled among each other.

    Raises:
        ValueError: A batch does not split into that many parts.
    """

    def __init__(self, shard_sizes: Sequence[int], *, seed: int, batch: int, streams: int, window: int) -> None:
        if batch % streams:
            raise ValueError(
                f"global_batch = {batch} does not split into {streams} equal parts, one a stream of "
                f"order.canonical_nodes. Use {max(batch // streams, 1) * streams}, or a divisor of {batch} as "
                "canonical_nodes."
            )
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._firsts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._seed, self._batch, self._part, self._window = seed, batch, batch // streams, window
        self._streams = np.arange(streams, dtype=np.int64)
        self._row: tuple[int, np.ndarray, np.ndarray] = (-1, self._sizes, self._firsts)

    def at(self, positions: np.ndarray, *, epoch: int) -> np.ndarray:
        """Return the samples at stream positions that all lie in ``epoch``; int64 (k,)."""
        num_samples = int(self._firsts[-1])
        # How far each stream has come when the epoch begins and ends: parts of batches lie across that border.
        begins, ends = (self._taken(self._streams, np.int64(border * num_samples)) for border in (epoch, epoch + 1))
        lengths = ends - begins
        starts = np.cumsum(lengths) - lengths
        stream = positions % self._batch // self._part
        window, offset = np.divmod(self._taken(stream, positions) - begins[stream], self._window)
        sizes = np.minimum(self._window, lengths[stream] - window * self._window)
        salts = (stream << 40) + window
        offset = permute(offset, sizes, round_keys(self._seed, "order/window", epoch), salts=salts)
        return self._sample_at(starts[stream] + window * self._window + offset, epoch)

    def _taken(self, stream: np.ndarray, position: np.ndarray | np.int64) -> np.ndarray:
        """Return how many of the positions below ``position`` belong to ``stream``."""
        batch, rest = np.divmod(position, self._batch)
        return np.asarray(batch * self._part + np.clip(rest - stream * self._part, 0, self._part))

    def _sample_at(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Return the samples at these places of the epoch's row of shards."""
        row = self._row
        if row[0] != epoch:
            shards = np.arange(len(self._sizes), dtype=np.int64)
            shards = permute(shards, len(shards), round_keys(self._seed, "order/shards", epoch))
            row = (epoch, shards, np.cumsum(self._sizes[shards]))
            self._row = row  # whole at once: other threads may work on the other side of an epoch's border
        _, shards, ends = row
        turn = np.searchsorted(ends, places, side="right")
        shard = shards[turn]
        return self._firsts[shard] + places - (ends[turn] - self._sizes[shard])
