"""The table of families with a decoder of Slipway, and what each one's configuration says.

Owns the defaults (those of the transformers config classes; a test compares) and what sets a family
apart. A new family with a decoder is a row here; `models.module_table` has the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models.keys import EXPERT_COUNTS


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model type with a decoder of ours, and what its configuration class says by default."""

    config_class: str
    architecture: str
    defaults: dict[str, Any]
    qkv_bias: bool | None = None
    """True or False where the family fixes it, None where `attention_bias` decides (for the output
    too)."""
    qk_norm: bool = False
    window_by_layer: bool = False
    """Sliding windows by `layer_types`; otherwise `sliding_window` counts for every layer."""
    rope_theta: float = 10000.0
    expert_count: str | None = None
    """The key for the number of experts; None: a dense family."""
    expert_block: str = "mlp"
    """What the files call the block with a layer's router and experts."""
    scoring: str = "softmax"
    """How the router makes scores of its logits."""
    latent: bool = False
    """Latent attention."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that transformers does not read, and the only value they may have."""

    @property
    def spellings(self) -> dict[str, str]:
        """Other spellings of a key of this family's config.json, to that key."""
        if self.expert_count is None:
            return {}
        return {key: self.expert_count for key in EXPERT_COUNTS if key != self.expert_count}

    @property
    def own_keys(self) -> set[str]:
        """Keys of config.json that are understood for this family alone."""
        return {*self.defaults, *self.fixed}


_COMMON: dict[str, Any] = {
    "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
    "pad_token_id": None, "tie_word_embeddings": False, "attention_dropout": 0.0, "head_dim": None,
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
_NO_HEAD_DIM = {key: value for key, value in _COMMON.items() if key != "head_dim"}
_SPECIAL_1_2 = {"bos_token_id": 1, "eos_token_id": 2}
_QWEN: dict[str, Any] = _COMMON | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "max_window_layers": 28, "layer_types": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}

DECODERS: dict[str, Family] = {
    "llama": Family(
        config_class="LlamaConfig",
        architecture="LlamaForCausalLM",
        defaults=_COMMON | _SPECIAL_1_2 | {
            "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
            "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
        },
    ),
    "mistral": Family(
        config_class="MistralConfig",
        architecture="MistralForCausalLM",
        defaults=_COMMON | _SPECIAL_1_2 | {
            "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": 4096,
        },
        qkv_bias=False,
    ),
    "qwen2": Family(
        config_class="Qwen2Config",
        architecture="Qwen2ForCausalLM",
        defaults={key: value for key, value in _QWEN.items() if key != "head_dim"},
        qkv_bias=True,
        window_by_layer=True,
    ),
    "qwen3": Family(
        config_class="Qwen3Config",
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN | {"head_dim": 128, "attention_bias": False},
        qk_norm=True,
        window_by_layer=True,
    ),
    "qwen3_moe": Family(
        config_class="Qwen3MoeConfig",
        architecture="Qwen3MoeForCausalLM",
        defaults=_NO_HEAD_DIM | _EXPERTS | {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 24, "num_key_value_heads": 4, "max_position_embeddings": 32768,
            "use_sliding_window": False, "sliding_window": 4096, "attention_bias": False,
            "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
            "num_experts": 128, "norm_topk_prob": False, "mlp_only_layers": None,
            "bos_token_id": None, "eos_token_id": None,
        },
        qk_norm=True,
        expert_count="num_experts",
    ),
    "mixtral": Family(
        config_class="MixtralConfig",
        architecture="MixtralForCausalLM",
        defaults=_NO_HEAD_DIM | _SPECIAL_1_2 | _EXPERTS | {
            "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": None, "rms_norm_eps": 1e-5,
            "num_experts_per_tok": 2, "num_local_experts": 8, "router_jitter_noise": 0.0,
        },
        qkv_bias=False,
        rope_theta=1000000.0,
        expert_count="num_local_experts",
        expert_block="block_sparse_moe",
    ),
    "deepseek_v3": Family(
        config_class="DeepseekV3Config",
        architecture="DeepseekV3ForCausalLM",
        defaults=_NO_HEAD_DIM | {
            "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
            "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
            "output_router_logits": False, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
            "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
            "first_k_dense_replace": 3, "norm_topk_prob": True, "max_position_embeddings": 4096,
            "bos_token_id": 0, "eos_token_id": 1, "rope_interleave": True, "attention_bias": False,
            "num_nextn_predict_layers": 1,
        },
        expert_count="n_routed_experts",
        scoring="sigmoid",
        latent=True,
        fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
}  # fmt: skip
"""model_type -> family. Qwen2.5 is qwen2."""
