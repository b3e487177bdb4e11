"""Adapters on every layout give the results of one process: losses, gradients, parameters."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.parity import (
    FAMILIES,
    MIXTURES,
    MODULES,
    TOLERANCE,
    Case,
    Outcome,
    assert_equal,
)
from tests.parallel.test_parity import SEQUENCE, outcomes_of, wrong_ones
from tests.workshop import Workshop


def lora(**keys: Any) -> dict[str, Any]:
    # A larger epsilon of Adam: B begins as zeros and becomes the sum of its steps.
    return {"pet_config": {"lora_rank": 4, "lora_alpha": 8, **keys}, "optimizer": {"eps": 1e-2}}


DROPOUT = lora(lora_dropout=0.2)
DORA = lora(pet_type="dora")
EXPERTS = lora(target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"])
FROZEN = {"freeze": ["embed_tokens", r"model\.layers\.[01]\..*", "norm"]}
PLAIN = {"train_dataset": {"packing": False}}
RECOMPUTE = {"recompute_config": {"recompute": True}}
QUICK = [
    Case(dp=2, sharded=True, more=DORA),
    Case(tp=2, parallel=SEQUENCE, more=DROPOUT),
    Case("qwen3 tied", tp=2, pp=2, more=DORA | RECOMPUTE),
    Case(pp=2, more=DROPOUT | RECOMPUTE),
    Case("qwen3 moe", dp=2, ep=2, more=EXPERTS),
    Case("gpt2", dp=2, sharded=True, more=DORA | PLAIN),
    Case(pp=2, more=FROZEN),
    Case(dp=2, sharded=True, more=FROZEN),
]


@pytest.fixture(scope="module")
def quick(materials: Workshop, tmp_path_factory) -> dict[str, tuple[list[Outcome], Outcome]]:
    return outcomes_of(materials.copy_to(tmp_path_factory.mktemp("adapters")), QUICK)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_layout_equals_one_process(quick, case: Case) -> None:
    ranks, reference = quick[str(case)]
    assert_equal(case, ranks, reference)


def test_the_adapter_alone_is_trained(quick) -> None:
    adapted = [reference for name, (_, reference) in quick.items() if "pet_config" in name]
    assert len(adapted) > 5
    for reference in adapted:
        for gradients in reference.gradients:
            assert gradients
            assert all("lora_" in name for name in gradients)
        moved = {name for name, (*_, values) in reference.gradients[-1].items() if values.any()}
        assert any("lora_A" in name for name in moved)
        assert any("lora_B" in name for name in moved)


def test_frozen_parameters_have_no_gradient(quick) -> None:
    frozen = [reference for name, (_, reference) in quick.items() if "freeze" in name]
    for reference in frozen:
        assert {name.split(".")[2] for name in reference.gradients[0] if "layers" in name} == {
            "2", "3"
        }  # fmt: skip


def matrix(family: str) -> list[Case]:
    axes = [{"dp": 2, "sharded": True}, {"tp": 4}, {"pp": 2}, {"cp": 2}, {"tp": 2, "cp": 2},
            {"tp": 8}, {"dp": 2, "tp": 2, "pp": 2}]  # fmt: skip
    if family in MIXTURES:
        axes += [{"dp": 2, "ep": 2, "sharded": True}, {"dp": 2, "tp": 2, "ep": 2}]
    if family in MODULES:
        axes = [{"dp": 2}, {"dp": 2, "sharded": True}]
    kinds = [DROPOUT, DORA, lora(modules_to_save=["norm", "embed_tokens"], use_rslora=True)]
    if family in MODULES:
        kinds = [DORA | PLAIN, lora(use_rslora=True) | PLAIN]
    return [
        Case(family, **degrees, more=kind, parallel=SEQUENCE if degrees.get("tp") == 2 else {})
        for degrees in axes for kind in kinds
    ]  # fmt: skip


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", [*FAMILIES, *MODULES])
def test_every_family(materials: Workshop, tmp_path, family: str) -> None:
    wrong = wrong_ones(materials.copy_to(tmp_path / "work"), matrix(family), TOLERANCE)
    assert not wrong, "\n".join(wrong)
