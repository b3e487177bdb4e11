"""Attention and what it needs: who may see whom, the key/value cache, the step from scores to
outputs.

Plain causal attention builds no mask at all; anything else is one boolean mask a forward and window
size, shared by the layers. A rank may hold any tokens of its rows (`Sight.places`) and any heads of
a layer (`BaseAttention.first_head`): what they see and what dropout hits is the same as uncut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dropout import SHARES, dropout, dropout_seeds
from models.layers import Leaf, dtype_of
from models.spec import DecoderConfig, Precision


class KVCache:
    """Keys and values of every layer so far, in tensors that are allocated ahead and doubled when
    full."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep `key` and `value` [rows, heads, new, size] and give all of the layer's, old and new.

        Their heads and sizes may differ.
        """
        end = self.length + key.shape[2]
        if layer not in self._layers or end > self._layers[layer][0].shape[2]:
            self._grow(layer, (key, value), end)
        keys, values = self._layers[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, count: int) -> None:
        """Count `count` more positions as kept: called once a forward, after the last layer."""
        self.length += count

    def _grow(self, layer: int, like: tuple[Tensor, Tensor], needed: int) -> None:
        while self.capacity < needed:
            self.capacity *= 2
        key, value = (t.new_empty(*t.shape[:2], self.capacity, t.shape[3]) for t in like)
        if layer in self._layers:
            for new, old in zip((key, value), self._layers[layer], strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self._layers[layer] = (key, value)


class AttentionMask:
    """Who may see whom in the rows of one forward.

    Every row has `total` tokens, of which `length` are here as queries: those at `places` [length],
    or the last ones when `places` is None. Keys are all of the row unless told otherwise.
    """

    def __init__(
        self,
        *,
        length: int,
        total: int,
        device: torch.device,
        token_indices: Tensor | None = None,
        document_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
    ) -> None:
        """`document_ids` [rows, total]: only inside the same document. `key_mask` [rows, total]:
        False for padding."""
        self.length, self.total = length, total
        self.in_order = token_indices is None
        self.token_indices = (
            torch.arange(total - length, total, device=device)
            if token_indices is None
            else token_indices
        )
        self.document_ids, self.key_mask = document_ids, key_mask
        self._masks: dict[tuple[int | None, bool], Tensor | None] = {}
        self._whole: AttentionMask | None = None

    def mask(
        self,
        window: int | None,
        queries: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        always: bool = False,
    ) -> Tensor | None:
        """A mask [rows or 1, 1, queries, keys], True where a query may look.

        `queries` and `keys` are places in the row; the tokens here and the whole row by default,
        and then the mask is kept for the next layer. None where SDPA's own causal rule is enough,
        unless `always`.
        """
        if queries is not None or keys is not None:
            return self._build(window, queries, keys)
        found = (window, always)
        if found not in self._masks:
            plain = not always and self._is_plain(window)
            self._masks[found] = None if plain else self._build(window, None, None)
        return self._masks[found]

    def whole(self) -> AttentionMask:
        """The same rows seen by all of their tokens, in order: for attention that has gathered
        them. One object for all layers, as masks are kept in it."""
        if self.in_order and self.length == self.total:
            return self
        if self._whole is None:
            self._whole = AttentionMask(
                length=self.total,
                total=self.total,
                device=self.token_indices.device,
                document_ids=self.document_ids,
                key_mask=self.key_mask,
            )
        return self._whole

    def _is_plain(self, window: int | None) -> bool:
        narrow = window is not None and self.total > window
        several = self.length < self.total and self.length > 1  # SDPA aligns them at the first key
        blocks = self.document_ids is not None or self.key_mask is not None
        return self.in_order and not (narrow or blocks or several)

    def _build(self, window: int | None, queries: Tensor | None, keys: Tensor | None) -> Tensor:
        queries = self.token_indices if queries is None else queries
        key_index = (
            torch.arange(self.total, device=self.token_indices.device) if keys is None else keys
        )
        query_index = queries[:, None]
        allowed = key_index <= query_index
        if window is not None and self.total > window:
            allowed = allowed & (key_index > query_index - window)
        allowed = allowed[None, None]
        if self.document_ids is not None:
            asking, asked = self.document_ids[:, queries], self.document_ids[:, key_index]
            allowed = allowed & (asking[:, None, :, None] == asked[:, None, None, :])
        if self.key_mask is not None:
            # A padding query would have nobody to look at: it looks at itself.
            shown = self.key_mask[:, key_index]
            allowed = allowed & shown[:, None, None, :] | (key_index == query_index)
        return allowed


@dataclass(kw_only=True)
class StepContext:
    """What all layers of one forward share. Not a pytree on purpose: wrappers that cast a module's
    floating-point inputs (FSDP mixed precision) leave the tables of the rotation alone."""

    cos: Tensor
    sin: Tensor
    mask: AttentionMask
    stream_indices: Tensor | None = None
    """Places of the tokens of the residual stream here; None: all of a row, in order."""
    dropout_seeds: Tensor | None = None
    """One seed a row [rows], or None: no dropout."""
    cache: KVCache | None = None
    balance_scale: Tensor | None = None
    """d(total loss) / d(sum over rows of a layer's balance loss), a float32 scalar; None: no such
    loss."""


class BaseAttention(Leaf):
    """What attention layers share: from queries, keys and values to outputs."""

    def __init__(
        self, config: DecoderConfig, precision: Precision, layer: int, scale: float | None = None
    ) -> None:
        """`scale` multiplies the scores; None is one over the root of the query size."""
        super().__init__()
        self.layer, self.window = layer, config.sliding_window[layer]
        self.dropout, self.scale = config.attention_dropout, scale
        self.softmax_dtype = dtype_of(precision.softmax_compute_dtype or "float32")
        self.first_head = 0
        """Index of the first head here among those of the layer."""
        heads = config.num_attention_heads
        sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: StepContext, window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Outputs [rows, heads, queries, value size] of `query` [rows, heads, queries, size] over
        `key` and `value` [rows, key/value heads, keys, ...] of the whole row. `sinks` [heads]: one
        more score in every softmax, for nothing.

        Everything about who sees whom happens in here. A seam: the instance's attribute may be
        replaced by a function of the same arguments, which may call this one.
        """
        mask = context.mask
        if context.dropout_seeds is None or not self.dropout:
            return attend(query, key, value, mask.mask(window), scale=self.scale, sinks=sinks)
        heads = torch.arange(query.shape[1], device=query.device) + self.first_head
        return attend_with_dropout(
            query,
            key,
            value,
            mask.mask(window, always=True),
            scale=self.scale,
            dtype=self.softmax_dtype,
            probability=self.dropout,
            seeds=dropout_seeds(context.dropout_seeds, self.layer, SHARES),
            lines=heads[:, None] * mask.total + mask.token_indices,
            sinks=sinks,
        )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention [rows, heads, queries, value size] by the device's kernel.

    Without a mask: causal when there is more than one query. Key/value heads are shared inside the
    kernel without a mask, and repeated with one (kernels fall back to the slowest path otherwise).
    """
    if sinks is not None:
        return _attend_with_sinks(query, key, value, mask, sinks, scale)
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        groups = 1
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=groups > 1,
    )


_SINK_SIZE = 8
"""Numbers that a head grows by for its sink: kernels want multiples of 8."""


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """As `attend`, by the same kernel: a sink is a first key that everybody sees, whose value is
    zero. Heads have more numbers for it, 0 but for one: 1 in that key, `sinks / scale` in every
    query, whose product is the sink."""
    size, width = query.shape[-1], value.shape[-1]
    scale = size**-0.5 if scale is None else scale
    causal = mask is None and query.shape[2] > 1
    of_query = (sinks / scale).to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = F.pad(torch.cat((query, of_query), dim=-1), (0, _SINK_SIZE - 1))
    sink = F.pad(key.new_ones(*key.shape[:2], 1, 1), (size, _SINK_SIZE - 1))
    key = torch.cat((sink, F.pad(key, (0, _SINK_SIZE))), dim=2)
    # Values grow to the size of keys, where they had it: the fastest kernels want them equal.
    value = F.pad(value, (0, _SINK_SIZE if width == size else 0, 1, 0))
    if causal:  # a first query, so that query i + 1 is at the place of key i + 1
        query = F.pad(query, (0, 0, 1, 0))
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    return attend(query, key, value, mask, scale=scale)[:, :, int(causal) :, :width]


def attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float | None,
    dtype: torch.dtype,
    probability: float,
    seeds: Tensor,
    lines: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attend`, with the scores in the open: softmax in `dtype`, then dropout on its result.

    `lines` [heads, queries] numbers the lines of scores for `models.dropout`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)[..., : key.shape[2]]
    return torch.matmul(dropout(shares, probability, seeds, lines=lines), value)
