"""Ring attention: each rank computes with one block of keys and values per ring step, then sends
it to the next rank.

The tokens of a row are split into 2 * size chunks; rank i has chunk i and, from the other end,
chunk 2 * size - 1 - i, so that with a causal mask every rank has the same work at every step:

    chunk   0  1  2  3  4  5  6  7        (4 ranks)
    rank    0  1  2  3  3  2  1  0

Invariants: besides its own keys and values, a rank holds those of at most two ranks, and scores of
at most `SCORES` elements; KV heads are never repeated; the backward pass recomputes the scores, and
the gradients of keys and values follow them one step behind, until they are back on their own rank.
Sums are in a fixed order, so results are bitwise reproducible.

Not as fast as it could be on CUDA: each block of scores goes through memory, where a fused kernel
would keep it on the chip. Source: Liu et al., Ring Attention (https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from launcher.parallel.blockwise import Block, OnlineSoftmax, SoftmaxBackward, grouped
from models.attention import AttentionMask
from models.documents import document_bounds

SCORES = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Elements of scores computed at once: what fits in the cache on a CPU; on a GPU a memory limit
(128 MB in float32)."""


def chunks(total: int, size: int, rank: int) -> list[range]:
    """The token indices that `rank` of a ring has of a row of `total` tokens; ascending.

    `total` is a multiple of 2 * size (ValueError).
    """
    length, rest = divmod(total, 2 * size)
    if rest:
        raise ValueError(f"{total} tokens cannot be split into {2 * size} equal chunks")
    starts = (rank * length, (2 * size - 1 - rank) * length)
    return [range(start, start + length) for start in starts]


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, and the attention mask of their rows."""

    group: dist.ProcessGroup
    mask: AttentionMask
    window: int | None

    @property
    def rank(self) -> int:
        """This rank within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    def blocks(self, source: int, *, lines: int) -> Iterator[Block]:
        """The blocks of scores between the local queries and the keys of rank `source`.

        `lines`: rows times heads. Blocks that the causal mask, the window or documents exclude
        completely are left out; this needs no device synchronization.
        """
        queries = chunks(self.mask.total, self.size, self.rank)
        scores = SCORES.get(self.mask.token_indices.device.type, SCORES["cuda"])
        for at, key_range in _with_offsets(chunks(self.mask.total, self.size, source)):
            step = max(1, scores // (lines * len(key_range)))
            if self.window is not None:  # with few queries, most keys are outside the window
                step = min(step, max(self.window, 256))
            for start, query_range in _with_offsets(queries):
                for tile_start in range(0, len(query_range), step):
                    tile = query_range[tile_start : tile_start + step]
                    first = start + tile_start
                    yield from self._block(slice(first, first + len(tile)), tile, at, key_range)

    def _block(self, queries: slice, query_range: range, at: int, keys: range) -> Iterator[Block]:
        first = keys.start if self.window is None else query_range.start - self.window + 1
        first = max(first, self._begins(query_range.start)[0])
        key_range = range(max(keys.start, first), min(keys.stop, query_range.stop))
        if not key_range:
            return
        at += key_range.start - keys.start
        all_visible = (
            key_range[-1] <= query_range[0]
            and (self.window is None or key_range[0] > query_range[-1] - self.window)
            and key_range[0] >= self._begins(query_range[-1])[1]
        )
        mask = None if all_visible else self._mask(query_range, key_range)
        yield Block(queries, slice(at, at + len(key_range)), mask)

    def _begins(self, token: int) -> tuple[int, int]:
        """Where the document of a token begins: in the row where it does so first, and last. Where
        only a mask holds it, any key may be in the document, and none is known to be."""
        if self.mask.lengths is not None:
            first, last = document_bounds(self.mask.lengths)
            return first[token], last[token]
        apart = self.mask.document_ids is not None or self.mask.key_mask is not None
        return 0, self.mask.total if apart else 0

    def _mask(self, query_range: range, key_range: range) -> Tensor | None:
        device = self.mask.token_indices.device
        ranges = (query_range, key_range)
        queries, keys = (torch.arange(r.start, r.stop, device=device) for r in ranges)
        return self.mask.mask(self.window, queries, keys)


def _with_offsets(ranges: Sequence[range]) -> Iterator[tuple[int, range]]:
    """Each range with its offset in their concatenation."""
    at = 0
    for token_indices in ranges:
        yield at, token_indices
        at += len(token_indices)


@torch.compiler.disable
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, ring: Ring, *, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention outputs [rows, heads, tokens, value size] of this rank's queries over full rows.

    `query` [rows, heads, tokens, size], `key` [rows, KV heads, tokens, size] and `value` [rows, KV
    heads, tokens, value size] are of the tokens at `chunks(...)` of this rank. `scale` multiplies
    the scores; None is 1 / sqrt(size). `sinks` [heads]: one more score in every softmax, of a zero
    value. A collective: every rank of the ring must run it, and its backward pass.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    output: Tensor = _RingAttention.apply(query, key, value, sinks, ring, scale)
    return output


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, ring: Ring,
        scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.ring, ctx.scale = ring, scale
        queries = grouped(query, key.shape[1])
        softmax = OnlineSoftmax(queries, value.shape[-1], scale, sinks)
        for source, arrived in _ring_steps(_packed(key, value), ring):
            keys, values = _unpacked(arrived, key, value)
            for block in ring.blocks(source, lines=query.shape[0] * query.shape[1]):
                softmax.add(block, keys, values)
        output = softmax.output().to(query.dtype).flatten(1, 2)
        ctx.save_for_backward(query, key, value, output, softmax.logsumexp(), sinks)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ring, scale = ctx.ring, ctx.scale
        query, key, value, output, logsumexp, sinks = ctx.saved_tensors
        queries, output, gradient = (grouped(t, key.shape[1]) for t in (query, output, gradient))
        softmax = SoftmaxBackward(queries, output, gradient, logsumexp, scale)
        shift: _Shift | None = None
        for source, arrived in _ring_steps(_packed(key, value), ring):
            keys, values = _unpacked(arrived, key, value)
            sums = torch.zeros_like(arrived, dtype=logsumexp.dtype)
            for block in ring.blocks(source, lines=query.shape[0] * query.shape[1]):
                softmax.add(block, keys, values, *_unpacked(sums, key, value))
            if shift is not None:
                sums += shift.wait()
            shift = _Shift(sums, ring)
        assert shift is not None
        grad_key_value = (t.to(key.dtype) for t in _unpacked(shift.wait(), key, value))
        grad_query = softmax.grad_query.to(query.dtype).flatten(1, 2)
        grad_sinks = None if sinks is None else softmax.grad_sinks(sinks)
        return grad_query, *grad_key_value, grad_sinks, None, None


class _Shift:
    """An asynchronous send of a tensor to the next rank, and receive from the previous one."""

    def __init__(self, outgoing: Tensor, ring: Ring) -> None:
        self._outgoing = outgoing  # must not be freed before it is sent
        self._incoming = torch.empty_like(outgoing)
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        send = dist.P2POp(dist.isend, outgoing, group=ring.group, group_peer=after)
        receive = dist.P2POp(dist.irecv, self._incoming, group=ring.group, group_peer=before)
        self._works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        """The received tensor, once both transfers are complete."""
        for work in self._works:
            work.wait()
        return self._incoming


def _ring_steps(held: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """(rank, its tensor) of each ring step, this rank's first. The next tensor is in transfer while
    the caller works with the current one, which it must not change."""
    for step in range(ring.size):
        shift = _Shift(held, ring) if step + 1 < ring.size else None
        yield (ring.rank - step) % ring.size, held
        if shift is not None:
            held = shift.wait()


def _packed(key: Tensor, value: Tensor) -> Tensor:
    return torch.cat((key.flatten(), value.flatten()))


def _unpacked(flat: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Views of `flat` in the shapes of `key` and `value`."""
    first, second = flat.split([key.numel(), value.numel()])
    return first.view(key.shape), second.view(value.shape)
