"""Softmax attention whose keys and values come piece by piece, and its gradients.

Owns the arithmetic alone: pieces come in any order and from anywhere, and no tensor is larger than
a piece's scores or the operands. Queries are [rows, key/value heads, query heads of each, queries,
size], so that key/value heads need not be repeated; keys and values [rows, key/value heads, keys,
size]. Products are in the dtype of the operands; scores, statistics and sums over pieces in float32
(float64 for float64). Softmax piece by piece is by Milakov and Gimelshein
(https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A part of the scores: which queries here, which of the keys that are passing through."""

    queries: slice
    keys: slice
    mask: Tensor | None
    """[rows or 1, 1, queries, keys], True where a query may look; None: everywhere."""


def grouped(states: Tensor, heads: int) -> Tensor:
    """[rows, query heads, ...] -> [rows, key/value heads, query heads of each, ...]"""
    return states.unflatten(1, (heads, -1))


class Softmax:
    """The outputs, and what each piece adds to them.

    All is relative to the highest score of each query so far.
    """

    def __init__(
        self, asking: Tensor, value_size: int, scale: float, sinks: Tensor | None = None
    ) -> None:
        """`asking`: the queries. `scale` multiplies the scores. `sinks` [query heads]: a score that
        each query of a head has seen already, of a key whose value is zero."""
        self.asking, self.scale = asking, scale
        dtype = _wide(asking.dtype)
        lowest = torch.finfo(dtype).min  # not -inf: the difference of two would be no number
        self.peak = torch.full(asking.shape[:-1], lowest, dtype=dtype, device=asking.device)
        self.weight = torch.zeros_like(self.peak)
        self.sum = self.weight.new_zeros((*asking.shape[:-1], value_size))
        if sinks is not None:
            self.peak.copy_(_by_query(sinks, asking))
            self.weight.fill_(1.0)

    def add(self, piece: Block, keys: Tensor, values: Tensor) -> None:
        """Let the queries of `piece` look at its keys."""
        peak, weight, total = (
            t[:, :, :, piece.queries] for t in (self.peak, self.weight, self.sum)
        )
        scores = _scores(self.asking, keys, piece, self.scale)
        higher = torch.maximum(peak, scores.amax(-1))
        shares = scores.sub_(higher[..., None]).exp_()
        shrink = (peak - higher).exp_()
        peak.copy_(higher)
        weight.mul_(shrink).add_(shares.sum(-1))
        outputs = _by_head(shares.to(values.dtype), values[:, :, piece.keys])
        total.mul_(shrink[..., None]).add_(outputs)

    def output(self) -> Tensor:
        """[..., queries, value size] of queries that have seen at least one key each."""
        return self.sum / self.weight[..., None]

    def logarithm(self) -> Tensor:
        """The logarithm of the sum of the exponentials of the scores [..., queries]."""
        return self.peak + self.weight.log()


class Change:
    """The gradients, and what each piece adds to them: its scores are computed again."""

    def __init__(
        self, asking: Tensor, output: Tensor, gradient: Tensor, logarithm: Tensor, scale: float
    ) -> None:
        """`output`, its `gradient` and `logarithm`: of `Softmax` when it had seen all pieces."""
        self.asking, self.gradient, self.logarithm = asking, gradient, logarithm
        self.scale = scale
        self.of_query = torch.zeros_like(asking, dtype=logarithm.dtype)
        # What softmax takes off the change of each score, as the shares of a query add up to one:
        # their mean change.
        self.mean = (gradient.to(logarithm.dtype) * output.to(logarithm.dtype)).sum(-1)

    def of_sinks(self, sinks: Tensor) -> Tensor:
        """The gradient of the `sinks` given to `Softmax`. Their values are zero: what is left is
        the mean change, by their share."""
        shares = (_by_query(sinks, self.asking).to(self.mean.dtype) - self.logarithm).exp()
        return (-shares * self.mean).sum((0, -1)).flatten().to(sinks.dtype)

    def add(
        self, piece: Block, keys: Tensor, values: Tensor, of_keys: Tensor, of_values: Tensor
    ) -> None:
        """Add to `of_query`, and to `of_keys` and `of_values`, shaped as `keys` and `values`."""
        parts = (self.asking, self.gradient, self.logarithm, self.mean)
        asking, gradient, logarithm, mean = (t[:, :, :, piece.queries] for t in parts)
        key, value = keys[:, :, piece.keys], values[:, :, piece.keys]
        scores = _scores(self.asking, keys, piece, self.scale)
        shares = scores.sub_(logarithm[..., None]).exp_()
        of_values[:, :, piece.keys] += _over_queries(shares.to(gradient.dtype), gradient)
        slope = _by_head(gradient, value.transpose(2, 3)).to(shares.dtype)
        slope = slope.sub_(mean[..., None]).mul_(shares).mul_(self.scale).to(key.dtype)
        self.of_query[:, :, :, piece.queries] += _by_head(slope, key)
        of_keys[:, :, piece.keys] += _over_queries(slope, asking)


def _by_query(sinks: Tensor, asking: Tensor) -> Tensor:
    """[query heads] -> [key/value heads, query heads of each, 1]"""
    return sinks.unflatten(0, asking.shape[1:3])[..., None]


def _scores(asking: Tensor, keys: Tensor, piece: Block, scale: float) -> Tensor:
    """Scores [rows, key/value heads, query heads of each, queries, keys] of a piece, -inf where a
    query may not look; a fresh tensor."""
    query, key = asking[:, :, :, piece.queries], keys[:, :, piece.keys]
    scores = _by_head(query, key.transpose(2, 3)).to(_wide(query.dtype)).mul_(scale)
    if piece.mask is not None:
        scores.masked_fill_(~piece.mask[:, None], float("-inf"))
    return scores


def _by_head(lines: Tensor, matrix: Tensor) -> Tensor:
    """`lines` [rows, key/value heads, query heads of each, n, a] times `matrix` [rows, key/value
    heads, a, b]: the query heads of one key/value head are more lines of one product."""
    return torch.matmul(lines.flatten(2, 3), matrix).unflatten(2, lines.shape[2:4])


def _over_queries(left: Tensor, right: Tensor) -> Tensor:
    """`left` [rows, key/value heads, query heads of each, n, a], `right` [..., n, b] -> their
    products [rows, key/value heads, a, b] added up over the query heads and n."""
    return torch.matmul(left.flatten(2, 3).transpose(2, 3), right.flatten(2, 3))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
