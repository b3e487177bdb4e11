"""Log lines about saves: the results, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.checkpoint import health
from launcher.checkpoint.best import EVALUATION
from launcher.checkpoint.saver import SaveResult
from launcher.config.schema import CheckpointMonitorSection


def result_lines(result: SaveResult, config: CheckpointMonitorSection, ranks: int) -> Iterator[str]:
    """What a save did, or why it failed."""
    request, name = result.request, result.name
    for warning in result.warnings:
        yield f"warning: {name} is saved, but {warning}"
    for old in result.removed:
        yield f"removed {old} of the run that this one resumes: {_retention(config)}"
    if result.error is not None:
        where = f" in {result.failed_in}, only in {', '.join(result.saved_in)}"
        yield (
            f"warning: step {request.step} was not saved{where if result.saved_in else ''}: "
            f"{result.error}"
        )
        return
    verdict = request.record.get(health.KEY, {})
    if not verdict.get("is_healthy", True):
        yield f"warning: {name}: {health.health_issue({health.KEY: verdict})}"
    value = request.record.get(EVALUATION, {}).get(config.best_metric)
    best = f", the best so far: {config.best_metric} {value:.6g}" if result.is_best else ""
    waited = f" in the background, training waited {request.waited_seconds:.2f} s"
    yield (
        f"saved step {request.step} as {name}: {ranks} rank{'' if ranks == 1 else 's'}, "
        f"{result.nbytes / 1e6:.1f} MB, {result.seconds:.2f} s"
        f"{waited if request.waited_seconds else ''}"
        f"{best}"
    )


def no_effect_lines(config: CheckpointMonitorSection) -> Iterator[str]:
    """Limits in time, which have no effect beside a limit in numbers, as in MindFormers."""
    for key, value, other, number in (
        ("save_checkpoint_seconds", config.save_checkpoint_seconds,
         "save_checkpoint_steps", config.save_checkpoint_steps),
        ("keep_checkpoint_per_n_minutes", config.keep_checkpoint_per_n_minutes,
         "keep_checkpoint_max", config.keep_checkpoint_max),
    ):  # fmt: skip
        if value and number:
            yield f"{key}: {value} has no effect: {other} is {number}. Set that to 0"


def _retention(config: CheckpointMonitorSection) -> str:
    if config.keep_checkpoint_max:
        return f"keep_checkpoint_max is {config.keep_checkpoint_max}"
    return f"keep_checkpoint_per_n_minutes is {config.keep_checkpoint_per_n_minutes}"
