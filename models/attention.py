"""Attention: masks, the key/value cache, and the step from queries, keys and values to outputs.

Plain causal attention builds no mask tensor; anything else is one boolean mask a forward and window
size, shared by the layers. A rank may have any tokens of its rows (`AttentionMask.token_indices`)
and any heads of a layer (`BaseAttention.first_head`): mask and dropout are the same as on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.dropout import ATTENTION_PROBABILITIES, dropout, dropout_seeds
from models.layers import Leaf, dtype_of
from models.spec import DecoderConfig, Precision


class KVCache:
    """Past keys and values of every layer, in preallocated tensors that double when full."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append `key` and `value` [rows, heads, new, size]; returns all those of the layer.

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
        """Advance the length by `count`: called once a forward, after the last layer."""
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
    """The attention mask of the rows of one forward.

    Every row has `total` tokens, of which `length` are local queries: those at `token_indices`
    [length], or the last ones if it is None. Keys are the full row by default.
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
        """`document_ids` [rows, total]: attention only within a document. `key_mask` [rows, total]:
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
        self._full: AttentionMask | None = None

    def mask(
        self,
        window: int | None,
        queries: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        always: bool = False,
    ) -> Tensor | None:
        """A mask [rows or 1, 1, queries, keys], True where a query attends to a key.

        `queries` and `keys` are token indices; by default the local tokens and the full row, and
        then the mask is cached for the next layer. None where `is_causal` of SDPA is enough, unless
        `always`.
        """
        if queries is not None or keys is not None:
            return self._build(window, queries, keys)
        key = (window, always)
        if key not in self._masks:
            plain = not always and self._is_plain(window)
            self._masks[key] = None if plain else self._build(window, None, None)
        return self._masks[key]

    def full(self) -> AttentionMask:
        """The mask of the same rows for all of their tokens, in order: for attention after an
        all-to-all. One object for all layers, as it caches masks."""
        if self.in_order and self.length == self.total:
            return self
        if self._full is None:
            self._full = AttentionMask(
                length=self.total,
                total=self.total,
                device=self.token_indices.device,
                document_ids=self.document_ids,
                key_mask=self.key_mask,
            )
        return self._full

    def _is_plain(self, window: int | None) -> bool:
        windowed = window is not None and self.total > window
        offset = (
            self.length < self.total and self.length > 1
        )  # SDPA aligns queries at the first key
        masked = self.document_ids is not None or self.key_mask is not None
        return self.in_order and not (windowed or masked or offset)

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
            of_queries, of_keys = self.document_ids[:, queries], self.document_ids[:, key_index]
            allowed = allowed & (of_queries[:, None, :, None] == of_keys[:, None, None, :])
        if self.key_mask is not None:
            # A padding query would have no key: it attends to itself.
            visible = self.key_mask[:, key_index]
            allowed = allowed & visible[:, None, None, :] | (key_index == query_index)
        return allowed


@dataclass(kw_only=True)
class StepContext:
    """What all layers of one forward share. Not a pytree on purpose: wrappers that cast a module's
    floating-point inputs (FSDP mixed precision) must not cast the rotary tables."""

    cos: Tensor
    sin: Tensor
    mask: AttentionMask
    stream_indices: Tensor | None = None
    """Token indices of the local residual stream; None: the full row, in order."""
    dropout_seeds: Tensor | None = None
    """One seed a row [rows], or None: no dropout."""
    cache: KVCache | None = None
    balance_scale: Tensor | None = None
    """d(total loss) / d(sum over rows of a layer's balance loss), a float32 scalar; None: no
    balance loss."""


class BaseAttention(Leaf):
    """Base of the attention layers: from queries, keys and values to outputs."""

    def __init__(
        self, config: DecoderConfig, precision: Precision, layer: int, scale: float | None = None
    ) -> None:
        """`scale` multiplies the scores; None is 1 / sqrt(query size)."""
        super().__init__()
        self.layer, self.window = layer, config.sliding_window[layer]
        self.dropout, self.scale = config.attention_dropout, scale
        self.softmax_dtype = dtype_of(precision.softmax_compute_dtype or "float32")
        self.first_head = 0
        """Index in the layer of the first local head."""
        heads = config.num_attention_heads
        sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: StepContext, window: int | None,
        sinks: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Outputs [rows, heads, queries, value size] of `query` [rows, heads, queries, size] over
        `key` and `value` [rows, KV heads, keys, ...] of full rows. `sinks` [heads]: one more score
        in every softmax, of a zero value.

        All masking is in here. Context parallelism replaces this attribute of an instance by a
        function of the same arguments, which may call this one.
        """
        mask = context.mask
        if context.dropout_seeds is None or not self.dropout:
            return attend(query, key, value, mask.mask(window), scale=self.scale, sinks=sinks)
        heads = torch.arange(query.shape[1], device=query.device) + self.first_head
        allowed = mask.mask(window, always=True)
        assert allowed is not None
        return attend_with_dropout(
            query,
            key,
            value,
            allowed,
            scale=self.scale,
            dtype=self.softmax_dtype,
            probability=self.dropout,
            seeds=dropout_seeds(context.dropout_seeds, self.layer, ATTENTION_PROBABILITIES),
            lines=heads[:, None] * mask.total + mask.token_indices,
            sinks=sinks,
        )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention [rows, heads, queries, value size] by SDPA.

    Without a mask: causal if there is more than one query, and grouped-query attention in the
    kernel. With a mask KV heads are repeated (kernels fall back to the slowest path otherwise).
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
"""Padding of the head size for a sink: kernels need multiples of 8."""


def _attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """As `attend`, by the same kernel: a sink is a first key that all queries attend to, whose
    value is zero. The head size is padded with zeros, except for one dimension: 1 in that key,
    `sinks / scale` in every query, whose product with `scale` is the sink."""
    size, width = query.shape[-1], value.shape[-1]
    scale = size**-0.5 if scale is None else scale
    causal = mask is None and query.shape[2] > 1
    of_query = (sinks / scale).to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    query = F.pad(torch.cat((query, of_query), dim=-1), (0, _SINK_SIZE - 1))
    sink = F.pad(key.new_ones(*key.shape[:2], 1, 1), (size, _SINK_SIZE - 1))
    key = torch.cat((sink, F.pad(key, (0, _SINK_SIZE))), dim=2)
    # Values are padded like keys of the same size: the fastest kernels need them equal.
    value = F.pad(value, (0, _SINK_SIZE if width == size else 0, 1, 0))
    if causal:  # a first query, so that query i + 1 is aligned with key i + 1
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
    """As `attend`, without a fused kernel: softmax in `dtype`, then dropout on the probabilities.

    `lines` [heads, queries] are the row indices of the scores for `models.dropout`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    probabilities = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)[..., : key.shape[2]]
    return torch.matmul(dropout(probabilities, probability, seeds, lines=lines), value)
