"""Keys of MindFormers' model sections that have no effect here.

Owns the table of them, and `checkpoint_name_or_path`, which counts only where nothing else names
weights. A key that the configuration class of the family has is left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.mindspore.model_section.keys import SECTION, ModelKeys, is_null, value_of

NO_EFFECT: dict[str, tuple[str, ...]] = {
    "the batch size is runner_config.batch_size": ("batch_size",),
    "prediction always has a key/value cache, which is not paged": (
        "use_past", "use_past_shard", "block_size", "num_blocks", "chunk_prefill",
    ),
    "shapes are dynamic in any case": ("is_dynamic",),
    "the attention kernel is chosen by the device": (
        "use_flash_attention", "use_attn_mask_compression", "use_eod_attn_mask_compression",
        "use_ring_attention", "enable_fa_var_len", "apply_query_key_layer_scaling",
    ),
    "kernels are fused by the compiler": (
        "bias_dropout_fusion", "bias_swiglu_fusion", "apply_rope_fusion", "use_fused_rope",
        "use_fused_swiglu", "moe_router_fusion", "moe_permute_fusion", "moe_grouped_gemm",
        "use_fused_ops_topkrouter", "masked_softmax_fusion", "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion", "use_fused_ops_permute",
    ),
    "tokens are exchanged by PyTorch, and none is dropped": (
        "moe_token_dispatcher_type", "moe_token_drop_policy", "moe_expert_capacity_factor",
        "moe_router_force_expert_balance", "use_pad_tokens", "npu_nums_per_device",
        "print_expert_load", "moe_shared_expert_overlap", "group_wise_a2a",
    ),
    "softmax comes before the choice of experts, as in transformers": ("moe_router_pre_softmax",),
    "set by the section parallel or parallel_config": (
        "parallel_optimizer", "fine_grain_interleave", "compute_in_2d", "layers_group",
        "enable_high_performance", "use_rope_slice", "parallel_config", "recompute_config",
    ),
    "labels are shifted by the data loader": ("input_sliced_sig",),
    "labels without loss are -100 everywhere": ("ignore_token_id",),
    "documents are kept apart where rows are packed": ("eod_reset",),
    "speculative decoding does not change results": ("parallel_decoding_params",),
    "the family follows from the type": ("auto_register", "auto_map", "net_name", "model_name"),
    "dropout is the same in every layer": ("hidden_dropout_layers",),
    "there is one implementation of the models": ("use_legacy",),
    "read from its own section": ("monitor_config",),
    "only losses and texts are returned": ("return_hidden_states", "return_extra_loss"),
    "the sizes of a group of heads follow from the heads": ("group_query_attention",),
}  # fmt: skip
"""Reason -> keys. Whatever their value."""

KEYS = (*(name for names in NO_EFFECT.values() for name in names), "checkpoint_name_or_path")


def translate(keys: ModelKeys) -> None:
    """Drop the keys without effect."""
    _weights(keys)
    keys.draft.drop("model.arch", "the family follows from model.model_config")
    for why, names in NO_EFFECT.items():
        for name in names:
            if keys.has(name) and not keys.is_own(name):
                keys.drop(name, why)
    for name in keys.names():
        node = keys.draft.find(f"{SECTION}.{name}")
        if node is not None and isinstance(node.value, str) and is_null(node.value) and node.value:
            keys.replace(name, {name: None}, "null")


def _weights(keys: ModelKeys) -> None:
    """`checkpoint_name_or_path` names weights where load_checkpoint does not."""
    name = "checkpoint_name_or_path"
    value, load = keys.value(name), value_of(keys.draft.find("load_checkpoint"))
    if value is None or load is not None or not _is_path(value):
        keys.drop(name, "load_checkpoint names the weights")
    else:
        keys.draft.replace(f"{SECTION}.{name}", {"load_checkpoint": value})


def _is_path(value: Any) -> bool:
    try:
        return isinstance(value, str) and Path(value).exists()
    except (OSError, ValueError):
        return False
