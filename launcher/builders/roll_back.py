"""Roll-back: a run goes on from its newest save, without the samples that led to an unsound step.

Owns the way back: weights, optimizer and counts are those of the save, the place in the data is
behind the step. It leads to what this run saved, or to where it was resumed from, never to a save
of another run in the folder. Called by all ranks together, which all saw the same step.
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
from launcher.train.health import UnsoundStep
from launcher.train.run import TrainRun


def no_effect_reason(config: Config) -> str:
    """Why roll_back does nothing in a run with `config`; empty: it may."""
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


class RollBack:
    """The ways back of one run, made before it begins; at most `most` to one save."""

    def __init__(self, job: Job, run: TrainRun, most: int) -> None:
        self._job, self._most = job, most
        self._root = own_root(job.config)
        known = job.world.from_main({str(found.name) for found in published(self._root)})
        self._of_others = known - {run.came_from}
        self._taken = Counter[str]()

    def take(self, run: TrainRun, error: UnsoundStep) -> None:
        """Bring `run` back to its newest save. Raises `error` where there is none, or when that did
        not help."""
        job = self._job
        try:
            chosen = choose(
                self._root, True, job.world, job.log, healthy=watches_health(job.config),
                without=self._of_others,
            )  # fmt: skip
            if chosen is None or self._taken[chosen.label] >= self._most:
                tried = f"went back to {chosen.label} {self._most} times" if chosen else "no save"
                job.log(f"roll_back: {tried}, the run ends")
                raise error
            self._taken[chosen.label] += 1
            state = restore(job, run, chosen, chosen.state)
        except UnsoundStep:
            raise
        except UserError as trouble:
            raise UserError([*error.problems, *trouble.problems]) from error
        run.state = replace(state, data_position=error.behind)
        run.resumed_from = name_to_keep(job, run, chosen)
        job.log(
            f"rolled back to {chosen.label}, step {state.global_step}: {error.what}. Samples "
            f"{state.data_position} to {error.behind - 1} are left out"
        )
