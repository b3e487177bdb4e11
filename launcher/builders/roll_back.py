"""Roll-back: after an unsound step a run returns to its newest save and leaves out the samples.

Weights, optimizer state and counts are those of the save; the data position is after the step. Only
what this run saved, or was resumed from, counts, never a save of another run in the folder. Called
by all ranks together, which all saw the same step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from launcher.builders.gradients import watches_health
from launcher.builders.job import Job
from launcher.builders.resume import name_to_keep, own_root, restore
from launcher.checkpoint.catalog import published
from launcher.checkpoint.resume import choose
from launcher.config.schema import Config
from launcher.errors import UserError
from launcher.train.callbacks import Callbacks
from launcher.train.health import UnsoundStep
from launcher.train.loop import fit
from launcher.train.run import TrainRun


def no_effect_reason(config: Config) -> str:
    """Why roll_back has no effect with `config`; empty: it has."""
    if config.checkpoint_monitor is None:
        return "nothing is saved before the last step: add CheckpointMonitor to callbacks"
    checks = (config.check_for_nan_in_loss_and_grad, config.use_skip_data_by_global_norm,
              config.monitor_config.check_for_global_norm)  # fmt: skip
    if not any(checks):
        return (
            "no check ends the run: set check_for_nan_in_loss_and_grad or "
            "monitor_config.check_for_global_norm"
        )
    return ""


def fit_with_roll_back(job: Job, run: TrainRun, callbacks: Callbacks) -> None:
    """Train; with `monitor_config.roll_back` unsound steps are rolled back."""
    monitor = job.config.monitor_config
    if not monitor.roll_back:
        fit(run, callbacks)
        return
    if reason := no_effect_reason(job.config):
        job.log(f"monitor_config.roll_back: True has no effect: {reason}")
    roll_back = RollBack(job, run, monitor.global_norm_spike_count_threshold)
    while True:
        try:
            fit(run, callbacks)
        except UnsoundStep as error:
            roll_back.take(run, error)
        else:
            return


class RollBack:
    """The roll-backs of one run, at most `most` to one save. Made before the run begins."""

    def __init__(self, job: Job, run: TrainRun, most: int) -> None:
        self._job, self._most = job, most
        self._root = own_root(job.config)
        known = job.world.from_main({str(found.name) for found in published(self._root)})
        self._of_others = known - {run.origin.came_from}
        self._taken = Counter[str]()

    def take(self, run: TrainRun, error: UnsoundStep) -> None:
        """Return `run` to its newest save. Raises `error` where there is none, or when returning to
        it has not helped."""
        job = self._job
        try:
            chosen = choose(
                self._root, True, job.world, job.log, healthy=watches_health(job.config),
                without=self._of_others,
            )  # fmt: skip
            if chosen is None or self._taken[chosen.label] >= self._most:
                tried = f"returned to {chosen.label} {self._most} times" if chosen else "no save"
                job.log(f"roll_back: {tried}, the run ends")
                raise error
            self._taken[chosen.label] += 1
            state = restore(job, run, chosen, chosen.state)
        except UnsoundStep:
            raise
        except UserError as trouble:
            raise UserError([*error.problems, *trouble.problems]) from error
        run.state = replace(state, data_position=error.behind)
        run.origin = replace(run.origin, resumed_from=name_to_keep(job, run, chosen))
        job.log(
            f"rolled back to {chosen.label}, step {state.global_step}: {error.what}. Samples "
            f"{state.data_position} to {error.behind - 1} are left out"
        )
