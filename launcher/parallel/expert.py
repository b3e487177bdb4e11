"""Expert parallelism, applied to a decoder: the experts of a layer are spread over data-parallel
ranks, and an all-to-all dispatches tokens to them, another one combines the outputs.

Rank r of the `ep` axis holds the experts [r * n, (r + 1) * n), n experts a rank: its modules
compute with that slice of the stacked parameters. Two ranks with two experts each, a to d:

    local tokens, sorted    a a b c d d   |   b d
    after the all-to-all    a a b . b     |   c d d . d       in the order of the ranks
    sorted by expert        a a b b       |   c d d d

Invariants: every rank takes part in every all-to-all, forward and backward, even with no tokens
and with experts that no token chose. The host waits once a layer, to read how many tokens are sent
and received: an all-to-all of uneven sizes needs them. It waits for the counts alone, while the
device sorts the tokens; a recomputed layer does not wait, nor exchange counts, again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.collectives import all_reduce, all_to_all_rows, begin_all_to_all_rows
from launcher.parallel.host_copy import HostCopy
from launcher.parallel.kept_results import unselected
from launcher.parallel.remembered import is_repeated, remembered
from models.decoder import Decoder
from models.grouped import Groups
from models.moe import Exchange, MoE


def apply_expert_parallel(model: Decoder, group: dist.ProcessGroup) -> None:
    """Dispatch the tokens of each block of experts in `model` over the ranks of `group`.

    `Experts` parameters already hold this rank's experts, equally many on each rank.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            module.exchange = ExpertExchange(group)


def apply_row_sums(model: Decoder, *groups: dist.ProcessGroup) -> None:
    """Compute the balance loss of `model` over the tokens of all ranks of `groups`, over which the
    tokens of a row are split.

    The sum over the ranks is then the same on each, P = sum of p_r, and so is the loss L(P). Each
    rank back-propagates the full dL/dP, and the gradients of all ranks are summed. dL/dp_r = dL/dP
    must reach rank r once, from its own replica of the loss: backward is the identity. (An
    all-reduce in the backward pass would count it once for every rank.)
    """
    for module in model.modules():
        if isinstance(module, MoE):
            module.row_sum = partial(_all_reduce_over, groups)


def _all_reduce_over(groups: tuple[dist.ProcessGroup, ...], sums: Tensor) -> Tensor:
    for group in groups:
        sums = all_reduce(sums, group)
    return sums


class _Counts(NamedTuple):
    """Tokens that are sent and received, and their copy on the way to the host."""

    sent: Tensor
    """[ranks, experts of a rank] int64."""
    received: Tensor
    """[ranks, own experts] int64."""
    on_host: HostCopy
    """Both, [2, ranks, experts of a rank]."""


class _Sent(NamedTuple):
    """Tokens on their way to the ranks of their experts."""

    incoming: Any
    """What `begin_all_to_all_rows` gives."""
    sent: list[int]
    """Tokens sent to each rank."""
    received: list[int]
    order: Tensor
    """Sorts the received tokens by expert."""
    inverse: Tensor
    groups: Groups


class ExpertExchange(Exchange):
    """The exchange of tokens among the ranks of a group.

    begin        counts to all ranks, and on their way to the host
                   (meanwhile: the local tokens are sorted)
    send         the host waits for the counts; tokens leave
                   (meanwhile: the shared experts)
    receive      tokens have come; sorted by expert
    give_back    outputs return to the ranks of their tokens
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @torch.compiler.disable
    def begin(self, counts: Tensor) -> _Counts:
        """As `Exchange.begin`, with `counts` [experts of all ranks]."""
        sent = counts.view(dist.get_world_size(self.group), -1)
        known = remembered(partial(self._exchanged, sent))
        if is_repeated():
            # Without a wait for the device: a recomputed router that chooses other experts would
            # mix up the tokens of others.
            with unselected():
                torch._assert_async((sent == known.sent).all(), "recomputation chose other experts")
        return known

    def _exchanged(self, sent: Tensor) -> _Counts:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent.contiguous(), group=self.group)
        return _Counts(sent, received, HostCopy(torch.stack((sent, received))))

    @torch.compiler.disable
    def send(self, tokens: Tensor, begun: _Counts) -> _Sent:
        """As `Exchange.send`. The host waits for the counts, unless this is a recomputation."""
        to_ranks, from_ranks = begun.on_host.read("expert counts")
        sent, received = _sums(to_ranks), _sums(from_ranks)
        incoming = begin_all_to_all_rows(tokens, sent, received, self.group)
        order, inverse = by_expert(begun.received, sum(received))
        groups = Groups(begun.received.sum(0), _sums(zip(*from_ranks, strict=True)))
        return _Sent(incoming, sent, received, order, inverse, groups)

    @torch.compiler.disable
    def receive(self, sent: _Sent) -> tuple[Tensor, Groups]:
        """As `Exchange.receive`."""
        return _Reorder.apply(sent.incoming.wait(), sent.order, sent.inverse), sent.groups

    @torch.compiler.disable
    def give_back(self, outputs: Tensor, sent: _Sent) -> Tensor:
        """As `Exchange.give_back`."""
        by_rank = _Reorder.apply(outputs, sent.inverse, sent.order)
        return all_to_all_rows(by_rank, sent.received, sent.sent, self.group)


def _sums(lines: Iterable[Sequence[int]]) -> list[int]:
    return [sum(line) for line in lines]


def by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The permutation that sorts the received rows by expert, and its inverse: two index tensors
    [total].

    `counts` [ranks, experts] int64 sums to `total`. Rows are received rank by rank, those of a rank
    sorted by expert; sorted, they are expert by expert, those of an expert in the order of the
    ranks. `sorted = rows[order]` and `rows = sorted[inverse]`.
    """
    received = _starts(counts)
    sorted_ = _starts(counts.T).T
    indices = torch.arange(total, device=counts.device)
    # Rows of one rank for one expert stay adjacent: all of them move by the same number.
    order = indices + _repeated(received.T - sorted_.T, counts.T, total)
    inverse = indices + _repeated(sorted_ - received, counts, total)
    return order, inverse


def _starts(counts: Tensor) -> Tensor:
    """The offset of each cell when the cells are concatenated, row by row."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)


def _repeated(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """Each cell's value, repeated by its count [total]."""
    return values.flatten().repeat_interleave(counts.flatten(), output_size=total)


class _Reorder(torch.autograd.Function):
    """`rows[order]`; backward gathers by `inverse`, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None
