"""Reporting: the callback that turns step records into metrics, a progress line and a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.report.console import Console
from launcher.report.curves import FILE_NAME as CURVE_NAME
from launcher.report.curves import draw_loss
from launcher.report.metrics import MetricsLog, read_rows
from launcher.report.progress import Pace, progress_line
from launcher.train.callbacks import Callback
from launcher.train.evaluate import EvaluationResult
from launcher.train.run import TrainRun
from launcher.train.step import StepRecord


class Reporting(Callback):
    """On the main process only."""

    def __init__(self, console: Console, metrics: MetricsLog, trackers: Sequence[Any]) -> None:
        self.console = console
        self.metrics = metrics
        self.trackers = trackers
        self._pace = Pace()

    def _add(self, row: dict[str, Any]) -> None:
        """A row for `metrics.jsonl`, and its numbers for the trackers."""
        self.metrics.add(row)
        for tracker in self.trackers:
            tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def on_train_begin(self, run: TrainRun) -> None:
        """Remove the rows of steps that are about to be trained again."""
        self.metrics.go_back(run.state.consumed_samples)

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            self._add(record.as_row())
        newest = records[-1]
        left = self._pace.remaining(newest.step, run.total_steps, newest.seconds)
        self.console.progress(
            progress_line(
                step=newest.step, total=run.total_steps, loss=newest.loss, lr=newest.lr,
                grad_norm=newest.grad_norm, tokens_per_second=newest.tokens_per_second,
                remaining_seconds=left, mfu=newest.mfu,
                peak_memory_bytes=newest.peak_memory_bytes,
                data_share=newest.data_wait_seconds / newest.seconds,
                source_losses={
                    source.name: source.loss
                    for source in newest.sources if source.loss is not None
                },
            ),
            last=newest.step == run.total_steps,
        )  # fmt: skip

    def on_evaluation(self, run: TrainRun, result: EvaluationResult) -> None:
        epoch, _ = run.epoch_and_step()
        self._add({"step": run.state.global_step, "epoch": epoch, **result.as_row()})

    def close(self, run: TrainRun) -> None:
        """Finish the files and draw the curve; also after an interrupt."""
        self.metrics.close()
        for tracker in self.trackers:
            tracker.finish()
        curve = run.output_dir / CURVE_NAME
        if draw_loss(read_rows(self.metrics.path), curve):
            run.log(f"loss curve: {curve}   metrics: {self.metrics.path}")
