"""Attention by documents on a GPU: against the mask, and the same bits twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.attention import AttentionMask, attend
from models.documents import document_lengths
from models.packed_attention import attend_documents

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("dtype", "close"), [("bfloat16", 5e-2), ("float32", 1e-4)])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("value_size", [128, 96])
def test_documents_give_what_the_mask_gives_twice(
    dtype: str, close: float, window: int | None, value_size: int
) -> None:
    torch.manual_seed(0)
    total, shapes = 2048, ((8, 128), (2, 128), (2, value_size))
    ids = (torch.rand(2, total) < 0.003).long().cumsum(1)
    full = [torch.randn(2, heads, total, size, device="cuda") for heads, size in shapes]
    sinks, weights = torch.randn(8, device="cuda"), torch.randn(2, 8, total, value_size).cuda()

    def computed(by_documents: bool, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (*full, sinks)]
        if by_documents:
            output = attend_documents(
                *leaves[:3], document_lengths(ids), window=window, sinks=leaves[3]
            )
        else:
            mask = AttentionMask(
                length=total, total=total, device=full[0].device, document_ids=ids.cuda()
            )
            output = attend(*leaves[:3], mask.mask(window), sinks=leaves[3])
        return [output, *torch.autograd.grad(output, leaves, weights.to(kind))]

    expected = computed(False, torch.float32)
    found, again = (computed(True, getattr(torch, dtype)) for _ in range(2))
    for one, other, same in zip(expected, found, again, strict=True):
        assert torch.equal(other, same)
        assert (one - other.float()).abs().max() <= close * one.abs().max()
