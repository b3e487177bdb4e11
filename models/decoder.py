"""The decoder: every family of `models.families.DECODERS` in one class.

Owns the forward computation. Invariants: parameters have the Hugging Face names; with tied
embeddings there is no `lm_head` parameter, so a model can be built on the meta device, sharded and
filled without retying; weights are never cast, activations have the dtype of the weights; logits
and gradients of the dense families are bitwise equal to those of transformers (attention "sdpa")
for plain causal input in float32.

Nothing here depends on ranks. A pipeline stage is a Decoder with some of its layers, `embeds` or
`ends` off; a shard of the heads needs no change, as head counts are read from the projected
tensors; the local tokens may be any tokens of a row (`token_indices`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from models.attention import AttentionMask, BaseAttention, StepContext
from models.cache import KVCache
from models.deepseek import LatentAttention
from models.documents import OnHost
from models.dropout import ATTENTION_OUTPUT, MLP_OUTPUT, dropout, dropout_seeds
from models.layers import MLP, Embedding, Linear, Module, RMSNorm, TiedHead, dtype_of, norm_of
from models.moe import MoE
from models.rope import RotaryTables, widened
from models.spec import DecoderConfig, Precision


class Attention(BaseAttention):
    """Multi-head or grouped-query attention."""

    def __init__(self, config: DecoderConfig, precision: Precision, layer: int) -> None:
        super().__init__(config, precision, layer)
        self.head_dim, self.rope_interleave = config.head_dim, config.rope_interleave
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        linear = partial(Linear, config.hidden_size, bias=config.attention_bias)
        self.q_proj = linear(heads * config.head_dim)
        self.kv_proj: Linear | None = None
        if config.fused_key_value:
            self.kv_proj = linear(2 * kv_heads * config.head_dim)
        else:
            self.k_proj = linear(kv_heads * config.head_dim)
            self.v_proj = linear(kv_heads * config.head_dim)
        self.o_proj = Linear(heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        norm = partial(norm_of, config, precision, config.head_dim)
        self.q_norm: RMSNorm | None = norm() if config.qk_norm else None
        self.k_norm: RMSNorm | None = norm() if config.qk_norm else None

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        query = self._heads(self.q_proj(states, context), self.q_norm)
        key, value = self._keys_and_values(states, context)
        query, key = (
            context.rotate(heads, interleaved=self.rope_interleave) for heads in (query, key)
        )
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        output = self.attend(query, key, value, context, self.window, self.held("sinks"))
        return self.o_proj(output.transpose(1, 2).flatten(2), context)

    def key_value_projections(self) -> list[tuple[Linear, int]]:
        """The projections to keys and values, each with its number of outputs a KV head."""
        if self.kv_proj is not None:
            return [(self.kv_proj, 2 * self.head_dim)]
        return [(self.k_proj, self.head_dim), (self.v_proj, self.head_dim)]

    def _keys_and_values(self, states: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, KV heads, length, head_dim], not rotated."""
        if self.kv_proj is None:
            key = self._heads(self.k_proj(states, context), self.k_norm)
            return key, self._heads(self.v_proj(states, context), None)
        heads = self.kv_proj(states, context).unflatten(-1, (-1, 2 * self.head_dim)).transpose(1, 2)
        key, value = heads.split(self.head_dim, dim=-1)
        return (key if self.k_norm is None else self.k_norm(key)), value

    def _heads(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """[rows, length, heads * head_dim] -> [rows, heads, length, head_dim], with QK norm."""
        heads = projected.view(*projected.shape[:2], -1, self.head_dim)
        return (heads if norm is None else norm(heads)).transpose(1, 2)


class DecoderLayer(Module):
    """A pre-norm layer: attention, then MLP or experts; in some families with a norm of the output
    of each too."""

    def __init__(self, config: DecoderConfig, precision: Precision, layer: int) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.seed_layer: int | Tensor = layer
        """Number of the layer, for the seeds of dropout: a tensor where compiled layers share a
        graph."""
        attention = Attention if config.latent is None else LatentAttention
        self.self_attn = attention(config, precision, layer)
        self.block_name = "mlp"
        """The attribute with the MLP or the experts, named as in files."""
        if config.experts is not None and config.experts.layers[layer]:
            self.block_name = config.experts.block_name
            block: nn.Module = MoE(config)
        else:
            block = MLP(config.hidden_size, config.intermediate_size, config.hidden_act,
                        bias=config.mlp_bias, down_bias=config.down_bias)  # fmt: skip
        self.add_module(self.block_name, block)
        norm = partial(norm_of, config, precision, config.hidden_size)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.post_self_attn_layernorm: RMSNorm | None = norm() if config.output_norms else None
        self.post_mlp_layernorm: RMSNorm | None = norm() if config.output_norms else None

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        attended = self.self_attn(self.input_layernorm(states), context)
        if self.post_self_attn_layernorm is not None:
            attended = self.post_self_attn_layernorm(attended)
        states = states + self._dropped(attended, context, ATTENTION_OUTPUT)
        block, normed = getattr(self, self.block_name), self.post_attention_layernorm(states)
        transformed = block(normed, context)
        if self.post_mlp_layernorm is not None:
            transformed = self.post_mlp_layernorm(transformed)
        return states + self._dropped(transformed, context, MLP_OUTPUT)

    def regions(self) -> tuple[nn.Module, nn.Module]:
        """The modules that tensor parallelism shards; `models.spec.Rule` defines a region."""
        return self.self_attn, getattr(self, self.block_name)

    def _dropped(self, states: Tensor, context: StepContext, site: int) -> Tensor:
        if context.dropout_seeds is None or not self.dropout:
            return states
        seeds = dropout_seeds(context.dropout_seeds, self.seed_layer, site)
        return dropout(states, self.dropout, seeds, lines=context.stream_indices)


class DecoderModel(Module):
    """The decoder without its head; a separate module for the prefix `model.` of the Hugging Face
    names."""

    def __init__(self, config: DecoderConfig, precision: Precision) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        # A dict, so that a pipeline stage keeps layers "4" and "5" under their names.
        self.layers = nn.ModuleDict({
            str(layer): DecoderLayer(config, precision, layer)
            for layer in range(config.num_hidden_layers)
        })  # fmt: skip
        self.norm = norm_of(config, precision, config.hidden_size)


class Decoder(Module):
    """A causal language model: token ids in, logits out."""

    def __init__(self, config: DecoderConfig, precision: Precision | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision = precision or Precision()
        self.model = DecoderModel(config, self.precision)
        self.lm_head: Linear | None = None
        self.tied_head: TiedHead | None = None
        if config.tie_word_embeddings:
            self.tied_head = TiedHead(self.model.embed_tokens)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rotary = RotaryTables(config)
        self.embeds = True
        """Whether this is the first stage; False: `forward` takes hidden states."""
        self.ends = True
        """Whether this is the last stage; False: `forward` returns hidden states."""
        self.applies_head = True
        """Whether the last stage computes logits; False: `forward` returns the input of the head,
        which the loss applies."""
        self.enter_head: Callable[[Tensor], Tensor] = _unchanged
        """From the normed states to the input of the head. Parallelism may replace it."""
        self.by_documents = True
        """Whether attention is computed by documents where it can be; False: by masks."""
        self.stream_part = (0, 1)
        """(index, count): which of `count` equal chunks of the residual stream, along the sequence,
        is local (sequence parallelism)."""

    def decoder_layers(self) -> list[DecoderLayer]:
        """The local layers, in order."""
        return cast(list[DecoderLayer], list(self.model.layers.values()))

    @property
    def head_module(self) -> Linear | TiedHead:
        """The module from the last hidden states to logits."""
        head = self.tied_head if self.lm_head is None else self.lm_head
        assert head is not None
        return head

    def forward(
        self,
        inputs: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_lengths: Tensor | OnHost | None = None,
        sample_seeds: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
        token_indices: Tensor | None = None,
        total: int | None = None,
        balance_scale: Tensor | None = None,
    ) -> Tensor:
        """Logits [rows, length, vocabulary] (length 1 with `last_only`) for token ids [rows,
        length].

        `position_ids` [rows, length] default to the order in the row, not counting padding.
        `document_ids` [rows, total] restrict attention to the same document; `document_lengths`
        [rows, any] int32 are the same on the CPU (`models.documents.document_lengths`), so that
        nothing waits for a GPU to find out. `sample_seeds` [rows]
        int64 enable dropout in training: its pattern is a function of (seed of the sample, layer).
        `cache` holds the past keys and values of a generation, and the padding of its rows; it is
        extended. `attention_mask` [rows, past + length] is False for padding on the left, where
        the cache does not know it. `balance_scale`: see `StepContext`.

        `token_indices` [length] are the indices of the local tokens in rows of `total` tokens; by
        default the tokens are full rows. A stage without `embeds` takes hidden states [rows, length
        of its stream part, hidden], one without `ends` returns them. Without `applies_head` the
        last stage returns [rows, length, hidden].
        """
        states = self.model.embed_tokens(inputs) if self.embeds else inputs
        length = inputs.shape[1] if self.embeds else inputs.shape[1] * self.stream_part[1]
        past = cache.length if cache is not None else 0
        if total is None:
            total = past + length
        if isinstance(document_lengths, OnHost):
            document_lengths = document_lengths.tensor
        rows_of_cache = None if self.training or attention_mask is not None else cache
        decodes = rows_of_cache is not None and length == 1 and document_ids is None
        if rows_of_cache is not None and not decodes:
            attention_mask = rows_of_cache.key_mask(total, inputs.device)
            if document_ids is None:
                document_lengths = rows_of_cache.padding_lengths(total)
        mask = AttentionMask(
            length=length,
            total=total,
            device=inputs.device,
            token_indices=token_indices,
            document_ids=document_ids,
            document_lengths=document_lengths,
            key_mask=attention_mask,
            by_documents=self.by_documents,
        )
        dtype = states.dtype
        wide_rotary = rows_of_cache is not None and position_ids is None and self.rotary.by_position
        if wide_rotary:
            assert rows_of_cache is not None
            tables = partial(self._wide_rotary, dtype)
            cos, sin = rows_of_cache.rotary(tables, length, inputs.device)
        else:
            if position_ids is None and rows_of_cache is not None:
                position_ids = rows_of_cache.positions(length, inputs.device)
            elif position_ids is None:
                position_ids = _positions(mask)
            cos, sin = self._rotary(dtype, position_ids)
        part, parts = self.stream_part
        context = StepContext(
            cos=cos,
            sin=sin,
            wide_rotary=wide_rotary,
            decodes=decodes,
            mask=mask,
            stream_indices=mask.token_indices.chunk(parts)[part],
            dropout_seeds=sample_seeds if self.training else None,
            cache=cache,
            balance_scale=balance_scale,
        )
        states = self.run_layers(states, context)
        if cache is not None:
            cache.advance(length)
        if not self.ends:
            return states
        states = self.enter_head(self.model.norm(states[:, -1:] if last_only else states))
        return self.head_module(states, context) if self.applies_head else states

    def _rotary(self, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tables of `positions` for hidden states of `dtype`."""
        configured = self.precision.rotary_dtype
        return self.rotary.tables(positions, dtype_of(configured) if configured else dtype)

    def _wide_rotary(self, dtype: torch.dtype, positions: Tensor) -> tuple[Tensor, Tensor]:
        return widened(*self._rotary(dtype, positions))

    def run_layers(self, states: Tensor, context: StepContext) -> Tensor:
        """Run the layers on hidden states [rows, length of the stream part, hidden].

        Parallelism may replace this attribute of an instance by a function of the same arguments.
        """
        for layer in self.model.layers.values():
            states = layer(states, context)
        return states


def _unchanged(states: Tensor) -> Tensor:
    return states


def _positions(mask: AttentionMask) -> Tensor:
    """Positions [rows or 1, length] of the local tokens: their indices, not counting padding."""
    if mask.key_mask is None:
        return mask.token_indices[None]
    counted: Tensor = (mask.key_mask.long().cumsum(-1) - 1).clamp_min(0)
    return counted[:, mask.token_indices]
