"""Roll-back: a run goes on from its newest save, without the samples that led to an unsound step.

Owns the way back: weights, optimizer and counts are those of the save, the place in the data is
behind the step. Called by all ranks together, which all saw the same step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from launcher.assembly.job import Job
from launcher.assembly.resume import name_to_keep, own_root, restore
from launcher.checkpoint.resume import choose
from launcher.errors import UserError
from launcher.train.health import UnsoundStep
from launcher.train.run import TrainRun


@dataclass
class RollBack:
    """The ways back of one run; at most `most` to one save."""

    job: Job
    most: int
    _taken: Counter[str] = field(default_factory=Counter)

    def take(self, run: TrainRun, error: UnsoundStep) -> None:
        """Bring `run` back to its newest save. Raises `error` where there is none, or when that did
        not help."""
        root = own_root(self.job.config)
        try:
            chosen = choose(root, True, self.job.world, self.job.say)
        except UserError as trouble:
            raise UserError([*error.problems, *trouble.problems]) from error
        if chosen is None or self._taken[chosen.label] >= self.most:
            reason = f"went back to {chosen.label} {self.most} times" if chosen else "nothing saved"
            self.job.say(f"roll_back: {reason}, the run ends")
            raise error
        self._taken[chosen.label] += 1
        state = restore(self.job, run, chosen, chosen.state)
        run.state = replace(state, data_position=error.behind)
        run.resumed_from = name_to_keep(self.job, run, chosen)
        self.job.say(
            f"rolled back to {chosen.label}, step {state.global_step}: {error.what}. Samples "
            f"{state.data_position} to {error.behind - 1} are left out"
        )
