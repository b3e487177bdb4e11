"""Ring attention alone: its blocks, padding, dtypes, memory, bitwise reproducibility."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from launcher.parallel import ring, world
from launcher.parallel.context import token_indices
from launcher.parallel.ring import Ring, ring_attention
from models.attention import AttentionMask, attend
from tests.parallel.rows import (
    CLOSE,
    ROWS,
    TOTAL,
    context_of,
    documents_of_rows,
    error,
    operands,
    start,
    weights_like,
)
from tests.ranks import run_ranks


def test_causal_work_in_a_ring_is_equal_at_every_step() -> None:
    size, total = 4, 64
    for step in range(size):
        work = {
            sum(
                len(range(*block.queries.indices(total))) * len(range(*block.keys.indices(total)))
                for block in _At(size, rank, total).blocks((rank - step) % size, lines=1)
            )
            for rank in range(size)
        }
        assert len(work) == 1


class _At(Ring):
    """A ring for one of its ranks, without a process group."""

    def __init__(
        self, size: int, rank: int, total: int, window: int | None = None,
        document_ids: Tensor | None = None,
    ) -> None:  # fmt: skip
        mask = AttentionMask(length=total // size, total=total, device=torch.device("cpu"),
                             token_indices=token_indices(total, size, rank, balanced=True),
                             document_ids=document_ids)  # fmt: skip
        for name, value in {"mask": mask, "window": window, "at": (rank, size)}.items():
            object.__setattr__(self, name, value)

    @property
    def rank(self) -> int:
        return self.at[0]

    @property
    def size(self) -> int:
        return self.at[1]


@pytest.mark.parametrize("window", [None, 5, 16, 64])
@pytest.mark.parametrize("scores", [1 << 25, 64])
def test_blocks_cover_the_mask_once(
    window: int | None, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ring.SCORES, "cpu", scores)
    size, total = 4, 48
    seen = torch.zeros(total, total, dtype=torch.int64)
    for rank in range(size):
        at = _At(size, rank, total, window)
        for source in range(size):
            keys = token_indices(total, size, source, balanced=True)
            for block in at.blocks(source, lines=2):
                lines, columns = at.mask.token_indices[block.queries], keys[block.keys]
                assert 2 * len(lines) * len(columns) <= scores
                mask = torch.ones(()) if block.mask is None else block.mask[0, 0]
                seen[lines[:, None], columns] += mask.long()
    order = torch.arange(total)
    expected = order[:, None] >= order
    if window is not None:
        expected &= order > order[:, None] - window
    assert torch.equal(seen, expected.long())


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_leave_out_other_documents(window: int | None) -> None:
    """Blocks without a common document are no blocks; those within one need no mask."""
    size, total = 2, 96
    order = torch.arange(total)
    ids = torch.stack([order // 40, order // 50])
    seen = torch.zeros(ROWS, total, total, dtype=torch.int64)
    blocks, masked = 0, 0
    for rank in range(size):
        at = _At(size, rank, total, window, ids)
        for source in range(size):
            keys = token_indices(total, size, source, balanced=True)
            for block in at.blocks(source, lines=2):
                lines, columns = at.mask.token_indices[block.queries], keys[block.keys]
                mask = torch.ones(1, 1, 1) if block.mask is None else block.mask[:, 0]
                seen[:, lines[:, None], columns] += mask.long()
                blocks, masked = blocks + 1, masked + int(block.mask is not None)
    expected = (order[:, None] >= order) & (ids[:, :, None] == ids[:, None, :])
    if window is not None:
        expected = expected & (order > order[:, None] - window)
    assert torch.equal(seen, expected.long())
    assert blocks < sum(1 for _ in range(4) for _ in range(3))


def test_padding_is_masked_and_gives_no_nan() -> None:
    for worst in run_ranks(2, _compare_padded):
        assert worst <= CLOSE


def _compare_padded() -> float:
    cp = start("ring")
    try:
        key_mask = torch.arange(TOTAL) >= torch.tensor([[5], [0]])
        query, key, value = operands(heads=4, shared=2, sizes=(8, 8, 8))
        device, own = torch.device("cpu"), cp.token_indices(TOTAL)
        full = AttentionMask(length=TOTAL, total=TOTAL, device=device, key_mask=key_mask)
        part = AttentionMask(
            length=len(own), total=TOTAL, device=device, token_indices=own, key_mask=key_mask
        )
        expected = attend(query, key, value, full.mask(None))[:, :, own]
        assert cp.ring is not None
        parts = (t[:, :, own] for t in (query, key, value))
        return error(expected, ring_attention(*parts, Ring(cp.ring, part, None)))
    finally:
        world.stop()


@pytest.mark.parametrize(("dtype", "close"), [("float64", 1e-13), ("bfloat16", 2e-2)])
def test_accuracy_of_other_dtypes(dtype: str, close: float) -> None:
    for errors in run_ranks(2, _compare_in, dtype):
        assert max(errors) <= close, errors


def _compare_in(dtype: str) -> list[float]:
    cp = start("ring")
    try:
        full = [t.to(getattr(torch, dtype)).double().requires_grad_()
                 for t in operands(heads=4, shared=2, sizes=(8, 8, 8))]  # fmt: skip
        expected = attend(*full, None)
        expected.backward(weights_like(expected))
        own = cp.token_indices(TOTAL)
        parts = [t.detach()[:, :, own].to(getattr(torch, dtype)).requires_grad_() for t in full]
        assert cp.ring is not None
        found = ring_attention(*parts, Ring(cp.ring, context_of(own, None).mask, None))
        found.backward(weights_like(expected)[:, :, own].to(found.dtype))
        pairs = [(expected[:, :, own], found)]
        pairs += [(a.grad[:, :, own], b.grad) for a, b in zip(full, parts, strict=True)]
        assert all(b.dtype == getattr(torch, dtype) for _, b in pairs)
        return [error(a, b.double()) for a, b in pairs]
    finally:
        world.stop()


# Memory and repeatability of a ring.


class _Largest(TorchDispatchMode):
    """The largest number of elements of a tensor created inside."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_a_ring_never_holds_all_scores_and_is_bitwise_reproducible() -> None:
    for largest, repeated in run_ranks(4, _long_row):
        assert repeated
        # Rows, heads, and a chunk of queries by a chunk of keys; all scores are 64 times as many.
        assert largest == ROWS * 2 * 64 * 64


