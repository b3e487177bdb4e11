"""Expert parallelism, put beside a decoder: the experts of a layer are spread over data-parallel
ranks, and tokens travel to them and back.

Rank r of the `ep` axis holds the experts [r * n, (r + 1) * n), n of them a rank: its leaves compute
with that part of the stacked parameters. Two ranks with two experts each, a to d:

    tokens here, sorted     a a b c d d   |   b d
    sent and arrived        a a b . b     |   c d d . d       in the order of the ranks
    sorted by expert        a a b b       |   c d d d

Invariants: every rank takes part in every exchange, forward and backward, if it has no tokens and
if nobody wants its experts; the host waits for the device once a layer, to learn how many tokens
come and go.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.collectives import all_reduce, exchange_rows
from models.decoder import Decoder
from models.moe import Experts, MoE

Compute = Callable[[Tensor, Tensor], Tensor]
"""`Experts.forward`."""


def apply_expert_parallel(model: Decoder, group: dist.ProcessGroup) -> None:
    """Send the tokens of each block of experts in `model` to the ranks of `group` that have them.

    The views of `Experts` parameters already give this rank's experts, as many on each rank.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = partial(_dispatch, module.forward, group)  # type: ignore[method-assign]


def apply_row_sums(model: Decoder, *groups: dist.ProcessGroup) -> None:
    """Let the balance loss of `model` count the tokens of all ranks of `groups`, over which the
    tokens of a row are spread.

    The sum over the ranks is then the same on each, P = sum of p_r, and so is the loss L(P); each
    rank sends the whole of dL/dP back, and the gradients of all are added. dL/dp_r = dL/dP has to
    arrive at rank r once, and its own copy of the loss sends it: backward is the identity. (Adding
    up in the backward pass too would count it once for every rank.)
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
    leaving = counts.view(dist.get_world_size(group), -1)
    arriving = torch.empty_like(leaving)
    dist.all_to_all_single(arriving, leaving, group=group)
    sent, received = torch.stack((leaving.sum(1), arriving.sum(1))).tolist()
    order, back = by_expert(arriving, sum(received))
    arrived = exchange_rows(tokens, sent, received, group)
    outputs = compute(_Reorder.apply(arrived, order, back), arriving.sum(0))
    return exchange_rows(_Reorder.apply(outputs, back, order), received, sent, group)


def by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """How to sort what has arrived by expert, and the inverse: two index tensors [total].

    `counts` [ranks, experts] int64 adds up to `total`. Rows come rank by rank, sorted by expert in
    each; afterwards they are expert by expert, in the order of the ranks in each. `rows[order]` are
    sorted, `sorted[back]` are as they came.
    """
    came = _starts(counts)
    goes = _starts(counts.T).T
    places = torch.arange(total, device=counts.device)
    # Rows of one rank for one expert stay together: all of them move by the same number.
    order = places + _of_each(came.T - goes.T, counts.T, total)
    back = places + _of_each(goes - came, counts, total)
    return order, back


def _starts(counts: Tensor) -> Tensor:
    """Where each cell begins when they are laid end to end, line by line."""
    flat = counts.flatten()
    return (flat.cumsum(0) - flat).view(counts.shape)


def _of_each(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """The value of each cell as often as it counts [total]."""
    return values.flatten().repeat_interleave(counts.flatten(), output_size=total)


class _Reorder(torch.autograd.Function):
    """`rows[order]`; backward gathers by `back`, the inverse, where autograd would scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient[back], None, None
