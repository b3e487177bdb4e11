"""The keys of `model_config`: the meaning of each key of MindFormers or Hugging Face.

Owns the tables from a key to its meaning. Each key is in exactly one of them: an alias of a
config.json key, a precision, a generation setting, or not built yet. Keys that only MindFormers has
are translated before they arrive here (`launcher.extensions.TRANSLATIONS`).
"""

from __future__ import annotations

from typing import Any

from launcher.extensions import TRANSLATED_MODEL_KEYS, installed

ALIASES: dict[str, str] = {
    "num_layers": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "num_query_groups": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "max_position_embedding": "max_position_embeddings",
    "theta": "rope_theta",
    "rotary_base": "rope_theta",
    "layernorm_epsilon": "rms_norm_eps",
    "layer_norm_epsilon": "rms_norm_eps",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
    "attention_dropout_rate": "attention_dropout",
    "attention_dropout_prob": "attention_dropout",
    "hidden_dropout_rate": "hidden_dropout",
    "hidden_dropout_prob": "hidden_dropout",
    "kv_channels": "head_dim",
    "num_experts_chosen": "num_experts_per_tok",
    "moe_router_topk": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "aux_loss_factor": "router_aux_loss_coef",
    "moe_aux_loss_coeff": "router_aux_loss_coef",
    "shared_expert_num": "n_shared_experts",
    "moe_router_num_groups": "n_group",
    "moe_router_group_topk": "topk_group",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
}
"""MindFormers spelling -> Hugging Face key. `torch_dtype`, `seq_length` and the rope keys are read
separately."""

EXPERT_COUNTS: frozenset[str] = frozenset({
    "expert_num", "num_experts", "num_local_experts", "num_moe_experts", "n_routed_experts",
})  # fmt: skip
"""Spellings of the number of experts; the one in config.json differs by family."""

PRECISIONS: dict[str, str] = {
    "compute_dtype": "compute_dtype",
    "params_dtype": "params_dtype",
    "param_init_type": "params_dtype",
    "param_init_dtype": "params_dtype",
    "dtype": "params_dtype",
    "torch_dtype": "params_dtype",
    "layernorm_compute_dtype": "layernorm_compute_dtype",
    "layernorm_compute_type": "layernorm_compute_dtype",
    "rotary_dtype": "rotary_dtype",
    "softmax_compute_dtype": "softmax_compute_dtype",
    "softmax_compute_type": "softmax_compute_dtype",
}
"""Spelling -> field of Precision."""

DTYPES: dict[str, str] = {
    "float32": "float32", "fp32": "float32", "float": "float32",
    "bfloat16": "bfloat16", "bf16": "bfloat16",
    "float16": "float16", "fp16": "float16", "half": "float16",
}  # fmt: skip

GENERATION: frozenset[str] = frozenset({
    "max_length", "max_decode_length", "max_new_tokens", "min_length", "min_new_tokens",
    "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
})  # fmt: skip

GENERAL: frozenset[str] = frozenset({
    "architectures", "transformers_version", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id", "pretraining_tp", "name_or_path", "hidden_dropout",
    "head_dim",
})  # fmt: skip
"""Keys that every family in `DECODERS` may have in config.json or here, besides its defaults."""

ROPE: frozenset[str] = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

STAGES: frozenset[str] = frozenset({"offset", "pp_interleave_num"})
"""Keys that divide the layers over pipeline stages, read by `launcher.config.derived`."""

NOT_BUILT: dict[str, str] = {
    "quantization_config": "quantized weights",
    "mtp_num_layers": "multi-token prediction",
    "num_nextn_predict_layers": "multi-token prediction",
}
"""Key -> the feature it enables. Falsy values are accepted."""

FEATURE_ADVICE: dict[str, str] = {
    "quantization_config": "Use FP8 weights with a scale for each block (quant_method fp8, "
    "weight_block_size [128, 128]), or convert the weights to bfloat16 and "
    "remove quantization_config from their config.json",
}


def is_switched_off(key: str, value: Any) -> bool:
    """Whether the value of a key of `NOT_BUILT` or `EXPERT_COUNTS` disables its feature."""
    return not value or (value == 1 and key in EXPERT_COUNTS) or str(value).lower() == "none"


def every_key() -> set[str]:
    """All spellings in these tables, and those that are translated before, for suggestions."""
    tables = (
        *(ALIASES, EXPERT_COUNTS, PRECISIONS, GENERATION, GENERAL, ROPE, NOT_BUILT, STAGES),
        *installed(TRANSLATED_MODEL_KEYS).values(),
    )
    return {"type", "seq_length", "qkv_has_bias"}.union(*tables)
