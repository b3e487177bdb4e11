"""How a MindFormers configuration spreads work over processes and memory.

Owns parallel_config, parallel and recompute_config: degrees that other keys switch off, schedules
that differ in time and memory alone, and lists that belong to another number of stages.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from launcher.config.draft import Draft
from launcher.mindspore.sections.values import (
    DEGREES,
    count,
    is_of_mindformers,
    is_on,
    processes,
    written,
)

_PARALLEL = "parallel_config"
_SCHEDULER = "parallel.pipeline_config.pipeline_scheduler"
_INTERLEAVE = "parallel.pipeline_config.pipeline_interleave"
_SHARDS = "parallel.parallel_optimizer_config.optimizer_weight_shard_size"
_ACCUMULATION = "runner_config.gradient_accumulation_steps"
_SEQUENCE_SCHEDULES = ("seqpipe", "seqvpp", "seqsmartvpp")
_DATA_PARALLEL_ONLY = (0, "DATA_PARALLEL", "data_parallel")
_RECOMPUTED = ("recompute", "select_recompute", "select_recompute_exclude")


def translate(draft: Draft) -> None:
    """Translate these sections."""
    _one_process(draft)
    _data_parallel_only(draft)
    _automatic_degree(draft)
    _sharding(draft)
    _experts(draft)
    _schedule(draft)
    if count(draft, f"{_PARALLEL}.pipeline_stage", 1) == 1:
        _without_stages(draft)
    elif is_of_mindformers(draft):
        _accumulation(draft)


def _one_process(draft: Draft) -> None:
    """`use_parallel: False` is a run of one process, whatever the degrees are."""
    if written(draft, "use_parallel") is None or is_on(draft, "use_parallel", default=True):
        return
    if (processes() or 1) == 1:
        _as_one(draft, (*DEGREES, "expert_parallel"), "use_parallel is False: one process")


def _data_parallel_only(draft: Draft) -> None:
    """parallel_mode 0 is data parallel, in which the other degrees are not used."""
    value = written(draft, "parallel.parallel_mode")
    if type(value) is not bool and value in _DATA_PARALLEL_ONLY:
        others = [name for name in DEGREES if name != "data_parallel"]
        _as_one(draft, others, "parallel_mode 0 is data parallel alone")


def _as_one(draft: Draft, axes: Any, why: str) -> None:
    for axis in axes:
        key = f"{_PARALLEL}.{axis}"
        if count(draft, key, 1) > 1:
            draft.replace(key, {key: 1}, why)


def _automatic_degree(draft: Draft) -> None:
    """`data_parallel: auto` is what the other degrees leave of the processes."""
    key = f"{_PARALLEL}.data_parallel"
    if str(written(draft, key, "")).lower() != "auto":
        return
    others = 1
    for axis in DEGREES:
        others *= count(draft, f"{_PARALLEL}.{axis}", 1) if axis != "data_parallel" else 1
    world = processes() or others
    draft.replace(key, {key: max(world // max(others, 1), 1)}, "from the number of processes")


def _sharding(draft: Draft) -> None:
    """More shards than data-parallel ranks are all of them."""
    ranks = count(draft, f"{_PARALLEL}.data_parallel", 1)
    if count(draft, _SHARDS, -1) > ranks:
        draft.replace(_SHARDS, {_SHARDS: -1}, f"data_parallel is {ranks}: all ranks")


def _experts(draft: Draft) -> None:
    """MindFormers also spreads experts over tensor-parallel ranks. Here they are spread over as
    many data-parallel ranks as fit, which changes the place of an expert and no result."""
    key = f"{_PARALLEL}.expert_parallel"
    ranks, experts = count(draft, f"{_PARALLEL}.data_parallel", 1), count(draft, key, 1)
    fitting = gcd(ranks, experts)
    if is_of_mindformers(draft) and experts > fitting >= 1:
        draft.replace(key, {key: fitting}, f"of {ranks} data-parallel ranks")


def _schedule(draft: Draft) -> None:
    """Schedules over pieces of a sequence give the result of those over full sequences."""
    kind = written(draft, _SCHEDULER)
    if kind not in _SEQUENCE_SCHEDULES:
        return
    draft.replace(_SCHEDULER, {_SCHEDULER: "1f1b"}, "schedules differ in time and memory only")
    if is_on(draft, _INTERLEAVE) and _stages_per_rank(draft) == 1:
        draft.replace(_INTERLEAVE, {_INTERLEAVE: False}, "pp_interleave_num is 1")


def _accumulation(draft: Draft) -> None:
    """A pipeline accumulates over its micro-batches alone, there as here."""
    if count(draft, _ACCUMULATION, 1) > 1:
        draft.replace(_ACCUMULATION, {_ACCUMULATION: 1}, "a pipeline accumulates its micro-batches")


def _stages_per_rank(draft: Draft) -> int:
    return count(draft, "model.model_config.pp_interleave_num", 1)


def _without_stages(draft: Draft) -> None:
    """Lists of entries for several stages, where there is one: any entry means all its layers."""
    why = "pipeline_stage is 1, the list is for several stages"
    for name in _RECOMPUTED:
        key = f"recompute_config.{name}"
        value = written(draft, key)
        if isinstance(value, dict):
            changed = {name: _of_one_stage(entries) for name, entries in value.items()}
            if changed != value:
                draft.replace(key, {key: changed}, why)
        elif _of_one_stage(value) != value:
            draft.replace(key, {key: _of_one_stage(value)}, why)


def _of_one_stage(value: Any) -> Any:
    """The entries for one stage: True or False for a list of several, else what was written."""
    if not isinstance(value, list) or any(isinstance(item, str) for item in value):
        return value
    if len(value) <= 1 and not any(isinstance(item, list) for item in value):
        return value
    flat = [part for item in value for part in (item if isinstance(item, list) else [item])]
    if not all(isinstance(part, int) for part in flat):
        return value
    return any(flat)
