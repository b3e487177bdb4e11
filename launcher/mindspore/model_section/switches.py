"""Keys that state what a family has in any case, such as `normalization: RMSNorm`.

Owns which values agree with which family. A value that agrees has no effect; one that does not is
refused, because it would be another model.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.keys import ModelKeys, is_neutral, spellings
from models.families import DECODERS

_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "normalization": (("RMSNorm", "FusedRMSNorm"), "the family has RMS norms"),
    "rmsnorm": ((True,), "the family has RMS norms"),
    "post_layer_norm": ((True,), "there is a norm after the last layer"),
    "apply_residual_connection_post_layernorm": (
        (False,), "residuals are added before the norms",
    ),
    "gated_linear_unit": ((True,), "the family has a gated MLP"),
    "swiglu": ((True,), "the family has a gated MLP"),
    "add_bias_linear": ((False,), "linear layers of the family have no biases"),
    "use_gating_sigmoid": ((False,), "scores follow from the family"),
    "post_self_attn_layernorm": ((False,), "the family has no such norm"),
    "post_mlp_layernorm": ((False,), "the family has no such norm"),
    "prefix_projection": ((False,), "prefixes are not trained"),
    "pre_seq_len": ((None, 0), "prefixes are not trained"),
    "quantization_bit": ((0, None), "weights are not quantized"),
}  # fmt: skip
"""Key -> the values that agree with every family that runs here, and what they mean."""

_OUTPUT_NORMS: dict[str, tuple[tuple[Any, ...], str]] = dict.fromkeys(
    ("post_self_attn_layernorm", "post_mlp_layernorm"), ((True,), "the family has such norms")
)
"""The same of GLM-4-0414."""
_GATED = ("swiglu", "fusedswiglu")
_DROPOUTS = ("emb_dropout_prob", "embed_dropout_prob", "embedding_dropout_prob")

KEYS = (
    *("add_qkv_bias", "attn_proj_has_bias", "qk_layernorm", "multi_latent_attention"),
    *("untie_embeddings_and_output_weights", *_FIXED, *_DROPOUTS),
)


def translate(keys: ModelKeys) -> None:
    """Drop what agrees with the family, refuse what does not."""
    _activation(keys)
    fixed = _FIXED | (_OUTPUT_NORMS if keys.family == "glm4" else {})
    for name, (allowed, why) in fixed.items():
        if keys.has(name) and not keys.is_own(name) and keys.is_llama_like:
            value = keys.value(name)
            if value is None or any(_same(value, item) for item in allowed):
                keys.drop(name, why)
            else:
                keys.refuse(name, why, nearest=f"Nearest: {allowed[0]}")
    for name in _DROPOUTS:
        if keys.has(name) and not keys.is_own(name):
            if is_neutral(keys.value(name)):
                keys.drop(name, "nothing is dropped")
            else:
                keys.refuse(name, "dropout of embeddings is not built yet", nearest="Nearest: 0.0")
    _hidden_dropout(keys)
    _biases(keys)
    _norms_of_heads(keys)
    _latent(keys)
    _tied(keys)
    _quantization(keys)


def _hidden_dropout(keys: ModelKeys) -> None:
    """Dropout of the residual stream of a family that has none in its configuration class."""
    if keys.known is None or keys.is_own("hidden_dropout"):
        return
    for name in spellings("hidden_dropout"):
        if is_neutral(keys.value(name)):
            keys.drop(name, "nothing is dropped")


def _same(value: Any, item: Any) -> bool:
    if isinstance(value, str) and isinstance(item, str):
        return value.lower() == item.lower()
    return value == item


def _activation(keys: ModelKeys) -> None:
    """`swiglu` and `fusedswiglu` name the gated MLP with SiLU."""
    value = keys.value("hidden_act")
    if isinstance(value, str) and value.lower() in _GATED:
        keys.replace("hidden_act", {"hidden_act": "silu"}, "the gated MLP with SiLU")


def _biases(keys: ModelKeys) -> None:
    """`add_qkv_bias` and `qkv_has_bias`: biases of q, k and v."""
    for name in ("add_qkv_bias", "qkv_has_bias", "attn_proj_has_bias"):
        if not keys.has(name) or keys.is_own(name) or not keys.family:
            continue
        has, value = _has_bias(keys, name), bool(keys.value(name))
        if keys.family in ("glm", "glm4") and name != "attn_proj_has_bias":
            keys.replace(name, {"attention_bias": value})
        elif has is None:
            continue
        elif value == has:
            keys.drop(name, f"{keys.family} has {'such' if has else 'no such'} biases")
        else:
            nearest = ""
            if name == "qkv_has_bias" and keys.family in ("llama", "qwen2"):
                nearest = f"Nearest: type: {'Qwen2Config' if value else 'LlamaConfig'}"
            keys.refuse(name, f"{keys.family} has {'such' if has else 'no such'} biases",
                        nearest=nearest)  # fmt: skip


def _has_bias(keys: ModelKeys, name: str) -> bool | None:
    """Whether a family has these biases; None if another key decides, or nothing is known."""
    own = DECODERS.get(keys.family)
    if own is None:
        return True if keys.family == "qwen2_moe" and name != "attn_proj_has_bias" else None
    if name == "attn_proj_has_bias" and keys.family != "telechat":
        return own.output_bias and bool(keys.size("attention_bias", False))
    if own.qkv_bias is not None:
        return own.qkv_bias
    return bool(keys.size("attention_bias", own.defaults.get("attention_bias", False)))


def _norms_of_heads(keys: ModelKeys) -> None:
    """`qk_layernorm`: norms of the queries and keys of each head, or of the latent vectors."""
    name = "qk_layernorm"
    if not keys.has(name) or keys.is_own(name) or not keys.family:
        return
    has = keys.family in ("qwen3", "qwen3_moe", "deepseek_v3")
    if keys.family == "glm4_moe":
        has = bool(keys.size("use_qk_norm", False))
    if bool(keys.value(name)) == has:
        keys.drop(name, f"{keys.family} has {'such' if has else 'no such'} norms")
    elif keys.family not in DECODERS:
        keys.drop(name, "the family decides")
    else:
        keys.refuse(name, f"{keys.family} has {'' if has else 'no '}norms of queries and keys",
                    nearest=f"Nearest: {has}")  # fmt: skip


def _latent(keys: ModelKeys) -> None:
    name = "multi_latent_attention"
    if not keys.has(name) or keys.is_own(name) or not keys.family:
        return
    has = keys.is_own("kv_lora_rank")
    if bool(keys.value(name)) == has:
        keys.drop(name, f"{keys.family} has {'latent' if has else 'plain'} attention")
    else:
        keys.refuse(name, f"{keys.family} has {'latent' if has else 'plain'} attention",
                    nearest=f"Nearest: {has}")  # fmt: skip


def _tied(keys: ModelKeys) -> None:
    name = "untie_embeddings_and_output_weights"
    value = keys.value(name)
    if isinstance(value, bool):
        keys.replace(name, {"tie_word_embeddings": not value})
    elif keys.has(name):
        if value is None:
            keys.drop(name, "it asks for nothing")
        else:
            keys.refuse(name, "must be True or False")


def _quantization(keys: ModelKeys) -> None:
    """Weights of MindSpore's golden stick, in a format of its own."""
    name = "quantization_config"
    value = keys.value(name)
    if isinstance(value, dict) and str(value.get("quant_method", "")).lower() in (
        *("ptq", "rtn", "smooth-quant", "a8w8", "a16w8", "a8w4", "osl"),
    ):
        keys.refuse(
            name,
            f"quantized weights of quant_method {value['quant_method']} cannot be read: they are "
            "in a format of MindSpore's golden stick",
            advice="Load the bfloat16 weights of the model, and remove quantization_config",
        )
