"""Softmax attention over blocks of keys and values, and its gradients.

Owns the arithmetic alone: blocks may come in any order and from any rank, and no tensor is larger
than the scores of one block or the operands. Queries are [rows, KV heads, query heads of each,
queries, size], so that KV heads need not be repeated; keys and values [rows, KV heads, keys, size].
Products are in the dtype of the operands; scores, statistics and sums over blocks in float32
(float64 for float64). The online softmax is that of Milakov and Gimelshein
(https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A block of scores: some of the local queries by some of the keys of the current ring step."""

    queries: slice
    keys: slice
    mask: Tensor | None
    """[rows or 1, 1, queries, keys], True where a query attends to a key; None: everywhere."""


def grouped(states: Tensor, heads: int) -> Tensor:
    """[rows, query heads, ...] -> [rows, KV heads, query heads of each, ...]"""
    return states.unflatten(1, (heads, -1))


class OnlineSoftmax:
    """The attention outputs, accumulated over blocks relative to the running maximum of the scores
    of each query."""

    def __init__(
        self, queries: Tensor, value_size: int, scale: float, sinks: Tensor | None = None
    ) -> None:
        """`scale` multiplies the scores. `sinks` [query heads]: an initial score of each query of a
        head, of a key whose value is zero."""
        self.queries, self.scale = queries, scale
        dtype = _accumulation_dtype(queries.dtype)
        lowest = torch.finfo(dtype).min  # not -inf: the difference of two would be NaN
        self.maximum = torch.full(queries.shape[:-1], lowest, dtype=dtype, device=queries.device)
        self.denominator = torch.zeros_like(self.maximum)
        self.numerator = self.denominator.new_zeros((*queries.shape[:-1], value_size))
        if sinks is not None:
            self.maximum.copy_(_by_query(sinks, queries))
            self.denominator.fill_(1.0)

    def add(self, block: Block, keys: Tensor, values: Tensor) -> None:
        """Accumulate the scores of `block`."""
        maximum, denominator, numerator = (
            t[:, :, :, block.queries] for t in (self.maximum, self.denominator, self.numerator)
        )
        scores = _scores(self.queries, keys, block, self.scale)
        higher = torch.maximum(maximum, scores.amax(-1))
        exponentials = scores.sub_(higher[..., None]).exp_()
        rescale = (maximum - higher).exp_()
        maximum.copy_(higher)
        denominator.mul_(rescale).add_(exponentials.sum(-1))
        outputs = _by_head(exponentials.to(values.dtype), values[:, :, block.keys])
        numerator.mul_(rescale[..., None]).add_(outputs)

    def output(self) -> Tensor:
        """[..., queries, value size]; each query must have attended to at least one key."""
        return self.numerator / self.denominator[..., None]

    def logsumexp(self) -> Tensor:
        """The log-sum-exp of the scores [..., queries]."""
        return self.maximum + self.denominator.log()


class SoftmaxBackward:
    """The gradients, accumulated over blocks whose scores are recomputed."""

    def __init__(
        self, queries: Tensor, output: Tensor, gradient: Tensor, logsumexp: Tensor, scale: float
    ) -> None:
        """`output`, its `gradient` and `logsumexp`: those of `OnlineSoftmax` after all blocks."""
        self.queries, self.gradient, self.logsumexp = queries, gradient, logsumexp
        self.scale = scale
        self.grad_query = torch.zeros_like(queries, dtype=logsumexp.dtype)
        # The softmax subtracts this from the gradient of each probability: their weighted mean,
        # as the probabilities of a query sum to one.
        self.mean = (gradient.to(logsumexp.dtype) * output.to(logsumexp.dtype)).sum(-1)

    def grad_sinks(self, sinks: Tensor) -> Tensor:
        """The gradient of the `sinks` given to `OnlineSoftmax`. Their values are zero: only the
        mean remains, times their probability."""
        probabilities = (_by_query(sinks, self.queries).to(self.mean.dtype) - self.logsumexp).exp()
        return (-probabilities * self.mean).sum((0, -1)).flatten().to(sinks.dtype)

    def add(
        self, block: Block, keys: Tensor, values: Tensor, grad_keys: Tensor, grad_values: Tensor
    ) -> None:
        """Add to `grad_query`, and to `grad_keys` and `grad_values`, shaped as `keys` and
        `values`."""
        operands = (self.queries, self.gradient, self.logsumexp, self.mean)
        query, gradient, logsumexp, mean = (t[:, :, :, block.queries] for t in operands)
        key, value = keys[:, :, block.keys], values[:, :, block.keys]
        scores = _scores(self.queries, keys, block, self.scale)
        probabilities = scores.sub_(logsumexp[..., None]).exp_()
        grad_values[:, :, block.keys] += _over_queries(probabilities.to(gradient.dtype), gradient)
        grad_scores = _by_head(gradient, value.transpose(2, 3)).to(probabilities.dtype)
        grad_scores = grad_scores.sub_(mean[..., None]).mul_(probabilities).mul_(self.scale)
        grad_scores = grad_scores.to(key.dtype)
        self.grad_query[:, :, :, block.queries] += _by_head(grad_scores, key)
        grad_keys[:, :, block.keys] += _over_queries(grad_scores, query)


def _by_query(sinks: Tensor, queries: Tensor) -> Tensor:
    """[query heads] -> [KV heads, query heads of each, 1]"""
    return sinks.unflatten(0, queries.shape[1:3])[..., None]


def _scores(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    """Scores [rows, KV heads, query heads of each, queries, keys] of a block, -inf where masked; a
    new tensor."""
    query, key = queries[:, :, :, block.queries], keys[:, :, block.keys]
    scores = _by_head(query, key.transpose(2, 3)).to(_accumulation_dtype(query.dtype)).mul_(scale)
    if block.mask is not None:
        scores.masked_fill_(~block.mask[:, None], float("-inf"))
    return scores


def _by_head(left: Tensor, right: Tensor) -> Tensor:
    """`left` [rows, KV heads, query heads of each, n, a] times `right` [rows, KV heads, a, b]: the
    query heads of one KV head are further rows of one product."""
    return torch.matmul(left.flatten(2, 3), right).unflatten(2, left.shape[2:4])


def _over_queries(left: Tensor, right: Tensor) -> Tensor:
    """`left` [rows, KV heads, query heads of each, n, a], `right` [..., n, b] -> their products
    [rows, KV heads, a, b], summed over the query heads and n."""
    return torch.matmul(left.flatten(2, 3).transpose(2, 3), right.flatten(2, 3))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
