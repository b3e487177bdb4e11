"""Collectives that the backward pass knows: what goes out together comes back together.

Owns the pairs of forward and backward communication between the ranks of one process group:

    forward                          backward
    same on every rank (nothing)     add up                  `fan_out`
    add up                           nothing                 `add_up`
    gather pieces of a dim           add up and cut          `gather`
    add up and cut a dim             gather pieces           `add_up_and_cut`
    keep own piece of a dim          gather pieces           `keep_piece`
    exchange pieces of two dims      exchange back           `exchange`
    send rows to their rank          send back               `exchange_rows`

The operands are plain local tensors. Every function works on gloo and NCCL and inside
`torch.compile`; sums are made in place where the operand is a fresh result nobody else needs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

# Renamed in torch 2.13, where the older names warn.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.all_reduce(tensor, "sum", group)
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def _gather(piece: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.all_gather_tensor(piece, dim, group)
    size = dist.get_world_size(group)
    stacked = piece.new_empty((size, *piece.shape))
    _all_gather(stacked.flatten(0, 1), piece.contiguous(), group=group)
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _sum_and_cut(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.reduce_scatter_tensor(tensor, "sum", dim, group)
    size = dist.get_world_size(group)
    pieces = tensor.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    piece = pieces.new_empty(pieces.shape[1:])
    _reduce_scatter(piece, pieces.flatten(0, 1), group=group)
    return piece


def _piece(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length).contiguous()


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.group), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        if torch.compiler.is_compiling():
            return _sum(tensor, group)
        ctx.mark_dirty(tensor)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, piece: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather(piece, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sum_and_cut(gradient, ctx.dim, ctx.group), None, None


class _AddUpAndCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _sum_and_cut(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.dim, ctx.group), None, None


class _KeepPiece(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _piece(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.dim, ctx.group), None, None


def copy_to_tp(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`tensor`, the same on every rank, into work that differs by rank.

    The gradient that comes back is added up in place: nothing that takes the result may hand the
    gradient it is given on as it is (matrix products do not).
    """
    result: Tensor = _FanOut.apply(tensor, group)
    return result


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's `tensor`; a tensor that is not a leaf is overwritten with it."""
    result: Tensor = _AddUp.apply(tensor.contiguous(), group)
    return result


def gather(piece: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The pieces of all ranks, laid end to end along `dim`, into work that differs by rank."""
    result: Tensor = _Gather.apply(piece, dim, group)
    return result


def reduce_scatter(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece, along `dim`, of the sum of every rank's `tensor`."""
    result: Tensor = _AddUpAndCut.apply(tensor, dim, group)
    return result


def split(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's piece, along `dim`, of a `tensor` that is the same on every rank."""
    result: Tensor = _KeepPiece.apply(tensor, dim, group)
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
        ctx.cut, ctx.join, ctx.group = cut, join, group
        return _exchange(tensor, cut, join, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.join, ctx.cut, ctx.group), None, None, None


def exchange(tensor: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: dim `cut` is cut over the ranks, and the pieces that arrive are laid end to end
    along dim `join`. From rows of a sequence with all heads to all rows of some heads, and back."""
    result: Tensor = _Exchange.apply(tensor, cut, join, group)
    return result


def _exchange(tensor: Tensor, cut: int, join: int, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    outgoing = tensor.unflatten(cut, (size, -1)).movedim(cut, 0).contiguous()
    if torch.compiler.is_compiling():
        arrived = functional.all_to_all_single(outgoing, None, None, group)
    else:
        arrived = torch.empty_like(outgoing)
        dist.all_to_all_single(arrived, outgoing, group=group)
    return arrived.movedim(0, join).flatten(join, join + 1)


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange_rows(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange_rows(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def exchange_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """The rows other ranks send here, in rank order; `sent[r]` rows go to rank r, in order."""
    result: Tensor = _ExchangeRows.apply(rows, sent, received, group)
    return result


def _exchange_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    arrived = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
