"""What the main process of a job writes about its steps: metrics, progress and trackers."""

from __future__ import annotations

from pathlib import Path

from launcher.builders.job import Job
from launcher.builders.resume import own_root
from launcher.checkpoint.catalog import published
from launcher.report.aside import move_aside
from launcher.report.curves import FILE_NAME as CURVE_NAME
from launcher.report.metrics import MetricsLog, Start
from launcher.report.trackers import open_trackers
from launcher.train.reporting import Reporting
from launcher.train.run import TrainRun


def open_reporting(job: Job, run: TrainRun) -> Reporting:
    """Open the metrics and the trackers. Called on the main process only."""
    config = job.config
    board = config.tensorboard.tensorboard_dir
    names = list(dict.fromkeys([*config.trackers, *(["tensorboard"] if board else [])]))
    metadata = {"seed": config.seed, "global_batch_size": run.loader.global_batch,
                "total_steps": run.total_steps, "model": job.spec.hf_config}  # fmt: skip
    trackers = open_trackers(
        names, Path(board or job.output_dir / "trackers"), metadata,
        cpu=job.world.device.type == "cpu",
    )  # fmt: skip
    metrics = MetricsLog(job.output_dir, _start_of(job, run), run.state.consumed_samples)
    if metrics.moved_to:
        curve = job.output_dir / CURVE_NAME
        moved = [metrics.moved_to, *([move_aside(curve)] if curve.exists() else [])]
        job.log(f"of an earlier run, renamed: {', '.join(map(str, moved))}")
    return Reporting(job.console, metrics, trackers)


def _start_of(job: Job, run: TrainRun) -> Start:
    """How the run continues the metrics in its folder, which are those of the run that saved
    last."""
    if run.origin.resumed_from is not None:
        return Start.SAME
    came_from = run.origin.came_from
    saved = published(own_root(job.config)) if came_from else []
    is_of_last = bool(saved) and came_from.startswith(f"{saved[-1].name.label}-")
    return Start.BRANCH if is_of_last else Start.FRESH
