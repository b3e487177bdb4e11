"""The model family of a MindFormers configuration.

Owns the step from `type`, `model_type`, `architectures` and `arch.type`, with the switches that
make another family of MindFormers' LlamaConfig, to the `type` or `model_type` of this launcher, and
the defaults of MindFormers' older classes.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.keys import ModelKeys, spellings, value_of
from models.config_class import causal_classes, class_names
from models.families import DECODERS

_NOT_BUILT = {
    "telechat3": "TeleChat3", "telechat3_moe": "TeleChat3-MoE", "deepseek_v4": "DeepSeek-V4",
}  # fmt: skip
"""model_type of MindFormers -> the family, which is not built here."""

_ARCHITECTURES = {
    "ChatGLM2ForConditionalGeneration": "glm",
    "ChatGLM2ForCausalLM": "glm",
    "ParallelTelechatForCausalLM": "telechat",
    "TelechatForCausalLM": "telechat",
    "ParallelLlamaForCausalLM": "llama",
    "TeleChat3ForCausalLM": "telechat3",
    "TeleChat3MoeForCausalLM": "telechat3_moe",
    "DeepseekV4ForCausalLM": "deepseek_v4",
}
"""Architectures that transformers does not have, or names differently -> model_type."""

_BOOSTED = {"llama": "LlamaConfig", "qwen": "Qwen2Config"}
"""`boost_model_name` of LlmBoostConfig, in lower case -> type."""

_CONFIG_CLASSES = {"ChatGLM2Config": "GlmConfig", "ChatGLM4Config": "GlmConfig"}
"""Configuration classes of MindFormers -> those of transformers."""

_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaConfig": _LLAMA_DEFAULTS,
    "LlmBoostConfig": _LLAMA_DEFAULTS,
    "TelechatConfig": _LLAMA_DEFAULTS,
    "DeepseekV3Config": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32768,
    },
    "ChatGLM2Config": {
        "hidden_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 32,
        "intermediate_size": 13696, "vocab_size": 65024, "head_dim": 128, "rms_norm_eps": 1e-5,
        "attention_bias": True,
    },
}  # fmt: skip
"""Type of MindFormers -> its defaults, in keys of config.json."""
_SAID_BY = {
    "rope_theta": ("rotary_emb_base", "rope_ratio"), "attention_bias": ("add_qkv_bias",),
}  # fmt: skip
"""Key of config.json -> other keys that become it."""


def choose(keys: ModelKeys) -> None:
    """Find the family, write it as `type`, and imply the defaults of MindFormers' class."""
    kind = keys.value("type")
    written = str(kind or keys.value("model_type") or "")
    if written in _NOT_BUILT:
        _refuse(keys, "type" if kind else "model_type", written)
        return
    if kind is not None:
        _from_type(keys, str(kind))
    elif not keys.value("model_type") and not keys.config_json.get("model_type"):
        _from_architecture(keys)
    keys.family = _family_of(keys)
    keys.is_legacy = keys.is_legacy and not keys.config_json
    keys.defaults = _DEFAULTS.get(str(kind), {}) if keys.is_legacy else {}
    for name in ("llm_backend", "boost_model_name"):
        keys.drop(name, "it names a library of kernels for Ascend devices")


def _refuse(keys: ModelKeys, name: str, family: str) -> None:
    keys.refuse(
        name,
        f"the family {_NOT_BUILT[family]} is not built yet",
        nearest=f"Known: {', '.join(DECODERS)}",
        advice="The model types of docs/models.md can be used",
    )


def _from_type(keys: ModelKeys, kind: str) -> None:
    """Replace a type whose family depends on other keys, or that is named differently here."""
    architecture = value_of(keys.draft.find("model.arch.type"))
    new = _CONFIG_CLASSES.get(kind, kind)
    if kind == "LlmBoostConfig":
        name = str(keys.value("boost_model_name", "Llama"))
        if name.lower() not in _BOOSTED:
            keys.refuse("boost_model_name", "unknown model", nearest="Nearest: Llama or Qwen")
            return
        new = _BOOSTED[name.lower()]
    elif kind == "LlamaConfig":
        new = _llama_like(keys)
    keys.is_legacy = kind in _DEFAULTS and (architecture is not None or new != kind)
    if new != kind:
        keys.replace("type", {"type": new}, _why(kind, new))
    if new in ("Qwen2Config", "Qwen2MoeConfig") and keys.value("qkv_has_bias") is True:
        keys.drop("qkv_has_bias", "q, k and v of this family have biases")


def _why(kind: str, new: str) -> str:
    reasons = {
        "Qwen2Config": "a Llama with biases on q, k and v is a Qwen2",
        "MixtralConfig": "a Llama with experts is a Mixtral",
        "Qwen2MoeConfig": "a Llama with biases on q, k and v, experts and a gated shared expert "
        "is a Qwen2-MoE",
    }
    return reasons.get(new, "") if kind == "LlamaConfig" else f"{kind} is {new} here"


def _llama_like(keys: ModelKeys) -> str:
    """The type of the family that MindFormers' LlamaConfig describes with these switches."""
    has_bias = bool(keys.value("qkv_has_bias"))
    experts = keys.draft.find("moe_config.expert_num")
    count = value_of(experts)
    has_experts = isinstance(count, int | float) and count > 1
    if not has_experts:
        return "Qwen2Config" if has_bias else "LlamaConfig"
    return "Qwen2MoeConfig" if has_bias else "MixtralConfig"


def _from_architecture(keys: ModelKeys) -> None:
    """Write the model_type of `architectures`, a name or a list of them, else of `arch.type`."""
    name, key = keys.value("architectures"), "architectures"
    name = name[0] if isinstance(name, list) and name else name
    if name is None:
        name, key = value_of(keys.draft.find("model.arch.type")), ""
    found = family_of_architecture(str(name))
    if not found:
        return
    if found in _NOT_BUILT:
        _refuse(keys, "architectures", found)
    elif key:
        keys.imply("model_type", found, "architectures")
    else:
        keys.draft.imply("model.model_config.model_type", found, "model.arch.type")


def family_of_architecture(name: str) -> str:
    """The model_type of an architecture; empty for an unknown one."""
    by_name = {own.architecture: family for family, own in DECODERS.items()}
    return {**causal_classes(), **by_name, **_ARCHITECTURES}.get(name, "")


def _family_of(keys: ModelKeys) -> str:
    by_class = {kind: name for name, kind in class_names().items()}
    by_class |= {own.config_class: name for name, own in DECODERS.items()}
    kind = keys.value("type") or keys.value("model_type")
    return (
        by_class.get(str(kind), str(kind)) if kind else str(keys.config_json.get("model_type", ""))
    )


def imply_defaults(keys: ModelKeys) -> None:
    """Write the defaults of MindFormers' class where nothing is written."""
    for name, value in keys.defaults.items():
        if not any(keys.value(other) is not None for other in _SAID_BY.get(name, ())):
            keys.imply(name, value, "type")
    if keys.defaults and keys.family != "glm" and not keys.spelling("num_key_value_heads"):
        for name in spellings("num_key_value_heads"):
            keys.drop(name, "every attention head has its own keys and values")
        keys.imply("num_key_value_heads", keys.size("num_attention_heads"), "type")
