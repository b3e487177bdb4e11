"""What balances experts and predicts further tokens: all that matters to a training loss only.

Owns balance losses, moving router biases and prediction layers. In predict and eval they have no
effect; in training they become the loss of transformers, or are refused when they ask for more.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.keys import (
    SECTION,
    ModelKeys,
    is_neutral,
    value_of,
)
from models.families import DECODERS

MOE_KEYS = (
    *("aux_loss_factor", "aux_loss_types", "aux_loss_factors", "z_loss_factor"),
    *("balance_via_topk_bias", "topk_bias_update_rate"),
)
"""Keys of `moe_config` that are read here."""

_PREDICT = "it has an effect in training only"
_NOTHING = "it asks for nothing"
_TYPES = ("seq_aux_loss", "gbs_aux_loss", "aux_loss", "sub_seq_aux_loss", "none")
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_layers", "mtp_depth")
_MTP_FACTORS = ("mtp_loss_factor", "mtp_loss_scaling_factor")

KEYS = (
    *("moe_router_enable_expert_bias", "moe_router_bias_update_rate", "moe_z_loss_coeff"),
    *("moe_router_load_balancing_type", *_MTP_COUNTS, *_MTP_FACTORS),
)


def translate(keys: ModelKeys) -> None:
    """Translate the keys of model_config."""
    _moving_bias(
        keys, f"{SECTION}.moe_router_enable_expert_bias", f"{SECTION}.moe_router_bias_update_rate"
    )
    _nothing_or_refuse(keys, f"{SECTION}.moe_z_loss_coeff", "the z-loss of the router")
    _coefficient(keys)
    _prediction_layers(keys)


def translate_moe(keys: ModelKeys) -> None:
    """Translate the keys of `moe_config` of a model with experts."""
    _moving_bias(keys, "moe_config.balance_via_topk_bias", "moe_config.topk_bias_update_rate")
    _nothing_or_refuse(keys, "moe_config.z_loss_factor", "the z-loss of the router")
    factor, key = _written_factor(keys)
    for name in ("aux_loss_factor", "aux_loss_types", "aux_loss_factors"):
        if key != f"moe_config.{name}":
            keys.draft.drop(f"moe_config.{name}", _PREDICT if not keys.trains else _NOTHING)
    if key:
        _balance_loss(keys, key, factor)


def _written_factor(keys: ModelKeys) -> tuple[Any, str]:
    """The coefficient of the balance loss over experts, and its key."""
    types = value_of(keys.draft.find("moe_config.aux_loss_types"))
    factors = value_of(keys.draft.find("moe_config.aux_loss_factors"))
    if isinstance(types, list) and isinstance(factors, list) and len(types) == len(factors):
        for kind, factor in zip(types, factors, strict=True):
            if kind != "expert" and factor and keys.trains:
                keys.draft.refuse(
                    "moe_config.aux_loss_types",
                    "only the balance loss over experts is built",
                    nearest="Nearest: [expert]",
                )
        factor = next((f for t, f in zip(types, factors, strict=True) if t == "expert"), 0)
        return factor, "moe_config.aux_loss_factors"
    key = "moe_config.aux_loss_factor"
    found = value_of(keys.draft.find(key))
    return found, key if keys.draft.find(key) is not None else ""


def _balance_loss(keys: ModelKeys, key: str, factor: Any) -> None:
    """Write the balance loss of `factor`, written at `key`, for a family that has one."""
    if not keys.is_own("router_aux_loss_coef"):
        keys.draft.drop(key, f"{keys.family or 'the model'} is trained without a balance loss")
    elif not keys.trains:
        keys.draft.drop(key, _PREDICT)
    else:
        values = {f"{SECTION}.router_aux_loss_coef": factor or 0.0}
        if factor and keys.is_own("output_router_logits") and not keys.has("output_router_logits"):
            values[f"{SECTION}.output_router_logits"] = True
        keys.draft.replace(key, values, "the balance loss of transformers, over all rows at once")


def _coefficient(keys: ModelKeys) -> None:
    """`moe_aux_loss_coeff` and the kind of the loss."""
    kind = "moe_router_load_balancing_type"
    if keys.has(kind):
        if keys.trains and str(keys.value(kind, "none")) not in _TYPES:
            keys.refuse(kind, "unknown balance loss", nearest=f"Known: {', '.join(_TYPES)}")
        else:
            keys.drop(kind, "the balance loss is that of transformers, over all rows at once")
    names = [name for name in ("moe_aux_loss_coeff", "aux_loss_factor") if keys.has(name)]
    if not keys.is_own("router_aux_loss_coef"):
        names += [name for name in ("router_aux_loss_coef",) if keys.has(name) and _is_known(keys)]
    for name in names:
        _balance_loss(keys, f"{SECTION}.{name}", keys.value(name))


def _is_known(keys: ModelKeys) -> bool:
    return keys.family in DECODERS or keys.known is not None


def _moving_bias(keys: ModelKeys, switch: str, rate: str) -> None:
    """Router biases that move after each step."""
    is_on, speed = (value_of(keys.draft.find(key)) for key in (switch, rate))
    asks = bool(is_on) and not is_neutral(speed)
    if asks and keys.trains:
        keys.draft.refuse(
            rate,
            f"moving the router's biases in training is not built yet ({switch} is on)",
            nearest="Nearest: 0.0",
            advice="With 0.0 the biases of the loaded weights are used and stay as they are",
            also=(switch,),
        )
        return
    why = "the biases of the loaded weights are used and stay as they are"
    keys.draft.drop_all((switch, rate), why)


def _nothing_or_refuse(keys: ModelKeys, key: str, feature: str) -> None:
    value = value_of(keys.draft.find(key))
    if keys.trains and not is_neutral(value):
        keys.draft.refuse(key, f"{feature} is not built yet", nearest="Nearest: 0.0")
    else:
        keys.draft.drop(key, _PREDICT)


def _prediction_layers(keys: ModelKeys) -> None:
    """Layers that predict further tokens (MTP): trained by a loss of their own, not used to
    predict."""
    names = [name for name in _MTP_COUNTS if keys.has(name)]
    asked = next((name for name in names if not is_neutral(keys.value(name))), "")
    in_files = not names and not is_neutral(keys.config_json.get("num_nextn_predict_layers"))
    factor = next((name for name in _MTP_FACTORS if not is_neutral(keys.value(name))), "")
    if keys.trains and (asked or (in_files and factor)):
        keys.refuse(
            asked or factor,
            "training with multi-token prediction is not built yet",
            nearest="Nearest: num_nextn_predict_layers = 0",
            advice="Set model.model_config.num_nextn_predict_layers: 0 to train the model without "
            "its prediction layers",
        )
        names = [name for name in names if name != asked]
    elif asked:
        keys.drop(asked, "the prediction layers are not used")
        names.remove(asked)
    for name in names:
        if name not in ("num_nextn_predict_layers", "mtp_num_layers"):
            keys.drop(name, _NOTHING)
    for name in _MTP_FACTORS:
        if name != factor or not (keys.trains and in_files and not asked):
            keys.drop(name, "there is no loss of prediction layers")
