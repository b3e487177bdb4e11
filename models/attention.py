"""Attention: which tokens attend to which, and the step from queries, keys and values to outputs.

One description of the rows of a forward (`AttentionMask`: documents, padding, which tokens are
local) and the window of a layer decide how attention is computed, in `BaseAttention.attend`:

    one query a row, over a cache     `attend_last`
    plain causal                      scaled dot product attention, without a mask
    documents, padding, a window,     `models.packed_attention`: by documents, memory linear in the
    queries after a past, sinks,      length of a row, no mask; dropout too
    values unlike keys (MLA)
    rows of up to `MASK_UP_TO`        one boolean mask a forward and window, shared by the layers
    tokens; documents out of order    the same

A rank may have any tokens of its rows (`AttentionMask.token_indices`) and any heads of a layer
(`BaseAttention.first_head`): mask and dropout are the same as on one rank.
In a decoding step, one query a row over the cache, the queries of a KV head are the rows of one
product, and nothing is copied: keys that a query does not see are cut off, or masked by a mask that
is computed once a generation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import KVCache
from models.documents import lengths_of_ids, lengths_of_padding, one_document
from models.dropout import ATTENTION_PROBABILITIES, dropout, dropout_seeds
from models.layers import Leaf, dtype_of
from models.packed_attention import attend_documents, attend_documents_with_dropout
from models.rope import rotate, rotate_wide
from models.spec import DecoderConfig, Precision

MASK_UP_TO = 64
"""Tokens of a row up to which one call with a mask is cheaper than the plan of its documents, their
calls and an operator of our own: all of that took 0.1 ms on a CPU, a mask of 64 x 64 with 8 heads
0.3 ms, one of 128 x 128 1.1 ms."""


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
        document_lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        by_documents: bool = True,
    ) -> None:
        """`document_ids` [rows, total]: attention only within a document. `key_mask` [rows, total]:
        False for padding. `document_lengths` [rows, any]: the same on the host, as
        `models.documents` has it; None: found out here, which waits for a GPU. `by_documents`
        False: attention is never by documents, always by masks."""
        self.length, self.total = length, total
        self.in_order = token_indices is None
        self.token_indices = (
            torch.arange(total - length, total, device=device)
            if token_indices is None
            else token_indices
        )
        self.document_ids, self.key_mask = document_ids, key_mask
        self.lengths: Tensor | None = None
        """The documents of the rows; None: not needed, or lengths cannot express them."""
        self.by_documents = by_documents
        if by_documents and total > MASK_UP_TO and length > 1:
            self.lengths = self._lengths() if document_lengths is None else document_lengths
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
                document_lengths=self.lengths,
                key_mask=self.key_mask,
                by_documents=self.by_documents,
            )
        return self._full

    def documents(self, window: int | None, *, always: bool = False) -> Tensor | None:
        """The lengths of the documents of the rows where attention is to be computed by documents;
        None: by a mask, or without one. `always`: also where `is_causal` of SDPA is enough."""
        return self.lengths if self.in_order and (always or not self._is_plain(window)) else None

    def _lengths(self) -> Tensor | None:
        if self.document_ids is not None and self.key_mask is not None:
            return None
        if self.document_ids is not None:
            # In a graph there are no values to look at.
            compiling = torch.compiler.is_compiling()
            return None if compiling else lengths_of_ids(self.document_ids)
        if self.key_mask is not None:
            return lengths_of_padding(self.key_mask)
        return one_document(self.total)

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
    decodes: bool = False
    """Whether every row has one query, the last token of the cache."""
    wide_rotary: bool = False
    """Whether `cos` and `sin` are those of `models.rope.widened`."""
    balance_scale: Tensor | None = None
    """d(total loss) / d(sum over rows of a layer's balance loss), a float32 scalar; None: no
    balance loss."""

    def rotate(self, states: Tensor, *, interleaved: bool) -> Tensor:
        """`states` [rows, heads, length, head_dim] rotated, as by `models.rope.rotate`."""
        rotated = rotate_wide if self.wide_rotary else rotate
        return rotated(states, self.cos, self.sin, interleaved=interleaved)


class BaseAttention(Leaf):
    """Base of the attention layers: from queries, keys and values to outputs."""

    def __init__(
        self, config: DecoderConfig, precision: Precision, layer: int, scale: float | None = None
    ) -> None:
        """`scale` multiplies the scores; None is 1 / sqrt(query size)."""
        super().__init__()
        self.layer, self.window = layer, config.sliding_window[layer]
        self.seed_layer: int | Tensor = layer
        """As in `DecoderLayer`."""
        self.dropout, self.scale = config.attention_dropout, scale
        self.softmax_dtype = dtype_of(precision.softmax_compute_dtype or "float32")
        self.first_head = 0
        """Index in the layer of the first local head."""
        heads = config.num_attention_heads
        sinks = nn.Parameter(torch.empty(heads)) if config.attention_sinks else None
        self.register_parameter("sinks", sinks)

    def prepare(self, context: StepContext) -> None:
        """Build what `attend` caches in `context` for all layers of a forward, if this one is the
        first: a compiled layer then is the same graph, first or not. Replaced together with
        `attend`."""
        if context.cache is not None:
            return
        drops = context.dropout_seeds is not None and bool(self.dropout)
        if context.mask.documents(self.window, always=drops) is None:
            context.mask.mask(self.window, always=drops)

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
        if context.decodes and context.cache is not None:
            key, value, bias = context.cache.visible(key, value, window)
            return attend_last(query, key, value, bias, scale=self.scale, sinks=sinks)
        if context.dropout_seeds is not None and self.dropout:
            return self._attend_with_dropout(query, key, value, context, window, sinks)
        unlike = sinks is not None or value.shape[-1] != query.shape[-1]
        lengths = mask.documents(window, always=unlike)
        if lengths is None:
            return attend(query, key, value, mask.mask(window), scale=self.scale, sinks=sinks)
        return attend_documents(
            query, key, value, lengths, window=window, scale=self.scale, sinks=sinks
        )

    def _attend_with_dropout(
        self, query: Tensor, key: Tensor, value: Tensor, context: StepContext, window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        mask = context.mask
        assert context.dropout_seeds is not None
        seeds = dropout_seeds(context.dropout_seeds, self.seed_layer, ATTENTION_PROBABILITIES)
        lengths = mask.documents(window, always=True)
        if lengths is not None:
            return attend_documents_with_dropout(
                query,
                key,
                value,
                lengths,
                window=window,
                scale=self.scale,
                dtype=self.softmax_dtype,
                probability=self.dropout,
                seeds=seeds,
                first_head=self.first_head,
                sinks=sinks,
            )
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
            seeds=seeds,
            lines=heads[:, None] * mask.total + mask.token_indices,
            sinks=sinks,
        )


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention [rows, heads, queries, value size] by SDPA.

    Without a mask: causal if there is more than one query. Grouped-query attention is that of the
    kernel; but with a mask on a GPU KV heads are repeated, as no fast kernel has both.
    """
    if sinks is not None:
        return _attend_with_sinks(query, key, value, mask, sinks, scale)
    groups = query.shape[1] // key.shape[1]
    if mask is not None and groups > 1 and not query.is_cpu:
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


def attend_last(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `attend`, for one query a row that attends to all keys; `bias` [rows or 1, 1, 1, keys] is
    added to the scores.

    The queries that share a KV head are taken together: they become queries of one head.
    """
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, size)
    if sinks is not None:
        sinks = sinks.view(kv_heads, -1, 1)
        output = _softmax_with_sinks(grouped, key, value, bias, sinks, scale)
    else:
        output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=bias, scale=scale)
    return output.reshape(rows, heads, 1, value.shape[-1])


def _softmax_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sinks: Tensor,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """Attention [rows, KV heads, queries, value size] without a kernel, `sinks` [KV heads, queries,
    1]: keys are not copied to add one, as `_attend_with_sinks` does."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(2, 3)).float()
    if bias is not None:
        scores = scores + bias
    column = sinks.float().expand(*scores.shape[:3], 1)
    shares = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(shares.to(value.dtype), value)


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
