"""config.json of `chatglm` (ChatGLM2 to GLM-4-9B, with code of their own) as that of `glm`.

Transformers has the same network under the name `glm`: rotary embeddings of neighbouring pairs in
one half of each head, q, k and v with biases. Owns the keys; the names of tensors are translated
where weights are opened. Torch-free.

Source of the keys: configuration_chatglm.py of https://huggingface.co/THUDM/glm-4-9b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.checks import is_integer, is_number
from models.spec import Problems

CHATGLM = "chatglm"
_ADVICE = "Use the glm-4-9b directory that is converted for transformers (model_type glm)"
_ONLY: dict[str, Any] = {
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False, "original_rope": True, "pre_seq_len": None,
    "prefix_projection": False, "quantization_bit": 0, "vision_config": None, "hidden_dropout": 0.0,
}  # fmt: skip
"""Key -> the only supported value, which is also its default."""
_UNREAD = frozenset({
    "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion",
    "classifier_dropout", "fp32_residual_connection", "interleaved_qkv",
    "kv_channels", "multi_query_attention", "multi_query_group_num", "rope_ratio", "auto_map",
})  # fmt: skip
_RENAMED = {
    "num_layers": "num_hidden_layers", "padded_vocab_size": "vocab_size",
    "ffn_hidden_size": "intermediate_size", "layernorm_epsilon": "rms_norm_eps",
    "seq_length": "max_position_embeddings", "add_qkv_bias": "attention_bias",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 28, "hidden_size": 4096, "intermediate_size": 13696,
    "num_attention_heads": 32, "vocab_size": 65024, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
"""Defaults of its configuration class."""


def as_glm(config: Mapping[str, Any], problems: Problems) -> dict[str, Any]:
    """`config`, the content of a config.json of `chatglm`, as one of `glm`; adds problems with what
    that has no key for."""
    for key, only in _ONLY.items():
        if config.get(key) not in (None, only):
            problems.log(f"config.json: {key} = {config[key]}", "this family supports only "
                         f"{only}", advice=_ADVICE)  # fmt: skip
    left_out = {*_ONLY, *_UNREAD, *_RENAMED}
    kept = {key: value for key, value in config.items() if key not in left_out}
    renamed = {new: config[old] for old, new in _RENAMED.items() if config.get(old) is not None}
    glm = _DEFAULTS | kept | renamed
    heads, hidden = glm["num_attention_heads"], glm["hidden_size"]
    groups = config.get("multi_query_group_num", 1) if config.get("multi_query_attention") else None
    size = config.get("kv_channels")
    if size is None and is_integer(heads) and is_integer(hidden):
        size = hidden // heads
    return glm | {
        "model_type": "glm", "architectures": ["GlmForCausalLM"], "head_dim": size,
        "num_key_value_heads": heads if groups is None else groups, "hidden_act": "silu",
        "rope_parameters": {
            "rope_type": "default", "partial_rotary_factor": 0.5,
            "rope_theta": _theta(config.get("rope_ratio", 1), problems),
        },
    }  # fmt: skip


def _theta(ratio: Any, problems: Problems) -> float:
    if not is_number(ratio) or ratio <= 0:
        problems.log(f"config.json: rope_ratio = {ratio!r}", "must be a number above 0")
        return 10000.0
    return 10000.0 * ratio
