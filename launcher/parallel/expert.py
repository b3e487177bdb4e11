"""Expert parallelism, applied to a decoder: the experts of a layer are spread over data-parallel
ranks, and an all-to-all dispatches tokens to them, another one combines the outputs.

Rank r of the `ep` axis holds the experts [r * n, (r + 1) * n), n experts a rank: its modules
compute with that slice of the stacked parameters. Two ranks with two experts each, a to d:

    local tokens, sorted    a a b c d d   |   b d
    after the all-to-all    a a b . b     |   c d d . d       in the order of the ranks
    sorted by expert        a a b b       |   c d d d

Invariants: every rank takes part in every all-to-all, forward and backward, even with no tokens
and with experts that no token chose; the host synchronizes with the device once a layer, to read
how many tokens are sent and received.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.host_reads import host_read
from launcher.parallel.collectives import all_reduce, all_to_all_rows
from models.decoder import Decoder
from models.moe import Experts, MoE

Compute = Callable[[Tensor, Tensor], Tensor]
"""`Experts.forward`."""


def apply_expert_parallel(model: Decoder, group: dist.ProcessGroup) -> None:
    """Dispatch the tokens of each block of experts in `model` over the ranks of `group`.

    `Experts` parameters already hold this rank's experts, equally many on each rank.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = partial(_dispatch, module.forward, group)  # type: ignore[method-assign]


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


@torch.compiler.disable
def _dispatch(compute: Compute, group: dist.ProcessGroup, tokens: Tensor, counts: Tensor) -> Tensor:
    """As `Experts.forward`, with `counts` [experts of all ranks]."""
    counts_sent = counts.view(dist.get_world_size(group), -1)
    counts_received = torch.empty_like(counts_sent)
    dist.all_to_all_single(counts_received, counts_sent, group=group)
    with host_read("expert counts"):
        sent, received = torch.stack((counts_sent.sum(1), counts_received.sum(1))).tolist()
    order, inverse = by_expert(counts_received, sum(received))
    dispatched = all_to_all_rows(tokens, sent, received, group)
    outputs = compute(_Reorder.apply(dispatched, order, inverse), counts_received.sum(0))
    return all_to_all_rows(_Reorder.apply(outputs, inverse, order), received, sent, group)


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
