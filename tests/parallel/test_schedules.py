"""The table of schedules, and the actions of each rank in torch's schedules, in one process."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.bubble import Costs, bubble, duration, formula, orders, replay
from launcher.parallel.schedules import broken_rule

NUMBERS = [
    ("gpipe", 4, 1, 8), ("gpipe", 3, 2, 4), ("gpipe", 2, 1, 1), ("1f1b", 4, 1, 8),
    ("1f1b", 3, 1, 3), ("interleaved_1f1b", 4, 2, 8), ("interleaved_1f1b", 2, 4, 6),
    ("interleaved_zero_bubble", 4, 1, 8), ("interleaved_zero_bubble", 2, 2, 4),
    ("zero_bubble_v", 4, 2, 8), ("zero_bubble_v", 4, 2, 3), ("zero_bubble_v", 2, 2, 1),
]  # fmt: skip
"""Schedule, ranks, stages a rank, micro-batches."""


@pytest.mark.parametrize(
    ("name", "per_rank", "micro_batches", "rule"),
    [
        ("gpipe", 1, 1, None),
        ("1f1b", 1, 4, None),
        ("1f1b", 2, 4, "1f1b has 1 stages a rank, not 2"),
        ("interleaved_1f1b", 2, 3, None),
        ("interleaved_1f1b", 2, 10, None),
        (
            "interleaved_1f1b", 2, 9,
            "interleaved_1f1b on 4 ranks runs 9 micro-batches in 2 rounds, which must be of equal "
            "size",
        ),
    ],
)  # fmt: skip
def test_rules_of_schedules(name: str, per_rank: int, micro_batches: int, rule: str | None) -> None:
    found = broken_rule(name, ranks=4, per_rank=per_rank, micro_batches=micro_batches)
    assert found == rule


@pytest.mark.parametrize(("name", "ranks", "per_rank", "micro_batches"), NUMBERS)
def test_every_stage_runs_every_micro_batch_once(
    name: str, ranks: int, per_rank: int, micro_batches: int
) -> None:
    order = orders(name, ranks, per_rank, micro_batches)
    done = Counter(
        ("B" if operation.kind == "I" else operation.kind, operation.stage, operation.micro_batch)
        for own in order
        for operation in own
        if operation.kind != "W"
    )
    stages = range(ranks * per_rank)
    assert done == Counter((k, s, m) for k in "FB" for s in stages for m in range(micro_batches))
    partial_saves = [[x for own in order for x in own if x.kind == kind] for kind in "IW"]
    assert len(partial_saves[0]) == len(partial_saves[1])


@pytest.mark.parametrize(("name", "ranks", "per_rank", "micro_batches"), NUMBERS)
def test_bubbles_are_those_of_the_textbook(
    name: str, ranks: int, per_rank: int, micro_batches: int
) -> None:
    costs = Costs(forward=1.0, backward=2.0, inputs=1.0, weights=1.0)
    order = orders(name, ranks, per_rank, micro_batches)
    timeline = replay(order, ranks * per_rank, lambda kind, stage: costs.of(kind, stage))
    known = formula(name, ranks, per_rank, micro_batches)
    if known is None:
        assert bubble(timeline) < (ranks - 1) / (micro_batches + ranks - 1)  # that of 1f1b
    else:
        assert bubble(timeline) == pytest.approx(known)
        work = 3 * per_rank * micro_batches
        assert duration(timeline) == pytest.approx(work / (1 - known))
