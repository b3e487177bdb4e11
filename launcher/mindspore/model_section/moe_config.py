"""Experts in the section `moe_config` of MindFormers' older classes.

Owns what each of its keys becomes in config.json of the family. What only matters to a loss is in
balance.py.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section import balance
from launcher.mindspore.model_section.experts import as_integer, scoring_of
from launcher.mindspore.model_section.keys import (
    SECTION,
    ModelKeys,
    is_null,
    spellings,
    value_of,
)
from models.families import DECODERS

MOE = "moe_config"
_DENSE = "the model has no experts"
_FAMILIES = (
    "Set model.model_config.type: "
    f"{', '.join(own.config_class for own in DECODERS.values() if own.expert_count)}"
)
_KERNELS = "tokens are exchanged and experts computed by PyTorch, without dropping a token"

_WITHOUT_EFFECT = frozenset({
    "capacity_factor", "enable_sdrop", "use_fused_ops_topkrouter", "use_fused_ops_permute",
    "routing_policy", "group_wise_a2a", "comp_comm_parallel", "comp_comm_parallel_degree",
    "ep_extend_tp", "max_router_load", "npu_nums_per_device", "router_dense_type", "use_gmm",
    "enable_gmm_safe_tokens", "expert_group_size", "save_token_distribution", "cur_layer",
    "enable_cold_hot_expert", "update_step", "hot_expert_num", "cold_token_percent",
    "moe_module_name", "topk_method", "use_allgather_dispatcher", "moe_shared_expert_overlap",
    "expert_model_parallel", "callback_moe_droprate", "moe_init_method_std",
    "enable_deredundency", "dispatch_global_max_bs",
})  # fmt: skip
"""Keys of `moe_config` about kernels, communication and dropped tokens."""

_NAMES = {
    "expert_num": "", "num_experts_chosen": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size", "first_k_dense_replace": "",
    "n_group": "n_group", "topk_group": "topk_group", "norm_topk_prob": "norm_topk_prob",
    "routed_scaling_factor": "routed_scaling_factor", "shared_expert_num": "",
    "use_shared_expert_gating": "", "use_gating_sigmoid": "",
}  # fmt: skip
"""Keys of `moe_config` that describe the model -> key of config.json; empty: read separately."""
_NOTHING: dict[str, Any] = {
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 1,
}  # fmt: skip
"""What a family does that has no such key."""
_SCALE = "router_topk_scaling_factor"
_COUNTS = ("num_", "moe_", "n_group", "topk_group")
"""How keys of config.json begin that are integers, which may be written as 8.0."""
_KNOWN = frozenset({*_WITHOUT_EFFECT, *_NAMES, *balance.MOE_KEYS})


def translate(keys: ModelKeys) -> None:
    """Translate `moe_config`, at the top level or in model_config."""
    section = keys.draft.find(MOE)
    inner = keys.draft.find(f"{SECTION}.{MOE}")
    if inner is not None and isinstance(inner.value, dict):
        keys.draft.rename(f"{SECTION}.{MOE}", MOE)
        section = keys.draft.find(MOE)
    elif value_of(inner) is None:
        keys.drop(MOE, _DENSE)
    if section is not None and isinstance(section.value, dict):
        _section(keys, list(section.value))
        keys.draft.prune(MOE)


def _moe(keys: ModelKeys, name: str, default: Any = None) -> Any:
    value = value_of(keys.draft.find(f"{MOE}.{name}"))
    return default if value is None else value


def _section(keys: ModelKeys, names: list[str]) -> None:
    count = as_integer(_moe(keys, "expert_num", 1))
    if count is None or count < 1:
        keys.draft.refuse(f"{MOE}.expert_num", "must be an integer of at least 1")
    elif count > 1 and not keys.expert_count and keys.is_legacy:
        keys.draft.refuse(
            f"{MOE}.expert_num", f"{keys.family} with experts is not built yet",
            nearest="Nearest: 1", advice=_FAMILIES,
        )  # fmt: skip
    if count is None or count <= 1 or not keys.expert_count:
        kept = "expert_num" if (count or 0) > 1 and not keys.is_legacy else ""  # refused when read
        known = [name for name in names if name in _KNOWN and name != kept]
        keys.draft.drop_all([f"{MOE}.{name}" for name in known], _DENSE)
        return
    balance.translate_moe(keys)
    keys.draft.drop_all([f"{MOE}.{name}" for name in names if name in _WITHOUT_EFFECT], _KERNELS)
    _counts(keys, names)
    for name, key in _NAMES.items():
        if key and name in names:
            _value(keys, name, key)


def _counts(keys: ModelKeys, names: list[str]) -> None:
    """The number of experts, of shared ones and of dense layers, and the defaults of MindFormers
    where those of the family differ."""
    _imply_defaults(keys, names)
    _put(keys, "expert_num", {keys.expert_count: as_integer(_moe(keys, "expert_num"))})
    if "shared_expert_num" in names:
        _shared(keys)
    keys.draft.drop(f"{MOE}.use_shared_expert_gating", "it follows from the family")
    if "first_k_dense_replace" in names:
        _dense_layers(keys)
    if _moe(keys, "use_gating_sigmoid") and scoring_of(keys.family) != "sigmoid":
        rule = f"the scores of {keys.family} are a softmax"
        keys.draft.refuse(f"{MOE}.use_gating_sigmoid", rule, nearest="Nearest: False")
    else:
        keys.draft.drop(f"{MOE}.use_gating_sigmoid", "the scores follow from the family")


def _dense_layers(keys: ModelKeys) -> None:
    """`first_k_dense_replace`, of which True is one layer."""
    name = "first_k_dense_replace"
    written = _moe(keys, name, 0)
    if keys.is_own(name):
        _put(keys, name, {name: as_integer(written) if written is not None else 0})
    elif written in (True, False):
        _put(keys, name, {})
    else:
        keys.draft.refuse(f"{MOE}.{name}", f"every layer of {keys.family} has experts",
                          nearest="Nearest: 0")  # fmt: skip


def _imply_defaults(keys: ModelKeys, names: list[str]) -> None:
    """The defaults of `moe_config`, where no config.json is below it."""
    if keys.config_json:
        return
    source = f"{MOE}.expert_num"
    defaults: dict[str, Any] = {
        "num_experts_per_tok": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0,
    }  # fmt: skip
    if keys.family == "qwen2_moe":
        defaults["moe_intermediate_size"] = keys.size("intermediate_size")
        defaults["shared_expert_intermediate_size"] = 0
    if keys.is_own("n_group") and "n_group" not in names:
        defaults |= {"n_group": 1, "topk_group": 1}
    if keys.is_own("n_shared_experts"):
        defaults |= {"n_shared_experts": 0, "first_k_dense_replace": 1}
        defaults["moe_intermediate_size"] = 1407
    written = {_NAMES.get(name) or name for name in names}
    if "shared_expert_num" in names:
        written |= {"n_shared_experts", "shared_expert_intermediate_size"}
    for key, value in defaults.items():
        if keys.is_own(key) and key not in written and not any(map(keys.has, spellings(key))):
            keys.draft.imply(f"{SECTION}.{key}", value, source)


def _shared(keys: ModelKeys) -> None:
    """Shared experts, whose gate is a matter of the family."""
    gate = "use_shared_expert_gating"
    count = as_integer(_moe(keys, "shared_expert_num"))
    width = _moe(keys, "moe_intermediate_size") or keys.size("moe_intermediate_size")
    if count is None:
        keys.draft.refuse(f"{MOE}.shared_expert_num", "must be an integer of at least 0")
    elif count and bool(_moe(keys, gate)) != (keys.family == "qwen2_moe"):
        _wrong_gate(keys, gate)
    elif keys.is_own("n_shared_experts"):
        _put(keys, "shared_expert_num", {"n_shared_experts": count})
    elif keys.is_own("shared_expert_intermediate_size"):
        _put(keys, "shared_expert_num", {"shared_expert_intermediate_size": count * (width or 0)})
    elif count == 0:
        _put(keys, "shared_expert_num", {})
    else:
        keys.draft.refuse(f"{MOE}.shared_expert_num", f"{keys.family} has no shared experts",
                          nearest="Nearest: 0")  # fmt: skip


def _value(keys: ModelKeys, name: str, key: str) -> None:
    """A key of `moe_config` that is one key of config.json."""
    written, value = keys.draft.find(f"{MOE}.{name}"), _moe(keys, name)
    if is_null(value) and key not in ("n_group", "topk_group"):
        keys.draft.drop(f"{MOE}.{name}", "null asks for nothing")
    elif key == "routed_scaling_factor" and not keys.is_own(key) and keys.is_own(_SCALE):
        _put(keys, name, {_SCALE: value})
    elif keys.is_own(key):
        if key in ("n_group", "topk_group") and not value:
            value = 1
        count = as_integer(value) if key.startswith(_COUNTS) and type(value) is float else None
        _put(keys, name, {key: value if count is None else count})
    elif key == "moe_intermediate_size":
        _expert_width(keys, value)
    elif _is_nothing(key, value):
        _put(keys, name, {})
    elif written is not None:
        keys.draft.refuse(
            f"{MOE}.{name}", f"{keys.family} has no {key}", nearest=f"Nearest: {_NOTHING[key]}"
        )


def _is_nothing(key: str, value: Any) -> bool:
    return value == _NOTHING[key] or (key in ("n_group", "topk_group") and not value)


def _expert_width(keys: ModelKeys, width: Any) -> None:
    """Families whose experts have the width of the MLP."""
    mlp = keys.size("intermediate_size")
    if mlp is not None and as_integer(width) != mlp:
        keys.draft.refuse(
            f"{MOE}.moe_intermediate_size",
            f"the experts of {keys.family} have intermediate_size = {mlp}",
            nearest=f"Nearest: {mlp}",
        )
    else:
        _put(keys, "moe_intermediate_size", {"intermediate_size": as_integer(width)})


def _put(keys: ModelKeys, name: str, values: dict[str, Any]) -> None:
    keys.draft.replace(
        f"{MOE}.{name}", {f"{SECTION}.{key}": value for key, value in values.items()},
        "" if values else "every model of the family has it so",
    )  # fmt: skip


def _wrong_gate(keys: ModelKeys, gate: str) -> None:
    has_gate = keys.family == "qwen2_moe"
    key = gate if keys.draft.find(f"{MOE}.{gate}") is not None else "shared_expert_num"
    keys.draft.refuse(
        f"{MOE}.{key}",
        f"the shared expert of {keys.family} has {'a' if has_gate else 'no'} gate",
        advice=f"Set {MOE}.{gate}: {has_gate}",
    )
