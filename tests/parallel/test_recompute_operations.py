"""Recompute by operation: the same gradients, within the budget, by a repeatable choice."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from launcher.parallel.kept_results import keeping, unselected
from launcher.parallel.recompute_operations import (
    Measured,
    Operation,
    apply_recompute_operations,
    choose,
    measure,
    set_compiled_budget,
)
from launcher.parallel.remembered import remembered, remembering
from models.documents import document_lengths
from models.packed_attention import attend_documents
from tests.parallel.keeping import (
    SEQUENCE,
    SPECS,
    assert_same,
    check,
    decoder,
    numbered,
    plain,
    recompute,
    step,
)
from tests.parallel.parity import Case, run_cases
from tests.workshop import Workshop

BUDGETS = (None, 0.0, 0.3, 0.7, 1.0)


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_bitwise_the_same(name: str) -> None:
    expected, total = plain(name)
    for budget in BUDGETS:
        model, lines = decoder(name), list[str]()
        apply_recompute_operations(numbered(model), budget, log=lines.append)
        gradients, kept = step(model)
        assert_same(gradients, expected)
        assert sum(kept.values()) < total / 4  # of torch's own; what is kept by operation is apart
        assert 1 <= len(lines) <= 2, "one line for all layers of a structure"


def measured_layer() -> Measured:
    """A layer of `decoder("dense")`, measured as a run does."""
    model, found = decoder("dense"), list[Measured]()
    layer = numbered(model)[1]
    forward = layer.forward

    def measuring(*arguments: Any) -> Any:
        found.append(measure(layer, lambda: forward(*arguments), arguments))
        return forward(*arguments)

    layer.forward = measuring
    step(model)
    return found[0]


def test_a_choice_is_within_its_budget_and_the_same_each_time() -> None:
    first, again = measured_layer(), measured_layer()
    assert first == again
    costs = []
    for budget in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        choice = choose(first, budget)
        assert choice == choose(again, budget)
        chosen = [o for o in first.operations if o.key in choice.kept]
        assert sum(o.nbytes for o in chosen) <= budget * first.saved_bytes
        costs.append(sum(o.cost for o in chosen))
    assert costs[0] == 0
    assert all(less < more for less, more in pairwise(costs))
    products = choose(first, None).kept
    assert products == {o.key for o in first.operations if o.is_product}
    assert len(products) == 7 + 2, "projections, and attention with dropout in two products"


def test_dear_operations_are_kept_first() -> None:
    def operation(number: int, nbytes: int, flops: int) -> Operation:
        return Operation((torch.ops.aten.mm.default, number), nbytes, flops, 3 * nbytes, flops > 0)

    operations = (
        operation(0, 100, 0),
        operation(1, 60, 10**6),
        operation(2, 50, 10**7),
        operation(3, 1000, 10**9),  # the dearest for its bytes, and too large
    )
    measured = Measured(operations, sum(o.cost for o in operations), 200)
    kept = {number for _, number in choose(measured, 0.6).kept}
    assert kept == {1, 2}
    assert {number for _, number in choose(measured, 1.0).kept} == {1, 2}
    assert {number for _, number in choose(measured, None).kept} == {1, 2, 3}


class Writes(nn.Module):
    """A product that is written into, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))

    def forward(self, states: Tensor) -> Tensor:
        written = states @ self.weight
        written.mul_(2)  # as an all-reduce in place
        return (written.tanh() @ self.weight).sin()


def test_what_is_written_into_is_not_kept() -> None:
    gradients = []
    for budget in (1.0, None, 0.0):
        module = Writes()
        lines: list[str] = []
        apply_recompute_operations({0: module}, budget, uses_rng=True, log=lines.append)
        module(torch.ones(3, 8)).sum().backward()
        gradients.append(module.weight.grad)
    plain_module = Writes()
    plain_module(torch.ones(3, 8)).sum().backward()
    for gradient in gradients:
        assert gradient is not None
        assert torch.equal(gradient, plain_module.weight.grad)  # type: ignore[arg-type]
    found = measure(module, lambda: module(torch.ones(3, 8))).operations
    assert [o.key[1] for o in found if o.is_product] == [1]


