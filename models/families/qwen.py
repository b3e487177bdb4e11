"""Qwen2 (and 2.5), Qwen3 and Qwen3-MoE: sliding windows by layer, and QK norm since Qwen3."""

from __future__ import annotations

from typing import Any

from models.checks import LAYER_TYPES
from models.families.family import (
    BALANCE,
    COMMON,
    DENSE,
    Config,
    Family,
    expert_stacks,
    experts_of,
    same_window,
    windows_by_type,
)
from models.spec import ExpertsConfig

_COMMON: dict[str, Any] = COMMON | {
    "vocab_size": 151936, "max_position_embeddings": 32768, "use_sliding_window": False,
    "sliding_window": 4096, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_DENSE = _COMMON | {
    "intermediate_size": 22016, "num_key_value_heads": 32, "max_window_layers": 28,
    "layer_types": None,
}  # fmt: skip


def _windows(config: Config) -> tuple[int | None, ...]:
    """Sliding windows from layer `max_window_layers` on, if they are enabled."""
    layers = config["num_hidden_layers"]
    if not config["use_sliding_window"]:
        config["sliding_window"] = None
    first = config["max_window_layers"] if config["sliding_window"] is not None else layers
    return windows_by_type(config, [LAYER_TYPES[layer >= first] for layer in range(layers)])


def _experts(config: Config) -> ExpertsConfig:
    """Every `decoder_sparse_step`-th layer has experts, except `mlp_only_layers`."""
    dense = config["mlp_only_layers"] = list(config["mlp_only_layers"] or ())
    step = config["decoder_sparse_step"]
    layers = tuple(
        layer not in dense and (layer + 1) % step == 0
        for layer in range(config["num_hidden_layers"])
    )
    return experts_of(config, config["num_experts"], layers=layers)


QWEN2 = Family(
    config_class="Qwen2Config",
    architecture="Qwen2ForCausalLM",
    defaults=_DENSE,
    parameters=DENSE,
    qkv_bias=True,
    windows=_windows,
)

QWEN3 = Family(
    config_class="Qwen3Config",
    architecture="Qwen3ForCausalLM",
    defaults=_DENSE | {"head_dim": 128, "attention_bias": False},
    parameters=DENSE,
    output_bias=True,
    windows=_windows,
    options=lambda config: {"qk_norm": True},
)

QWEN3_MOE = Family(
    config_class="Qwen3MoeConfig",
    architecture="Qwen3MoeForCausalLM",
    defaults=_COMMON | BALANCE | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_key_value_heads": 4, "attention_bias": False, "decoder_sparse_step": 1,
        "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128,
        "norm_topk_prob": False, "mlp_only_layers": None,
    },
    parameters=DENSE | expert_stacks(),
    output_bias=True,
    windows=same_window,
    expert_count="num_experts",
    beyond={"router_topk_scaling_factor": 1.0},
    experts=_experts,
    options=lambda config: {"qk_norm": True},
)  # fmt: skip
