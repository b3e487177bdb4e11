"""A tiny configuration of every causal model type of transformers."""

from __future__ import annotations

from typing import Any

from models.config_class import ConfigClass, config_class
from models.module_table import CAUSAL_WHEN

VOCABULARY = 96
POSITIONS = 64

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 6, "window_size": 6,
    "max_position_embeddings": POSITIONS, "max_seq_len": POSITIONS,
    # other names of the same keys
    "ffn_dim": 48, "n_inner": 48, "d_inner": 48, "dff": 48, "d_head": 8, "block_ff_dim": 48,
    "ffn_hidden_size": 48, "decoder_layers": 2, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "embedding_size": 32, "input_embedding_size": 32,
    "output_embedding_size": 32, "attention_hidden_size": 32, "attention_head_dim": 8,
    "global_head_dim": 8, "num_global_key_value_heads": 2, "word_embed_proj_dim": 32,
    "rotary_dim": 4, "query_pre_attn_scalar": 8, "attention_types": [[["global", "local"], 1]],
    "attention_window_size": 6, "type_vocab_size": 2, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8,
    "audio_vocab_size": 20, "num_codebooks": 2,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_intermediate_size": 24,
    "expert_ffn_hidden_size": 24, "expert_intermediate_size": 24, "n_shared_experts": 1,
    "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 40,
    "shared_intermediate_size": 40, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "router_hidden_size": 16,
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # states
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8,
    "mamba_n_groups": 1, "n_mamba_heads": 2, "mamba_dt_rank": 4, "mamba_headdim": 32,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8,
    "num_heads": 4, "chunk_size": 8, "time_step_rank": 4, "lru_width": 32,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "linear_head_dim": 8,
    "linear_num_heads": 4, "conv_L_cache": 3, "num_mem_blocks": 1, "adapter_rank": 8,
    "kv_channels": 8, "num_query_groups": 2, "block_size": 8, "num_random_blocks": 1,
}  # fmt: skip
"""Key -> a small value, for the classes that have the key."""

OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4}
        for kind in ("full_attention", "sliding_attention")
    }},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_oss": {"num_local_experts": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "nemotron_h": {
        "num_hidden_layers": None, "n_groups": 1, "moe_shared_expert_intermediate_size": 40,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4,
              "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
              "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    **{family: {"layer_types": ["linear_attention", "full_attention"]} for family in (
        "bailing_hybrid", "granitemoehybrid", "kimi_linear", "olmo_hybrid", "qwen3_5_moe_text",
        "qwen3_5_text", "qwen3_next",
    )},
}  # fmt: skip
"""Further keys of a model type."""


def tiny_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """Keys for a tiny causal model of `model_type`, by their first names in its class; None removes
    one."""
    known = config_class(model_type)
    assert known is not None, model_type
    keys = {**SIZES, **_causal(model_type), **OTHERS.get(model_type, {}), **changes}
    if "kv_lora_rank" in known.defaults:
        keys = {"num_key_value_heads": keys["num_attention_heads"]} | {
            key: value for key, value in keys.items() if key != "num_key_value_heads"
        }  # fmt: skip
    return {key: value for key, value in _named(known, keys).items() if value is not None}


def _causal(model_type: str) -> dict[str, Any]:
    condition = CAUSAL_WHEN.get(model_type)
    return dict([condition]) if condition is not None else {}


def _named(known: ConfigClass, keys: dict[str, Any]) -> dict[str, Any]:
    """`keys` by their first names; a key under its own name takes precedence over an alias."""
    named = {known.key(key): value for key, value in keys.items() if key in known.synonyms}
    return named | {key: value for key, value in keys.items() if key in known.defaults}
