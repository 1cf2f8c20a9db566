"""A training run, seen from the border between two updates: counting, logging, checkpoints, stopping.

The stage keeps what it learns and how; this file keeps the promise that killing it anywhere changes nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from data.randomness import key_of
from pipelines.runtime.config.outcome import Outcome
from pipelines.runtime.stage.fingerprint import fingerprint_of
from pipelines.runtime.stage.launch import agree_on, any_rank
from pipelines.runtime.stage.progress import progress_line
from pipelines.runtime.stage.provenance import exactness, made_by
from pipelines.runtime.stage.stage import Stage, Stopped
from pipelines.runtime.stage.watchdog import Watchdog
from pipelines.runtime.training.anomalies import AnomalyDetector, CheckedUpdate, first_not_finite
from pipelines.runtime.training.checkpoint import Best, Checkpoints, Stateful
from pipelines.runtime.training.config import BatchShare, TrainingConfig
from pipelines.runtime.training.evidence import write_evidence
from pipelines.runtime.training.metrics import MetricBuffer
from pipelines.runtime.training.optim import LossScale, Optimizer, learning_rate
from pipelines.runtime.training.replica_check import ReplicaCheck
from pipelines.runtime.training.throughput import Throughput, holding_up, straggler

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Loaded(Protocol[T_co]):
    """A batch with its index and the time the loop waited for it."""

    @property
    def index(self) -> int: ...
    @property
    def batch(self) -> T_co: ...
    @property
    def wait_seconds(self) -> float: ...


class Training:
    """The counts, logs and checkpoints of one training stage.

    Args:
        stage: The running stage.
        config: Its configuration.
        share: This rank's slice of every global batch.
        keys: Names the samples at given positions of a global batch; asked only when something is wrong with them.
        parts: What a checkpoint holds, by name; the same on every rank.
        flops_per_image: Of one training step, or 0 when not known.
        peak_flops: Of one device a second, for model-FLOP utilisation; infinite when it is not known.
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
        peak_flops: float = math.inf,
    ) -> None:
        accelerator = stage.accelerator
        rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
        self.stage, self.config, self.share, self.parts = stage, config, share, dict(parts)
        self.update = 0
        self.next_batch = 0
        self.attempt = 1
        self._keys = keys
        self._bad_batches: list[int] = []
        self._best = Best(config.checkpoint.best)
        self._save_for_best = False
        self._checkpoints = Checkpoints(stage.folder / "checkpoints", config.checkpoint, writes=stage.is_main)
        self._anomalies = AnomalyDetector(config.on_bad_update, device=device, world_size=world_size)
        self.parts["anomalies"] = self._anomalies
        self._rehearsed = world_size == 1
        self._loss_scale = LossScale(accelerator.scaler) if accelerator.scaler is not None else None
        if self._loss_scale is not None:
            self.parts["loss_scale"] = self._loss_scale
        self._replica_check = ReplicaCheck(
            self.parts, every=config.replica_check_every, world_size=world_size, device=device
        )
        self._watchdog = stage.watchdog = Watchdog(
            stage.folder / "watchdog",
            rank=rank,
            world_size=world_size,
            hang_seconds=config.hang_seconds,
            keys=lambda batch: keys(batch, share.positions),
            on_exit=lambda: Outcome(working=True).tell(stage.folder, is_main=False),
        )
        self._throughput = Throughput(
            device=device,
            rank=rank,
            world_size=world_size,
            global_batch=config.global_batch,
            flops_per_image=flops_per_image,
            peak_flops=peak_flops,
        )
        self._buffer = MetricBuffer(device=device, world_size=world_size)
        self._on_last_part = False
        self._shown: dict[str, float] = {}
        request = fingerprint_of(stage.name, config, stage.parents)
        self._made_by = made_by(request, world_size=world_size) if stage.is_main else {}

    @property
    def refused(self) -> Tensor:
        """1 where the present update does not count, on the device: averages must not move then."""
        return self._anomalies.refused

    def resume(self) -> None:
        """Continue after the newest intact checkpoint, on every rank the same one; do nothing when there is none."""
        if state := self._restore():
            self.stage.say(f"continuing after update {self.update}, {exactness(state, self._made_by)}")
        self.stage.tracker.resume_after(self.update)

    def _restore(self) -> Mapping[str, Any]:
        """Take up the newest intact checkpoint and return its state, empty when there is none. A collective."""
        stage = self.stage
        newest = agree_on(self._checkpoints.newest_intact() if stage.is_main else 0, stage.accelerator)
        if not newest:
            return {}
        checkpoint = self._checkpoints.read(newest)
        for name, part in self.parts.items():
            part.load(checkpoint.parts.get(name, {}))
        state = checkpoint.state
        self.update, self.next_batch = checkpoint.update, int(state["next_batch"])
        self.attempt = int(state.get("attempt", 1))
        self._best.found, self._bad_batches = dict(state.get("best", {})), list(state.get("bad_batches", ()))
        return state

    def updates(self, batches: Callable[[int], Iterator[Loaded[T]]]) -> Iterator[T]:
        """Yield one batch an update until the last update; what a border needs is done when the loop comes back.

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
                    self._watchdog.beat(update=self.update + 1, batch=self.next_batch)
                    loaded = next(stream)
                    self.update, self.next_batch = self.update + 1, loaded.index + 1
                    self._throughput.begin_update(waited=loaded.wait_seconds)
                    if not self._rehearsed:
                        with self._rehearsal():
                            yield loaded.batch
                    self._replica_check.begin(self.update)
                    yield loaded.batch
                    bad = self._record()
                    if bad is not None:
                        _close(stream)
                        self._answer(bad)
                        stream = batches(self.next_batch)
                        continue
                    self._border(line.advance_to)
            self._checkpoints.wait()
        finally:
            _close(stream)

    @contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Make an update that changes nothing.

        DDP arranges gradients in buffers anew after the first backward pass of a process, and in which order several
        ranks are summed depends on a gradient's place there. Were the first update a real one, a restart would sum it
        in another order than a run that was never stopped, and differ in the last bits from three ranks on.
        """
        scale = (
            {name: tensor.clone() for name, tensor in self._loss_scale.tensors().items()} if self._loss_scale else {}
        )
        self._anomalies.freeze()
        yield
        self._anomalies.unfreeze()
        self._buffer.present.clear()
        if self._loss_scale is not None:
            self._loss_scale.load(scale)
        self._rehearsed = True
        self._throughput.restart()
        self._throughput.begin_update(waited=0.0)

    def _record(self) -> CheckedUpdate | None:
        """Take down the update just made; return the first one that does not count, on every rank the same."""
        update, batch = self.update, self.next_batch - 1
        metrics = self._buffer.close_update(update=update, batch=batch, attempt=self.attempt)
        self._anomalies.remember(update=update, batch=batch, metrics=metrics)
        looks = self._replica_check.active or self.is_due(self.config.log_every) or self._saves_now()
        return self._anomalies.first_bad(wait=looks)

    def _saves_now(self) -> bool:
        return self._checkpoints.due(self.update) or self.update == self.config.updates or self._save_for_best

    def _border(self, show: Callable[[int, Mapping[str, float]], None]) -> None:
        """Do what is due between two updates; everything up to here counts."""
        stage, config = self.stage, self.config
        if self._replica_check.active:
            rate = learning_rate(config.optim, update=self.update, total_updates=config.updates)
            self._replica_check.end(self.update, moves=rate > 0 and not self._anomalies.present_is_refused())
        last = self.update == config.updates
        stopping = self._anomalies.stop_agreed and not last
        if stopping and (bad := self._anomalies.first_bad(wait=True)) is not None:
            self._answer(bad)
        saves = self._saves_now() or stopping
        if saves or self.update % config.log_every == 0:
            self.flush()
        show(self.update, self._shown)
        if stage.is_main:
            self._checkpoints.check(self.update)
        # Between two looks the newest verdict is not in yet: what may still be refused is not saved.
        if saves or (self.is_due(config.log_every) and self._checkpoints.retry_due(self.update)):
            self._save(compares=saves)
        if stopping:
            self._checkpoints.wait()
            raise Stopped(f"{stage.stop.reason or 'asked by another rank'}, after update {self.update}")

    def micro_batches(self, wrapped: nn.Module) -> Iterator[slice]:
        """Yield the slices of this rank's share, one a forward and backward pass.

        Gradients are averaged over the ranks on the last one only. Dropout is seeded anew for each: nothing carries
        over, so there is nothing to save.
        """
        self._replica_check.listen(wrapped)
        accelerator, parts = self.stage.accelerator, self.share.micro_batches()
        for number, part in enumerate(parts):
            self._on_last_part = number == len(parts) - 1
            name = f"dropout/{self.next_batch - 1}/{accelerator.process_index}/{number}"
            seed_networks(key_of(self.config.seed, name)[0] >> 1, device=accelerator.device)
            with nullcontext() if self._on_last_part else accelerator.no_sync(wrapped):
                yield part

    def backward(self, loss: Tensor, *, terms: Mapping[str, Tensor] | None = None) -> None:
        """Add a micro-batch's gradients.

        Args:
            loss: Its mean over images.
            terms: What the loss is made of; the replica check wants a gradient from each.
        """
        self._replica_check.check_terms(terms or {"train/loss": loss})
        if self._on_last_part:
            self._throughput.meet_others()
        self.stage.accelerator.backward(loss / self.share.num_micro_batches)

    def log(self, metrics: Mapping[str, Tensor]) -> None:
        """Note a micro-batch's metrics, means over its images: scalars that stay on the device until the next flush."""
        self._buffer.add(metrics, share=1 / self.share.num_micro_batches)

    def log_once(self, metrics: Mapping[str, Tensor]) -> None:
        """Note metrics that are said once an update, not by every micro-batch; scalars as for ``note``."""
        self._buffer.add(metrics, share=1.0)

    def step(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Apply the gradients of an update, those of all its networks or none, and note their norms by name."""
        scaler = self.stage.accelerator.scaler
        self._replica_check.take_reduced()
        norms = {name: optimizer.clip() for name, optimizer in optimizers.items()}
        self._anomalies.check(self._buffer.present, norms, scaler=scaler, stops=self.stage.stop.heard())
        for optimizer in optimizers.values():
            optimizer.apply(update=self.update, total_updates=self.config.updates, refused=self.refused)
        if scaler is not None:
            scaler.update()
        self._buffer.add(norms, share=1.0)

    def is_due(self, period: int) -> bool:
        """Return whether something that happens every ``period`` updates, and after the last, is due now."""
        return self.update % period == 0 or self.update == self.config.updates

    def validation_is_due(self) -> bool:
        """Return whether pictures and validation are due: never after an update that does not count."""
        return self.is_due(self.config.validate_every) and not self._anomalies.present_is_refused()

    def expect(self, metrics: Mapping[str, float]) -> None:
        """Log what the main process measured before the first update.

        Raises:
            ConfigError: The metric that is to choose the best checkpoint is not among them.
        """
        self.stage.tracker.log_metrics(metrics, step=0)
        self._best.check(metrics)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Log what the main process measured after this update; a new best is saved. Call it on every rank."""
        self.stage.tracker.log_metrics(metrics, step=self.update, attempt=self.attempt)
        self._save_for_best = any_rank(self._best.beaten_by(metrics, update=self.update), self.stage.accelerator)

    def flush(self) -> None:
        """Average the pending metrics over the ranks and write them out, one line an update. A collective."""
        rows = self._buffer.rows()
        if not rows:
            return
        pace = self._throughput.metrics()
        images, loss = self.update * self.config.global_batch, rows[-1].get("train/loss", math.nan)
        rows[-1] |= {"progress/images": images, **pace}
        self.stage.tracker.log_records(rows)
        self._shown = {"images": images, "loss": loss, "images/s": pace["perf/images_per_s"]}
        if self.stage.is_main and (slow := straggler(pace)) is not None:
            self.stage.say(f"update {self.update}: rank {slow} on {self._watchdog.host_of(slow)} {holding_up(pace)}")

    def _answer(self, bad: CheckedUpdate) -> None:
        """Go back to before a bad update, write down what was in it, and do as the policy says. A collective.

        Raises:
            FloatingPointError: On every rank, when training is not to go on.
        """
        policy, limit = self.config.on_bad_update.policy, self.config.on_bad_update.limit
        self._buffer.forget_from(bad.update)
        self.update, self.next_batch = bad.update - 1, bad.batch + 1
        self.flush()
        self._bad_batches.append(bad.batch)
        path, what = write_evidence(
            bad, self.stage, attempt=self.attempt, global_batch=self.config.global_batch, keys=self._keys
        )
        broken = first_not_finite(self.parts)
        any_broken = any_rank(bool(broken), self.stage.accelerator)
        text = f"Update {bad.update} (batch {bad.batch}) does not count: {what}. Its sample keys are in {path}."
        if policy == "stop":
            raise FloatingPointError(
                f"{text} Nothing of it has reached the weights. Lower optim.peak_lr or look at the data, or let "
                "training go on: run it again with --on_bad_update.policy skip (or rewind)."
            )
        if len(self._bad_batches) > limit:
            raise FloatingPointError(f"{text} It is the {len(self._bad_batches)}th; on_bad_update.limit = {limit}.")
        self._anomalies.unfreeze()
        self._save_for_best = False
        done = "the batch is left out"
        if policy == "rewind" or any_broken:
            batches, attempt = self._bad_batches, self.attempt
            if self.stage.is_main:
                self._checkpoints.wait()
            if self._restore():
                self.next_batch, self._bad_batches, self.attempt = bad.batch + 1, batches, attempt + 1
                done = f"training goes on from update {self.update}, past the batch"
            elif any_broken:
                raise FloatingPointError(
                    f"{text} The weights themselves are not finite ({broken or 'on another rank'})."
                )
        self.stage.say(f"{text} {done[0].upper()}{done[1:]}.")

    def _save(self, *, compares: bool = True) -> None:
        """Write a checkpoint.

        Args:
            compares: Compare the ranks first, so that none is written from one that has gone astray; a collective.
        """
        if compares and self.stage.accelerator.num_processes > 1:
            self._replica_check.compare(f"after update {self.update}")
        self._save_for_best = False
        state = {
            "update": self.update,
            "next_batch": self.next_batch,
            "attempt": self.attempt,
            "bad_batches": self._bad_batches,
            "best": self._best.found,
            "images": self.update * self.config.global_batch,
            "local_run_id": self.stage.tracker.run_id,
            **self._made_by,
        }
        if self.stage.is_main:
            parts = {name: part.tensors() for name, part in self.parts.items()}
            # Lines up to here are never written again: they must be on disk before the checkpoint is.
            flush, best = self.stage.tracker.flush, self._best.found.get("update")
            self._checkpoints.save(self.update, parts, state, best=best, after=flush)


def _close(stream: Any) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        close()


def seed_networks(seed: int, *, device: torch.device) -> None:
    """Seed the networks' own randomness (dropout)."""
    # On a CPU `torch.manual_seed` would spend a quarter of a millisecond on noting whence devices are seeded that are
    # not there.
    torch.default_generator.manual_seed(seed) if device.type == "cpu" else torch.manual_seed(seed)
