"""How the weights that a configuration names are laid out: orders of fused matrices.

Owns the step from MindFormers' layout keys to `mindformers_qkv_order` and its neighbours, where
weights are loaded. Nothing is computed by them. The key without suffix,
`use_contiguous_weight_layout`, belongs to releases whose gate and up matrices are never in pairs.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.keys import SECTION, ModelKeys, value_of

_FUSED = (
    *("qkv_concat", "ffn_concat", "mlp_concat", "mla_qkv_concat", "use_gmm"),
    *("use_rearrange_rope", "use_fused_mla"),
)
_OLDER = "use_contiguous_weight_layout"
_ATTENTION = "use_contiguous_weight_layout_attention"
_MLP = "use_interleaved_weight_layout_mlp"
_QKV_ORDER, _MLP_ORDER = "mindformers_qkv_order", "mindformers_mlp_order"

KEYS = (_OLDER, _ATTENTION, _MLP, *_FUSED)


def translate(keys: ModelKeys) -> None:
    """Imply the orders where weights are loaded, and drop the keys."""
    if value_of(keys.draft.find("load_checkpoint")) is not None:
        for name in (_OLDER, _ATTENTION):
            _imply(keys, _QKV_ORDER, name, "plain", "group")
        _imply(keys, _MLP_ORDER, _MLP, "pair", "plain")
        _imply(keys, _MLP_ORDER, _OLDER, "plain", "plain")
        _imply(keys, "mindformers_rearranged_rope", "use_rearrange_rope", True, False)
        gmm = value_of(keys.draft.find("moe_config.use_gmm"))
        if isinstance(gmm, bool):
            keys.draft.imply("mindformers_use_gmm", gmm, "moe_config.use_gmm")
    why = "it describes files of weights, which are read by their names and orders"
    for name in KEYS:
        if not keys.is_own(name):
            keys.drop(name, why)


def _imply(keys: ModelKeys, order: str, name: str, if_true: Any, if_false: Any) -> None:
    value = keys.value(name)
    if isinstance(value, bool):
        keys.draft.imply(order, if_true if value else if_false, f"{SECTION}.{name}")
