"""Tensors of tiles: where the operands and results of a tile are in those of full rows.

Invariant: results are in memory by token, then head, as the projections before and after attention
have them, so that no layer copies them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.documents import DocumentPlan, Tile


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [rows, heads, queries, value size] and log-sum-exps [rows, heads, queries], in memory
    as the kernels have them: by token, then head; and by head."""
    rows, heads, queries = query.shape[:3]
    output = query.new_empty((rows, queries, heads, value.shape[-1])).transpose(1, 2)
    wide = torch.promote_types(query.dtype, torch.float32)
    logsumexp = query.new_empty((heads, rows, queries), dtype=wide).transpose(0, 1)
    return output, logsumexp


def empty_by_token(states: Tensor) -> Tensor:
    """By token, then head, as the projections have their outputs."""
    rows, heads, length, size = states.shape
    return states.new_empty((rows, length, heads, size)).transpose(1, 2)


def zeros_by_token(states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    rows, heads, length, size = states.shape
    return states.new_zeros((rows, length, heads, size), dtype=dtype).transpose(1, 2)


def tile_slices(tile: Tile, plan: DocumentPlan) -> tuple[Any, Any]:
    """Indices of the queries and of the keys of a tile in tensors [rows, heads, length, ...]."""
    first = plan.total - plan.queries
    queries = slice(tile.queries.start - first, tile.queries.stop - first)
    keys = slice(tile.keys.start, tile.keys.stop)
    return (tile.rows, slice(None), queries), (tile.rows, slice(None), keys)


class TileGradients:
    """The gradients of queries, keys and values, from those of tiles."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, apart: bool) -> None:
        """`apart`: no two tiles have a key in common. Otherwise gradients of keys and values are
        sums, in float32 at least."""
        self._apart, self._dtype = apart, query.dtype
        wide = query.dtype if apart else torch.promote_types(query.dtype, torch.float32)
        self._query = zeros_by_token(query)
        self._key, self._value = zeros_by_token(key, wide), zeros_by_token(value, wide)

    def add(
        self, queries: Any, keys: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor
    ) -> None:
        """Those of a tile; `queries` and `keys` are indices."""
        self._query[queries] = grad_query
        if self._apart:
            self._key[keys], self._value[keys] = grad_key, grad_value
        else:
            self._key[keys] += grad_key
            self._value[keys] += grad_value

    def of_operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """All of them, in the dtype of the operands."""
        return self._query, self._key.to(self._dtype), self._value.to(self._dtype)
