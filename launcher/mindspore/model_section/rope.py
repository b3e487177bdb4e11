"""Rotary embeddings: base, context extension and position embedding type of MindFormers.

Owns the step to `rope_theta`, `rope_scaling` and `partial_rotary_factor`. Two spellings are read:
`extend_method` with `scaling_factor` of the older classes, and `position_embedding_type` with
`rotary_scaling_factor` and the numbers of YaRN of the newer ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.mindspore.model_section.keys import ModelKeys, is_null, spellings
from models.checks import is_number

_NO_SCALING = "the context is not extended"
_METHODS = ("None", "PI", "LINEAR", "NTK", "DYNAMIC_NTK", "YARN", "LLAMA3")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.707}
"""Numbers that MindFormers' newer classes use where nothing is written; the last two only with
latent attention."""
_MAPS = ("LLAMA3", "YARN")
_NEEDED = {
    "LLAMA3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "YARN": ("factor",),
}  # fmt: skip

KEYS = (
    *("rotary_emb_base", "rope_ratio", "rotary_pct", "rotary_percent", "extend_method", *_YARN),
    *("scaling_factor", "position_embedding_type", "rotary_scaling_factor", "pretrain_seqlen"),
)


def translate(keys: ModelKeys) -> None:
    """Translate the keys about rotary embeddings."""
    _base(keys)
    if keys.has("extend_method") or _is_old_scaling(keys):
        _extend_method(keys)
    _position_embedding_type(keys)
    if not keys.is_own("pretrain_seqlen"):
        keys.drop("pretrain_seqlen", "only dynamic NTK of MindFormers asks for it")


def _base(keys: ModelKeys) -> None:
    """The base, of which `rotary_emb_base` beside `theta` is a leftover."""
    if keys.has("rotary_emb_base") and not keys.is_own("rotary_emb_base"):
        if keys.spelling("rope_theta"):
            keys.drop("rotary_emb_base", f"{keys.spelling('rope_theta')} is used")
        else:
            for name in spellings("rope_theta"):
                keys.drop(name, "rotary_emb_base is used")
            keys.rename("rotary_emb_base", "rope_theta")
    if keys.has("rope_ratio") and not keys.is_own("rope_ratio"):
        _ratio(keys)
    part = keys.value("rotary_pct", keys.value("rotary_percent"))
    for name in ("rotary_pct", "rotary_percent"):
        if not keys.has(name) or keys.is_own(name):
            continue
        if part in (None, 1) or keys.family not in ("llama", "qwen2", "mixtral", "telechat"):
            keys.replace(name, {} if part in (None, 1) else {"partial_rotary_factor": part},
                         "the full head is rotated" if part in (None, 1) else "")  # fmt: skip
        else:
            keys.refuse(name, f"{keys.family} rotates the full head", nearest="Nearest: 1.0")


def _ratio(keys: ModelKeys) -> None:
    ratio = keys.value("rope_ratio", 1)
    if not is_number(ratio) or ratio <= 0:
        keys.refuse("rope_ratio", "must be a number above 0", nearest="Nearest: 1")
    elif keys.spelling("rope_theta"):
        base = keys.value(keys.spelling("rope_theta"))
        if ratio == 1:
            keys.drop("rope_ratio", "it multiplies the base by one")
        else:
            keys.refuse("rope_ratio", f"rope_theta = {base} sets the base too",
                        advice="Remove one of the two")  # fmt: skip
    else:
        keys.replace("rope_ratio", {"rope_theta": 10000.0 * ratio}, "the base is 10000 times it")


def _is_old_scaling(keys: ModelKeys) -> bool:
    """Whether `scaling_factor` belongs to the older classes."""
    return keys.has("scaling_factor") and not keys.has("position_embedding_type")


def _extend_method(keys: ModelKeys) -> None:
    """`extend_method` and `scaling_factor`, a number or a map."""
    method, factor = str(keys.value("extend_method", "None")).upper(), keys.value("scaling_factor")
    if not keys.has("extend_method") and keys.family == "deepseek_v3" and isinstance(factor, dict):
        method = "YARN"  # the default of that class
    numbers = factor if isinstance(factor, Mapping) else {}
    number = numbers.get("factor") if isinstance(factor, Mapping) else factor
    if method == "NONE":
        _take(keys, {}, _NO_SCALING)
    elif method in ("LINEAR", "PI", "NTK", "DYNAMIC_NTK"):
        _by_number(keys, method, 1.0 if number is None else number)
    elif method in _MAPS:
        _by_map(keys, method, numbers)
    else:
        keys.refuse("extend_method", "unknown method", nearest=f"Known: {', '.join(_METHODS)}")
        _drop_factor(keys)


def _by_number(keys: ModelKeys, method: str, factor: Any) -> None:
    if not is_number(factor) or factor <= 0:
        keys.refuse("scaling_factor", f"extend_method {method} needs a number above 0",
                    nearest="Nearest: 1.0")  # fmt: skip
        keys.drop("extend_method", "scaling_factor is wrong")
    elif factor == 1:
        _take(keys, {}, _NO_SCALING)
    elif method == "NTK":
        theta = keys.spelling("rope_theta")
        base = keys.value(theta) if theta else keys.size("rope_theta", 10000.0)
        if not is_number(base):
            _take(keys, {}, _NO_SCALING)
            return
        if theta:
            keys.replace(theta, {"rope_theta": base * factor}, "NTK multiplies the base")
        _take(keys, {"rope_theta": base * factor}, "NTK multiplies the base")
    else:
        kind = "dynamic" if method == "DYNAMIC_NTK" else "linear"
        _take(keys, {"rope_scaling": {"rope_type": kind, "factor": factor}})


def _by_map(keys: ModelKeys, method: str, numbers: Mapping[str, Any]) -> None:
    missing = [name for name in _NEEDED[method] if is_null(numbers.get(name))]
    if missing:
        name = "scaling_factor" if keys.has("scaling_factor") else "extend_method"
        keys.refuse(
            name, f"extend_method {method} needs a map in scaling_factor; it has no "
            f"{' and no '.join(missing)}",
            advice=f"Write scaling_factor: {{{', '.join(f'{n}: ...' for n in _NEEDED[method])}}}",
        )  # fmt: skip
        other = "extend_method" if name == "scaling_factor" else "scaling_factor"
        keys.drop(other, "scaling_factor is wrong")
        return
    if method == "YARN" and numbers["factor"] == 1:
        _take(keys, {}, _NO_SCALING)
        return
    given = {name: value for name, value in numbers.items() if not is_null(value)}
    _take(keys, {"rope_scaling": {"rope_type": method.lower(), **given}})


def _take(keys: ModelKeys, values: dict[str, Any], why: str = "") -> None:
    """Replace both keys by `values`."""
    for name in ("extend_method", "scaling_factor"):
        keys.replace(name, values, why)


def _drop_factor(keys: ModelKeys) -> None:
    keys.drop("scaling_factor", "extend_method is wrong")


def _position_embedding_type(keys: ModelKeys) -> None:
    """The kind of the newer classes; scaling of config.json is used where it has some."""
    name = "position_embedding_type"
    if not keys.has(name) or keys.is_own(name) or not keys.is_llama_like:
        return
    kind = str(keys.value(name, "rope")).lower()
    scaling = keys.config_json.get("rope_scaling")
    has_scaling = isinstance(scaling, Mapping) or keys.has("rope_scaling")
    if kind == "yarn" and not has_scaling:
        _newer_yarn(keys)
    elif kind in ("rope", "yarn"):
        why = "rope_scaling is used" if has_scaling else _NO_SCALING
        for key in (name, "rotary_scaling_factor", "scaling_factor", *_YARN):
            keys.drop(key, why)
    elif keys.family:
        keys.refuse(name, f"{keys.family} has rotary embeddings", nearest="Nearest: rope or yarn")


def _newer_yarn(keys: ModelKeys) -> None:
    name = "position_embedding_type"
    source = "rotary_scaling_factor" if keys.has("rotary_scaling_factor") else "scaling_factor"
    factor = keys.value(source, 40.0)
    if isinstance(factor, Mapping) or not is_number(factor) or factor < 1:
        keys.refuse(source, "must be a number of at least 1", nearest="Nearest: 1")
        for key in (name, *_YARN):
            keys.drop(key, f"{source} is wrong")
        return
    defaults = dict(_YARN_DEFAULTS)
    if not keys.is_own("kv_lora_rank"):
        del defaults["mscale"], defaults["mscale_all_dim"]
    numbers = {key: keys.value(key, defaults.get(key)) for key in _YARN}
    numbers = {key: value for key, value in numbers.items() if value is not None}
    scaling = {"rope_type": "yarn", "factor": factor, **numbers}
    values = {"rope_scaling": scaling} if factor != 1 else {}
    for key in (name, "rotary_scaling_factor", "scaling_factor", *_YARN):
        keys.replace(key, values, "" if values else _NO_SCALING)
