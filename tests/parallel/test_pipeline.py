"""Pipelines of real ranks against the full decoder in one process: losses and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.layout.mesh import Mesh
from launcher.parallel import world
from launcher.parallel.schedules import SCHEDULES
from launcher.parallel.tied import broadcast_tied, tied_replicas
from launcher.train.loss import token_loss_sum
from tests.parallel.pipelines import (
    EMBEDDING,
    TOLERANCE,
    Case,
    bad_ones,
    batch,
    full_decoder,
    gradient_error,
    loss_error,
    named,
    pipeline_of,
    reference,
    scaled,
    split_of,
    stages_of,
    unsplit,
)
from tests.ranks import run_ranks


def run_case(case: Case, group: Any) -> dict[str, float]:
    """Relative errors of a step, of one with another shape, and of evaluations."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    split = split_of(case, ranks)
    stages = stages_of(case, split, rank)
    pipeline = pipeline_of(case, group, stages, split)
    replicas = None
    if case.tied:
        held = [p for name, p in named(stages) if name == EMBEDDING]
        replicas = tied_replicas(Mesh(pp=ranks), split, held)
    errors = {}
    for step, shown in enumerate([case, replace(case, rows=case.rows + 1)]):
        ids, labels, arguments = batch(shown, seed=step)
        expected = reference(unsplit(shown), step)
        loss = pipeline.train(ids, labels, scaled(labels), arguments)
        if replicas is not None:
            replicas.all_reduce_gradients()
        errors[f"loss {step}"] = loss_error(loss, expected[0], group)
        errors[f"gradients {step}"] = gradient_error(stages, expected[1])
        count = case.micro_batches if step == 1 else 1
        loss = pipeline.evaluate(ids, labels, scaled(labels), arguments, micro_batches=count)
        errors[f"evaluation {step}"] = loss_error(loss, expected[2], group)
        assert all(module.training for module in stages.values())
    return errors


def run_cases(cases: list[Case]) -> list[dict[str, float]]:
    world.start(force_cpu=True)
    return [run_case(case, dist.group.WORLD) for case in cases]


TWO_RANKS = [
    Case("gpipe"),
    Case("gpipe", per_rank=2, tied=True),
    Case("1f1b", packed=True, dropout=True),
    Case("1f1b", tied=True, micro_batches=5, counts=(5, 3)),
    Case("interleaved_1f1b", per_rank=2, packed=True),
    Case("interleaved_1f1b", per_rank=4, tied=True),
    Case("interleaved_zero_bubble", tied=True, micro_batches=6),
    Case("interleaved_zero_bubble", per_rank=2, packed=True, dropout=True, counts=(3, 2, 2, 1)),
    Case("zero_bubble_v", per_rank=2, packed=True),
    Case("zero_bubble_v", per_rank=2, tied=True, dropout=True, counts=(3, 2, 2, 1)),
]
FOUR_RANKS = [
    Case("gpipe", tied=True),
    Case("1f1b", counts=(3, 2, 2, 1), micro_batches=8, packed=True, dropout=True),
    Case("1f1b", tied=True),
    Case("interleaved_1f1b", per_rank=2, micro_batches=8, tied=True),
    Case("interleaved_zero_bubble", counts=(3, 2, 2, 1), packed=True),
    Case("zero_bubble_v", per_rank=2, micro_batches=8, dropout=True),
    Case("zero_bubble_v", per_rank=2, micro_batches=4, tied=True, packed=True),
    Case("zero_bubble_v", per_rank=2, micro_batches=1),
]


def test_two_ranks_compute_what_one_does() -> None:
    assert bad_ones(2, TWO_RANKS, run_cases) == []


def test_four_ranks_compute_what_one_does() -> None:
    assert bad_ones(4, FOUR_RANKS, run_cases) == []


def same_twice() -> list[bool]:
    """Whether a repeated step, with evaluations of other shapes in between, is bitwise the same."""
    world.start(force_cpu=True)
    results = []
    for name in SCHEDULES:
        case = Case(name, SCHEDULES[name].per_rank or 2, packed=True, dropout=True)
        split = split_of(case, 2)
        stages = stages_of(case, split, dist.get_rank())
        pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
        ids, labels, arguments = batch(case)
        found = []
        for _ in range(2):
            loss = pipeline.train(ids, labels, scaled(labels), arguments)
            found.append([loss, *(p.grad for _, p in named(stages))])
            for _, parameter in named(stages):
                parameter.grad = None
            pipeline.evaluate(ids[:1], labels[:1], scaled(labels))
        results.append(all(torch.equal(a, b) for a, b in zip(*found, strict=True)))
    return results


