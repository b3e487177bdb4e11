"""Rules about the profiler: which steps and which ranks it records."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from launcher.config.checks.check import Check
from launcher.config.derived import degrees
from launcher.config.provenance import KeyProblem

_START, _STOP, _RANKS = "profile_start_step", "profile_stop_step", "profile_rank_ids"


def steps(check: Check) -> Iterator[KeyProblem]:
    """The window is not empty, and begins before the run ends."""
    config = check.config
    if not (config.profile and check.trains):
        return
    start, stop = config.profile_start_step, config.profile_stop_step
    if stop < start and not config.init_start_profile:
        is_written = check.provenance.is_written(_STOP)
        yield check.wrong(
            _STOP if is_written else _START,
            f"steps {start} to {stop} are recorded: the last one must not be before the first",
            nearest=f"Nearest: {start}" if is_written else f"Nearest: {stop}",
            advice="" if is_written else f"Or set {_STOP}",
            also=(_START,),
        )
    runner = config.runner_config
    ends = [length for length in (runner.max_steps, runner.stop_step) if length]
    if ends and start > min(ends) and not config.init_start_profile:
        yield check.wrong(
            _START, f"the run has {min(ends)} steps", nearest=f"Nearest: {min(ends)}", also=(_STOP,)
        )


def ranks(check: Check) -> Iterator[KeyProblem]:
    """The ranks that record exist."""
    chosen = check.config.profile_rank_ids
    if not check.config.profile or not check.trains or chosen is None:
        return
    count = check.world_size or prod(degrees(check.config).values())
    there = [rank for rank in chosen if 0 <= rank < count]
    if len(there) < len(chosen):
        numbers = "only rank 0" if count == 1 else f"ranks 0 to {count - 1}"
        yield check.wrong(
            _RANKS, f"the run has {numbers}", nearest=f"Nearest: {there or [0]}",
            also=("parallel_config", "use_parallel"),
        )  # fmt: skip


def warnings(check: Check) -> Iterator[str]:
    """A profile that nothing is recorded for."""
    if check.config.profile and not check.trains and check.mode:
        yield f"{check.provenance.where('profile')}: profile: only steps of training are recorded"
