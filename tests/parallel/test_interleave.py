"""Interleaved chunks of a micro-batch: the same gradients as without."""

from __future__ import annotations

import pytest
import torch

from launcher.parallel.interleave import interleave, split_context
from models.attention import AttentionMask, StepContext
from tests.models.tiny import tokens
from tests.parallel.keeping import (
    CPU,
    INTERLEAVED,
    SEQUENCE,
    SPECS,
    SWAP,
    check,
    decoder,
    plain,
    recompute,
    run_again,
    step,
)
from tests.parallel.parity import Case
from tests.workshop import Workshop


@pytest.mark.parametrize("model_name", SPECS)
@pytest.mark.parametrize("recompute", [False, True])
def test_interleaved_chunks_give_the_same_gradients(model_name: str, recompute: bool) -> None:
    model = decoder(model_name)
    run_again(model, recompute=recompute)
    interleave(model, 2)
    gradients, _ = step(model)
    for name, expected in plain(model_name)[0].items():
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-6)


def test_rows_that_do_not_divide_run_as_one() -> None:
    model = decoder("dense")
    interleave(model, 2)
    assert torch.equal(model.eval()(tokens(3, 9)), decoder("dense").eval()(tokens(3, 9)))


def test_each_chunk_has_its_rows_of_the_context() -> None:
    rows, total = 4, 6
    documents = torch.arange(rows * total).view(rows, total)
    mask = AttentionMask(length=total, total=total, device=CPU, document_ids=documents)
    context = StepContext(
        cos=torch.arange(rows).view(rows, 1, 1, 1), sin=torch.zeros(1, 1, total, 2), mask=mask,
        dropout_seeds=torch.arange(rows),
    )  # fmt: skip
    first, second = split_context(context, rows, 2)
    assert first.cos.flatten().tolist() == [0, 1]
    assert second.cos.flatten().tolist() == [2, 3]
    assert second.sin is context.sin
    assert second.dropout_seeds is not None
    assert second.dropout_seeds.tolist() == [2, 3]
    assert torch.equal(second.mask.document_ids, documents[2:])  # type: ignore[arg-type]
    assert torch.equal(mask.mask(None)[2:], second.mask.mask(None))  # type: ignore[index, arg-type]


LAYOUTS = [
    Case(dp=2, sharded=True, batch=2, more={**INTERLEAVED, **recompute(select_recompute=True)}),
    Case(
        "qwen3 moe", dp=2, ep=2, batch=2, more={**INTERLEAVED, **SWAP, **recompute(recompute=True)}
    ),
    Case(
        tp=2, parallel=SEQUENCE, batch=4, more={**INTERLEAVED, **recompute(recompute=[2]), **SWAP}
    ),
]
MORE_LAYOUTS = [
    Case(dp=2, sharded=True, batch=2, more=INTERLEAVED),
    Case(dp=2, batch=2, more=INTERLEAVED),
    Case(tp=2, batch=4, more=INTERLEAVED),
    Case(cp=2, batch=4, more={**INTERLEAVED, **recompute(recompute=True)}),
    Case(cp=2, batch=4, parallel={"context_parallel_algo": "ulysses_cp"}, more=INTERLEAVED),
    Case(pp=2, batch=1, more={**INTERLEAVED, **SWAP}),
    Case(
        "deepseek", dp=2, batch=2, more={**INTERLEAVED, **SWAP, **recompute(select_recompute=True)}
    ),
    Case("qwen3 moe", dp=2, ep=2, tp=2, batch=2, parallel=SEQUENCE, more=INTERLEAVED),
]


def test_layouts(workshop: Workshop) -> None:
    check(workshop, LAYOUTS)


@pytest.mark.long
def test_more_layouts(workshop: Workshop) -> None:
    check(workshop, MORE_LAYOUTS)
