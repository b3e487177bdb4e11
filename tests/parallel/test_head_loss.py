"""Head and loss in chunks on every layout, against all logits at once in one process."""

from __future__ import annotations

import pytest

from tests.parallel.keeping import check, recompute
from tests.parallel.parity import Case
from tests.workshop import Workshop

CHUNKED = {"loss_chunk_tokens": 24}
"""A row has 64 tokens."""
SEQUENCE = {"use_seq_parallel": True}
LORA = {"pet_config": {"pet_type": "lora", "lora_rank": 2, "target_modules": ["q_proj", "lm_head"]}}
CASES = [
    Case(more=CHUNKED),
    Case("qwen3 tied", tp=2, parallel=SEQUENCE, more=CHUNKED),
    Case(dp=2, sharded=True, micro=2, more=CHUNKED),
    Case("qwen3 tied", pp=2, pipeline={"pipeline_scheduler": "zero_bubble_v"}, more=CHUNKED),
]
MANY = [
    Case(dp=2, micro=2, more=CHUNKED),
    Case("qwen3 tied", dp=2, sharded=True, more={**CHUNKED, **recompute(recompute=True)}),
    Case("qwen3 tied", tp=2, parallel={"vocab_emb_dp": False}, more=CHUNKED),
    Case(tp=2, cp=2, parallel=SEQUENCE, more=CHUNKED),
    Case(dp=2, tp=2, pp=2, sharded=True, more=CHUNKED),
    Case("qwen3 moe", dp=2, ep=2, more={**CHUNKED, "micro_batch_interleave_num": 2}, batch=2),
    Case(tp=2, more={**CHUNKED, **LORA}),
    Case(dp=2, sharded=True, more={**CHUNKED, **LORA}),
    *(
        Case(pp=2, pipeline={"pipeline_scheduler": name}, more=CHUNKED)
        for name in ("gpipe", "1f1b", "interleaved_zero_bubble")
    ),
    Case(more={**CHUNKED, "compile": "aot_eager"}),
]


def test_chunks_on_layouts(workshop: Workshop) -> None:
    check(workshop, CASES)


@pytest.mark.long
@pytest.mark.parametrize("case", MANY, ids=str)
def test_chunks_on_more_layouts(workshop: Workshop, case: Case) -> None:
    # The first steps of Adam from zeros multiply a rounding by 1 / epsilon.
    check(workshop, [case], tolerance=1e-4 if "pet_config" in case.more else 1e-5)
