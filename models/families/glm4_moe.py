"""GLM-4.5: experts as in DeepSeek-V3, plain attention, half of each head rotated.

The multi-token prediction module, stored in its files as a further layer, is ignored.
"""

from __future__ import annotations

from models.families.family import (
    COMMON,
    CORRECTED,
    DENSE,
    Family,
    expert_stacks,
    grouped_experts_of,
    mlp,
)

GLM4_MOE = Family(
    config_class="Glm4MoeConfig",
    architecture="Glm4MoeForCausalLM",
    defaults=COMMON | {
        "vocab_size": 151552, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "attention_bias": False,
        "num_experts_per_tok": 8, "output_router_logits": False, "n_shared_experts": 1,
        "n_routed_experts": 128, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
        "bos_token_id": None, "eos_token_id": None, "num_nextn_predict_layers": 1,
    },
    parameters=DENSE | mlp("mlp.shared_experts") | expert_stacks() | CORRECTED,
    partial_rotary_factor=0.5,
    expert_count="n_routed_experts",
    experts=grouped_experts_of,
    options=lambda config: {"qk_norm": bool(config["use_qk_norm"])},
)  # fmt: skip
