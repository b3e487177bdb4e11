"""Health: unsound steps, whose loss or gradient norm is far too large or not finite.

Owns which steps are unsound and what happens then: the step is skipped (and several in a row end
the run), or the run ends before the step is saved, or it goes back to the newest save and leaves
the samples of the step out (`launcher.builders.roll_back`). Invariant: all ranks decide alike
without a collective, from numbers that are the same on all of them.
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
from launcher.train.run import Limits, TrainRun
from launcher.train.step import StepRecord

ABNORMAL_FILE = "abnormal_global_norm.json"
"""In output_dir, as in MindFormers: step to its norm and its samples."""


class UnsoundStep(UserError):
    """A step that ends the run, on all ranks, before it is saved."""

    def __init__(self, run: TrainRun, record: StepRecord, *, rule: str, advice: str) -> None:
        self.step = record.step
        first, self.behind = samples_of(run, record)
        """Position in the data after the step."""
        self.what = f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm:.4g}"
        where = f"samples {first} to {self.behind - 1}"
        if not run.config.monitor_config.roll_back:
            advice += ", or set monitor_config.roll_back: True"
        super().__init__(self.what, where=where, rule=rule, advice=advice)


def samples_of(run: TrainRun, record: StepRecord) -> tuple[int, int]:
    """The positions in the data where a step of the newest sink began and ended."""
    later = (run.state.global_step - record.step) * run.loader.global_batch
    behind = run.state.data_position - later
    return behind - run.loader.global_batch, behind


class FiniteCheck(Callback):
    """Warns once of a loss or gradient norm that is not finite, or, with
    `check_for_nan_in_loss_and_grad`, ends the run. Steps in which a dynamic loss scale searches for
    the right scale do not count."""

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self._has_warned = False

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            if self._has_warned or _is_finite(run, record):
                continue
            if self.stop:
                raise UnsoundStep(
                    run, record,
                    rule="check_for_nan_in_loss_and_grad: True requires finite values",
                    advice="Resume from the last checkpoint with a lower learning rate",
                )  # fmt: skip
            self._has_warned = True
            first, behind = samples_of(run, record)
            what = f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm}"
            run.log(f"warning: samples {first} to {behind - 1}: {what}. Set "
                    "check_for_nan_in_loss_and_grad: True to stop such a run")  # fmt: skip


def _is_finite(run: TrainRun, record: StepRecord) -> bool:
    if math.isfinite(record.loss) and math.isfinite(record.grad_norm):
        return True
    scaling, overflow = run.settings.scaling, bool(record.overflow)
    return scaling is not None and scaling.is_expected(record.loss_scale or 1.0, overflow)


def limits_of(config: Config) -> Limits | None:
    """The configured limits of a sound step; None: every step is sound."""
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
    """Logs steps that pass the limits, records them in `ABNORMAL_FILE`, and ends the run where it
    is configured to."""

    limits: Limits
    most: int
    """How many steps in a row may be skipped."""

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
                run, record,
                rule="with monitor_config.check_for_global_norm: True such a step ends the run",
                advice="To skip such steps, resume with use_skip_data_by_global_norm: True and "
                "check_for_global_norm: False",
            )  # fmt: skip
        first, behind = samples_of(run, record)
        run.log(
            f"is_skip: [True], step {record.step}: {self._what(record)}, {in_a_row} in a row of at "
            f"most {self.most}: samples {first} to {behind - 1} are skipped"
        )
        if in_a_row > self.most:
            raise UnsoundStep(
                run, record, rule=f"it is skipped, and so were the {self.most} before it: "
                "monitor_config.global_norm_spike_count_threshold allows no more",
                advice="Lower the learning rate, or raise the threshold",
            )  # fmt: skip

    def _what(self, record: StepRecord) -> str:
        if not record.grad_norm < self.limits.norm:
            return f"gradient norm {record.grad_norm:.4g} is above {self.limits.norm:g}"
        return f"loss {record.loss:.4g} is above {self.limits.loss:g}"

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
    """The JSON value in `path` if it is of `kind`, else an empty one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()
