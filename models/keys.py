"""The keys of `model_config`: the meaning of each key of MindFormers or Hugging Face.

Owns the tables from a key to its meaning. Each key is in exactly one of them: an alias of a
config.json key, a precision, a generation setting, accepted without effect, or not built yet.
"""

from __future__ import annotations

from typing import Any

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

WRITE_MLP_WIDTH = "Set intermediate_size"
_WRITE_ROPE_SCALING = "Set rope_scaling: {rope_type: linear | dynamic | yarn | llama3, factor: 2.0}"

REPLACED: dict[str, tuple[str, str]] = {
    "extend_method": (
        "the context is extended by rope_scaling, as in config.json",
        _WRITE_ROPE_SCALING,
    ),
    "scaling_factor": (
        "the context is extended by rope_scaling, as in config.json",
        _WRITE_ROPE_SCALING,
    ),
    "multiple_of": ("the width of the MLP is set directly", WRITE_MLP_WIDTH),
    "ffn_dim_multiplier": ("the width of the MLP is set directly", WRITE_MLP_WIDTH),
    "moe_config": (
        "experts are configured in model_config itself",
        "Set num_experts, num_experts_per_tok and moe_intermediate_size there",
    ),
}
"""Key -> (rule, advice), for keys that another key replaces here."""

STAGES: frozenset[str] = frozenset({"offset", "pp_interleave_num"})
"""Keys that divide the layers over pipeline stages, read by `launcher.config.derived`."""

NO_EFFECT: dict[str, str] = {
    "use_flash_attention": "the attention kernel is chosen by the device",
    "use_past": "prediction always uses a key/value cache",
    "qkv_concat": "q, k and v stay separate parameters, under their Hugging Face names",
    "checkpoint_name_or_path": "weights come from load_checkpoint or pretrained_model_dir",
    "batch_size": "the batch size is runner_config.batch_size",
    "block_size": "the key/value cache is not paged",
    "num_blocks": "the key/value cache is not paged",
    "is_dynamic": "shapes are dynamic in any case",
    "use_attn_mask_compression": "no mask is built for plain causal attention",
    "use_ring_attention": "set by parallel_config.context_parallel",
    "use_rope_slice": "the rotary tables are computed once a step",
    "use_eod_attn_mask_compression": "document borders come from the data",
    "fine_grain_interleave": "for Ascend only",
    "enable_high_performance": "for Ascend only",
    "input_sliced_sig": "labels are shifted by the data loader",
    "parallel_decoding_params": "speculative decoding does not change results",
    "parallel_optimizer": "set by parallel.enable_parallel_optimizer",
    "auto_register": "the class is chosen by the model type",
    "auto_map": "the class is chosen by the model type",
    "ignore_token_id": "labels without loss are -100 everywhere",
    "residual_dtype": "the residual stream has the compute dtype",
    "embedding_init_type": "embeddings have the parameters' dtype",
    "position_embedding_type": "the family uses rotary embeddings",
    "normalization": "the family uses RMS norms",
    "swiglu": "the family uses a gated MLP",
    "gated_linear_unit": "the family uses a gated MLP",
    "add_bias_linear": "set by attention_bias and mlp_bias",
    "hidden_dropout_layers": "dropout is the same in every layer",
    "use_legacy": "there is one implementation of the models",
    "monitor_config": "read from its own section",
}
"""Key -> why it has no effect here."""

OF_THE_DECODER: frozenset[str] = frozenset({
    "position_embedding_type", "normalization", "swiglu", "gated_linear_unit", "add_bias_linear",
})  # fmt: skip
"""Keys of `NO_EFFECT` whose reason applies only to families in `DECODERS`."""

NOT_BUILT: dict[str, str] = {
    "pet_config": "low-rank adapters (LoRA)",
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
    """Whether the value of a key of `NOT_BUILT`, `REPLACED` or `EXPERT_COUNTS` disables its
    feature."""
    neutral = value == 1 and (key in EXPERT_COUNTS or key == "scaling_factor")
    return not value or neutral or str(value).lower() == "none"


def every_key() -> set[str]:
    """All spellings in these tables, for suggestions."""
    tables = (
        *(ALIASES, EXPERT_COUNTS, PRECISIONS, GENERATION, GENERAL, ROPE, REPLACED, NO_EFFECT),
        *(NOT_BUILT, STAGES),
    )
    return {"type", "seq_length", "qkv_has_bias"}.union(*tables)
