"""Training loop between two updates: counts, guards, logs, checkpoints and stopping.

The stage decides what it learns and how, in a loop over ``Training.updates``; this file ensures that a process can be
killed at any moment and changes nothing by it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.files import flush_file
from data.manifest import MANIFEST_NAME, digest_of
from data.prefetch import Prefetch
from data.randomness import key_of
from pipelines.runtime.config.errors import ConfigError, Stopped
from pipelines.runtime.stage.fingerprint import fingerprint_of
from pipelines.runtime.stage.launch import any_rank, from_main
from pipelines.runtime.stage.progress import ProgressLine, progress_line
from pipelines.runtime.stage.provenance import exactness, made_by
from pipelines.runtime.stage.stage import Stage
from pipelines.runtime.stage.watchdog import Watchdog
from pipelines.runtime.training.anomalies import AnomalyDetector, CheckedUpdate, write_report
from pipelines.runtime.training.checkpoint import Best, Checkpoints, Stateful, first_not_finite
from pipelines.runtime.training.config import BatchShare, TrainingConfig
from pipelines.runtime.training.metrics import MetricBuffer, Throughput, straggler
from pipelines.runtime.training.optim import LossScale, Optimizer, learning_rate
from pipelines.runtime.training.replica_check import ReplicaCheck

Batch = TypeVar("Batch")


class Training:
    """Counts, guards, logs and checkpoints of one training stage.

    Args:
        stage: The running stage.
        config: Its configuration.
        share: This rank's slice of every global batch.
        keys: Names the samples at given positions of a global batch; called only when something is wrong with them.
        parts: What a checkpoint holds, by name; the same on every rank.
        flops_per_image: Of one training step, or 0 when not known.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrainingConfig,
        *,
        share: BatchShare,
        keys: Callable[[int, range], list[str]],
        parts: Mapping[str, Stateful],
        flops_per_image: float = 0.0,
    ) -> None:
        accelerator = stage.accelerator
        self.stage, self.config, self.share, self.parts, self._keys = stage, config, share, dict(parts), keys
        self.update, self.next_batch, self.attempt = 0, 0, 1
        self._bad_batches: list[int] = []
        self._on_last_micro_batch = False
        self._dropout_seed = key_of(config.seed, "dropout")[0] >> 2

        # Guards beside the loop: updates that do not count, ranks that differ, updates that do not come.
        self._anomalies = self.parts["anomalies"] = AnomalyDetector(config.on_bad_update, accelerator)
        self._replica_check = ReplicaCheck(self.parts, accelerator, every=config.replica_check_every)
        self._watchdog = stage.watchdog = Watchdog(
            stage.folder,
            accelerator,
            hang_seconds=config.hang_seconds,
            keys=lambda batch: keys(batch, share.positions),
        )

        # Checkpoints, with what their bits depend on.
        self._loss_scale = LossScale(accelerator.scaler) if accelerator.scaler is not None else None
        if self._loss_scale is not None:
            self.parts["loss_scale"] = self._loss_scale
        self._checkpoints = Checkpoints(stage.folder / "checkpoints", config.checkpoint, writes=stage.is_main)
        self._best, self._save_for_best = Best(config.checkpoint.best), False
        request = fingerprint_of(stage.name, config, stage.parents)
        world_size, device = accelerator.num_processes, accelerator.device
        self._request_digest = digest_of(request)
        self._made_by = made_by(request, config.run, world_size=world_size, device=device) if stage.is_main else {}

        # Logs.
        self._buffer = MetricBuffer(accelerator)
        self._throughput = Throughput(accelerator, config, flops_per_image=flops_per_image)
        self._shown: dict[str, float] = {}

    @property
    def refused(self) -> Tensor:
        """1 where the current update does not count, on the device: averages must not move then."""
        return self._anomalies.refused

    def resume(self) -> None:
        """Continue after the newest intact checkpoint, on every rank the same one; do nothing when there is none.

        A training that had finished is longer now: its manifest is removed before its weights can be replaced.

        Raises:
            ConfigError: Another version of the code wrote it, or it is longer than the training is to be, or of a
                finished training no checkpoint is left.
        """
        # What is finished is so no longer, but only where it can be trained on.
        manifest, state = self.stage.folder / MANIFEST_NAME, self._restore()
        if self.update > self.config.updates:
            raise ConfigError(
                f"{self.stage.folder} has made {self.update} updates, but {self.stage.name}.updates = "
                f"{self.config.updates}: give at least {self.update}, or begin anew with another run.root."
            )
        self._best.check()
        if any_rank(self.stage.is_main and manifest.is_file(), self.stage.accelerator):
            if not state:
                raise ConfigError(f"{self.stage.folder} is finished and holds no intact checkpoint to train on from.")
            self.stage.log.info(
                f"was finished after update {self.update}: its manifest is removed, it trains on until update "
                f"{self.config.updates}, and rates that depend on the number of updates follow the new one"
            )
            if self.stage.is_main:
                manifest.unlink()
                flush_file(manifest.parent)

        # Lines that were written behind the checkpoint are of another configuration: what follows does not repeat them.
        newest_attempt = self.stage.tracker.resume_after(self.update)
        if self._was_changed_since(state):
            self.attempt = max(self.attempt, newest_attempt) + 1

        # Say where it goes on, and how exactly; the main process alone knows what wrote it.
        if state and self.stage.is_main:
            self.stage.log.info(f"continuing after update {self.update}, {exactness(state, self._made_by)}")

    def rehearse(self, one_update: Callable[[Batch], object], make_batch: Callable[[int], Batch]) -> None:
        """Make the next update in a way that changes nothing, when there are several ranks.

        DDP arranges gradients in buffers anew after the first backward pass of a process, and in which order several
        ranks are summed depends on a gradient's place there. Were the first update a real one, a restart would sum it
        in another order than a run that was never stopped, and differ in the last bits from three ranks on.

        Args:
            one_update: Makes an update of this rank's share of a batch.
            make_batch: Makes that share by the index of the global batch.
        """
        if self.stage.accelerator.num_processes == 1 or self.update == self.config.updates:
            return
        scale = self._loss_scale.tensors() if self._loss_scale is not None else {}
        update, batch = self.update, self.next_batch

        # An update as any other, but refused on the device.
        self.update, self.next_batch = update + 1, batch + 1
        self._anomalies.freeze()
        with self._watchdog.watching():
            self._watchdog.current = (self.update, batch, time.monotonic())
            one_update(make_batch(batch))
        self._anomalies.unfreeze()

        # Forget its number, its metrics, and what an overflow did to the loss scale.
        self.update, self.next_batch = update, batch
        self._buffer.current.clear()
        if self._loss_scale is not None:
            self._loss_scale.load(scale)

    def updates(self, batches: Callable[[int], Prefetch[Batch]]) -> Iterator[Batch]:
        """Yield one batch an update until the last update; what is due between two is done when the loop comes back.

        Args:
            batches: Gives the batches from a batch index on; closed at the end.

        Raises:
            Stopped: The ranks agreed to stop; everything up to the last update is committed.
            FloatingPointError: An update was bad, and the policy is to stop.
            ReplicaError: The ranks no longer train one network.
        """
        config, stage = self.config, self.stage
        self._throughput.restart()
        stream = batches(self.next_batch)
        try:
            with (
                self._watchdog.watching(),
                progress_line(
                    stage.name, total=config.updates, unit="updates", start=self.update, is_main=stage.is_main
                ) as line,
            ):
                while self.update < config.updates:
                    # The stage makes an update of the next batch.
                    self._watchdog.current = (self.update + 1, self.next_batch, time.monotonic())
                    loaded = next(stream)
                    self.update, self.next_batch = self.update + 1, loaded.index + 1
                    self._throughput.begin_update(waited=loaded.wait_seconds)
                    if self.update >= self._replica_check.next_update:
                        self._replica_check.begin(self.update)
                    yield loaded.batch

                    # When one was bad, go back to before it and past its batch.
                    if (bad := self._close_update()) is None:
                        self._between_updates(line)
                    else:
                        stream.close()
                        self._recover_from(bad)
                        stream = batches(self.next_batch)
            self._checkpoints.wait()
        finally:
            self._checkpoints.join()  # after an error the folder's lock is given back, and the next start may read here
            stream.close()

    def micro_batches(self, wrapped: nn.Module) -> Iterator[slice]:
        """Yield the slices of this rank's share, one a forward and backward pass.

        Gradients are averaged over the ranks on the last one only. Dropout is seeded anew for each: nothing carries
        over, so there is nothing to save.
        """
        if self._replica_check.active:
            self._replica_check.observe(wrapped)
        accelerator, parts = self.stage.accelerator, self.share.micro_batches
        passes = ((self.next_batch - 1) * accelerator.num_processes + accelerator.process_index) * len(parts)
        for number, part in enumerate(parts):
            self._on_last_micro_batch = number == len(parts) - 1
            seed_networks(self._dropout_seed + passes + number, device=accelerator.device)
            with nullcontext() if self._on_last_micro_batch else accelerator.no_sync(wrapped):
                yield part

    def backward(self, loss: Tensor, *, terms: Mapping[str, Tensor] | None = None) -> None:
        """Add a micro-batch's gradients.

        Args:
            loss: Its mean over images.
            terms: What the loss is made of, by default itself; the replica check demands a gradient from each.
        """
        if self._replica_check.active:
            self._replica_check.check_terms({"train/loss": loss} if terms is None else terms)
        if self._on_last_micro_batch:
            self._throughput.before_all_reduce()
        self.stage.accelerator.backward(loss / len(self.share.micro_batches))

    def log(self, metrics: Mapping[str, Tensor]) -> None:
        """Log a micro-batch's metrics, means over its images: scalars that stay on the device until the next flush."""
        self._buffer.add(metrics, share=1 / len(self.share.micro_batches))

    def log_once(self, metrics: Mapping[str, Tensor]) -> None:
        """Log metrics that come once an update, not with every micro-batch; scalars as for ``log``."""
        self._buffer.add(metrics, share=1.0)

    def step(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Apply the gradients of an update, those of all its networks or none, and log their norms by name."""
        # Check the update, and agree on a stop by the way. The main process alone looks for the file.
        stage, scaler = self.stage, self.stage.accelerator.scaler
        if self._replica_check.active:
            self._replica_check.record_reduced()
        norms = {name: optimizer.clip() for name, optimizer in optimizers.items()}
        stops = stage.stop.requested(look=stage.is_main)
        self._anomalies.check(self._buffer.current, norms, stops=stops)

        # Apply it; a refused one changes nothing.
        for optimizer in optimizers.values():
            optimizer.apply(update=self.update, total_updates=self.config.updates, refused=self.refused)
        if scaler is not None:
            scaler.update()
        self.log_once(norms)

    def is_due(self, period: int) -> bool:
        """Return whether something that happens every ``period`` updates, and after the last, is due now."""
        return self.update % period == 0 or self.update == self.config.updates

    def validation_is_due(self) -> bool:
        """Return whether validation is due: never after an update that does not count."""
        return self.is_due(self.config.validate_every) and not self.refused

    def report(self, metrics: Mapping[str, float]) -> None:
        """Log what validation measured after this update, or before the first; a new best is saved. On every rank.

        Raises:
            ConfigError: The metric that is to choose the best checkpoint is not among them.
        """
        self.stage.tracker.log_metrics(metrics, step=self.update, attempt=self.attempt)
        self._save_for_best = any_rank(self._best.beaten_by(metrics, update=self.update), self.stage.accelerator)

    def flush(self) -> None:
        """Average the pending metrics over the ranks and write them out, one record an update. A collective."""
        records = self._buffer.records()
        if not records:
            return

        # The last record also says how fast the updates since the last flush were.
        throughput = self._throughput.metrics()
        images, loss = self.update * self.config.global_batch, records[-1].get("train/loss", math.nan)
        refused = float(len(self._bad_batches))
        records[-1] |= {"progress/images": images, "health/refused_updates": refused, **throughput}
        self.stage.tracker.log_records(records)
        self._shown = {"images": images, "loss": loss, "images/s": throughput["perf/images_per_s"]}
        if slow := straggler(throughput):
            rank, sentence = slow
            self.stage.log.info(f"update {self.update}: rank {rank} on {self._watchdog.host_of(rank)} {sentence}")

    def _close_update(self) -> CheckedUpdate | None:
        """Record the update just made; return the first one that does not count, on every rank the same."""
        update, batch = self.update, self.next_batch - 1
        metrics = self._buffer.close_update(update=update, batch=batch, attempt=self.attempt)
        self._anomalies.send_to_host(update=update, batch=batch, metrics=metrics)
        wait = self._replica_check.active or self.is_due(self.config.log_every) or self._saves_now()
        return self._anomalies.first_bad(wait=wait)

    def _between_updates(self, line: ProgressLine) -> None:
        """Do what is due between two updates; everything up to here counts."""
        # Compare the ranks.
        stage, config = self.stage, self.config
        if self._replica_check.active:
            rate = learning_rate(config.optim, update=self.update, total_updates=config.updates)
            self._replica_check.end(self.update, moves=rate > 0 and not self.refused)

        # A stop comes after an update that counts, too.
        stopping = self._anomalies.stop_agreed and self.update < config.updates
        if stopping and (bad := self._anomalies.first_bad(wait=True)) is not None:
            self._recover_from(bad)

        # Log.
        saves = self._saves_now() or stopping
        if saves or self.update % config.log_every == 0:
            self.flush()
            line.advance_to(self.update, self._shown)

        # Save. Between two flushes the newest check has not been read yet: what may still be refused is not saved.
        if self._checkpoints.failure is not None:
            self._checkpoints.check(self.update)
        if saves or (self.is_due(config.log_every) and self._retry_due()):
            self._save(compares=saves)
        if stopping:
            self._checkpoints.wait()
            raise Stopped(f"{stage.stop.reason or 'asked by another rank'}, after update {self.update}")

    def _recover_from(self, bad: CheckedUpdate) -> None:
        """Go back to before a bad update, report what was in it, and do as the policy says. A collective.

        Raises:
            FloatingPointError: On every rank, when training is not to go on.
        """
        # Go back: from the bad update on everything was frozen, so this is a matter of counts and logs.
        config, stage = self.config, self.stage
        self._buffer.forget_from(bad.update)
        self.update, self.next_batch = bad.update - 1, bad.batch + 1
        self.flush()

        # Report it, and end when the policy says so.
        self._bad_batches.append(bad.batch)
        path, what = write_report(bad, stage, attempt=self.attempt, global_batch=config.global_batch, keys=self._keys)
        broken = first_not_finite({name: part.tensors() for name, part in self.parts.items()})
        any_broken = any_rank(bool(broken), stage.accelerator)
        text = f"Update {bad.update} (batch {bad.batch}) does not count: {what}. Its sample keys are in {path}."
        if config.on_bad_update.policy == "stop":
            raise FloatingPointError(
                f"{text} Nothing of it has reached the weights. Lower optim.peak_lr or look at the data, or let "
                "training go on: run it again with --on_bad_update.policy skip (or rewind)."
            )
        if (number := len(self._bad_batches)) > (limit := config.on_bad_update.limit):
            raise FloatingPointError(f"{text} It is the {number}th; on_bad_update.limit = {limit}.")

        # Go on without the batch, from the last checkpoint when the policy or broken weights demand it.
        self._anomalies.unfreeze()
        self._save_for_best = False
        done = "The batch is left out"
        if config.on_bad_update.policy == "rewind" or any_broken:
            batches, attempt = self._bad_batches, self.attempt
            if stage.is_main:
                self._checkpoints.wait()
            if self._restore():
                self.next_batch, self._bad_batches, self.attempt = bad.batch + 1, batches, attempt + 1
                done = f"Training goes on from update {self.update}, past the batch"
            elif any_broken:
                raise FloatingPointError(
                    f"{text} The weights themselves are not finite ({broken or 'on another rank'})."
                )
        stage.log.info(f"{text} {done}.")

    def _saves_now(self) -> bool:
        periods = self.config.checkpoint.every_updates, self.config.checkpoint.keep_every
        return any(self.is_due(period) for period in periods if period) or self._save_for_best

    def _retry_due(self) -> bool:
        return any_rank(self._checkpoints.retry_due(self.update), self.stage.accelerator)

    def _save(self, *, compares: bool) -> None:
        """Write a checkpoint. A collective.

        Args:
            compares: Compare the ranks first, so that none is written from one that differs.
        """
        if compares and self.stage.accelerator.num_processes > 1:
            self._replica_check.compare(f"after update {self.update}")
        self._save_for_best = False
        parts = {
            name: part.gathered() if isinstance(part, Optimizer) else part.tensors()
            for name, part in self.parts.items()
        }
        if not self.stage.is_main:
            return
        state = {
            "update": self.update,
            "next_batch": self.next_batch,
            "attempt": self.attempt,
            "bad_batches": self._bad_batches,
            "best": self._best.found,
            "measured": self._best.measured,
            "images": self.update * self.config.global_batch,
            "local_run_id": self.stage.tracker.run_id,
            **self._made_by,
        }

        # Lines up to here are never written again: they must be on disk before the checkpoint is.
        flush, best = self.stage.tracker.flush, self._best.found.get("update")
        self._checkpoints.save(self.update, parts, state, best=best, after=flush)

    def _restore(self) -> Mapping[str, Any]:
        """Load the newest intact checkpoint and return its state, empty when there is none. A collective."""
        stage = self.stage
        newest = from_main(self._checkpoints.newest_intact() if stage.is_main else 0, stage.accelerator)
        if not newest:
            return {}
        checkpoint = self._checkpoints.read(newest)
        state = checkpoint.state
        checkpoint.load_into(self.parts, changed=self._was_changed_since(state))

        # Where it was.
        self.update, self.next_batch = checkpoint.update, int(state["next_batch"])
        self.attempt = int(state.get("attempt", 1))
        self._best.found, self._best.measured = dict(state.get("best", {})), list(state.get("measured", ()))
        self._bad_batches = list(state.get("bad_batches", ()))
        return state

    def _was_changed_since(self, state: Mapping[str, Any]) -> bool:
        """Return whether a checkpoint is of another configuration; it may have been accepted by an earlier start."""
        return state.get("config", self._request_digest) != self._request_digest


def seed_networks(seed: int, *, device: torch.device) -> None:
    """Seed the networks' own randomness (dropout)."""
    # On a CPU `torch.manual_seed` would spend a quarter of a millisecond on recording the seed for devices that are not
    # there.
    torch.default_generator.manual_seed(seed) if device.type == "cpu" else torch.manual_seed(seed)
