"""One optimizer step: forward and backward over the micro-batches, clip, update.

Invariant: nothing here waits for the device, except where a step may be skipped: with a loss scale,
or with limits. What the step measured is on its way to the host before the update is queued: who
reads it waits for the gradients, not for the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from launcher.data.loader import Batch, StepData
from launcher.parallel.host_copy import HostCopy
from launcher.report import ranges
from launcher.report.ranges import named_range
from launcher.train.compute import MicroBatch
from launcher.train.interrupts import STOP_REASONS
from launcher.train.random import mix, sample_seeds
from launcher.train.scaling import unscale_gradients

if TYPE_CHECKING:
    from launcher.train.run import TrainRun

LOSS, SQUARED_NORM, SIGNALS_FROM = range(3)
"""Indices in the tensor that ranks sum in a step; from `SIGNALS_FROM` on, the number of ranks with
each of `STOP_REASONS`. A step returns it with the norm in place of its square."""
GRADIENT_NORM = SQUARED_NORM
SOURCES_FROM = SIGNALS_FROM + len(STOP_REASONS)
"""From here on, in a mixture: the part of each source in the loss; then, in training on
preferences, the share of samples and `PreferenceSettings.measures`."""


def train_step(run: TrainRun, data: StepData, learning_rate: float) -> HostCopy:
    """Train on one global batch. Returns float32 [loss, gradient norm, ranks per reason to stop
    ..., part of each source in the loss ..., measures of preferences ...], and last, where it is
    watched, the norm of the embedding's gradient; on the way to the host.

    The loss is the mean over the target tokens of the global batch (of preferences: over its
    samples), the same on every rank; in a mixture it is the sum of the parts of the sources. Loss
    and norm are those without a loss scale. A step that overflows changes no parameter, optimizer
    state or update count, only the scale. It uses up its data, as in MindFormers, and a step of the
    learning-rate schedule, unlike there: a step is a position in the data and on the schedule, with
    or without an update.
    """
    targets = max(data.target_tokens, 1)
    run.model.parts.train()
    if run.model.preference is None:
        micro_batches = [micro_batch_of(run, batch) for batch in data.batches]
    else:
        micro_batches = preference_batches(run, data)
    loss_sums = run.model.compute.train(micro_batches, run.state.loss_scale / targets)
    run.gradients.finish()
    if run.settings.scaling is not None:
        unscale_gradients(run.parameters, run.state.loss_scale)
    measured = _measure(run, loss_sums / targets)
    on_host = HostCopy(measured)
    if not (_overflowed(run, on_host) or _is_skipped(run, on_host)):
        _update(run, measured[GRADIENT_NORM], learning_rate)
    run.optimizer.zero_grad()
    return on_host


def _measure(run: TrainRun, losses: torch.Tensor) -> torch.Tensor:
    """What `train_step` returns: summed over the ranks in one collective. `losses`: this rank's
    part of the loss, as `Compute.train` returns it."""
    reasons = torch.tensor(run.interrupts.as_values()).to(run.world.device, non_blocking=True)
    measures = [losses[:, 1:].sum(0)] if losses.dim() == 2 else []
    losses = losses[:, 0] if measures else losses
    of_sources = [losses] if run.loader.source_names else []
    own = [torch.stack([losses.sum(), run.gradients.squared_norm()]), reasons, *of_sources]
    own += measures
    watched = run.gradients.squared_norm_of_embedding()
    measured = run.world.sum(torch.cat(own if watched is None else [*own, watched]))
    measured[SQUARED_NORM].sqrt_()
    if watched is not None:
        measured[-1].sqrt_()
    return measured


def _overflowed(run: TrainRun, measured: HostCopy) -> bool:
    """Whether the step is skipped; moves the loss scale. Never without a loss scale. The host waits
    with one.

    A device could decide this by itself (`found_inf` of torch's fused optimizers), but then the
    scale, the number of updates and the state of bias correction would have to stay on the device
    too, which saves, schedules and other optimizers (Muon, SGD) read on the host. The wait takes
    the place of that for the values of the step, which come from the same copy.
    """
    scaling = run.settings.scaling
    if scaling is None:
        return False
    overflow = scaling.overflowed(measured.read("loss scale")[GRADIENT_NORM])
    scaling.move(run.state, overflow)
    return overflow


def _is_skipped(run: TrainRun, measured: HostCopy) -> bool:
    """Whether limits are passed, where steps are skipped for that. The host waits then."""
    limits = run.settings.limits
    if limits is None or not limits.skips:
        return False
    values = measured.read("step limits")
    return limits.are_passed(values[GRADIENT_NORM], values[LOSS])


def _update(run: TrainRun, norm: torch.Tensor, learning_rate: float) -> None:
    """Clip the gradients and update the parameters."""
    if run.settings.max_gradient_norm is not None:
        with named_range(ranges.CLIP):
            run.optimizer.clip(norm, run.settings.max_gradient_norm)
    run.wait_for_reads()
    run.is_consistent = False
    with named_range(ranges.OPTIMIZER):
        run.optimizer.step(learning_rate)
    run.state.updates += 1
    run.is_consistent = True


def preference_batches(run: TrainRun, data: StepData) -> list[MicroBatch]:
    """The micro-batches of a step on preferences, with what their loss needs beside them."""
    assert run.model.preference is not None
    task, model, world = run.model.preference, run.model, run.world
    parts = [task.prepared(model, batch, run.reference) for batch in data.batches]
    divergence = task.divergence(model, world, parts, data.samples)
    return [
        replace(micro_batch_of(run, part.batch), given=part.given(divergence)) for part in parts
    ]


def micro_batch_of(run: TrainRun, batch: Batch) -> MicroBatch:
    """One micro-batch on the device, with what training adds: seeds and the balance loss."""
    more: dict[str, Any] = {}
    if run.settings.balance is not None:
        more["balance_scale"] = run.settings.balance * run.state.loss_scale
    if run.settings.has_dropout:
        seed, step = run.config.seed, run.state.global_step
        more["seeds"] = sample_seeds(seed, step, row_ids(batch))
        more["seed"] = mix(seed, step, int(batch.sample_ids[0]))
    return run.model.batch_sharder(batch, **more)


def row_ids(batch: Batch) -> torch.Tensor:
    """A number of each row, int64: that of its sample, apart for the sequences of one sample."""
    if batch.input_ids.dim() == 2:
        return batch.sample_ids
    count = batch.input_ids.shape[1]
    return (batch.sample_ids[:, None] * count + torch.arange(count)).flatten()


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The part of one source of a mixture in a step."""

    name: str
    loss: float | None
    """Mean over its target tokens, nats; None where it has none in this step."""
    targets: int
    """Its target tokens: the losses of the sources, weighted by them, add up to that of the
    step."""
    samples: int
    consumed: int
    """Samples of the source before the present position in the data: those taken from it, and those
    that a roll-back left out."""

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        return {
            f"{key}/{self.name}": value
            for key, value in asdict(self).items()
            if key != "name" and value is not None
        }


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The measurements of one optimizer step; one row of `metrics.jsonl`."""

    step: int
    """Optimizer step in the run, from 1."""
    epoch: int
    step_in_epoch: int
    loss: float
    """Mean over target tokens, nats."""
    lr: float
    grad_norm: float
    tokens: int
    """Tokens of the global batch, without padding."""
    tokens_per_second: float
    """Over all ranks."""
    consumed_samples: int
    seconds: float
    data_wait_seconds: float = 0.0
    """Of `seconds`: the step waited for its data."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1; None: the peak of the device is not known."""
    peak_memory_bytes: int | None = None
    """Of the device of this rank since the last row; on the CPU of the process since it began."""
    reserved_memory_bytes: int | None = None
    """Held by the allocator of the device, as the above; None on the CPU."""
    loss_scale: float | None = None
    """The loss was multiplied by this; None: the loss is not scaled."""
    overflow: bool | None = None
    """Whether the step was skipped; None: the loss is not scaled."""
    skipped: bool | None = None
    """Whether it was skipped because limits were passed; None: there are none."""
    embedding_norm: float | None = None
    """Norm of the embedding's gradient; None: it is not watched."""
    sources: tuple[SourceRecord, ...] = ()
    """Of a mixture, for each source."""
    preference: Mapping[str, float] = field(default_factory=dict)
    """Rewards and log-probabilities of training on preferences, by the names of TRL."""

    @property
    def changed_nothing(self) -> bool:
        """Whether the step was skipped, for either reason."""
        return bool(self.overflow or self.skipped)

    def as_row(self) -> dict[str, Any]:
        """For `metrics.jsonl`."""
        row = {key: value for key, value in asdict(self).items() if value is not None}
        del row["sources"], row["preference"]
        row |= self.preference
        for source in self.sources:
            row |= source.as_row()
        return row
