"""Differentiable collectives.

Owns the pairs of forward and backward communication between the ranks of one process group:

                         forward                backward
    `copy_to_tp`         none                   all-reduce
    `all_reduce`         all-reduce             none
    `gather`             all-gather             reduce-scatter
    `reduce_scatter`     reduce-scatter         all-gather
    `split`              take the local chunk   all-gather
    `all_to_all`         all-to-all             all-to-all
    `all_to_all_rows`    uneven all-to-all      uneven all-to-all
    `begin_all_to_all_rows`                     the same, begun and waited for later

The operands are plain local tensors. Every function works on gloo and NCCL and inside
`torch.compile`; an all-reduce is in place where the operand is a new tensor that nothing else uses.
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


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.all_reduce(tensor, "sum", group)
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def _gather_dim(chunk: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.all_gather_tensor(chunk, dim, group)
    size = dist.get_world_size(group)
    stacked = chunk.new_empty((size, *chunk.shape))
    _all_gather(stacked.flatten(0, 1), chunk.contiguous(), group=group)
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter_dim(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return functional.reduce_scatter_tensor(tensor, "sum", dim, group)
    size = dist.get_world_size(group)
    chunks = tensor.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    result = chunks.new_empty(chunks.shape[1:])
    _reduce_scatter(result, chunks.flatten(0, 1), group=group)
    return result


def _local_chunk(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    length = tensor.shape[dim] // size
    return tensor.narrow(dim, rank * length, length).contiguous()


class _CopyToTP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        if torch.compiler.is_compiling():
            return _all_reduce(tensor, group)
        ctx.mark_dirty(tensor)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _gather_dim(chunk, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_dim(gradient, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter_dim(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather_dim(gradient, ctx.dim, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _local_chunk(tensor, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather_dim(gradient, ctx.dim, ctx.group), None, None


def copy_to_tp(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`tensor`, the same on every rank, as the input of computations that differ by rank.

    Its gradient is all-reduced in place: no consumer of the result may pass the gradient tensor it
    received through unchanged (matrix products do not).
    """
    result: Tensor = _CopyToTP.apply(tensor, group)
    return result


def all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of every rank's `tensor`; a tensor that is not a leaf is overwritten with it."""
    result: Tensor = _AllReduce.apply(tensor.contiguous(), group)
    return result


def gather(chunk: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """The chunks of all ranks concatenated along `dim`, as the input of computations that differ by
    rank."""
    result: Tensor = _Gather.apply(chunk, dim, group)
    return result


def reduce_scatter(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's chunk, along `dim`, of the sum of every rank's `tensor`."""
    result: Tensor = _ReduceScatter.apply(tensor, dim, group)
    return result


def split(tensor: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's chunk, along `dim`, of a `tensor` that is the same on every rank."""
    result: Tensor = _Split.apply(tensor, dim, group)
    return result


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, split_dim: int, concat_dim: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.dims, ctx.group = (split_dim, concat_dim), group
        return _all_to_all(tensor, split_dim, concat_dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        split_dim, concat_dim = ctx.dims
        return _all_to_all(gradient, concat_dim, split_dim, ctx.group), None, None, None


def all_to_all(tensor: Tensor, split_dim: int, concat_dim: int, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: `split_dim` is split over the ranks, and the received chunks are concatenated
    along `concat_dim`. From some tokens of all heads to all tokens of some heads, and back."""
    result: Tensor = _AllToAll.apply(tensor, split_dim, concat_dim, group)
    return result


def _all_to_all(
    tensor: Tensor, split_dim: int, concat_dim: int, group: dist.ProcessGroup
) -> Tensor:
    size = dist.get_world_size(group)
    outgoing = tensor.unflatten(split_dim, (size, -1)).movedim(split_dim, 0).contiguous()
    if torch.compiler.is_compiling():
        incoming = functional.all_to_all_single(outgoing, None, None, group)
    else:
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=group)
    return incoming.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all_rows(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all_rows(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """All-to-all of rows: the rows received, in rank order. `sent[r]` rows go to rank r, in
    order."""
    result: Tensor = _AllToAllRows.apply(rows, sent, received, group)
    return result


def _all_to_all_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    incoming = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(incoming, rows.contiguous(), received, sent, group=group)
    return incoming


class RowsUnderWay:
    """An all-to-all of rows that was begun; `wait` gives the rows received, in rank order.

    In the backward pass the gradient's all-to-all begins where the forward pass waited, and is
    waited for where it began: what autograd runs between the two is what ran between them.
    """

    def __init__(self, sent: list[int], received: list[int], group: dist.ProcessGroup) -> None:
        self.sent, self.received, self.group = sent, received, group
        self.token: Tensor | None = None
        """Empty; ties `wait` to the beginning in the graph of autograd, through which no memory
        passes that is still being filled."""
        self._work: Any = None
        self._rows: tuple[Tensor, Tensor] | None = None
        """Sent and received, kept until they have been."""

    def begin(self, rows: Tensor, *, back: bool = False) -> None:
        """Begin to send `rows`; `back`: from the ranks that received them to those that sent."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        rows, incoming = rows.contiguous(), rows.new_empty((sum(received), *rows.shape[1:]))
        self._work = dist.all_to_all_single(
            incoming, rows, received, sent, group=self.group, async_op=True
        )
        self._rows = rows, incoming

    def end(self) -> Tensor:
        """The rows received: the stream (on a CPU the host) waits for them."""
        assert self._rows is not None
        if self._work is not None:
            self._work.wait()
        _, incoming = self._rows
        self._work = self._rows = None
        return incoming

    def wait(self) -> Tensor:
        """The rows received, with a gradient. To be called once."""
        token, self.token = self.token, None  # whose node in the graph has this object
        result: Tensor = _EndRows.apply(token, self)
        return result


def begin_all_to_all_rows(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> RowsUnderWay:
    """As `all_to_all_rows`, which this begins and `RowsUnderWay.wait` ends."""
    under_way = RowsUnderWay(sent, received, group)
    under_way.token = _BeginRows.apply(rows, under_way)
    return under_way


class _BeginRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, under_way: RowsUnderWay) -> Tensor:
        ctx.under_way = under_way
        under_way.begin(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor, None]:
        return ctx.under_way.end(), None


class _EndRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, under_way: RowsUnderWay) -> Tensor:
        ctx.under_way = under_way
        return under_way.end()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.under_way.begin(gradient, back=True)
        return gradient.new_empty(0), None
