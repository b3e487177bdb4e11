"""Rows split over several ranks: their tokens, documents, and the groups of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel import world
from launcher.parallel.context import ContextParallel
from models.attention import AttentionMask, StepContext

ROWS, TOTAL = 2, 32
CLOSE = 1e-5


def start(way: str) -> ContextParallel:
    """Join the group: one ring or Ulysses group of all ranks, or `both`: Ulysses groups of two."""
    here = world.start(force_cpu=True)
    everyone = dist.new_group(list(range(here.size)))
    if way != "both":
        return ContextParallel(**{way: everyone})
    pairs = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    ulysses, ring_ = (dist.new_subgroups_by_enumeration(ranks)[0] for ranks in pairs)
    return ContextParallel(ulysses=ulysses, ring=ring_)


def documents_of_rows() -> Tensor:
    """Rows of several documents, whose borders are not those of chunks."""
    ends = torch.tensor([[3, 14, 15, TOTAL], [9, 10, 25, TOTAL]])
    return (torch.arange(TOTAL) >= ends[..., None]).sum(1)


def error(expected: Tensor, found: Tensor) -> float:
    """max|difference| / max|expected|."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


def operands(
    *, heads: int, shared: int, sizes: tuple[int, int, int], total: int = TOTAL
) -> list[Tensor]:
    torch.manual_seed(3)
    return [
        torch.randn(ROWS, count, total, size)
        for count, size in zip((heads, shared, shared), sizes, strict=True)
    ]


def context_of(own: Tensor | None, documents: Tensor | None) -> StepContext:
    length = TOTAL if own is None else len(own)
    mask = AttentionMask(length=length, total=TOTAL, device=torch.device("cpu"), token_indices=own,
                  document_ids=documents)  # fmt: skip
    return StepContext(cos=torch.empty(0), sin=torch.empty(0), mask=mask)


def weights_like(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel()).view(like.shape).cos()