def attended(states: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Attention of one head, whose values are as wide as `size`."""
    heads = states[:, None]
    return attend_documents(heads, heads, heads[..., :size], lengths)[:, 0]


@pytest.mark.parametrize("size", [8, 4])
def test_attention_by_documents_is_kept_and_counted(size: int) -> None:
    states = torch.linspace(-1, 1, 2 * 90 * 8).view(2, 90, 8).requires_grad_()
    lengths = document_lengths(torch.tensor([[0] * 30 + [1] * 60] * 2))
    run = partial(attended, states, lengths, size)
    kept = choose(measure(nn.Identity(), run), None).kept
    assert [operator._opname for operator, _ in kept] == ["attend_documents"]
    with FlopCounterMode(display=False) as flops:
        found = run()
    pairs = 2 * 90 * 90
    assert flops.get_total_flops() == pairs * 2 * (8 + 8)  # values are padded to the size of keys
    with flops:
        (expected,) = torch.autograd.grad(found.sum(), states)
    assert flops.get_total_flops() == pairs * 2 * 5 * 8
    again = checkpoint(run, use_reentrant=False, context_fn=partial(keeping, kept))
    assert torch.equal(torch.autograd.grad(again.sum(), states)[0], expected)


def kept_products(function: Any) -> int:
    """How many products of `function` recompute by operation would keep."""
    return len(choose(measure(nn.Identity(), function), None).kept)


def test_what_is_repeated_as_one_is_not_kept_by_itself() -> None:
    states = torch.ones(4, 4)

    def blocks() -> Tensor:
        with unselected():
            scores = states @ states  # of a block, which is not to be kept
        return scores.exp() @ states

    assert kept_products(blocks) == 1


def test_what_is_remembered_does_not_shift_what_is_kept() -> None:
    """It has products in the first run alone."""
    weight = torch.linspace(-1, 1, 16).view(4, 4).requires_grad_()
    reads: list[Tensor] = []

    def read() -> Tensor:
        reads.append(weight.detach() @ torch.ones(4, 4))
        return reads[-1]

    def function() -> Tensor:
        return ((weight @ remembered(read)).sin() @ weight).cos()

    (expected,) = torch.autograd.grad(function().sum(), weight)
    kept = choose(measure(nn.Identity(), function), None).kept
    assert len(kept) == 2
    reads.clear()
    found = checkpoint(
        remembering(function), use_reentrant=False, context_fn=partial(keeping, kept)
    )
    for _ in range(2):  # as the schedules that split the backward pass do
        (gradient,) = torch.autograd.grad(found.sum(), weight, retain_graph=True)
        assert torch.equal(gradient, expected)
    assert len(reads) == 1


def test_a_kept_result_that_is_written_into_is_an_error() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    made: list[Tensor] = []

    def function() -> Tensor:
        made.append(weight @ weight)
        return made[-1].sin()

    kept = {(torch.ops.aten.mm.default, 0)}
    found = checkpoint(function, use_reentrant=False, context_fn=partial(keeping, kept))
    made[0].detach().zero_()
    with pytest.raises(RuntimeError, match="written into"):
        found.sum().backward()


def test_the_compiler_follows_the_same_scale() -> None:
    """0 keeps the inputs of a graph, 1 is the compiler's own choice; more budget saves more."""
    kept_bytes = []
    expected, _ = plain("dense")
    try:
        for budget in (0.0, 0.5, 1.0):
            torch._dynamo.reset()
            set_compiled_budget(budget)
            model = decoder("dense")
            for layer in numbered(model).values():
                layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=False)
            gradients, kept = step(model)
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
            kept_bytes.append(sum(kept.values()))
    finally:
        set_compiled_budget(1.0)
        torch._dynamo.reset()
    assert kept_bytes[0] < kept_bytes[1] < kept_bytes[2]


def with_hooks(**section: Any) -> Case:
    """Weights in float32 that FSDP casts, those of experts and routers within a layer."""
    return Case("qwen3 moe", model={"compute_dtype": "bfloat16"},
                more={"compile": False, **recompute(**section)})  # fmt: skip


def test_what_hooks_of_fsdp_do_is_not_counted(workshop: Workshop) -> None:
    cases = [with_hooks(), with_hooks(memory_budget=0.4), with_hooks(recompute_operations=True)]
    ((expected,), *others) = run_cases(workshop, cases)
    for (found,) in others:
        assert found.losses == expected.losses
        for mine, theirs in zip(found.gradients, expected.gradients, strict=True):
            assert mine.keys() == theirs.keys()
            assert all((mine[name][2] == values).all() for name, (*_, values) in theirs.items())


LAYOUTS = [
    Case(tp=2, parallel=SEQUENCE, more=recompute(memory_budget=0.5)),
    Case("qwen3 moe", dp=2, ep=2, more=recompute(recompute_operations=True)),
    Case(cp=2, more=recompute(memory_budget=0.4)),
    Case(pp=2, more=recompute(memory_budget=0.4, recompute=[1])),
    Case(dp=2, sharded=True, more=recompute(recompute_operations=True)),
    Case(
        pp=2,
        pipeline={"pipeline_scheduler": "zero_bubble_v"},
        more=recompute(recompute_operations=True),
    ),
]


@pytest.mark.long
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(workshop: Workshop, case: Case) -> None:
    check(workshop, [case])
