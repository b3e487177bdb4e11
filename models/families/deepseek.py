"""DeepSeek-V3: latent attention, experts in groups, shared experts, dense layers at the beginning.

The multi-token prediction modules, stored in its files as further layers, are ignored.
"""

from __future__ import annotations

from dataclasses import fields

from models.checks import nearest
from models.families.family import (
    ADDED_ONCE,
    COLUMNS,
    COMMON,
    CORRECTED,
    ENDS,
    NORMS,
    REPLICATED,
    ROWS,
    Add,
    Config,
    Family,
    expert_stacks,
    grouped_experts_of,
    mlp,
)
from models.spec import LatentConfig

_ATTENTION = {
    "self_attn.q_proj.weight": COLUMNS,
    "self_attn.q_a_proj.weight": REPLICATED, "self_attn.q_a_proj.bias": REPLICATED,
    "self_attn.q_a_layernorm.weight": REPLICATED, "self_attn.q_b_proj.weight": COLUMNS,
    "self_attn.kv_a_proj_with_mqa.weight": REPLICATED,
    "self_attn.kv_a_proj_with_mqa.bias": REPLICATED,
    "self_attn.kv_a_layernorm.weight": REPLICATED, "self_attn.kv_b_proj.weight": COLUMNS,
    "self_attn.o_proj.weight": ROWS, "self_attn.o_proj.bias": ADDED_ONCE,
}  # fmt: skip


def _check(config: Config, add: Add) -> None:
    rotated, heads = config["qk_rope_head_dim"], config["num_attention_heads"]
    if rotated % 2:
        rule = "rotary embeddings need an even head size"
        add("qk_rope_head_dim", rule, nearest(rotated - 1, rotated + 1), "")
    if config["num_key_value_heads"] not in (None, heads):
        rule = f"must equal the attention heads, {heads}, in latent attention"
        add("num_key_value_heads", rule, nearest(heads), "Or remove it")


DEEPSEEK_V3 = Family(
    config_class="DeepseekV3Config",
    architecture="DeepseekV3ForCausalLM",
    defaults=COMMON | {
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
    parameters=ENDS | NORMS | _ATTENTION | mlp() | mlp("mlp.shared_experts") | expert_stacks()
    | CORRECTED,
    output_bias=True,
    expert_count="n_routed_experts",
    experts=grouped_experts_of,
    options=lambda config: {
        "latent": LatentConfig(**{f.name: config[f.name] for f in fields(LatentConfig)}),
        "head_dim": config["qk_rope_head_dim"], "rotary_dim": config["qk_rope_head_dim"],
        "num_key_value_heads": config["num_key_value_heads"] or config["num_attention_heads"],
    },
    check=_check,
    has_latent=True,
    fixed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
)  # fmt: skip
