"""The training loop.

    while steps are left:
        a sink of `sink_size` steps: fetch, step, fetch, step, ...   no callback, and no host sync
                                                                     but for a loss scale
        read what the steps measured, tell every callback
        stop when a signal was received, after saving

Without sinking (the default, or `sink_size: 1`) a sink is one step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from launcher.train.callbacks import Callback
from launcher.train.interrupts import STOP_REASONS, Interrupted
from launcher.train.run import TrainRun
from launcher.train.state import epoch_and_step
from launcher.train.step import GRADIENT_NORM, LOSS, SIGNALS_FROM, StepRecord, train_step


class PendingRecord(NamedTuple):
    """What the host knows of a step before it reads what the device measured."""

    step: int
    rate: float
    loss_scale: float
    tokens: int
    consumed_samples: int


def fit(run: TrainRun, callbacks: Sequence[Callback], sink_size: int = 1) -> None:
    """Train until `run.total_steps`. Raises `Interrupted` after a wish to stop."""
    with run.interrupts:
        try:
            _fit(run, callbacks, sink_size)
        except Interrupted:
            raise
        except Exception as error:
            for callback in callbacks:
                _tell_of(error, callback, run)
            raise


def _tell_of(error: Exception, callback: Callback, run: TrainRun) -> None:
    """Tell a callback of the error that ends the run, which comes before any of its own."""
    try:
        callback.on_exception(run, error)
    except Exception as other:
        name = type(callback).__name__
        run.log(f"warning: {name}.on_exception: {type(other).__name__}: {other}")


def _fit(run: TrainRun, callbacks: Sequence[Callback], sink_size: int) -> None:
    for callback in callbacks:
        callback.on_train_begin(run)
    while run.state.global_step < run.total_steps:
        records, signal_number = run_sink(run, sink_size)
        for callback in callbacks:
            callback.on_steps_end(run, records)
        if signal_number:
            for callback in callbacks:
                callback.on_interrupt(run)
            raise Interrupted(signal_number)
    for callback in callbacks:
        callback.on_train_end(run)


def run_sink(run: TrainRun, sink_size: int) -> tuple[list[StepRecord], int]:
    """The steps to the next multiple of `sink_size`, then one read of what they measured.

    Returns the record of each step and the number of a received signal (0: none).
    """
    started = time.perf_counter()
    done = run.state.global_step
    steps = min(sink_size - done % sink_size, run.total_steps - done)
    measured, pending = [], []
    for _ in range(steps):
        data = run.loader.step(run.state.data_position)
        rate, scale = run.schedule(run.state.global_step), run.state.loss_scale
        measured.append(train_step(run, data, rate))
        run.state.advance(data.samples, data.input_tokens)
        pending.append(PendingRecord(run.state.global_step, rate, scale, data.input_tokens,
                            run.state.consumed_samples))  # fmt: skip
    values = torch.stack(measured).tolist()  # the one point where the host waits for the device
    seconds = (time.perf_counter() - started) / steps
    records = [
        _record(run, record, row, seconds) for record, row in zip(pending, values, strict=True)
    ]
    return records, _signal(values[-1])


def _record(
    run: TrainRun, record: PendingRecord, row: Sequence[float], seconds: float
) -> StepRecord:
    epoch, step_in_epoch = epoch_and_step(record.step, run.steps_per_epoch)
    norm, scaled = row[GRADIENT_NORM], run.scaling is not None
    limits, watches = run.limits, run.gradients.embedding is not None
    return StepRecord(
        step=record.step, epoch=epoch, step_in_epoch=step_in_epoch, loss=row[LOSS], lr=record.rate,
        grad_norm=norm, tokens=record.tokens, tokens_per_second=record.tokens / seconds,
        consumed_samples=record.consumed_samples, seconds=seconds,
        loss_scale=record.loss_scale if scaled else None,
        overflow=not math.isfinite(norm) if scaled else None,
        skipped=limits.are_passed(norm, row[LOSS]) if limits and limits.skips else None,
        embedding_norm=row[-1] if watches else None,
    )  # fmt: skip


def _signal(last: Sequence[float]) -> int:
    """The wish the ranks agree on after the newest step, 0 for none: SIGTERM if any rank got it."""
    ranks = last[SIGNALS_FROM : SIGNALS_FROM + len(STOP_REASONS)]
    received = [number for number, count in zip(STOP_REASONS, ranks, strict=True) if count]
    return max(received, default=0)  # a request comes after signals
