"""The profiler of a job, from its configuration."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from launcher.builders.job import Job
from launcher.train.profiling import ProfileSettings, StepProfiler

FOLDER = "profile"


def open_profiler(job: Job) -> AbstractContextManager[StepProfiler | None]:
    """The profiler of this rank; None where it records nothing."""
    config, rank = job.config, job.world.rank
    if not config.profile or not _records(job):
        return nullcontext()
    level = 1 if config.profile_level is None else config.profile_level
    settings = ProfileSettings(
        start=0 if config.init_start_profile else config.profile_start_step,
        stop=config.profile_stop_step,
        shapes=level >= 1,
        flops=level >= 2,
        memory=config.profile_memory,
        stack=config.with_stack,
        communication=config.profile_communication,
        memory_snapshot=config.profile_memory_snapshot,
        nsight=config.mstx,
    )
    on_cuda = job.world.device.type == "cuda"
    for key in ("profile_memory_snapshot", "mstx"):
        if getattr(config, key) and not on_cuda:
            job.log(f"warning: {key}: no effect on the CPU")
    root = Path(config.profile_output) if config.profile_output else job.output_dir / FOLDER
    return StepProfiler(settings, root / f"rank_{rank}", job.world.device, job.log)


def _records(job: Job) -> bool:
    """Whether this rank is one of those that record."""
    config, rank = job.config, job.world.rank
    chosen = config.profile_rank_ids
    if chosen is None and not config.profile_pipeline:
        return True
    of_stage = all(at == 0 for axis, at in job.mesh.coordinates(rank).items() if axis != "pp")
    return rank in (chosen or ()) or (config.profile_pipeline and of_stage)
