"""The pipeline schedules: in which order a rank computes its stages and micro-batches.

Owns the table from the names of the configuration to torch's schedules, and what each requires of
the numbers of stages and micro-batches. Two ranks, four micro-batches, forward F, backward B:

    gpipe       F0 F1 F2 F3                B0 B1 B2 B3        all forward, then all backward
                   F0 F1 F2 F3 B0 B1 B2 B3
    1f1b        F0 F1       B0 F2 B1 F3 B2    B3              no more in flight than ranks
                   F0 B0 F1 B1 F2 B2 F3 B3

The interleaved schedules give each rank several stages, in a loop: the bubble is that of a shorter
stage. The zero-bubble schedules split B into the gradients of inputs and of weights, and fill the
bubble with the latter, on which no other rank depends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

TorchSchedule = Any
"""A schedule object of torch: `step(...)` runs one global batch."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(output of the last stage, labels) of one micro-batch -> a float32 scalar."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One schedule: torch's classes, and what they require."""

    single: Callable[..., TorchSchedule] | None = None
    """Torch's class where every rank has one stage."""
    multiple: Callable[..., TorchSchedule] | None = None
    """Torch's class for a list of stages."""
    per_rank: int | None = None
    """Stages a rank, if the schedule supports only this number."""
    v_shaped: bool = False
    """Stages are on ranks 0 1 1 0, not on 0 1 0 1."""
    fills: bool = False
    """Needs at least as many micro-batches as ranks."""
    in_rounds: bool = False
    """Micro-batches run in rounds of equal size, at least the number of ranks."""


SCHEDULES = {
    "gpipe": Schedule(single=ScheduleGPipe, multiple=ScheduleLoopedBFS),
    "1f1b": Schedule(single=Schedule1F1B, per_rank=1, fills=True),
    "interleaved_1f1b": Schedule(multiple=ScheduleInterleaved1F1B, in_rounds=True),
    "interleaved_zero_bubble": Schedule(multiple=ScheduleInterleavedZeroBubble, in_rounds=True),
    "zero_bubble_v": Schedule(multiple=ScheduleZBVZeroBubble, per_rank=2, v_shaped=True),
}


def broken_rule(name: str, *, ranks: int, per_rank: int, micro_batches: int) -> str | None:
    """The rule of the schedule that these numbers break, as a sentence without a full stop."""
    schedule = SCHEDULES[name]
    if schedule.per_rank not in (None, per_rank):
        return f"{name} has {schedule.per_rank} stages a rank, not {per_rank}"
    if schedule.fills and micro_batches < ranks:
        return f"{name} on {ranks} ranks needs at least {ranks} micro-batches, not {micro_batches}"
    rounds = max(1, micro_batches // ranks)
    if schedule.in_rounds and micro_batches % rounds:
        return (
            f"{name} on {ranks} ranks runs {micro_batches} micro-batches in {rounds} rounds, "
            "which must be of equal size"
        )
    return None


def build_schedule(
    name: str, stages: Sequence[PipelineStage], micro_batches: int, loss: Loss
) -> TorchSchedule:
    """Torch's schedule `name` over the stages of this rank; gradients are summed, not averaged."""
    schedule = SCHEDULES[name]
    if len(stages) == 1 and schedule.single is not None:
        return schedule.single(stages[0], micro_batches, loss_fn=loss, scale_grads=False)
    assert schedule.multiple is not None
    return schedule.multiple(list(stages), micro_batches, loss_fn=loss, scale_grads=False)


def stage_ranks(schedule: TorchSchedule, stages: int) -> tuple[int, ...]:
    """The rank that torch's schedule sends to for each stage."""
    mapping = getattr(schedule, "stage_index_to_group_rank", None)
    return tuple(range(stages)) if mapping is None else tuple(mapping[s] for s in range(stages))
