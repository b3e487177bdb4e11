"""Mixtral: experts in every layer, with their own parameter names."""

from __future__ import annotations

from models.families.family import (
    ATTENTION,
    BALANCE,
    COMMON,
    ENDS,
    NORMS,
    Family,
    expert_stacks,
    experts_of,
    same_window,
)

_BLOCK = "block_sparse_moe"

MIXTRAL = Family(
    config_class="MixtralConfig",
    architecture="MixtralForCausalLM",
    defaults=COMMON | BALANCE | {
        "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "sliding_window": None, "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2, "num_local_experts": 8, "router_jitter_noise": 0.0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    parameters=ENDS | NORMS | ATTENTION | expert_stacks(_BLOCK, ("w1", "w3", "w2")),
    qkv_bias=False,
    windows=same_window,
    rope={"rope_theta": 1000000.0},
    expert_count="num_local_experts",
    experts=lambda config: experts_of(config, config["num_local_experts"], block_name=_BLOCK),
    mindformers_modules={_BLOCK: ("feed_forward", "mlp")},
)  # fmt: skip
