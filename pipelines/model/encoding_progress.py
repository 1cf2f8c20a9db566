"""How far encoding is, and how fast: a line for people, and the same metrics for MLflow."""

import time
from typing import Any

from pipelines.runtime.stage.progress import PLAIN_LINE_EVERY_SECONDS, ProgressLine
from pipelines.runtime.stage.stage import Stage


class EncodingProgress:
    """Metrics over all ranks and runs, as far as this process sees their work.

    Args:
        stage: The running stage.
        line: Where people look.
        num_shards: Of the corpus.
        done_before: Images that were encoded when this process began.
    """

    def __init__(self, stage: Stage, line: ProgressLine, *, num_shards: int, done_before: int) -> None:
        self._stage, self._line, self._num_shards, self._before = stage, line, num_shards, done_before
        self._began = time.monotonic()
        self._logged = self._began
        self._bytes = self._images = 0

    def show(self, shards: int, done: int, record: Any) -> None:
        """Take note of a shard that this process made, when ``done`` images in ``shards`` shards are encoded in all."""
        self._bytes += record["entry"]["bytes"]
        self._images += record["entry"]["samples"]
        metrics = self._metrics(shards, done)
        self._line.advance_to(done, {"shards": shards, "MB/s": metrics["progress/mb_per_s"]})
        if time.monotonic() - self._logged >= PLAIN_LINE_EVERY_SECONDS:
            self._logged = time.monotonic()
            self._stage.tracker.log_metrics(metrics, step=done)

    def finish(self) -> None:
        """Log the metrics of the whole."""
        self._stage.tracker.log_metrics(self._metrics(self._num_shards, self._line.total), step=self._line.total)

    def _metrics(self, shards: int, done: int) -> dict[str, float]:
        images_per_s = (done - self._before) / max(time.monotonic() - self._began, 1e-9)
        return {
            "progress/shards": float(shards),
            "progress/images": float(done),
            "progress/images_per_s": images_per_s,
            # Of the others' shards only the number of images is known, so their bytes are reckoned from ours.
            "progress/mb_per_s": images_per_s * self._bytes / max(self._images, 1) / 1e6,
            "progress/eta_s": (self._line.total - done) / images_per_s if images_per_s else 0.0,
        }
