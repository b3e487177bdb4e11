"""The dense decoder: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 in one class.

Owns the forward computation. Invariants: parameters have the Hugging Face names; there are no
buffers, and tied embeddings mean that there is no `lm_head` parameter, so a model may be built on
the meta device, sharded and filled without anything to repair; weights are never cast, activations
have the dtype the weights arrive in; logits and gradients equal those of transformers (attention
"sdpa") to the bit for plain causal input in float32. Nothing here knows of ranks: head counts are
read off the weights, so a slice of the heads runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import (
    KVCache,
    StepContext,
    attend,
    attend_with_dropout,
    attention_masks,
    dropout,
    dropout_seeds,
)
from models.rope import RotaryTables, rotate
from models.spec import DecoderConfig, Precision

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
# Places of dropout in a layer: the attention shares, what attention adds, what the MLP adds.
SHARES, ATTENTION_OUTPUT, MLP_OUTPUT = 0, 1, 2


class Linear(nn.Linear):
    """Leaves its values to `models.initial`; torch's own draw costs, on meta even an import."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Leaves its values to `models.initial`, as `Linear` does."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in `compute_dtype`."""

    def __init__(self, size: int, eps: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.compute_dtype = eps, compute_dtype

    def forward(self, states: Tensor) -> Tensor:
        wide = states.to(self.compute_dtype)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(states.dtype)


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, precision: Precision, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.window = (
            layer,
            config.head_dim,
            config.sliding_window[layer],
        )
        self.dropout = config.attention_dropout
        self.softmax_dtype = _dtype(precision.softmax_compute_dtype or "float32")
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        linear = partial(Linear, config.hidden_size, bias=config.attention_bias)
        self.q_proj = linear(heads * config.head_dim)
        self.k_proj = linear(shared * config.head_dim)
        self.v_proj = linear(shared * config.head_dim)
        self.o_proj = Linear(heads * config.head_dim, config.hidden_size, bias=config.output_bias)
        norm = partial(RMSNorm, config.head_dim, config.rms_norm_eps,
                       _dtype(precision.layernorm_compute_dtype))  # fmt: skip
        self.q_norm: RMSNorm | None = norm() if config.qk_norm else None
        self.k_norm: RMSNorm | None = norm() if config.qk_norm else None

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        rows, length, _ = states.shape
        query = self._heads(self.q_proj(states), self.q_norm)
        key = self._heads(self.k_proj(states), self.k_norm)
        value = self._heads(self.v_proj(states), None)
        query, key = (rotate(heads, context.cos, context.sin) for heads in (query, key))
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        mask = context.masks[self.window]
        if context.dropout_seeds is None or not self.dropout:
            output = attend(query, key, value, mask)
        else:
            assert mask is not None
            seeds = dropout_seeds(context.dropout_seeds, self.layer, SHARES)
            output = attend_with_dropout(query, key, value, mask, dtype=self.softmax_dtype,
                                         probability=self.dropout, seeds=seeds)  # fmt: skip
        return self.o_proj(output.transpose(1, 2).reshape(rows, length, -1))

    def _heads(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """[rows, length, heads * head_dim] -> [rows, heads, length, head_dim], each head normed."""
        heads = projected.view(*projected.shape[:2], -1, self.head_dim)
        return (heads if norm is None else norm(heads)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, precision: Precision, layer: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps,
                       _dtype(precision.layernorm_compute_dtype))  # fmt: skip
        self.layer, self.dropout = layer, config.hidden_dropout
        self.self_attn = Attention(config, precision, layer)
        self.mlp = MLP(config)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        attended = self.self_attn(self.input_layernorm(states), context)
        states = states + self._dropped(attended, context, ATTENTION_OUTPUT)
        transformed = self.mlp(self.post_attention_layernorm(states))
        return states + self._dropped(transformed, context, MLP_OUTPUT)

    def _dropped(self, states: Tensor, context: StepContext, site: int) -> Tensor:
        if context.dropout_seeds is None or not self.dropout:
            return states
        return dropout(states, self.dropout, dropout_seeds(context.dropout_seeds, self.layer, site))


class DecoderModel(nn.Module):
    """All below the head; a module of its own because the Hugging Face names say `model.`."""

    def __init__(self, config: DecoderConfig, precision: Precision) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, precision, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps,
                            _dtype(precision.layernorm_compute_dtype))  # fmt: skip


class Decoder(nn.Module):
    """A causal language model: token ids in, logits out."""

    def __init__(self, config: DecoderConfig, precision: Precision | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision = precision or Precision()
        self.model = DecoderModel(config, self.precision)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryTables(config)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        sample_seeds: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits [rows, length, vocabulary] (length 1 with `last_only`) for `input_ids` [rows,
        length].

        `position_ids` [rows, length] default to the order in the row, not counting padding.
        `document_ids` [rows, length] keep attention inside a document. `sample_seeds` [rows] int64
        switch dropout on in training: its pattern is a function of (seed of the sample, layer).
        `attention_mask` [rows, past + length] is False for padding on the left. `cache` holds the
        past of a generation and is extended.
        """
        past = cache.length if cache is not None else 0
        length, device = input_ids.shape[1], input_ids.device
        states = self.model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = _positions(attention_mask, past, length, device)
        rotary_dtype = self.precision.rotary_dtype
        cos, sin = self.rotary.tables(
            position_ids, _dtype(rotary_dtype) if rotary_dtype else states.dtype
        )
        seeds = sample_seeds if self.training else None
        context = StepContext(
            cos=cos,
            sin=sin,
            masks=attention_masks(
                self.config.sliding_window, queries=length, past=past, device=device,
                document_ids=document_ids, key_mask=attention_mask,
                always=seeds is not None and self.config.attention_dropout > 0,
            ),
            dropout_seeds=seeds,
            cache=cache,
        )  # fmt: skip
        for layer in self.model.layers:
            states = layer(states, context)
        if cache is not None:
            cache.advance(length)
        states = self.model.norm(states[:, -1:] if last_only else states)
        if self.lm_head is None:
            return F.linear(states, self.model.embed_tokens.weight)
        return self.lm_head(states)


def _positions(
    attention_mask: Tensor | None, past: int, length: int, device: torch.device
) -> Tensor:
    if attention_mask is None:
        return torch.arange(past, past + length, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
