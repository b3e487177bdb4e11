"""Callbacks: what else happens at the edges of a sink. And the table that names them.

Owns the interface, the callbacks that belong to training itself, and how classes of a user's own
come in: only from the files that `register_path` names, only by class name.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.schema import RegisteredCallbackSection
from launcher.errors import UserError, did_you_mean
from launcher.train.evaluate import evaluate
from launcher.train.run import TrainRun
from launcher.train.step import StepRecord


class Callback:
    """Does nothing at every edge; subclasses do something at some. Called on every rank."""

    def on_train_begin(self, run: TrainRun) -> None:
        """Before the first step."""

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        """After each sink: one record a step, oldest first (one record without sinking)."""

    def on_interrupt(self, run: TrainRun) -> None:
        """After the step in which a signal arrived, before the run stops."""

    def on_exception(self, run: TrainRun, error: Exception) -> None:
        """After an error on this rank, before the run ends with it."""

    def on_train_end(self, run: TrainRun) -> None:
        """After the last step."""


class LossMonitor(Callback):
    """MFLossMonitor: the original's loss line, every `per_print_times` steps."""

    def __init__(self, per_print_times: int = 1) -> None:
        self.per_print_times = per_print_times

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            if record.step % self.per_print_times == 0 or record.step == run.total_steps:
                run.log(loss_line(run, record))


def loss_line(run: TrainRun, record: StepRecord) -> str:
    """The fields of the original, in its order and spelling, throughput per device."""
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


class RequestFile(Callback):
    """OnRequestExit: a file with `{"GracefulExit": 1}` ends the run, saved and with exit code 0,
    one step after it was seen. The main process looks; the others hear of it in the step."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._seen = False

    def on_train_begin(self, run: TrainRun) -> None:
        if run.world.is_main and self._asks():
            run.log(f"warning: {self.path} asks for the end already: this run will not get far. "
                    "Delete it, or set GracefulExit to 0")  # fmt: skip

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        if run.world.is_main and not self._seen and self._asks():
            self._seen = True
            run.log(f"{self.path} asks for the end: one more step")
            run.interrupts.request()

    def _asks(self) -> bool:
        try:
            content = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.get("GracefulExit") == 1


class Evaluation(Callback):
    """EvalCallBack: the loss on the evaluation data every n steps or epochs, and at the end."""

    def __init__(self, step_interval: int, epoch_interval: int) -> None:
        self.step_interval = step_interval
        self.epoch_interval = epoch_interval
        self._evaluated_step = -1

    def on_train_begin(self, run: TrainRun) -> None:
        self._evaluated_step = -1

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        if any(self._due(run, record) for record in records):
            self._evaluate(run)

    def _due(self, run: TrainRun, record: StepRecord) -> bool:
        by_step = self.step_interval > 0 and record.step % self.step_interval == 0
        last_of_epoch = record.step_in_epoch == run.steps_per_epoch
        return by_step or (
            self.epoch_interval > 0 and last_of_epoch and record.epoch % self.epoch_interval == 0
        )

    def on_train_end(self, run: TrainRun) -> None:
        self._evaluate(run)

    def _evaluate(self, run: TrainRun) -> None:
        if run.evaluation is None or self._evaluated_step == run.state.global_step:
            return
        self._evaluated_step = run.state.global_step
        result = evaluate(run.parts, run.compute, run.batch_sharder, run.evaluation(), run.world)
        epoch, _ = run.epoch_and_step()
        run.report_row({"step": run.state.global_step, "epoch": epoch, **result.as_row()})
        run.log(f"step {run.state.global_step}: {result}")


def load_registered(path: str) -> dict[str, type[Callback]]:
    """The `Callback` subclasses in the file `path`, or in the files of that folder, by name."""
    root = Path(path)
    files = sorted(root.glob("*.py")) if root.is_dir() else [root]
    found: dict[str, type[Callback]] = {}
    for file in files:
        name = f"slipway_registered_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise UserError(f"register_path: {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise UserError(
                f"register_path: importing {file} failed: {type(error).__name__}: {error}",
                where=_place(error, file),
            ) from error
        for value in vars(module).values():
            if inspect.isclass(value) and issubclass(value, Callback) and value.__module__ == name:
                found[value.__name__] = value
    return found


def _place(error: BaseException, file: Path) -> str:
    """file:line in `file` where an error arose, as near as its traceback says."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    return f"{file}:{lines[-1]}" if lines else str(file)


def build_registered(
    entry: RegisteredCallbackSection, registered: Mapping[str, type[Callback]], where: str
) -> Callback:
    """The registered callback an entry of `callbacks` names, with its arguments checked."""
    kind = registered.get(entry.type)
    if kind is None:
        raise UserError(
            f"callbacks: unknown type {entry.type!r}",
            where=where,
            rule=f"register_path defines {', '.join(sorted(registered)) or 'no callback'}",
            nearest=did_you_mean(entry.type, registered),
        )
    parameters = list(inspect.signature(kind).parameters)
    try:
        inspect.signature(kind).bind(**entry.arguments)
    except TypeError as error:
        unknown = next((key for key in entry.arguments if key not in parameters), "")
        raise UserError(
            f"{entry.type}: {error}",
            where=where,
            rule=f"it takes {', '.join(parameters) or 'no argument'}",
            nearest=did_you_mean(unknown, parameters),
        ) from error
    try:
        return kind(**entry.arguments)
    except Exception as error:
        raise UserError(
            f"{entry.type}({_shown(entry.arguments)}) failed: {type(error).__name__}: {error}",
            where=where,
        ) from error


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
