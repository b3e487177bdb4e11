"""Callbacks: what happens beside the steps of a run. The interface, and those of training itself.

`launcher.builders.callbacks` builds them from the configuration, with those of the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.schema import EarlyStoppingSection
from launcher.train.evaluate import EvaluationResult
from launcher.train.run import TrainRun
from launcher.train.step import StepRecord


class Callback:
    """Does nothing; subclasses override some methods. Called on every rank."""

    def on_train_begin(self, run: TrainRun) -> None:
        """Before the first step, and again after a roll-back."""

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        """After each sink: one record a step, oldest first (one record without sinking)."""

    def on_evaluation(self, run: TrainRun, result: EvaluationResult) -> None:
        """After an evaluation."""

    def on_interrupt(self, run: TrainRun) -> None:
        """After the step in which a signal arrived, before the run stops."""

    def on_exception(self, run: TrainRun, error: Exception) -> None:
        """After an error on this rank, before the run ends with it."""

    def on_train_end(self, run: TrainRun) -> None:
        """After the last step."""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks of a run, in the order in which they are called."""

    reports: Sequence[Callback]
    checks: Sequence[Callback]
    """They may end the run before an unsound step is saved."""
    saving: Callback
    others: Sequence[Callback]
    """Requests to stop, and the user's own."""

    def __iter__(self) -> Iterator[Callback]:
        return iter((*self.reports, *self.checks, self.saving, *self.others))


class LossMonitor(Callback):
    """MFLossMonitor: MindFormers' loss line, every `per_print_times` steps."""

    def __init__(self, per_print_times: int = 1) -> None:
        self.per_print_times = per_print_times

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            if record.step % self.per_print_times == 0 or record.step == run.total_steps:
                run.log(loss_line(run, record))


def loss_line(run: TrainRun, record: StepRecord) -> str:
    """The fields of MindFormers, in its order and spelling, throughput per device."""
    epochs = -(-run.total_steps // run.steps_per_epoch)
    samples_per_second = run.loader.global_batch / record.seconds / run.world.size
    return (
        f"{{ Epoch:[{record.epoch:3d}/{epochs:3d}], "
        f"step:[{record.step_in_epoch:5d}/{run.steps_per_epoch:5d}], loss: {record.loss:.6f}, "
        f"per_step_time: {record.seconds * 1000:.0f}ms, lr: {record.lr:.6g}, "
        f"overflow cond: {bool(record.overflow)}, loss_scale: {record.loss_scale or 1.0}, "
        f"global_norm: [{record.grad_norm:.6f}], "
        f"train_throughput_per_npu: {samples_per_second:.3f} samples/s/p }}"
    )


class EarlyStopping(Callback):
    """Ends the run, which is saved, when an evaluation metric no longer improves. What it has seen
    is in the state of the run."""

    def __init__(self, section: EarlyStoppingSection) -> None:
        self.section = section

    def on_evaluation(self, run: TrainRun, result: EvaluationResult) -> None:
        step, metric = run.state.global_step, self.section.metric
        value = result.as_row().get(metric)
        run.state.stopping = run.state.stopping.after(self.section, step, value)
        state = run.state.stopping
        if state.is_due(self.section) and step < run.total_steps:
            best = "no finite value yet" if state.best is None else (
                f"the best value is {state.best:.6g}, of step {state.best_step}")  # fmt: skip
            run.log(
                f"EarlyStopping: {metric} has not improved in {state.without} evaluations ({best}):"
                f" the run ends after step {step} of {run.total_steps}"
            )


class RequestFile(Callback):
    """OnRequestExit: a file with `{"GracefulExit": 1}` stops the run, saved and with exit code 0,
    one step after the main process has seen it. Other ranks learn of it in that step."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._is_seen = False

    def on_train_begin(self, run: TrainRun) -> None:
        if run.world.is_main and self._requests_stop():
            run.log(f"warning: {self.path} already requests a stop: this run will end after two "
                    "steps. Delete the file, or set GracefulExit to 0")  # fmt: skip

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        if run.world.is_main and not self._is_seen and self._requests_stop():
            self._is_seen = True
            run.log(f"{self.path} requests a stop: stopping after one more step")
            run.interrupts.request()

    def _requests_stop(self) -> bool:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.get("GracefulExit") == 1
