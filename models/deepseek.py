"""Multi-head latent attention (MLA) of DeepSeek-V2 and V3 (https://arxiv.org/abs/2405.04434).

Keys and values are projected up from one normalized low-rank vector a token; each query and key
head has a part without positions and a rotary part, and all heads share the rotary part of keys.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from models.attention import BaseAttention, StepContext
from models.layers import Linear, RMSNorm, dtype_of
from models.rope import score_factor
from models.spec import DecoderConfig, Precision

_NORM_EPS = 1e-6
"""Epsilon of the norms in this file, independent of `rms_norm_eps`, as in transformers."""


class LatentAttention(BaseAttention):
    def __init__(self, config: DecoderConfig, precision: Precision, layer: int) -> None:
        latent = config.latent
        assert latent is not None
        self.latent = latent
        key_size = latent.qk_nope_head_dim + latent.qk_rope_head_dim
        scale = key_size**-0.5 * score_factor(config.rope_scaling)
        super().__init__(config, precision, layer, scale)
        hidden, heads = config.hidden_size, config.num_attention_heads
        low_rank = partial(Linear, hidden, bias=config.attention_bias)
        norm = partial(
            RMSNorm, eps=_NORM_EPS, compute_dtype=dtype_of(precision.layernorm_compute_dtype)
        )
        if latent.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * key_size)
        else:
            self.q_a_proj = low_rank(latent.q_lora_rank)
            self.q_a_layernorm = norm(latent.q_lora_rank)
            self.q_b_proj = Linear(latent.q_lora_rank, heads * key_size)
        self.kv_a_proj_with_mqa = low_rank(latent.kv_lora_rank + latent.qk_rope_head_dim)
        self.kv_a_layernorm = norm(latent.kv_lora_rank)
        self.kv_b_proj = Linear(
            latent.kv_lora_rank, heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        )
        self.o_proj = Linear(heads * latent.v_head_dim, hidden, bias=config.output_bias)

    def forward(self, states: Tensor, context: StepContext) -> Tensor:
        query = self._queries(states, context)
        key, value = self._keys_and_values(states, context)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)
        output = self.attend(query, key, value, context, self.window)
        return self.o_proj(output.transpose(1, 2).flatten(2), context)

    def _queries(self, states: Tensor, context: StepContext) -> Tensor:
        """[rows, heads, length, key size]"""
        latent = self.latent
        if latent.q_lora_rank is None:
            projected = self.q_proj(states, context)
        else:
            projected = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(states, context)), context)
        sizes = [latent.qk_nope_head_dim, latent.qk_rope_head_dim]
        heads = projected.unflatten(-1, (-1, sum(sizes))).transpose(1, 2)
        no_rope, rope = heads.split(sizes, dim=-1)
        return torch.cat((no_rope, self._rotated(rope, context)), dim=-1)

    def _keys_and_values(self, states: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
        """[rows, heads, length, key size] and [rows, heads, length, value size]"""
        latent = self.latent
        low_rank, rope = self.kv_a_proj_with_mqa(states, context).split(
            [latent.kv_lora_rank, latent.qk_rope_head_dim], dim=-1
        )
        rope = self._rotated(rope[:, None], context)
        sizes = [latent.qk_nope_head_dim, latent.v_head_dim]
        projected = self.kv_b_proj(self.kv_a_layernorm(low_rank), context)
        heads = projected.unflatten(-1, (-1, sum(sizes))).transpose(1, 2)
        no_rope, value = heads.split(sizes, dim=-1)
        key = torch.cat((no_rope, rope.expand(-1, no_rope.shape[1], -1, -1)), dim=-1)
        return key, value

    def _rotated(self, states: Tensor, context: StepContext) -> Tensor:
        return context.rotate(states, interleaved=self.latent.rope_interleave)