def _long_row() -> tuple[int, bool]:
    cp = start("ring")
    try:
        total = 512
        own = cp.token_indices(total)
        mask = AttentionMask(
            length=len(own),
            total=total,
            device=torch.device("cpu"),
            token_indices=own,
            document_ids=(torch.arange(total) // 100).expand(ROWS, -1),
        )
        assert cp.ring is not None
        results = []
        with _Largest() as largest:
            for _ in range(2):
                held = operands(heads=2, shared=1, sizes=(8, 8, 8), total=len(own))
                parts = [t.requires_grad_() for t in held]
                output = ring_attention(*parts, Ring(cp.ring, mask, None))
                output.backward(weights_like(output))
                results.append([output, *(part.grad for part in parts)])
        same = (torch.equal(a, b) for a, b in zip(*results, strict=True))
        return largest.elements, all(same)
    finally:
        world.stop()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_sinks_count_once_however_many_ranks_there_are(window: int | None, packed: bool) -> None:
    for errors in run_ranks(2, _compare_sinks, window, packed):
        assert max(errors) <= CLOSE, errors


def _compare_sinks(window: int | None, packed: bool) -> list[float]:
    """The errors of outputs, and of the gradients of queries, keys, values and sinks."""
    import torch.distributed as dist

    cp = start("ring")
    try:
        documents = documents_of_rows() if packed else None
        full = [t.requires_grad_() for t in operands(heads=4, shared=2, sizes=(8, 8, 8))]
        sinks = torch.tensor([3.0, -1.0, 0.5, 8.0], requires_grad=True)
        mask = context_of(None, documents).mask.mask(window, always=True)
        assert mask is not None
        scores = full[0] @ full[1].repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        column = sinks[:, None, None].expand(*scores.shape[:3], 1)
        shares = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
        expected = shares @ full[2].repeat_interleave(2, 1)
        (expected * weights_like(expected)).sum().backward()
        own = cp.token_indices(TOTAL)
        assert cp.ring is not None
        parts = [t.detach()[:, :, own].requires_grad_() for t in full]
        mine = sinks.detach().requires_grad_()
        at = Ring(cp.ring, context_of(own, documents).mask, window)
        found = ring_attention(*parts, at, sinks=mine)
        (found * weights_like(expected)[:, :, own]).sum().backward()
        assert mine.grad is not None
        dist.all_reduce(mine.grad)
        pairs = zip(full, parts, strict=True)
        errors = [error(a.grad[:, :, own], b.grad) for a, b in pairs]
        return [error(expected[:, :, own], found), error(sinks.grad, mine.grad), *errors]
    finally:
        world.stop()
