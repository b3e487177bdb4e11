"""Every family and every axis on a virtual GPU: the bits of the CPU, and no wait in a step.

Steps run in bfloat16, the default on GPUs. The host may wait in the first step, which allocates,
and for the reasons that `launcher.host_reads` lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from launcher.host_reads import HOST_READS
from tests.dry_run.driver import dry_run_on_rank
from tests.parallel.parity import MIXTURES, Case, run_cases
from tests.parallel.test_parity import FAMILIES_ONCE, QWEN3
from tests.workshop import Workshop

SWAP = {"swap_config": {"swap": True}}
HALF = {"compute_dtype": "float16"}
ALONE: list[Case] = [
    Case(),
    Case(model=HALF),
    Case("qwen2", more={"train_dataset": {"packing": False}}),
    Case("glm 9b", more={"recompute_config": {"recompute": True}}),
    Case("glm 0414", more=SWAP),
    Case("telechat", micro=2),
    Case("llama", more={"optimizer": {"type": "Muon"}}),
    Case("llama", more={"micro_batch_interleave_num": 2, "optimizer": {"type": "SGD"}}),
    Case("qwen3 moe"),
    Case("deepseek"),
    Case("glm"),
    Case("gpt-oss"),
    Case("mixtral"),
    Case("gpt2"),
    Case("gemma"),
]
SEVERAL: list[Case] = [
    Case(dp=2),
    Case(dp=2, sharded=True, micro=2),
    Case("qwen3 tied", tp=2, parallel={"use_seq_parallel": True, "vocab_emb_dp": False}),
    Case(tp=2, model={"attention_dropout": 0.1, "hidden_dropout": 0.1}),
    Case("gpt-oss", cp=2),
    Case("qwen3 moe", dp=2, ep=2, sharded=True),
    Case("deepseek", pp=2),
    Case(pp=2, pipeline={"pipeline_scheduler": "zero_bubble_v"}),
]


def check(workshop: Workshop, cases: Sequence[Case]) -> None:
    """Run `cases` on the CPU and on a virtual GPU, and compare."""
    given = [replace(case, model={"compute_dtype": "bfloat16", **case.model}) for case in cases]
    for case, ranks in zip(given, run_cases(workshop, given, main=dry_run_on_rank), strict=True):
        for rank, found in enumerate(ranks):
            assert not found.error, f"{case}, rank {rank}:\n{found.error}"
            assert list(found.losses[0]) == list(found.losses[1]), case
            assert not found.differing, case
            allowed = _allowed(case)
            assert set(found.reads) <= allowed, f"{case}: the host reads {set(found.reads)}"


def _allowed(case: Case) -> set[str]:
    """For which reasons the host may wait in a step."""
    reasons = set()
    if case.ep > 1 and case.family in MIXTURES:
        reasons.add("expert counts")
    if case.model["compute_dtype"] == "float16":
        reasons.add("loss scale")
    assert reasons <= set(HOST_READS)
    return reasons


def test_families_in_one_process(workshop: Workshop) -> None:
    check(workshop, ALONE)


def test_axes(workshop: Workshop) -> None:
    check(workshop, SEVERAL)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_all_layouts_and_families(workshop: Workshop, ranks: int) -> None:
    check(workshop, [case for case in (*QWEN3, *FAMILIES_ONCE) if case.ranks == ranks])
