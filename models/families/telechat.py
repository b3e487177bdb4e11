"""TeleChat2: Llama with one projection for keys and values, and biases at the end of a region.

Transformers has no class for it: its files come with code of their own, which is not used here.
That code is the source of the names, of config.json and of the rotary base:
https://github.com/Tele-AI/TeleChat2. `out_proj_has_bias` is a key of MindFormers, whose TeleChat3
models have no biases at all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from models.checks import is_integer, is_number, nearest
from models.families.family import (
    BALANCE,
    COMMON,
    DENSE,
    HEADS,
    REPLICATED,
    Add,
    Config,
    Family,
    experts_of,
)
from models.spec import Rule

_IN_A_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    "self_attn.q_proj.weight": "self_attention.query.weight",
    "self_attn.kv_proj.weight": "self_attention.key_value.weight",
    "self_attn.o_proj.weight": "self_attention.dense.weight",
    "self_attn.o_proj.bias": "self_attention.dense.bias",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
    "mlp.down_proj.bias": "mlp.down_proj.bias",
}
_IN_FILES = {
    "model.embed_tokens.weight": "transformer.word_embeddings.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
    **{kind: f"transformer.h.{{layer}}.{name}" for kind, name in _IN_A_LAYER.items()},
}

_SEQUENCES = ("training_seqlen", "base_seqlen")
_FIXED = {
    "embed_layernorm": False,
    "apply_residual_connection_post_layernorm": False,
    "use_RMSNorm": True,
}
_UNREAD = frozenset({
    "attention_softmax_in_fp32", "bias_dropout_fusion", "flash_attn", "logn",
    "masked_softmax_fusion", "n_inner", "skip_bias_add", "skip_bias_add_qkv", "slow_but_exact",
    "unk_token_id",
})  # fmt: skip


def _rules() -> dict[str, Rule]:
    rules = DENSE | {"self_attn.kv_proj.weight": HEADS}
    return {kind: replace(rules[kind], in_files=name) for kind, name in _IN_FILES.items()}


def _windows(config: Config) -> tuple[int | None, ...]:
    """None in any layer. The published code needs both lengths in config.json."""
    for key in _SEQUENCES:
        config[key] = config[key] or config["max_position_embeddings"]
    return (None,) * config["num_hidden_layers"]


def _options(config: Config) -> dict[str, Any]:
    has_bias = bool(config["out_proj_has_bias"])
    return {
        "output_bias": has_bias, "down_bias": has_bias, "fused_key_value": True,
        "rope_theta": _rotary_base(config),
    }  # fmt: skip


def _rotary_base(config: Config) -> float:
    """The rotary base: enlarged if the model was trained on longer rows than its base, `base *
    alpha ** (d / (d - 2))`, where alpha is one less than the next power of two of twice the ratio
    (the NTK rule of the published code, in rows of at most `training_seqlen`)."""
    base, trained = config["rope_parameters"]["rope_theta"], config["training_seqlen"]
    if not is_number(base) or trained <= config["base_seqlen"]:
        return base  # `check_rope` reports what is no number
    alpha = 2 ** math.ceil(math.log2(trained / config["base_seqlen"]) + 1) - 1
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return float(base * alpha ** (head_dim / (head_dim - 2)))


def _check(config: Config, add: Add) -> None:
    for key, only in _FIXED.items():
        if config.get(key) not in (None, only):
            add(key, "this family supports only one value", f"Nearest: {only}", "")
    if not isinstance(config["out_proj_has_bias"], bool):
        add("out_proj_has_bias", "must be True or False", "", "")
    width = config.get("moe_intermediate_size")
    if width is not None and not is_integer(width):
        add("moe_intermediate_size", "must be an integer of at least 1", "", "")
    _check_sequences(config, add)


def _check_sequences(config: Config, add: Add) -> None:
    given = [key for key in _SEQUENCES if config[key] is not None]
    for key in given:
        if not is_integer(config[key]):
            add(key, "must be an integer of at least 1", "", "")
            return
    if len(given) == 1:
        other = next(key for key in _SEQUENCES if key not in given)
        add(given[0], f"{other} is missing: the rotary base follows from both", "",
            f"Set model.model_config.{other}")  # fmt: skip
    elif given and config["max_position_embeddings"] > config["training_seqlen"]:
        longest = config["training_seqlen"]
        add("max_position_embeddings",
            f"rows longer than training_seqlen ({longest}) need a dynamic rotary base, which is "
            "not built yet", nearest(longest),
            f"Set model.model_config.max_position_embeddings: {longest}")  # fmt: skip
    elif given and config["hidden_size"] // config["num_attention_heads"] <= 2:
        add("hidden_size", "the head size is too small for training_seqlen", "", "")


_DENSE = Family(
    config_class="TelechatConfig",
    architecture="TelechatForCausalLM",
    in_transformers=False,
    config_keys={
        "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "intermediate_size": "ffn_hidden_size", "rms_norm_eps": "layer_norm_epsilon",
        "max_position_embeddings": "seq_length",
    },
    defaults=COMMON | {
        "vocab_size": 160256, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 30, "num_key_value_heads": None, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        "hidden_dropout": 0.0, "out_proj_has_bias": True,
        **dict.fromkeys(_SEQUENCES),
    },
    fixed=_FIXED,
    unread=_UNREAD,
    parameters=_rules(),
    qkv_bias=False,
    windows=_windows,
    options=_options,
    check=_check,
    mindformers_modules={"kv_proj": ("wk_v",)},
)  # fmt: skip

_BLOCK = "transformer.h.{layer}.mlp."
_ONE = f"{_BLOCK}local_experts.{{expert}}."
_EXPERTS = {
    "mlp.router.weight": replace(REPLICATED, in_files=f"{_BLOCK}router.weight"),
    "mlp.experts.gate_proj": Rule(tp_dim=1, expert=True, in_files=f"{_ONE}gate_proj.weight"),
    "mlp.experts.up_proj": Rule(tp_dim=1, expert=True, in_files=f"{_ONE}up_proj.weight"),
    "mlp.experts.down_proj": Rule(tp_dim=2, expert=True, in_files=f"{_ONE}down_proj.weight"),
    "mlp.experts.down_proj_bias": Rule(
        added_once=True, expert=True, in_files=f"{_ONE}down_proj.bias"
    ),
}
_WITH_EXPERTS = replace(
    _DENSE,
    defaults={
        **_DENSE.defaults, **BALANCE,
        "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "intermediate_size": 6144,
    },
    unread=_UNREAD | {"moe_intermediate_size"},
    parameters=_rules() | _EXPERTS,
    expert_count="num_experts",
    aliases=dict.fromkeys(
        ("num_chosen_experts", "num_experts_chosen", "moe_topk", "expert_topk"),
        "num_experts_per_tok",
    ),
    experts=lambda config: experts_of(
        config, config["num_experts"], router_name="router",
        down_bias=bool(config["out_proj_has_bias"]),
    ),
)  # fmt: skip
"""TeleChat2-39B-A12B: experts in every layer."""

TELECHAT = replace(_DENSE, with_experts=_WITH_EXPERTS)
