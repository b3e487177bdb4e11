"""Types of the keys of the eager style that become other keys.

Owns the check of values that the translation computes with: of another type they would be read as
the default. A key that is only renamed is checked under its new name.
"""

from __future__ import annotations

from typing import Any

from launcher.config.draft import Draft
from launcher.mindspore.sections.values import count, refuse, written

_COUNTS = (
    *("training.local_batch_size", "training.global_batch_size"),
    *("parallelism.pipeline_parallel_microbatch_size", "parallelism.ulysses_degree_in_cp"),
    "parallelism.pipeline_parallel_interleave_num",
)
_SWITCHES = (
    *("training.deterministic", "training.use_skip_step_on_nan", "checkpoint.enable_save"),
    *("checkpoint.no_save_optim", "checkpoint.no_load_optim", "profiler.enable_profiling"),
    *("optimizer.qk_clip", "optimizer.qk_clip_enabled"),
)
_SECTIONS = (
    *("recompute.select_module", "monitor.tensorboard", "monitor.train_state"),
    "monitor.health_checkpoint",
)
_RANKS = "parallelism.data_parallel_shard"


def check(draft: Draft) -> None:
    """Refuse values of another type, and take their keys away."""
    for key in _COUNTS:
        if written(draft, key) is not None and count(draft, key, 0) < 1:
            refuse(draft, key, "must be an integer of at least 1")
    if written(draft, _RANKS) is not None and count(draft, _RANKS, 0) == 0:
        refuse(draft, _RANKS, "must be a number of ranks, or -1 for what the other degrees leave")
    for key in _SWITCHES:
        if not _is_switch(written(draft, key)):
            refuse(draft, key, "must be true or false")
    for key in _SECTIONS:
        if not isinstance(written(draft, key), dict | None):
            refuse(draft, key, "must be a section (key: value)")


def _is_switch(value: Any) -> bool:
    return value is None or str(value).lower() in ("true", "false")
