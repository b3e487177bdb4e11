"""The training loop.

    while steps are left:
        train      a sink of `sink_size` steps; the host does not wait in it, but for a loss scale
        report     what the steps measured: metrics, progress, the loss line
        check      an unsound step ends the run before it is saved
        evaluate   when an evaluation is due, before the save: a save knows its metrics
        save       when a checkpoint is due
        callbacks  requests to stop, and the user's own
        stop       after a signal, once a checkpoint is saved; or early, after an evaluation

Without sinking (the default, or `sink_size: 1`) a sink is one step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from launcher.data.loader import StepData
from launcher.data.mixture import MixtureOrder
from launcher.report import ranges
from launcher.report.ranges import named_range
from launcher.train.callbacks import Callback, Callbacks
from launcher.train.collection import Collect, collected_every
from launcher.train.evaluate import evaluate_sets, is_evaluation_due
from launcher.train.interrupts import STOP_REASONS, Interrupted
from launcher.train.meter import Memory
from launcher.train.preference import summary_of
from launcher.train.run import TrainRun
from launcher.train.state import epoch_and_step
from launcher.train.step import (
    GRADIENT_NORM,
    LOSS,
    SIGNALS_FROM,
    SOURCES_FROM,
    SourceRecord,
    StepRecord,
    train_step,
)


def fit(run: TrainRun, callbacks: Callbacks) -> None:
    """Train until the run is finished. Raises `Interrupted` after a signal or a request to stop."""
    with run.interrupts, collected_every(run.config.gc_freq) as collect:
        try:
            _fit(run, callbacks, collect)
        except Interrupted:
            raise
        except Exception as error:
            for callback in callbacks:
                _report_exception(run, callback, error)
            raise


def _fit(run: TrainRun, callbacks: Callbacks, collect: Collect) -> None:
    for callback in callbacks:
        callback.on_train_begin(run)
    while not run.is_finished:
        records, stop_reason = train_steps(run)
        collect(run.state.global_step)
        for callback in (*callbacks.reports, *callbacks.checks):
            callback.on_steps_end(run, records)
        is_last = run.state.global_step >= run.total_steps and not stop_reason
        is_due = is_evaluation_due(run, records)
        if is_last or is_due:
            evaluate_run(run, callbacks, is_due=is_due)
        callbacks.saving.on_steps_end(run, records)
        for callback in callbacks.others:
            callback.on_steps_end(run, records)
        if run.profiler is not None and not run.is_finished:  # the last save is of the last step
            run.profiler.end_steps(run.state.global_step)
        if stop_reason:
            for callback in callbacks:
                callback.on_interrupt(run)
            raise Interrupted(stop_reason)
    for callback in callbacks:
        callback.on_train_end(run)


def _report_exception(run: TrainRun, callback: Callback, error: Exception) -> None:
    """Call `on_exception` of a callback; an error of its own is only logged."""
    try:
        callback.on_exception(run, error)
    except Exception as other:
        name = type(callback).__name__
        run.log(f"warning: {name}.on_exception: {type(other).__name__}: {other}")


def evaluate_run(run: TrainRun, callbacks: Callbacks, *, is_due: bool) -> None:
    """Report the loss on the evaluation data, where there is some. Checks see only evaluations that
    are due: another one, at the end of a part of a run, does not count for early stopping."""
    if not run.evaluation:
        return
    with named_range(ranges.EVALUATE):
        result = evaluate_sets(run.model, run.evaluation, run.world)
    run.evaluated = run.state.global_step, result
    run.log(f"step {run.state.global_step}: {result}")
    checks = callbacks.checks if is_due else ()
    for callback in (*callbacks.reports, *checks, *callbacks.others):
        callback.on_evaluation(run, result)


class PendingRecord(NamedTuple):
    """What the host knows of a step before it reads what the device measured."""

    step: int
    rate: float
    loss_scale: float
    data: StepData
    consumed_samples: int
    taken: Sequence[int]
    """Of a mixture: samples taken from each source so far."""


class StepCost(NamedTuple):
    """What the steps of a sink took on this rank, each the same."""

    seconds: float
    waited: float
    """Seconds of waiting for data."""
    memory: Memory


def train_steps(run: TrainRun) -> tuple[list[StepRecord], int]:
    """Train to the next multiple of `run.sink_size`, then read what the steps measured.

    That is the one point where the host waits for the device, and it waits for the gradients of the
    last step alone: while its update runs, callbacks run and the next step is queued. All that is
    measured is known before anything else happens, so no check comes a step late.

    Returns the record of each step, oldest first, and one of `STOP_REASONS` (0: none).
    """
    started = time.perf_counter()
    done = run.state.global_step
    steps = min(run.sink_size - done % run.sink_size, run.total_steps - done)
    measured, pending = [], []
    for _ in range(steps):
        if run.profiler is not None:
            run.profiler.begin_step(run.state.global_step + 1)
        with run.meter.waiting_for_data(), named_range(ranges.DATA):
            data = run.loader.step(run.state.data_position)
        rate, scale = run.schedule(run.state.global_step), run.state.loss_scale
        measured.append(train_step(run, data, rate))
        run.state.advance(data.samples, data.input_tokens)
        pending.append(PendingRecord(run.state.global_step, rate, scale, replace(data, batches=[]),
                                     run.state.consumed_samples, _taken(run)))  # fmt: skip
    values = [step.read("step values") for step in measured]
    cost = StepCost(
        seconds=(time.perf_counter() - started) / steps,
        waited=run.meter.take_waited() / steps,
        memory=run.meter.take_memory(),
    )
    records = [_record(run, record, row, cost) for record, row in zip(pending, values, strict=True)]
    return records, _stop_reason(values[-1])


def _record(
    run: TrainRun, record: PendingRecord, row: Sequence[float], cost: StepCost
) -> StepRecord:
    epoch, step_in_epoch = epoch_and_step(record.step, run.steps_per_epoch)
    norm, scaled = row[GRADIENT_NORM], run.settings.scaling is not None
    limits, watches = run.settings.limits, run.gradients.embedding is not None
    speed = record.data.input_tokens / cost.seconds
    return StepRecord(
        step=record.step, epoch=epoch, step_in_epoch=step_in_epoch, loss=row[LOSS], lr=record.rate,
        grad_norm=norm, tokens=record.data.input_tokens,
        tokens_per_second=speed, consumed_samples=record.consumed_samples,
        seconds=cost.seconds, data_wait_seconds=cost.waited, mfu=run.meter.mfu(speed),
        peak_memory_bytes=cost.memory.peak, reserved_memory_bytes=cost.memory.reserved,
        loss_scale=record.loss_scale if scaled else None,
        overflow=not math.isfinite(norm) if scaled else None,
        skipped=limits.are_passed(norm, row[LOSS]) if limits and limits.skips else None,
        embedding_norm=row[-1] if watches else None,
        sources=tuple(_source_records(run, record, row[SOURCES_FROM:])),
        preference=_preference_metrics(run, row[SOURCES_FROM + len(run.loader.source_names):]),
    )  # fmt: skip


def _preference_metrics(run: TrainRun, measured: Sequence[float]) -> dict[str, float]:
    """`measured`: the share of samples, then the measures, of the mean over the global batch."""
    if run.model.preference is None:
        return {}
    settings = run.model.preference.settings
    return summary_of(settings, measured[1 : len(settings.measures) + 1], measured[0])


def _taken(run: TrainRun) -> Sequence[int]:
    order = run.loader.order
    return order.taken(run.state.data_position) if isinstance(order, MixtureOrder) else ()


def _source_records(
    run: TrainRun, record: PendingRecord, parts: Sequence[float]
) -> Iterator[SourceRecord]:
    """`parts`: of each source in the loss of the step."""
    counts = record.data.sources
    if counts is None:
        return
    total = max(record.data.target_tokens, 1)
    for index, name in enumerate(run.loader.source_names):
        targets = counts.targets[index]
        yield SourceRecord(
            name=name, loss=parts[index] * total / targets if targets else None, targets=targets,
            samples=counts.samples[index], consumed=record.taken[index],
        )  # fmt: skip


def _stop_reason(last: Sequence[float]) -> int:
    """Why all ranks stop after the newest step, 0 if they do not: SIGTERM if any rank got it."""
    ranks = last[SIGNALS_FROM : SIGNALS_FROM + len(STOP_REASONS)]
    received = [number for number, count in zip(STOP_REASONS, ranks, strict=True) if count]
    return max(received, default=0)  # a request comes after signals
