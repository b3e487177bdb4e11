"""Attention with scores in memory, those of one tile at a time: any device, dtype and dropout.

Owns the arithmetic and its gradient, in which the scores are computed again: what is kept between
the passes is linear in the length of a row. KV heads are not repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.documents import Tile, document_plan
from models.dropout import dropout
from models.operator_flops import register_attention
from models.tile_tensors import TileGradients, empty_by_token, empty_outputs, tile_slices

QUERIES_IN_MEMORY = 256
"""Queries of a tile."""


@dataclass(frozen=True)
class _Step:
    """What the tiles of one call have in common."""

    window: int | None
    scale: float
    dtype: torch.dtype
    """Of the softmax."""
    probability: float
    first_head: int
    total: int

    def softmax(self, tile: Tile, query: Tensor, key: Tensor, sinks: Tensor | None) -> Tensor:
        """The probabilities of a tile, [rows, heads, queries, keys, or keys + 1 with a sink]."""
        scores = self._products(query, key.transpose(2, 3)) * self.scale
        if len(tile.keys) > 1:
            mask = tile.mask(self.window, query.device)
            scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        if sinks is not None:
            column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, column), dim=-1)
        return torch.softmax(scores, dim=-1, dtype=self.dtype)

    def outputs(
        self, tile: Tile, query: Tensor, key: Tensor, value: Tensor, seeds: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """[rows, heads, queries, value size], of the queries, keys and values of a tile."""
        shares = self.softmax(tile, query, key, sinks).to(query.dtype)[..., : len(tile.keys)]
        return self._products(self._dropped(tile, shares, seeds), value)

    def gradients(
        self, tile: Tile, gradient: Tensor, query: Tensor, key: Tensor, value: Tensor,
        seeds: Tensor | None, sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Those of queries, keys, values and sinks."""
        softmax = self.softmax(tile, query, key, sinks)
        shares = self._dropped(tile, softmax.to(query.dtype)[..., : len(tile.keys)], seeds)
        grad_value = self._over_queries(shares, gradient, value)
        # Dropout is a product with a constant: its gradient is the same product.
        of_shares = self._dropped(tile, self._products(gradient, value.transpose(2, 3)), seeds)
        of_shares = F.pad(of_shares, (0, softmax.shape[-1] - len(tile.keys))).to(self.dtype)
        of_scores = softmax * (of_shares - (softmax * of_shares).sum(-1, keepdim=True))
        of_sinks = None if sinks is None else of_scores[..., -1].sum((0, 2))
        of_scores = (of_scores[..., : len(tile.keys)] * self.scale).to(query.dtype)
        grad_query = self._products(of_scores, key)
        return grad_query, self._over_queries(of_scores, query, key), grad_value, of_sinks

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        """`left` [rows, heads, n, a] times `right` [rows, KV heads, a, b]: [rows, heads, n, b]. The
        query heads of one KV head are further rows of one product."""
        rows, heads, count, inner = left.shape
        by_kv_head = left.reshape(rows, right.shape[1], -1, inner)
        return torch.matmul(by_kv_head, right).view(rows, heads, count, right.shape[-1])

    def _over_queries(self, left: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """`left` [rows, heads, n, a] and `right` [..., n, b]: their products [rows, KV heads, a,
        b], summed over the query heads of a KV head of `like` and over n."""
        left, right = (t.reshape(t.shape[0], like.shape[1], -1, t.shape[-1]) for t in (left, right))
        return torch.matmul(left.transpose(2, 3), right)

    def _dropped(self, tile: Tile, shares: Tensor, seeds: Tensor | None) -> Tensor:
        if seeds is None:
            return shares
        device = shares.device
        heads = torch.arange(shares.shape[1], device=device) + self.first_head
        queries = torch.arange(tile.queries.start, tile.queries.stop, device=device)
        columns = torch.arange(tile.keys.start, tile.keys.stop, device=device)
        lines = heads[:, None] * self.total + queries
        return dropout(shares, self.probability, seeds, lines=lines, columns=columns)


@torch.library.custom_op("slipway::attend_tiles", mutates_args=())
def attend_tiles(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, seeds: Tensor | None,
    sinks: Tensor | None, window: int | None, scale: float, dtype: torch.dtype, probability: float,
    first_head: int,
) -> Tensor:  # fmt: skip
    plan = document_plan(lengths, query.shape[0], query.shape[2])
    step = _Step(window, scale, dtype, probability, first_head, plan.total)
    output, _ = empty_outputs(query, value)
    for tile in plan.tiles(window, QUERIES_IN_MEMORY):
        queries, keys = tile_slices(tile, plan)
        own = None if seeds is None else seeds[tile.rows]
        output[queries] = step.outputs(tile, query[queries], key[keys], value[keys], own, sinks)
    return output


@attend_tiles.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, seeds: Tensor | None,
    sinks: Tensor | None, window: int | None, scale: float, dtype: torch.dtype, probability: float,
    first_head: int,
) -> Tensor:  # fmt: skip
    return empty_outputs(query, value)[0]


@torch.library.custom_op("slipway::attend_tiles_backward", mutates_args=())
def attend_tiles_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor,
    seeds: Tensor | None, sinks: Tensor | None, window: int | None, scale: float,
    dtype: torch.dtype, probability: float, first_head: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys, values and sinks (no elements where there are none)."""
    plan = document_plan(lengths, query.shape[0], query.shape[2])
    step = _Step(window, scale, dtype, probability, first_head, plan.total)
    tiles = list(plan.tiles(window, QUERIES_IN_MEMORY))
    sums = TileGradients(query, key, value, all(tile.is_causal for tile in tiles))
    grad_sinks = query.new_zeros(0 if sinks is None else len(sinks), dtype=torch.float32)
    for tile in tiles:
        queries, keys = tile_slices(tile, plan)
        own = None if seeds is None else seeds[tile.rows]
        *found, of_sinks = step.gradients(
            tile, gradient[queries], query[queries], key[keys], value[keys], own, sinks
        )
        sums.add(queries, keys, *found)
        if of_sinks is not None:
            grad_sinks += of_sinks
    return *sums.of_operands(), grad_sinks


@attend_tiles_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor,
    seeds: Tensor | None, sinks: Tensor | None, window: int | None, scale: float,
    dtype: torch.dtype, probability: float, first_head: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    of_sinks = query.new_empty(0 if sinks is None else len(sinks), dtype=torch.float32)
    return empty_by_token(query), empty_by_token(key), empty_by_token(value), of_sinks


def _save_tiles(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors)


def _tiles_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, sinks = ctx.saved_tensors
    *found, of_sinks = attend_tiles_backward(gradient, *tensors, sinks, *ctx.settings)
    grad_sinks = None if sinks is None else of_sinks.to(sinks.dtype)
    return *found, None, None, grad_sinks, None, None, None, None, None


attend_tiles.register_autograd(_tiles_backward, setup_context=_save_tiles)
register_attention(torch.ops.slipway.attend_tiles, torch.ops.slipway.attend_tiles_backward)
