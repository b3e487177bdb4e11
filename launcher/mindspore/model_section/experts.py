"""Experts in the core spellings: keys of model_config about counts, groups, widths and scores.

Owns what each of them becomes in config.json of the family.
"""

from __future__ import annotations

from typing import Any

from launcher.mindspore.model_section.keys import ModelKeys
from models.families import DECODERS

KEYS = (
    *("moe_shared_expert_intermediate_size", "moe_router_score_function", "scoring_func"),
    "routed_scaling_factor",
)
_GROUPS = ("n_group", "topk_group", "moe_router_num_groups", "moe_router_group_topk")
_COUNTS = (
    *("num_experts", "n_routed_experts", "expert_num", "num_moe_experts", "num_experts_per_tok"),
    *("num_experts_chosen", "moe_router_topk", "n_shared_experts", "shared_expert_num"),
)
_SCALES = ("routed_scaling_factor", "moe_router_topk_scaling_factor")


def translate(keys: ModelKeys) -> None:
    """Translate the keys of model_config."""
    _numbers(keys)
    if keys.has("moe_shared_expert_intermediate_size"):
        _shared_width(keys)
    for name in ("scoring_func", "moe_router_score_function"):
        _scoring(keys, name)
    for name in _SCALES:
        _scale(keys, name)


def scoring_of(family: str) -> str:
    """How the router of a family scores experts."""
    own = DECODERS.get(family)
    has_sigmoid = own is not None and "mlp.gate.e_score_correction_bias" in own.parameters
    return "sigmoid" if has_sigmoid else "softmax"


def as_integer(value: Any) -> int | None:
    """The integer that a number is, 8 for 8.0; None for anything else."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return int(value) if isinstance(value, int) else None


def _numbers(keys: ModelKeys) -> None:
    """Counts may be floats, and no groups are one group."""
    for name in _COUNTS:
        value = keys.value(name)
        if isinstance(value, float) and as_integer(value) is not None:
            keys.replace(name, {name: as_integer(value)}, "an integer")
    for name in _GROUPS:
        if keys.has(name) and keys.value(name) in (None, 0):
            if keys.is_own("n_group"):
                keys.replace(name, {name: 1}, "no groups are one group")
            else:
                keys.drop(name, "there are no groups")


def _scale(keys: ModelKeys, name: str) -> None:
    """The factor of what routed experts add, which few families of transformers have."""
    if not keys.has(name) or keys.is_own("routed_scaling_factor") or not keys.expert_count:
        return
    if keys.value(name, 1) == 1:
        keys.drop(name, "it multiplies by one")
    elif keys.is_own("router_topk_scaling_factor"):
        keys.rename(name, "router_topk_scaling_factor")
    else:
        keys.refuse(name, f"{keys.family} does not scale routed experts", nearest="Nearest: 1.0")


def _scoring(keys: ModelKeys, name: str) -> None:
    value = keys.value(name)
    if value is None or not keys.family or keys.is_own(name):
        return
    has = scoring_of(keys.family)
    if value != has and keys.expert_count:
        keys.refuse(name, f"the scores of {keys.family} are a {has}", nearest=f"Nearest: {has}")
    else:
        keys.drop(name, f"the scores of {keys.family} are a {has}")


def _shared_width(keys: ModelKeys) -> None:
    """The width of all shared experts together, which follows from other keys."""
    name = "moe_shared_expert_intermediate_size"
    written, count = as_integer(keys.value(name)), keys.size("n_shared_experts")
    width = keys.size("moe_intermediate_size")
    if keys.is_own("shared_expert_intermediate_size"):
        keys.rename(name, "shared_expert_intermediate_size")
    elif keys.value(name) is None or not count:
        keys.drop(name, "there are no shared experts")
    elif isinstance(width, int) and written == width * count:
        keys.drop(name, "it is n_shared_experts times moe_intermediate_size")
    elif isinstance(width, int) and written and not written % width:
        keys.refuse(
            name, f"{count} shared experts of {width} are {count * width} wide",
            nearest=f"Nearest: {count * width}",
            advice=f"Or set model.model_config.n_shared_experts: {written // width}",
        )  # fmt: skip
    elif isinstance(width, int):
        keys.refuse(
            name, f"shared experts are n_shared_experts ({count}) times moe_intermediate_size "
            f"({width}) wide", nearest=f"Nearest: {count * width}",
        )  # fmt: skip