def test_a_step_repeated_gives_the_same_bits() -> None:
    assert run_ranks(2, same_twice) == [[True] * len(SCHEDULES)] * 2


def gradients_accumulate() -> float:
    world.start(force_cpu=True)
    case = Case("zero_bubble_v", per_rank=2)
    split = split_of(case, 2)
    stages = stages_of(case, split, dist.get_rank())
    pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
    ids, labels, arguments = batch(case)
    for _ in range(2):
        pipeline.train(ids, labels, scaled(labels), arguments)
    return gradient_error(stages, {n: 2 * g for n, g in reference(unsplit(case), 0)[1].items()})


def test_gradients_are_accumulated() -> None:
    assert max(run_ranks(2, gradients_accumulate)) <= TOLERANCE


def refusals() -> dict[str, str]:
    """The errors of invalid pipelines, each on all ranks."""
    world.start(force_cpu=True)
    rank = dist.get_rank()
    case = Case("1f1b")
    split = split_of(case, 2)
    stages = stages_of(case, split, rank)
    looped = split_of(Case("gpipe", per_rank=2), 2)
    other = split_of(case, 2).stages_of(1 - rank)[0]
    attempts: dict[str, Callable[[], Any]] = {
        "micro-batches": lambda: pipeline_of(
            replace(case, micro_batches=1), dist.group.WORLD, stages, split
        ),
        "per rank": lambda: pipeline_of(
            replace(case, schedule="zero_bubble_v"), dist.group.WORLD, stages, split
        ),
        "loop for V": lambda: pipeline_of(
            Case("zero_bubble_v", 2), dist.group.WORLD, {}, looped
        ),
        "wrong stage": lambda: pipeline_of(
            case, dist.group.WORLD, {other: stages[split.stages_of(rank)[0]]}, split
        ),
        "wrong module": lambda: pipeline_of(
            case, dist.group.WORLD, {rank: full_decoder(unsplit(case))}, split
        ),
        "rows": lambda: pipeline_of(case, dist.group.WORLD, stages, split).train(
            torch.zeros(6, 4, dtype=torch.int64), torch.zeros(6, 4, dtype=torch.int64),
            token_loss_sum,
        ),
    }  # fmt: skip
    said = {}
    for name, capture_error in attempts.items():
        with pytest.raises(ValueError) as raised:
            capture_error()
        said[name] = str(raised.value)
    return said


def test_invalid_pipelines_are_refused_before_anything_is_sent() -> None:
    said = run_ranks(2, refusals)
    assert said[0] | {"wrong stage": ""} == {
        "micro-batches": "1f1b on 2 ranks needs at least 2 micro-batches, not 1",
        "per rank": "zero_bubble_v has 2 stages a rank, not 1",
        "loop for V": "zero_bubble_v has its stages on ranks [0, 1, 1, 0], not [0, 1, 0, 1]",
        "wrong stage": "",
        "wrong module": "the module of stage 0 is that of another stage",
        "rows": "6 rows cannot be split into 4 equal micro-batches",
    }
    assert [answers["wrong stage"] for answers in said] == [
        "rank 0 of the pipeline has stages (0,), not (1,)",
        "rank 1 of the pipeline has stages (1,), not (0,)",
    ]


def fails_in_a_stage() -> str:
    world.start(force_cpu=True)
    case = Case("1f1b")
    split = split_of(case, 2)
    stages = stages_of(case, split, dist.get_rank())
    pipeline = pipeline_of(case, dist.group.WORLD, stages, split)
    ids, labels, _ = batch(case)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        raise FloatingPointError("of the loss")

    try:
        pipeline.train(ids, labels, loss)
    except Exception as exception:
        return repr(exception)
    return "nothing"


def test_an_error_in_a_stage_comes_out_as_it_is() -> None:
    """The other rank fails when this process ends: its connection breaks."""
    first, last = run_ranks(2, fails_in_a_stage)
    assert last == "FloatingPointError('of the loss')"
    assert first.startswith("RuntimeError(")
    assert "onnection" in first


def test_broadcast_tied_copies_the_first_to_the_second() -> None:
    first, second = nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.zeros(3))
    moment = torch.ones(2)
    broadcast_tied([first, torch.full((2,), 4.0)], [second, moment])
    assert second.tolist() == [0, 1, 2]
    assert moment.tolist() == [4, 4]
