"""Every optimizer gives the same results on a layout as in one process.

Muon orthogonalizes in float32 here. In bfloat16 a gradient that differs in its last bit may round
differently, and the iteration amplifies small singular values about 500 times.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parallel.parity import Case, Outcome, assert_equal, run_on_rank
from tests.parallel.test_parity import outcomes_of
from tests.workshop import Workshop

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"eps": 1e-4, "weight_decay": 0.1},
    "Adam": {"eps": 1e-4, "weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "eps": None},
    "Muon": {"weight_decay": 0.1, "adamw_eps": 1e-4, "eps": None},
}
"""`optimizer` of each type; None removes a key of the base configuration."""

LAYOUTS = {
    "dp2": Case(dp=2),
    "dp2 sharded": Case(dp=2, sharded=True),
    "tp2": Case(tp=2),
    "pp2": Case(pp=2),
    "cp2": Case(cp=2),
    "ep2": Case("qwen3 moe", dp=2, ep=2, sharded=True),
    "tp2 dp2 sharded": Case(dp=2, tp=2, sharded=True, parallel={"use_seq_parallel": True}),
    "tp2 dp4 ep2 shard 2": Case("qwen3 moe", dp=4, tp=2, ep=2, sharded=True, shard_size=2),
}
SAMPLE = [("Muon", name) for name in ("dp2 sharded", "ep2", "tp2 dp2 sharded")] + [
    ("Adam", "dp2 sharded"), ("SGD", "tp2 dp2 sharded"), ("SGD", "pp2"), ("Muon", "pp2"),
]  # fmt: skip
ALL = [(optimizer, layout) for optimizer in OPTIMIZERS for layout in LAYOUTS]


def case(optimizer: str, layout: str) -> Case:
    return replace(
        LAYOUTS[layout], more={"optimizer": {"type": optimizer, **OPTIMIZERS[optimizer]}}
    )


def in_float32(folder: str, cases: list[Case]) -> list[Outcome]:
    """`run_on_rank`, with matrices orthogonalized in float32."""
    from launcher.train import muon

    muon.DTYPE = torch.float32
    return run_on_rank(folder, cases)


Outcomes = dict[str, tuple[list[Outcome], Outcome]]


@pytest.fixture(scope="module")
def sample(materials: Workshop, tmp_path_factory) -> Outcomes:
    workshop = materials.copy_to(tmp_path_factory.mktemp("optimizers"))
    return outcomes_of(workshop, [case(*pair) for pair in SAMPLE], 240, in_float32)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("optimizer", "layout"), SAMPLE)
def test_an_optimizer_on_a_layout_equals_one_process(sample, optimizer, layout) -> None:
    assert_parity(sample, optimizer, layout)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_layout_equals_one_process(materials: Workshop, tmp_path, optimizer) -> None:
    workshop = materials.copy_to(tmp_path / "work")
    cases = [case(optimizer, layout) for layout in LAYOUTS]
    found = outcomes_of(workshop, cases, 800, in_float32)
    for layout in LAYOUTS:
        assert_parity(found, optimizer, layout)


def assert_parity(found: Outcomes, optimizer: str, layout: str) -> None:
    one = case(optimizer, layout)
    ranks, reference = found[str(one)]
    assert_equal(one, ranks, reference)
    assert reference.eval_loss < reference.losses[0], "it learns"
