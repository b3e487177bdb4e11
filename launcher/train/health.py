"""Health: steps whose gradient norm is far too large, or no number.

Owns what counts as such a step and what is done about it: it changes nothing (and several in a row
end the training), or it ends the training before anything of it is saved. Invariant: all ranks
decide alike without talking, from the one norm they share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.config.schema import Config
from launcher.errors import UserError
from launcher.train.callbacks import Callback
from launcher.train.run import TrainRun
from launcher.train.step import NormLimit, StepRecord

ABNORMAL_FILE = "abnormal_global_norm.json"
"""Below output_dir, as in the original: step to its norm and its samples."""


def norm_limit(config: Config) -> NormLimit | None:
    """The limit the configuration asks for; None: any norm is taken as it comes."""
    monitor = config.monitor_config
    if config.use_skip_data_by_global_norm or monitor.check_for_global_norm:
        skips = config.use_skip_data_by_global_norm
        return NormLimit(monitor.global_norm_spike_threshold, skips=skips)
    return None


@dataclass
class NormCheck(Callback):
    """Tells of steps beyond the limit, writes them down, and ends the run when that is asked for.

    It stands before CheckpointMonitor, so that no save holds what came of such a step. `most`: how
    many in a row may be skipped.
    """

    limit: NormLimit
    most: int

    def on_steps_end(self, run: TrainRun, records: Sequence[StepRecord]) -> None:
        for record in records:
            if record.overflow or not self.limit.is_beyond(record.grad_norm):
                run.state.skipped_in_a_row = 0
                continue
            run.state.skipped_in_a_row += 1
            in_a_row = run.state.skipped_in_a_row
            self._write(run, record)
            if not self.limit.skips:
                raise _error(run, record, "monitor_config.check_for_global_norm ends such a run",
                             "Resume with use_skip_data_by_global_norm: True (and without "
                             "check_for_global_norm) to leave these samples out")  # fmt: skip
            samples = f"samples {_first(run, record)} to {record.consumed_samples - 1}"
            run.say(
                f"is_skip: [True], step {record.step}: gradient norm {record.grad_norm:.4g} is "
                f"beyond {self.limit.threshold:g}, {in_a_row} in a row of at most "
                f"{self.most}: {samples} changed nothing"
            )
            if in_a_row > self.most:
                raise _error(run, record, f"it was skipped, and {self.most} before it in a row: "
                             "monitor_config.global_norm_spike_count_threshold allows no more",
                             "Lower the learning rate, or raise the threshold")  # fmt: skip

    def _write(self, run: TrainRun, record: StepRecord) -> None:
        if not run.world.is_main:
            return
        path = run.output_dir / ABNORMAL_FILE
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        samples = [_first(run, record), record.consumed_samples - 1]
        known[str(record.step)] = {"global_norm": str(record.grad_norm), "samples": samples}
        path.write_text(json.dumps(known, indent=1) + "\n")


def _first(run: TrainRun, record: StepRecord) -> int:
    return record.consumed_samples - run.loader.global_batch


def _error(run: TrainRun, record: StepRecord, rule: str, advice: str) -> UserError:
    return UserError(
        f"step {record.step}: gradient norm {record.grad_norm:.4g}",
        where=f"samples {_first(run, record)} to {record.consumed_samples - 1}",
        rule=rule,
        advice=advice,
    )
