"""Health: steps whose loss or gradient norm is far too large, or no number; and saves after them.

Owns what counts as such a step and what is done about it: it changes nothing (and several in a row
end the training), or it ends the training before anything of it is saved, or training goes back to
the newest save and leaves its samples out (`launcher.builders.roll_back` does that). Invariant: all
ranks decide alike without talking, from the numbers they share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import Config
from launcher.errors import UserError
from launcher.train.callbacks import Callback
from launcher.train.run import TrainRun
from launcher.train.step import Limits, StepRecord

ABNORMAL_FILE = "abnormal_global_norm.json"
"""Below output_dir, as in the original: step to its norm and its samples."""


class UnsoundStep(UserError):
    """A step that ends the run, on all ranks; nothing of it is saved."""

    def __init__(self, run: TrainRun, record: StepRecord, *, rule: str, advice: str) -> None:
        self.step = record.step
        first, self.behind = samples_of(run, record)
        """Place in the data behind the step."""
        self.what = f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm:.4g}"
        where = f"samples {first} to {self.behind - 1}"
        if not run.config.monitor_config.roll_back:
            advice += ", or set monitor_config.roll_back: True"
        super().__init__(self.what, where=where, rule=rule, advice=advice)


def samples_of(run: TrainRun, record: StepRecord) -> tuple[int, int]:
    """The place in the data where a step of the newest sink began, and that behind it."""
    later = (run.state.global_step - record.step) * run.loader.global_batch
    behind = run.state.data_position - later
    return behind - run.loader.global_batch, behind


class FiniteCheck(Callback):
    """Looks for the first loss or gradient norm that is not finite: says so once, or, with
    `check_for_nan_in_loss_and_grad`, ends the run. Steps in which a dynamic loss scale looks for
    the scale that fits are left alone.

    It stands before CheckpointMonitor, so that a run that ends has not saved such a step.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self._said = False

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            if self._said or _is_finite(run, record):
                continue
            if self.stop:
                raise UnsoundStep(
                    run, record,
                    rule="check_for_nan_in_loss_and_grad asks for finite values",
                    advice="Resume from the last checkpoint with a lower learning rate",
                )  # fmt: skip
            self._said = True
            first, behind = samples_of(run, record)
            what = f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}"
            run.log(f"warning: samples {first} to {behind - 1}: {what}. "
                    "check_for_nan_in_loss_and_grad: True would stop")  # fmt: skip


def _is_finite(run: TrainRun, record: StepRecord) -> bool:
    if math.isfinite(record.loss) and math.isfinite(record.grad_norm):
        return True
    scale, overflow = record.loss_scale or 1.0, bool(record.overflow)
    return run.scaling is not None and run.scaling.is_expected(scale, overflow)


def limits_of(config: Config) -> Limits | None:
    """The limits the configuration asks for; None: any loss and norm is taken as it comes."""
    monitor = config.monitor_config
    if config.use_skip_data_by_global_norm or monitor.check_for_global_norm:
        return Limits(
            norm=monitor.global_norm_spike_threshold,
            loss=monitor.loss_spike_threshold or math.inf,
            skips=config.use_skip_data_by_global_norm,
        )
    return None


@dataclass
class LimitCheck(Callback):
    """Tells of steps beyond the limits, writes them down, and ends the run when that is asked for.

    It stands before CheckpointMonitor, so that no save holds what came of such a step. `most`: how
    many in a row may be skipped.
    """

    limits: Limits
    most: int

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            if record.overflow or not self.limits.are_passed(record.grad_norm, record.loss):
                run.state.skipped_in_a_row = 0
                continue
            run.state.skipped_in_a_row += 1
            self._write(run, record)
            self._judge(run, record, run.state.skipped_in_a_row)

    def _judge(self, run: TrainRun, record: StepRecord, in_a_row: int) -> None:
        if not self.limits.skips:
            raise UnsoundStep(
                run, record, rule="monitor_config.check_for_global_norm ends such a run",
                advice="Resume with use_skip_data_by_global_norm: True (and without "
                "check_for_global_norm) to leave these samples out",
            )  # fmt: skip
        first, behind = samples_of(run, record)
        run.log(
            f"is_skip: [True], step {record.step}: {self._what(record)}, {in_a_row} in a row of at "
            f"most {self.most}: samples {first} to {behind - 1} changed nothing"
        )
        if in_a_row > self.most:
            raise UnsoundStep(
                run, record, rule=f"it was skipped, and {self.most} before it in a row: "
                "monitor_config.global_norm_spike_count_threshold allows no more",
                advice="Lower the learning rate, or raise the threshold",
            )  # fmt: skip

    def _what(self, record: StepRecord) -> str:
        if not record.grad_norm < self.limits.norm:
            return f"gradient norm {record.grad_norm:.4g} is beyond {self.limits.norm:g}"
        return f"loss {record.loss:.4g} is beyond {self.limits.loss:g}"

    def _write(self, run: TrainRun, record: StepRecord) -> None:
        if not run.world.is_main:
            return
        path = run.output_dir / ABNORMAL_FILE
        known = _read(path, dict)
        first, behind = samples_of(run, record)
        key = str(record.step)
        if key in known and known[key].get("samples") != [first, behind - 1]:  # after a roll-back
            key += f" (samples {first} to {behind - 1})"
        known[key] = {
            "global_norm": str(record.grad_norm), "loss": str(record.loss),
            "samples": [first, behind - 1],
        }  # fmt: skip
        path.write_text(json.dumps(known, indent=1) + "\n")


def _read(path: Path, kind: type) -> Any:
    """The JSON at `path` if it is of `kind`, else an empty one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()
