"""Rules about the profiler: which steps and which ranks it records."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.derived import degrees
from launcher.config.provenance import KeyProblem

_START, _STOP, _RANKS = "profile_start_step", "profile_stop_step", "profile_rank_ids"
_OUTPUT = "profile_output"


def steps(check: Check) -> Iterator[KeyProblem]:
    """The window is not empty, and begins before the run ends."""
    config = check.config
    if not (config.profile and check.trains):
        return
    start, stop = config.profile_start_step, config.profile_stop_step
    runner = config.runner_config
    ends = [length for length in (runner.max_steps, runner.stop_step) if length]
    if ends and start > min(ends) and not config.init_start_profile:
        yield check.wrong(
            _START, f"the run has {min(ends)} steps", nearest=f"Nearest: {min(ends)}", also=(_STOP,)
        )
    elif stop < start and not config.init_start_profile:
        is_written = check.provenance.is_written(_STOP)
        yield check.wrong(
            _STOP if is_written else _START,
            f"steps {start} to {stop} are recorded: the last one must not be before the first",
            nearest=f"Nearest: {start}" if is_written else f"Nearest: {stop}",
            advice="" if is_written else f"Or set {_STOP}",
            also=(_START,),
        )


def ranks(check: Check) -> Iterator[KeyProblem]:
    """The ranks that record exist, and there is one."""
    chosen = check.config.profile_rank_ids
    if not check.config.profile or not check.trains or chosen is None:
        return
    if not chosen and not check.config.profile_pipeline:
        yield check.wrong(
            _RANKS, "no rank records", nearest="Nearest: [0]", advice="Left out, all ranks do"
        )
    count = check.world_size or prod(degrees(check.config).values())
    there = [rank for rank in chosen if 0 <= rank < count]
    if len(there) < len(chosen):
        numbers = "only rank 0" if count == 1 else f"ranks 0 to {count - 1}"
        yield check.wrong(
            _RANKS, f"the run has {numbers}", nearest=f"Nearest: {there or [0]}",
            also=("parallel_config", "use_parallel"),
        )  # fmt: skip


def folder(check: Check) -> Iterator[KeyProblem]:
    """The path of the traces may not be a file, or inside one."""
    output = Path(check.config.profile_output or ".")
    if check.config.profile and check.trains:
        for path in (output, *output.parents):
            if path.is_file():
                yield check.wrong(_OUTPUT, f"must be a directory, {path} is a file")


def warnings(check: Check) -> Iterator[str]:
    """A profile that nothing is recorded for, and a window of none."""
    is_written, where = check.provenance.is_written, check.provenance.where
    if check.config.profile and not check.trains and check.mode:
        yield f"{where('profile')}: profile: only steps of training are recorded"
    for key in (_START, _STOP, _RANKS, _OUTPUT):
        if check.trains and is_written(key) and not is_written("profile"):
            yield f"{where(key)}: {key}: no effect without profile: True"
