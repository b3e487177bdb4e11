"""FSDP: when weights are gathered or cast, and that it changes no bit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tests.parallel.parity import STEPS, Case, Outcome, run_case, run_cases
from tests.workshop import Workshop

BF16 = {"compute_dtype": "bfloat16"}
KEPT = Case(micro=2, model=BF16)
FREED = Case(micro=2, model=BF16, parallel={"reshard_after_forward": True})
SHARDED = Case(dp=2, micro=2, sharded=True, model=BF16)
SHARDED_KEPT = Case(
    dp=2, micro=2, sharded=True, model=BF16, parallel={"reshard_after_forward": False}
)


Found = tuple[Outcome, Counter[str]]


def counted(folder: str, cases: Sequence[Case]) -> list[Found]:
    """The outcome of each case, and how often the weights of each module were gathered."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    from launcher.parallel import world as worlds

    gathered: Counter[str] = Counter()
    to_unsharded = FSDPParamGroup._to_unsharded

    def count(group: Any) -> None:
        gathered[str(group._module_fqn)] += 1
        to_unsharded(group)

    FSDPParamGroup._to_unsharded = count  # in a process of this test
    os.chdir(folder)
    world = worlds.start(force_cpu=True)
    found = []
    for number, case in enumerate(cases):
        gathered.clear()
        outcome = run_case(case, world, f"fsdp_{world.size}_{number}")
        found.append((outcome, Counter(gathered)))
    worlds.stop()
    return found


@pytest.fixture(scope="module")
def found(materials: Workshop, tmp_path_factory) -> dict[str, list[Found]]:
    """Each case with what its ranks found."""
    cases = [KEPT, FREED, SHARDED, SHARDED_KEPT]
    workshop = materials.copy_to(tmp_path_factory.mktemp("fsdp"))
    ranks = run_cases(workshop, cases, main=counted)
    return {str(case): each for case, each in zip(cases, ranks, strict=True)}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("case", "layer", "root"),
    [
        pytest.param(KEPT, STEPS + 1, STEPS + 1, id="one rank: a cast a step"),
        pytest.param(FREED, 2 * 2 * STEPS + 2, 2 * STEPS + 1, id="one rank, freed"),
        pytest.param(SHARDED, 2 * 2 * STEPS + 2, 2 * STEPS + 1, id="shards: freed by default"),
        pytest.param(SHARDED_KEPT, STEPS + 1, STEPS + 1, id="shards, kept"),
    ],
)
def test_how_often_weights_are_gathered(found, case: Case, layer: int, root: int) -> None:
    """In steps of two micro-batches, and an evaluation of two batches."""
    for _, gathered in found[str(case)]:
        layers = [count for name, count in gathered.items() if name.startswith("model.layers")]
        assert set(layers) == {layer}
        assert gathered[""] == root


@pytest.mark.parametrize(
    ("one", "other"), [(KEPT, FREED), (SHARDED_KEPT, SHARDED)], ids=["one rank", "two ranks"]
)
def test_it_changes_no_bit(found, one: Case, other: Case) -> None:
    for (mine, _), (theirs, _) in zip(found[str(one)], found[str(other)], strict=True):
        assert mine.losses == theirs.losses
        assert mine.eval_loss == theirs.eval_loss
        assert mine.parameters.keys() == theirs.parameters.keys()
        for name, (*_, values) in mine.parameters.items():
            assert np.array_equal(values, theirs.parameters[name][2]), name
