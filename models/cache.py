"""The key/value cache: past keys and values of the rows of a generation.

Invariants: the tensors of a layer are used from the front and handed out as views, never copied,
except to grow; they grow one layer after the other by blocks, at least a quarter of what there is
and never above `limit`, so that at most a quarter of the memory is unused, a long cache is never
there twice, and the copies of a generation are linear in its length. Padding of rows is on the
left, and known from the start: positions and masks of a step are views of tensors that are computed
when the cache grows.

A step can be recorded once and replayed (CUDA graphs): in `recordable` steps every operation is the
same on the same memory. Where the new token goes is then a tensor, `index`, and keys that are not
there yet are masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from models.documents import lengths_of_counts

BLOCK = 128
"""Tokens by which the cache grows at least."""


class KVCache:
    """Past keys and values of every layer, and the padding of the rows."""

    def __init__(
        self,
        capacity: int = BLOCK,
        *,
        limit: int | None = None,
        padding: Tensor | None = None,
        padding_counts: Sequence[int] | None = None,
    ) -> None:
        """`capacity` tokens at first, `limit` at most; None: no limit. `padding` [rows] int64: how
        many of the first tokens of each row are padding; None: none are. `padding_counts`: the
        same on the host, where the caller knows it."""
        self.capacity, self.limit, self.padding = capacity, limit, padding
        self._padding_counts = padding_counts
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._bias: Tensor | None = None
        self.index: Tensor | None = None
        """In a recordable step: the column of the new token [1] int64."""
        self._step_bias: dict[int | None, Tensor] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append `key` and `value` [rows, heads, new, size]; returns all those of the layer.

        Their heads and sizes may differ.
        """
        end = self.length + key.shape[2]
        if layer not in self._layers or end > self._layers[layer][0].shape[2]:
            self._grow(layer, (key, value), end)
        keys, values = self._layers[layer]
        if self.index is not None:
            return keys.index_copy_(2, self.index, key), values.index_copy_(2, self.index, value)
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Advance the length by `count`: called once a forward, after the last layer."""
        self.length += count

    def reserve(self, count: int) -> None:
        """Grow the layers that have no room for `count` more tokens."""
        for layer, tensors in list(self._layers.items()):
            if self.length + count > tensors[0].shape[2]:
                self._grow(layer, tensors, self.length + count)

    def storage(self) -> tuple[int, ...]:
        """Addresses of the keys of the layers: a recorded step is only right for these."""
        return tuple(keys.data_ptr() for keys, _ in self._layers.values())

    @contextmanager
    def recordable(self, index: Tensor) -> Iterator[None]:
        """In this context steps of one token use `index` [1] int64, which must have the value
        `length`, and change nothing else: the length does not advance."""
        length = self.length
        self._all_positions(1, index.device)
        self.index, self._step_bias = index, {}
        try:
            yield
        finally:
            self.length, self.index, self._step_bias = length, None, {}

    def truncate(self, length: int) -> None:
        """Forget the tokens from index `length` on, for a continuation of the same beginning."""
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache has {self.length} tokens, not {length}")
        self.length = length

    def keep(self, rows: Tensor) -> None:
        """Keep only `rows` (int64 indices), in their order, and the columns that one of them
        uses."""
        self._padding_counts = None
        start = 0
        if self.padding is not None:
            self.padding = self.padding[rows]
            start = int(self.padding.min())
            self.padding = self.padding - start
            if not self.padding.any():
                self.padding = None
        for layer, tensors in list(self._layers.items()):
            key, value = (t[rows, :, start:] for t in tensors)
            self._layers[layer] = (key, value)
        self.length -= start
        self.capacity -= start
        self.limit = None if self.limit is None else self.limit - start
        self._positions = self._rotary = self._bias = None

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Positions [rows or 1, count] int64 of the next tokens: their indices, not counting
        padding."""
        if self.index is not None:
            return self._all_positions(count, device).index_select(1, self.index)
        return self._all_positions(count, device)[:, self.length : self.length + count]

    def rotary(
        self, tables: Callable[[Tensor], tuple[Tensor, Tensor]], count: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """`tables` of the positions of the next tokens, cosines and sines [rows or 1, 1, count,
        size], which must be functions of each position alone."""
        positions = self._all_positions(count, device)
        if self._rotary is None:
            self._rotary = tables(positions)
        if self.index is not None:
            cos, sin = (table.index_select(2, self.index) for table in self._rotary)
            return cos, sin
        cos, sin = (table[:, :, self.length : self.length + count] for table in self._rotary)
        return cos, sin

    def key_mask(self, total: int, device: torch.device) -> Tensor | None:
        """[rows, total], False for padding; None: there is none."""
        if self.padding is None:
            return None
        return torch.arange(total, device=device) >= self.padding[:, None]

    def padding_lengths(self, total: int) -> Tensor | None:
        """The padding and the rest of rows of `total` tokens as documents (`models.documents`);
        None where the host does not know the padding, or there is none."""
        if self.padding is None or self._padding_counts is None:
            return None
        return lengths_of_counts(self._padding_counts, total)

    def visible(
        self, key: Tensor, value: Tensor, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of `key` and `value` [rows, heads, total, size] those that the last token may see, and
        what is added to their scores [rows, 1, 1, keys]; None: nothing, there is no padding."""
        if self.index is not None:
            return key, value, self._recordable_bias(key, window)
        total = key.shape[2]
        start = 0 if window is None else max(0, total - window)
        if start:
            key, value = key[:, :, start:], value[:, :, start:]
        if self.padding is None:
            return key, value, None
        if self._bias is None or self._bias.shape[-1] < total:
            seen = self.key_mask(max(total, self.capacity), key.device)
            assert seen is not None
            bias = torch.zeros(seen.shape, dtype=key.dtype, device=key.device)
            self._bias = bias.masked_fill(~seen, float("-inf"))[:, None, None]
        return key, value, self._bias[..., start:total]

    def _recordable_bias(self, key: Tensor, window: int | None) -> Tensor:
        """As that of `visible`, for all columns of the layers; computed once a step."""
        assert self.index is not None
        if window not in self._step_bias:
            columns = torch.arange(key.shape[2], device=key.device)
            seen = columns <= self.index
            if window is not None:
                seen = seen & (columns > self.index - window)
            if self.padding is not None:
                seen = seen & (columns >= self.padding[:, None])
            bias = torch.zeros(seen.shape, dtype=key.dtype, device=key.device)
            bias = bias.masked_fill(~seen, float("-inf"))
            self._step_bias[window] = bias.view(-1, 1, 1, len(columns))
        return self._step_bias[window]

    def _all_positions(self, count: int, device: torch.device) -> Tensor:
        """Positions of all columns [rows or 1, columns]."""
        needed = self.length + count
        if self._positions is None or self._positions.shape[1] < needed:
            columns = torch.arange(max(needed, self.capacity), device=device)[None]
            if self.padding is not None:
                columns = (columns - self.padding[:, None]).clamp_min(0)
            self._positions, self._rotary = columns, None
        return self._positions

    def _grow(self, layer: int, like: tuple[Tensor, Tensor], needed: int) -> None:
        if needed > self.capacity:
            blocks = -(-max(needed, self.capacity * 5 // 4) // BLOCK) * BLOCK
            self.capacity = blocks if self.limit is None else max(needed, min(blocks, self.limit))
        # Zeros: a recorded step reads all columns, and NaN times a share of zero is NaN.
        key, value = (t.new_zeros(*t.shape[:2], self.capacity, t.shape[3]) for t in like)
        if layer in self._layers:
            for new, old in zip((key, value), self._layers[layer], strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._layers[layer] = (key, value)
