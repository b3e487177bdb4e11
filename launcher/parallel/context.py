"""Context parallelism, put beside a decoder: the tokens of every row are spread over ranks.

Owns which rank has which tokens, and attention over all of them; everything else a decoder does is
local to a token. The ranks of the `cp` axis are in one or two groups:

    trade   neighbours, who have consecutive tokens: before attention each gives its tokens for all
            of their tokens of some heads, and back afterwards (DeepSpeed-Ulysses,
            https://arxiv.org/abs/2309.14509)
    ring    keys and values travel round (`launcher.parallel.ring`)

With both, the neighbours of a trade are one member of a ring together, with its two chunks:

    4 ranks, a row of 16 tokens: which rank has which

    ring            0  0  1  1  2  2  3  3  3  3  2  2  1  1  0  0
    trade           0  0  0  0  1  1  1  1  2  2  2  2  3  3  3  3
    trade of 2,     0  0  0  0  2  2  2  2  3  3  3  3  1  1  1  1
    ring of 2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.collectives import exchange
from launcher.parallel.expert import apply_row_sums
from launcher.parallel.ring import Ring, chunks, ring_attention
from models.attention import BaseAttention, StepContext
from models.decoder import Decoder

HEADS, TOKENS = 1, 2
"""Dims of queries, keys and values."""

Attend = Callable[[Tensor, Tensor, Tensor, StepContext, int | None, Tensor | None], Tensor]


def token_indices(total: int, size: int, rank: int, *, balanced: bool) -> Tensor:
    """Which tokens of a row of `total` tokens `rank` of `size` ranks has: int64 [total / size],
    ascending.

    `balanced`: one chunk from the head and one from the tail, for a ring; `total` is a multiple of
    2 * size. Otherwise consecutive ones, and it is a multiple of size (ValueError).
    """
    if balanced:
        return torch.cat([torch.arange(c.start, c.stop) for c in chunks(total, size, rank)])
    length, rest = divmod(total, size)
    if rest:
        raise ValueError(f"{total} tokens cannot be shared equally by {size} ranks")
    return torch.arange(rank * length, (rank + 1) * length)


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share rows. None for a group that is not there; one is."""

    ulysses: dist.ProcessGroup | None = None
    """Ranks that trade tokens for heads; their number divides the query heads of a rank."""
    ring: dist.ProcessGroup | None = None
    """Ranks that pass keys and values round; the same member of each trade."""

    @property
    def length_unit(self) -> int:
        """What the length of a row must be a multiple of."""
        trading, passing = _size(self.ulysses), _size(self.ring)
        return trading if passing == 1 else passing * math.lcm(2, trading)

    def token_indices(self, total: int) -> Tensor:
        """Which tokens of a row of `total` tokens are here: int64 [total / ranks], ascending.

        ValueError unless `total` is a multiple of `length_unit`.
        """
        member = torch.arange(total)
        if _size(self.ring) > 1:
            member = token_indices(total, _size(self.ring), dist.get_rank(self.ring), balanced=True)
        if _size(self.ulysses) == 1:
            return member
        own = token_indices(
            len(member), _size(self.ulysses), dist.get_rank(self.ulysses), balanced=False
        )
        return member[own]


def _size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def apply_context_parallel(model: Decoder, cp: ContextParallel) -> None:
    """Let the attention of every layer of `model` see the tokens of all ranks of `cp`, and its
    balance loss count them.

    `model` is then called with the tokens at `cp.places(total)` of each row, with these `places`
    and this `total`, and with the documents of whole rows. Called without places it computes alone,
    as before.
    """
    for layer in model.model.layers.values():
        attention = layer.self_attn
        attention.attend = partial(_attend, attention, attention.attend, cp)
    apply_row_sums(model, *(group for group in (cp.ulysses, cp.ring) if group is not None))


def _attend(
    attention: BaseAttention,
    alone: Attend,
    cp: ContextParallel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    context: StepContext,
    window: int | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `BaseAttention.attend`, over the tokens of all ranks."""
    mask = context.mask
    if mask.in_order:
        return alone(query, key, value, context, window, sinks)
    if cp.ulysses is not None:
        if sinks is not None:
            sinks = sinks.chunk(_size(cp.ulysses))[dist.get_rank(cp.ulysses)]
        key, value = (enough_heads(states, _size(cp.ulysses)) for states in (key, value))
        query, key, value = (exchange(t, HEADS, TOKENS, cp.ulysses) for t in (query, key, value))
    if cp.ring is not None:
        ring = Ring(cp.ring, mask, window)
        output = ring_attention(query, key, value, ring, scale=attention.scale, sinks=sinks)
    else:
        output = alone(query, key, value, replace(context, mask=mask.whole()), window, sinks)
    return output if cp.ulysses is None else exchange(output, TOKENS, HEADS, cp.ulysses)


def enough_heads(states: Tensor, size: int) -> Tensor:
    """Keys or values [rows, heads, tokens, size] with each head repeated as often as it takes for
    `size` ranks to have equally many; rank r then has those that its query heads need."""
    return states.repeat_interleave(size // math.gcd(size, states.shape[HEADS]), dim=HEADS)
