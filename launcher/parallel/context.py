"""Context parallelism, applied to a decoder: the tokens of every row are split over ranks.

Owns which rank has which tokens, and attention over all of them; everything else a decoder does is
local to a token. The ranks of the `cp` axis are in one or two groups:

    ulysses   neighbours with consecutive tokens: an all-to-all before attention gives each rank all
              tokens of some heads, another one afterwards reverses it (DeepSpeed-Ulysses,
              https://arxiv.org/abs/2309.14509)
    ring      keys and values are passed from rank to rank (`launcher.parallel.ring`)

With both, the ranks of a Ulysses group are together one member of the ring, and split its two
chunks:

    4 ranks, a row of 16 tokens: the rank of each token

    ring            0  0  1  1  2  2  3  3  3  3  2  2  1  1  0  0
    ulysses         0  0  0  0  1  1  1  1  2  2  2  2  3  3  3  3
    ulysses of 2,   0  0  0  0  2  2  2  2  3  3  3  3  1  1  1  1
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

from launcher.parallel.collectives import all_to_all
from launcher.parallel.expert import apply_row_sums
from launcher.parallel.ring import Ring, chunks, ring_attention
from models.attention import BaseAttention, StepContext
from models.decoder import Decoder

HEADS, TOKENS = 1, 2
"""Dims of queries, keys and values."""

Attend = Callable[[Tensor, Tensor, Tensor, StepContext, int | None, Tensor | None], Tensor]


def token_indices(total: int, size: int, rank: int, *, balanced: bool) -> Tensor:
    """The indices of the tokens that `rank` of `size` ranks has of a row of `total` tokens: int64
    [total / size], ascending.

    `balanced`: one chunk from the head and one from the tail, for a ring; `total` is a multiple of
    2 * size. Otherwise consecutive ones; `total` is a multiple of size (ValueError).
    """
    if balanced:
        return torch.cat([torch.arange(c.start, c.stop) for c in chunks(total, size, rank)])
    length, rest = divmod(total, size)
    if rest:
        raise ValueError(f"{total} tokens cannot be split equally over {size} ranks")
    return torch.arange(rank * length, (rank + 1) * length)


@dataclass(frozen=True)
class ContextParallel:
    """The groups of ranks that split rows; at least one is not None."""

    ulysses: dist.ProcessGroup | None = None
    """Ranks of the all-to-all; their number divides the query heads of a rank."""
    ring: dist.ProcessGroup | None = None
    """Ranks that pass keys and values on; each has the same rank in its Ulysses group."""

    @property
    def length_unit(self) -> int:
        """What the length of a row must be a multiple of."""
        ulysses, ring = _size(self.ulysses), _size(self.ring)
        return ulysses if ring == 1 else ring * math.lcm(2, ulysses)

    def token_indices(self, total: int) -> Tensor:
        """The indices of the local tokens of a row of `total` tokens: int64 [total / ranks],
        ascending.

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
    """Compute the attention of every layer of `model`, and its balance loss, over the tokens of all
    ranks of `cp`.

    `model` is then called with the tokens at `cp.token_indices(total)` of each row, these
    `token_indices`, this `total`, and the `document_ids` of full rows. Called without
    `token_indices`, it attends to the local tokens only, as before.
    """
    for layer in model.decoder_layers():
        attention = layer.self_attn
        attention.attend = partial(  # type: ignore[method-assign]
            _attend, attention, attention.attend, cp
        )
        attention.prepare = partial(  # type: ignore[method-assign]
            _prepare, attention.prepare, cp
        )
    apply_row_sums(model, *(group for group in (cp.ulysses, cp.ring) if group is not None))


def _attend(
    attention: BaseAttention,
    attend_locally: Attend,
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
        return attend_locally(query, key, value, context, window, sinks)
    if cp.ulysses is not None:
        if sinks is not None:
            sinks = sinks.chunk(_size(cp.ulysses))[dist.get_rank(cp.ulysses)]
        key, value = (enough_heads(states, _size(cp.ulysses)) for states in (key, value))
        query, key, value = (all_to_all(t, HEADS, TOKENS, cp.ulysses) for t in (query, key, value))
    if cp.ring is not None:
        ring = Ring(cp.ring, mask, window)
        output = ring_attention(query, key, value, ring, scale=attention.scale, sinks=sinks)
    else:
        full = replace(context, mask=mask.full())
        output = attend_locally(query, key, value, full, window, sinks)
    return output if cp.ulysses is None else all_to_all(output, TOKENS, HEADS, cp.ulysses)


def _prepare(
    prepare_locally: Callable[[StepContext], None], cp: ContextParallel, context: StepContext
) -> None:
    """As `BaseAttention.prepare`; a ring builds the masks of its parts as they come."""
    if context.mask.in_order:
        prepare_locally(context)
    elif cp.ring is None:
        prepare_locally(replace(context, mask=context.mask.full()))


def enough_heads(states: Tensor, size: int) -> Tensor:
    """Keys or values [rows, heads, tokens, size] with each head repeated until `size` ranks can
    have equally many; rank r then has those that its query heads need."""
    return states.repeat_interleave(size // math.gcd(size, states.shape[HEADS]), dim=HEADS)
