"""Rules about a pipeline: stages, the layers of each, micro-batches and schedules.

The schedules are those of torch.distributed.pipelining; their requirements are checked here,
before a process starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.checks.plan import (
    micro_batch_reasons,
    nearest_degree,
    nearest_multiple,
    plan_of,
    stage_reasons,
)
from launcher.config.derived import (
    SPLIT_BACKWARD,
    is_interleaved,
    pipeline_schedule,
    stage_counts,
    stage_offsets,
    stages_per_rank,
)
from launcher.config.provenance import KeyProblem

_STAGES = "parallel_config.pipeline_stage"
_PER_RANK = "model.model_config.pp_interleave_num"
_OFFSET = "model.model_config.offset"
_LAYERS = "parallel.pipeline_config.stage_layers"
_INTERLEAVE = "parallel.pipeline_config.pipeline_interleave"
_SCHEDULER = "parallel.pipeline_config.pipeline_scheduler"


def _has_pipeline(check: Check) -> bool:
    runs = check.lays_out or check.predicts
    return runs and check.config.parallel_config.pipeline_stage > 1


def stages(check: Check) -> Iterator[KeyProblem]:
    """Every stage has a layer."""
    plan = plan_of(check, predicts=True)
    reasons = stage_reasons(plan) if plan else []
    if plan and reasons:
        layers = plan.decoder.num_hidden_layers
        yield check.wrong(
            _STAGES,
            "; ".join(reasons),
            nearest=nearest_degree(plan, "pipeline_stage", layers, stage_reasons),
            also=("model", "model.model_config", _PER_RANK, _INTERLEAVE, _SCHEDULER),
        )


def micro_batches(check: Check) -> Iterator[KeyProblem]:
    """The number of micro-batches fits the schedule."""
    plan = plan_of(check)
    reasons = micro_batch_reasons(plan) if plan else []
    if plan and reasons:
        parallel = check.config.parallel_config
        yield check.wrong(
            "parallel_config.micro_batch_num",
            "; ".join(reasons),
            nearest=nearest_multiple(parallel.micro_batch_num, parallel.pipeline_stage),
            also=(_STAGES, _SCHEDULER),
        )


def accumulation(check: Check) -> Iterator[KeyProblem]:
    """A pipeline accumulates gradients over its micro-batches only."""
    key = "runner_config.gradient_accumulation_steps"
    if check.trains and _has_pipeline(check) and check.value(key) > 1:
        yield check.wrong(
            key,
            "a pipeline accumulates gradients over its micro-batches only",
            nearest="Nearest: 1",
            advice="Use parallel_config.micro_batch_num instead",
            also=(_STAGES,),
        )


def interleaving(check: Check) -> Iterator[KeyProblem]:
    """pp_interleave_num fits the schedule."""
    number = check.config.model.model_config.get("pp_interleave_num")
    if number is None or not _has_pipeline(check):
        return
    schedule, also = pipeline_schedule(check.config), (_INTERLEAVE, _SCHEDULER, _STAGES)
    several = is_interleaved(check.config)
    if type(number) is not int or number < 1:
        usual = stages_per_rank(check.config)
        yield check.wrong(
            _PER_RANK, "must be an integer of at least 1", nearest=f"Nearest: {usual}"
        )
    elif schedule == "zero_bubble_v" and number != 2:
        yield check.wrong(
            _PER_RANK,
            "zero_bubble_v requires two stages per rank",
            nearest="Nearest: 2",
            also=also,
        )
    elif several and number == 1:
        yield check.wrong(
            _PER_RANK,
            "an interleaved schedule requires several stages per rank",
            nearest="Nearest: 2",
            advice="Or set pipeline_interleave to False",
            also=also,
        )
    elif number > 1 and not several:
        yield check.wrong(
            _PER_RANK,
            f"{schedule} supports one stage per rank only",
            nearest="Nearest: 1",
            advice="Or set parallel.pipeline_config.pipeline_interleave to True",
            also=also,
        )


def split(check: Check) -> Iterator[KeyProblem]:
    """stage_layers or offset assigns every layer, and at least one to each stage."""
    decoder = check.spec.decoder if check.spec is not None else None
    if decoder is None or not _has_pipeline(check):
        return
    ranks, each = check.config.parallel_config.pipeline_stage, stages_per_rank(check.config)
    count, layers = ranks * each, decoder.num_hidden_layers
    if count > layers:
        return  # reported by `stages`
    written = check.config.parallel.pipeline_config.stage_layers
    shape_is_right = _is_offset(check.config.model.model_config.get("offset"), ranks, each)
    if written is not None:
        yield from _stage_layers(check, written, count, layers, offset_too=shape_is_right)
    elif not shape_is_right:
        form = f"{each} lists of {ranks} integers" if each > 1 else f"a list of {ranks} integers"
        yield check.wrong(
            _OFFSET,
            f"must be {form}, one per stage",
            nearest=f"Nearest: {_as_offset(check, corrected([layers // count] * count, layers))}",
            also=(_STAGES, _PER_RANK),
        )
    else:
        yield from _offset(check, count, layers)


def _stage_layers(
    check: Check, written: list[int], count: int, layers: int, *, offset_too: bool
) -> Iterator[KeyProblem]:
    also = (_STAGES, _PER_RANK, _SCHEDULER, _INTERLEAVE, "model", "model.model_config")
    if offset_too and any(stage_offsets(check.config) or ()):
        where = check.provenance.nearest(_OFFSET)
        yield check.wrong(
            _LAYERS, f"offset ({where}) assigns the layers too", advice="Remove one of the two"
        )
    elif len(written) != count or sum(written) != layers:
        present = written if len(written) == count else [layers // count] * count
        yield check.wrong(
            _LAYERS,
            f"must be {count} numbers (stages) with a sum of {layers} (layers), not "
            f"{len(written)} with a sum of {sum(written)}",
            nearest=f"Nearest: {corrected(present, layers)}",
            also=also,
        )


def _offset(check: Check, count: int, layers: int) -> Iterator[KeyProblem]:
    offsets, counts = stage_offsets(check.config), stage_counts(check.config, layers)
    if offsets is None or counts is None:
        return
    share, rest = divmod(layers, count)
    if sum(counts) != layers or min(counts) < 1:
        yield check.wrong(
            _OFFSET,
            f"{layers} layers are {share} for each of {count} stages with a remainder of {rest}: "
            f"offset must sum to {rest}, and every stage must keep a layer",
            nearest=f"Nearest: {_as_offset(check, corrected(counts, layers))}",
            also=(_STAGES, _PER_RANK),
        )


def _is_offset(written: Any, ranks: int, each: int) -> bool:
    """Whether `offset` has the form of a list a rank, or a list of those a stage of a rank."""
    if written is None or written == 0 or written == []:
        return not isinstance(written, bool)
    if not isinstance(written, list):
        return False
    rows = written if isinstance(written[0], list) else [written] * each
    return len(rows) == each and all(
        isinstance(row, list) and len(row) == ranks and all(type(item) is int for item in row)
        for row in rows
    )


def _as_offset(check: Check, counts: list[int]) -> list[Any]:
    """Layers of each stage in the form of `offset`."""
    ranks, each = check.config.parallel_config.pipeline_stage, stages_per_rank(check.config)
    share = sum(counts) // len(counts)
    offsets = [number - share for number in counts]
    laps = [offsets[lap * ranks : (lap + 1) * ranks] for lap in range(each)]
    if pipeline_schedule(check.config) == "zero_bubble_v":
        laps[1].reverse()
    return laps if each > 1 else laps[0]


def corrected(counts: list[int], layers: int) -> list[int]:
    """`counts` changed as little as gives every stage a layer, and `layers` in all."""
    result = [min(max(count, 1), layers) for count in counts]
    while sum(result) < layers:
        result[result.index(min(result))] += 1
    while sum(result) > layers:
        last = max(range(len(result)), key=lambda index: (result[index], index))
        result[last] -= 1
    return result


def compiled(check: Check) -> Iterator[KeyProblem]:
    """Schedules that split the backward pass cannot run compiled layers."""
    schedule = pipeline_schedule(check.config)
    compiles = check.config.compile not in (False, "auto", "eager")
    if check.trains and _has_pipeline(check) and compiles and schedule in SPLIT_BACKWARD:
        yield check.wrong(
            "compile",
            f"not supported with {schedule}, which splits the backward pass",
            nearest="Nearest: auto",
            advice="It leaves the layers eager here; or use another pipeline_scheduler",
            also=(_SCHEDULER, _STAGES),
        )


def recomputed(check: Check) -> Iterator[KeyProblem]:
    """Schedules that split the backward pass would recompute a layer for each of its parameters."""
    schedule = pipeline_schedule(check.config)
    if not (check.trains and _has_pipeline(check) and schedule in SPLIT_BACKWARD):
        return
    for name in ("recompute", "select_recompute", "recompute_operations", "memory_budget"):
        key = f"recompute_config.{name}"
        if check.value(key) not in (None, False, [], {}):
            yield check.wrong(
                key,
                f"not supported with {schedule}, which splits the backward pass",
                nearest="Nearest: None" if name == "memory_budget" else "Nearest: False",
                advice="Or use pipeline_scheduler: 1f1b",
                also=(_SCHEDULER, _STAGES),
            )


def warnings(check: Check) -> Iterator[str]:
    """Keys of a pipeline that is not there."""
    if check.config.parallel_config.pipeline_stage > 1 or not check.lays_out:
        return
    written = {
        "parallel_config.micro_batch_num": check.config.parallel_config.micro_batch_num > 1,
        _INTERLEAVE: check.value(_INTERLEAVE),
        _SCHEDULER: check.value(_SCHEDULER) != "1f1b",
        _LAYERS: check.value(_LAYERS) is not None,
        _PER_RANK: check.value(_PER_RANK) not in (None, 1),
        _OFFSET: bool(check.value(_OFFSET)),
    }
    for key, is_set in written.items():
        if is_set:
            yield f"{check.provenance.where(key)}: {key}: no effect without a pipeline"
