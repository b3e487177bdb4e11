"""The vocabulary sharded over tensor-parallel ranks: the embedding, and the cross entropy of
sharded logits.

Rank r holds the rows [r * n, (r + 1) * n) of the embedding and of the head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100
CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Logits processed at a time: what fits in the cache on a CPU; on a GPU a memory limit."""


def look_up(input_ids: Tensor, weight: Tensor, rank: int) -> Tensor:
    """Embeddings [..., size] of the ids whose rows `weight` [n, size] holds, zeros for others: the
    sum over the ranks is the embedding of every id."""
    rows = input_ids - rank * len(weight)
    elsewhere = (rows < 0) | (rows >= len(weight))
    embeddings = F.embedding(rows.masked_fill(elsewhere, 0), weight)
    return embeddings.masked_fill(elsewhere[..., None], 0.0)


def token_loss_sum(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup, *, by_row: bool = False
) -> Tensor:
    """Cross entropy in nats, summed over the labels that are not -100: a float32 scalar, the same
    on every rank of `group`; with `by_row` the sum of each row, float32 [batch].

    `logits` [batch, sequence, n]: this rank's columns, any floating dtype. `labels` [batch,
    sequence] int64, ids of the full vocabulary. Two small collectives: the maxima, then the sums of
    exponentials together with the logits of the labels.
    """
    total: Tensor = _SummedCrossEntropy.apply(
        logits.flatten(0, 1), labels.flatten(), group, len(labels) if by_row else None
    )
    return total


def scale_rows(gradient: Tensor, scale: Tensor) -> Tensor:
    """`gradient` [tokens, n], multiplied in place by a scalar, or by the `scale` [batch] of the row
    that a token is of."""
    if scale.dim():
        gradient.unflatten(0, (len(scale), -1)).mul_(scale[:, None, None])
        return gradient
    return gradient.mul_(scale)


class _SummedCrossEntropy(torch.autograd.Function):
    """Forward also computes the gradient of the logits; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup, batch: int | None
    ) -> Tensor:
        """`batch`: rows whose sums are returned; None: the sum of all."""
        largest = logits.amax(-1).float()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        columns = logits.shape[1]
        own = labels - dist.get_rank(group) * columns
        here = (own >= 0) & (own < columns)
        own = own.masked_fill(~here, 0)
        gradient, sums = _exponentials(logits, largest)
        picked = logits.gather(1, own[:, None])[:, 0].float() - largest
        both = torch.stack([sums, picked.masked_fill(~here, 0.0)])
        dist.all_reduce(both, group=group)
        counts = labels != IGNORED_LABEL
        losses = (both[0].log() - both[1]).masked_fill(~counts, 0.0)
        if ctx.needs_input_grad[0]:
            scale = counts / both[0]
            for chunk, factor in zip(*_chunks(gradient, scale), strict=True):
                chunk.mul_(factor[:, None])
            hit = (here & counts).to(gradient.dtype)
            ctx.gradient = gradient.scatter_add_(1, own[:, None], -hit[:, None])
            ctx.dtype = logits.dtype
        return losses.sum() if batch is None else losses.view(batch, -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return scale_rows(gradient, scale).to(ctx.dtype), None, None, None


def gradient_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the gradient of logits until it is multiplied by the loss scale: that of the
    logits, or float32 for float16, in which most of it would underflow."""
    return torch.float32 if logits.dtype == torch.float16 else logits.dtype


def _exponentials(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - largest) in the dtype of the gradient, and its float32 sums over the columns."""
    powers = torch.empty_like(logits, dtype=gradient_dtype(logits))
    sums = torch.empty_like(largest)
    for chunk, top, out, row_sums in zip(*_chunks(logits, largest, powers, sums), strict=True):
        wide = (chunk.float() - top[:, None]).exp_()
        torch.sum(wide, -1, out=row_sums)
        out.copy_(wide)
    return powers, sums


def _chunks(logits: Tensor, *others: Tensor) -> list[tuple[Tensor, ...]]:
    limit = CHUNK_ELEMENTS.get(logits.device.type, 1 << 27)
    rows = max(limit // logits.shape[1], 1)
    return [tensor.split(rows) for tensor in (logits, *others)]
