"""Every layout gives the results of one process: three steps of loss, gradients, parameters.

`make test` runs all axes on Qwen3 and every family and axis once; the full matrix is marked long.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.parallel.parity import (
    FAMILIES,
    MIXTURES,
    TOLERANCE,
    Case,
    Outcome,
    assert_equal,
    run_cases,
)
from tests.ranks import PATIENCE
from tests.workshop import Workshop

SEQUENCE = {"use_seq_parallel": True}
SHARDED_VOCABULARY = {"vocab_emb_dp": False}
BALANCE = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
SCHEDULES: dict[str, dict[str, object]] = {
    "gpipe": {"pipeline_scheduler": "gpipe"},
    "1f1b": {"pipeline_scheduler": "1f1b"},
    "interleaved 1f1b": {"pipeline_scheduler": "1f1b", "pipeline_interleave": True},
    "interleaved zero bubble": {"pipeline_scheduler": "interleaved_zero_bubble"},
    "zero bubble": {"pipeline_scheduler": "zero_bubble_v"},
}

QWEN3 = [
    Case(dp=2),
    Case(dp=2, sharded=True, micro=2),
    Case(dp=4, sharded=True, shard_size=2),
    Case(tp=2, more={"train_dataset": {"packing": False}}),
    Case(tp=2, parallel=SEQUENCE, model={"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    Case("qwen3 tied", tp=2, parallel={**SEQUENCE, **SHARDED_VOCABULARY}),
    Case("qwen3 tied", tp=4, parallel=SEQUENCE),
    Case(dp=2, tp=2, sharded=True, parallel=SHARDED_VOCABULARY),
    Case(dp=2, pp=2, sharded=True),
    Case(tp=2, pp=2, parallel=SEQUENCE),
    Case(dp=2, tp=2, pp=2, sharded=True),
    Case(cp=2),
    Case("qwen3 tied", cp=2, tp=2, parallel={**SEQUENCE, "context_parallel_algo": "ulysses_cp"}),
    Case(pp=2, model={"num_hidden_layers": 5, "hidden_dropout": 0.1}),
    *(Case("qwen3 tied", pp=2, pipeline=schedule) for schedule in SCHEDULES.values()),
]
FAMILIES_ONCE = [
    Case("llama", dp=2, tp=2, model={"attention_bias": True, "mlp_bias": True}),
    Case("qwen2", tp=8),
    Case("telechat", tp=8, parallel=SEQUENCE),
    Case("telechat moe", dp=2, tp=2, ep=2, sharded=True, parallel=SEQUENCE),
    Case("telechat tied", dp=2, tp=2, pp=2, sharded=True),
    Case("telechat", tp=2, cp=2, more={"recompute_config": {"recompute": True}}),
    Case("glm 9b", tp=8, parallel=SEQUENCE),
    Case("glm 0414", dp=2, tp=2, pp=2, parallel=SEQUENCE, model={"hidden_dropout": 0.1}),
    Case("glm 0414", tp=2, cp=2, more={"recompute_config": {"recompute": True}}),
    Case("qwen3 moe", dp=2, ep=2, micro=2, model=BALANCE),
    Case("qwen3 moe", tp=2, cp=2, parallel=SEQUENCE, model=BALANCE),
    Case("qwen3 moe", dp=4, tp=2, ep=2, sharded=True, parallel=SEQUENCE),
    Case("mixtral", dp=2, ep=2, sharded=True),
    Case("deepseek", dp=2, tp=2, pp=2, ep=2, sharded=True),
    Case("deepseek", cp=2),
    Case("deepseek", dp=2, pp=2, sharded=True, model={"first_k_dense_replace": 2}),
    Case("deepseek", tp=2),
    Case("glm", dp=2, tp=2, ep=2, sharded=True, parallel=SEQUENCE),
    Case("glm", tp=8, model={"use_qk_norm": False, "attention_bias": True}),
    Case("glm", pp=2, cp=2, pipeline=SCHEDULES["interleaved 1f1b"]),
    Case("gpt-oss", dp=2, tp=2, ep=2, sharded=True, parallel=SEQUENCE, model=BALANCE),
    Case("gpt-oss", tp=8),
    Case("gpt-oss", tp=2, cp=2),
    Case(
        "gpt-oss",
        pp=2,
        cp=2,
        pipeline=SCHEDULES["interleaved 1f1b"],
        parallel={"context_parallel_algo": "ulysses_cp"},
    ),
    Case(
        "gpt-oss",
        dp=2,
        more={"recompute_config": {"select_recompute": True}},
        model={"attention_dropout": 0.1},
    ),
]


def full_matrix() -> Iterable[Case]:
    """Families x axes, each with a replicated and a sharded optimizer if there are data ranks."""
    axes = [
        {"dp": 2}, {"dp": 4}, {"tp": 2}, {"tp": 4}, {"pp": 2}, {"pp": 4}, {"cp": 2}, {"cp": 4},
        {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "tp": 2, "pp": 2},
        {"dp": 2, "cp": 2}, {"tp": 2, "cp": 2}, {"pp": 2, "cp": 2}, {"dp": 2, "tp": 2, "cp": 2},
        {"tp": 2, "pp": 2, "cp": 2}, {"dp": 4, "pp": 2}, {"tp": 4, "dp": 2},
    ]  # fmt: skip
    with_experts = [
        {"dp": 2, "ep": 2}, {"dp": 4, "ep": 2}, {"dp": 4, "ep": 4}, {"dp": 2, "tp": 2, "ep": 2},
        {"dp": 4, "tp": 2, "ep": 4}, {"dp": 2, "pp": 2, "ep": 2}, {"dp": 2, "cp": 2, "ep": 2},
        {"dp": 2, "tp": 2, "pp": 2, "ep": 2},
    ]  # fmt: skip
    for family in FAMILIES:
        for degrees in axes + (with_experts if family in MIXTURES else []):
            plain = Case(family, **degrees)
            yield plain
            if plain.dp > 1:
                yield replace(plain, sharded=True)
            if plain.dp > 2:
                yield replace(plain, sharded=True, shard_size=2)
            if plain.tp > 1:
                yield replace(plain, parallel={**SEQUENCE, **SHARDED_VOCABULARY})
            if plain.cp > 1:
                yield replace(plain, parallel={"context_parallel_algo": "ulysses_cp"})
    for family in FAMILIES:
        for schedule in SCHEDULES.values():
            yield Case(family, pp=2, dp=2, sharded=True, pipeline=schedule)
    hybrid = {"context_parallel_algo": "hybrid_cp", "ulysses_degree_in_cp": 2}
    yield Case(cp=4, parallel=hybrid)


def outcomes_of(
    workshop: Workshop, cases: list[Case], timeout: float = PATIENCE, main: Any = None
) -> dict[str, tuple[list[Outcome], Outcome]]:
    """Every case with its reference, by name; cases that are equal in one process share it."""
    alone = {_key(case): case.alone() for case in cases}
    found = run_cases(workshop, [*alone.values(), *cases], timeout, main)
    references = dict(zip(alone, (ranks[0] for ranks in found), strict=False))
    return {
        str(case): (ranks, references[_key(case)])
        for case, ranks in zip(cases, found[len(alone) :], strict=True)
    }


def _key(case: Case) -> str:
    return json.dumps(case.alone().yaml(), sort_keys=True)


QUICK = [*QWEN3, *FAMILIES_ONCE]


@pytest.fixture(scope="module")
def quick(materials: Workshop, tmp_path_factory) -> dict[str, tuple[list[Outcome], Outcome]]:
    return outcomes_of(materials.copy_to(tmp_path_factory.mktemp("parity")), QUICK)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_layout_equals_one_process(quick, case: Case) -> None:
    ranks, reference = quick[str(case)]
    assert_equal(case, ranks, reference)


def test_the_runs_learn_something(quick) -> None:
    for ranks, reference in quick.values():
        assert reference.losses[-1] < reference.losses[0] - 0.01
        assert ranks[0].eval_loss < reference.losses[0]


REPLICATED = list(full_matrix())


def wrong_ones(workshop: Workshop, cases: list[Case], tolerance: float) -> list[str]:
    """The message of each case that differs from one process."""
    found = outcomes_of(workshop, cases, timeout=1500)
    wrong = []
    for case in cases:
        try:
            assert_equal(case, *found[str(case)], tolerance)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_matrix(materials: Workshop, tmp_path, family: str) -> None:
    cases = [case for case in REPLICATED if case.family == family]
    wrong = wrong_ones(materials.copy_to(tmp_path / "work"), cases, TOLERANCE)
    assert not wrong, "\n".join(wrong)


def compiled_matrix(family: str) -> list[Case]:
    """Every axis and combination of axes, with compiled layers."""
    degrees = [{"dp": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"dp": 2, "tp": 2}, {"dp": 2, "pp": 2},
               {"tp": 2, "pp": 2}, {"dp": 2, "tp": 2, "pp": 2}]  # fmt: skip
    if family in MIXTURES:
        degrees += [{"dp": 2, "ep": 2}, {"dp": 2, "tp": 2, "ep": 2}]
    return [
        Case(family, **sizes, sharded="dp" in sizes, more={"compile": "aot_eager"})
        for sizes in degrees
    ]


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrix_compiled(materials: Workshop, tmp_path, family: str) -> None:
    wrong = wrong_ones(materials.copy_to(tmp_path / "work"), compiled_matrix(family), 1e-4)
    assert not wrong, "\n".join(wrong)
