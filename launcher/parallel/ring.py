"""Ring attention: keys and values travel round the ranks, each computing with those it has.

The tokens of a row are cut into 2 * size chunks; rank i has chunk i and, from the other end, chunk
2 * size - 1 - i, so that under the causal rule every rank has the same work at every step:

    chunk   0  1  2  3  4  5  6  7        (4 ranks)
    rank    0  1  2  3  3  2  1  0

Invariants: a rank holds the keys and values of two ranks at most, its own apart, and scores of at
most `SCORES` elements; key/value heads are never repeated; the backward pass computes the scores
again, and the gradients of keys and values travel one step behind them, until they are home. What a
rank adds up, it adds up in a fixed order: the bits are the same each time.

Not as fast as it could be on CUDA: the scores go through memory, piece by piece, where a fused
kernel would keep them on the chip. After Liu et al., Ring Attention
(https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from launcher.parallel.blockwise import Block, Change, Softmax, grouped
from models.attention import AttentionMask

SCORES = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Elements of scores computed at once: on a CPU what its cache holds, on a GPU bounded memory (128
MB in float32)."""


def chunks(total: int, size: int, rank: int) -> list[range]:
    """The places of a row of `total` tokens that `rank` of a ring has; ascending.

    `total` is a multiple of 2 * size (ValueError).
    """
    length, rest = divmod(total, 2 * size)
    if rest:
        raise ValueError(f"{total} tokens cannot be cut into {2 * size} equal chunks")
    starts = (rank * length, (2 * size - 1 - rank) * length)
    return [range(start, start + length) for start in starts]


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, and who sees whom in the rows they share."""

    group: dist.ProcessGroup
    mask: AttentionMask
    window: int | None

    @property
    def rank(self) -> int:
        """This rank among them."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many they are."""
        return dist.get_world_size(self.group)

    def pieces(self, source: int, *, lines: int) -> Iterator[Block]:
        """What there is to compute between the queries here and the keys of rank `source`.

        `lines`: rows times heads. Which tokens may not be looked at for their order alone is left
        out; it is known without asking the device.
        """
        queries = chunks(self.mask.total, self.size, self.rank)
        scores = SCORES.get(self.mask.token_indices.device.type, SCORES["cuda"])
        for at, key_range in _placed(chunks(self.mask.total, self.size, source)):
            step = max(1, scores // (lines * len(key_range)))
            if self.window is not None:  # short runs of queries leave most keys out of the window
                step = min(step, max(self.window, 256))
            for start, query_range in _placed(queries):
                for tile_start in range(0, len(query_range), step):
                    tile = query_range[tile_start : tile_start + step]
                    first = start + tile_start
                    yield from self._piece(slice(first, first + len(tile)), tile, at, key_range)

    def _piece(self, queries: slice, asking: range, at: int, keys: range) -> Iterator[Block]:
        first = keys.start if self.window is None else asking.start - self.window + 1
        asked = range(max(keys.start, first), min(keys.stop, asking.stop))
        if not asked:
            return
        at += asked.start - keys.start
        by_order = asked[-1] <= asking[0] and (
            self.window is None or asked[0] > asking[-1] - self.window
        )
        everyone = self.mask.document_ids is None and self.mask.key_mask is None
        mask = None if by_order and everyone else self._mask(asking, asked)
        yield Block(queries, slice(at, at + len(asked)), mask)

    def _mask(self, asking: range, asked: range) -> Tensor | None:
        device = self.mask.token_indices.device
        queries, keys = (torch.arange(r.start, r.stop, device=device) for r in (asking, asked))
        return self.mask.mask(self.window, queries, keys)


def _placed(ranges: Sequence[range]) -> Iterator[tuple[int, range]]:
    """Each range and where it begins when they are laid end to end."""
    at = 0
    for token_indices in ranges:
        yield at, token_indices
        at += len(token_indices)


@torch.compiler.disable
def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, ring: Ring, *, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention outputs [rows, heads, tokens, value size] of the queries of this rank's tokens over
    the whole rows.

    `query` [rows, heads, tokens, size], `key` [rows, key/value heads, tokens, size] and `value`
    [rows, key/value heads, tokens, value size] are of the tokens at `chunks(...)` of this rank.
    `scale` multiplies the scores; None is one over the root of the size. `sinks` [heads]: one more
    score in every softmax, for nothing. Every rank of the ring
    calls it, and its backward pass.
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
        asking = grouped(query, key.shape[1])
        softmax = Softmax(asking, value.shape[-1], scale, sinks)
        for source, arrived in _rounds(_packed(key, value), ring):
            keys, values = _unpacked(arrived, key, value)
            for piece in ring.pieces(source, lines=query.shape[0] * query.shape[1]):
                softmax.add(piece, keys, values)
        output = softmax.output().to(query.dtype).flatten(1, 2)
        ctx.save_for_backward(query, key, value, output, softmax.logarithm(), sinks)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ring, scale = ctx.ring, ctx.scale
        query, key, value, output, logarithm, sinks = ctx.saved_tensors
        asking = grouped(query, key.shape[1])
        done, gradient = (grouped(t, key.shape[1]) for t in (output, gradient))
        change = Change(asking, done, gradient, logarithm, scale)
        passing: _Passing | None = None
        for source, arrived in _rounds(_packed(key, value), ring):
            keys, values = _unpacked(arrived, key, value)
            sums = torch.zeros_like(arrived, dtype=logarithm.dtype)
            for piece in ring.pieces(source, lines=query.shape[0] * query.shape[1]):
                change.add(piece, keys, values, *_unpacked(sums, key, value))
            if passing is not None:
                sums += passing.arrived()
            passing = _Passing(sums, ring)
        assert passing is not None
        home = (t.to(key.dtype) for t in _unpacked(passing.arrived(), key, value))
        of_sinks = None if sinks is None else change.of_sinks(sinks)
        return change.of_query.to(query.dtype).flatten(1, 2), *home, of_sinks, None, None


class _Passing:
    """A tensor on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, leaving: Tensor, ring: Ring) -> None:
        self._leaving = leaving  # must not be freed before it is out
        self._arriving = torch.empty_like(leaving)
        after, before = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size
        send = dist.P2POp(dist.isend, leaving, group=ring.group, group_peer=after)
        receive = dist.P2POp(dist.irecv, self._arriving, group=ring.group, group_peer=before)
        self._works = dist.batch_isend_irecv([send, receive])

    def arrived(self) -> Tensor:
        """What has come, once it is here and the other is out."""
        for work in self._works:
            work.wait()
        return self._arriving


def _rounds(own: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Every rank of the ring and its tensor, this rank's first; the next one is on its way while
    the caller works with the present one, which it must not change."""
    for step in range(ring.size):
        passing = _Passing(own, ring) if step + 1 < ring.size else None
        yield (ring.rank - step) % ring.size, own
        if passing is not None:
            own = passing.arrived()


def _packed(key: Tensor, value: Tensor) -> Tensor:
    return torch.cat((key.flatten(), value.flatten()))


def _unpacked(flat: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Views of `flat` in the shapes of `key` and `value`."""
    first, second = flat.split([key.numel(), value.numel()])
    return first.view(key.shape), second.view(value.shape)
