"""`adapter_config.json`: the description of a low-rank adapter, in the format of PEFT.

Owns which of its fields count, which have no effect here, and which describe something that is not
an adapter of linear layers. The fields and their defaults are those of `peft.LoraConfig`
(https://huggingface.co/docs/peft/package_reference/lora). The same content is the entry of an
adapter in the state files of checkpoints. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from launcher.errors import Problem, UserError
from launcher.json_text import UNAMBIGUOUS, NotJson, line_and_column, parse
from launcher.weights.adapters.matching import by_pattern, is_named
from launcher.weights.formats.placeholders import placeholder

CONFIG_NAME = "adapter_config.json"
LORA = "LORA"
LARGEST = 1 << 24
"""Bytes of such a file that are read."""

Content = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "exclude_modules": None,
    "modules_to_save": None, "use_rslora": False, "use_dora": False, "layers_to_transform": None,
    "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False, "ensure_weight_tying": False,
}  # fmt: skip
"""Fields that count here, and what they are where a file of an older version lacks them."""
_NUMBER, _NAMES = (int, float), (str, list)
_TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,), "lora_alpha": _NUMBER, "lora_dropout": _NUMBER, "target_modules": _NAMES,
    "exclude_modules": _NAMES, "modules_to_save": (list,), "use_rslora": (bool,),
    "use_dora": (bool,), "layers_to_transform": (int, list), "rank_pattern": (dict,),
    "alpha_pattern": (dict,), "fan_in_fan_out": (bool,), "ensure_weight_tying": (bool,),
}  # fmt: skip
_FORM = {
    int: "an integer", float: "a number", str: "a text", list: "a list", bool: "true or false",
    dict: "an object",
}  # fmt: skip

_OF_NO_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "megatron_core", "runtime_config", "qalora_group_size"),
    *("init_lora_weights", "loftq_config", "corda_config", "eva_config", "lora_ga_config"),
    "layers_pattern",
}
"""Fields that do not change what an adapter with given weights computes, or are checked apart."""
_HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "layers_pattern": ("layers", "h")}
_REFUSED = {
    "bias": "biases of the base model are not part of an adapter here",
    "lora_bias": "B has no bias here",
    "target_parameters": "adapters of single parameters are not built; those of experts are read "
    "where the file names their projections in target_modules",
    "trainable_token_indices": "single rows of the embedding cannot be trained",
    "megatron_config": "layers of Megatron are not known",
    "layer_replication": "repeated layers are not built",
    "alora_invocation_tokens": "adapters that begin at a token (aLoRA) are not built",
    "use_qalora": "QA-LoRA is not built",
    "use_bdlora": "block-diagonal LoRA is not built",
    "arrow_config": "routing between adapters (Arrow) is not built",
    "velora_config": "VeLoRA is not built",
    "monteclora_config": "MonteCLoRA is not built",
    "kasa_config": "KaSA is not built",
    "layers_pattern": "layers are counted in `layers` or `h`",
}
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of values of init_lora_weights with which PEFT changes the weights of the base."""


def read_config(path: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`. Raises `UserError` for what is not one."""
    text = ""
    try:
        if path.stat().st_size > LARGEST:
            raise NotJson(f"it has more than {LARGEST >> 20} MiB")
        text = path.read_text(encoding="utf-8")
        content = parse(text, UNAMBIGUOUS)
        if not isinstance(content, dict):
            raise NotJson("it is not a JSON object")
    except NotJson as error:
        if found := placeholder(path, is_text=True):
            raise UserError(found) from None
        line = "" if error.position is None else f":{line_and_column(text, error.position)[0]}"
        raise UserError(
            f"this is not a description of an adapter: {error.reason}",
            where=f"{path}{line}", advice="Copy the directory again",
        ) from None  # fmt: skip
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the file: {error}", where=str(path)) from None
    return content


def checked(content: Content, where: str) -> dict[str, Any]:
    """The fields that count, with defaults. Raises `UserError` with everything in `content` that
    cannot be an adapter of linear layers. `where`: its file, in messages."""
    problems = [*_kind(content, where), *_types(content, where), *_refused(content, where)]
    if problems:
        raise UserError(problems)
    return {
        name: default if content.get(name) is None else content[name]
        for name, default in DEFAULTS.items()
    }


def unknown_fields(content: Content) -> list[str]:
    """The fields that are set and that nothing here knows: of a newer PEFT, or misspelt."""
    known = {*DEFAULTS, *_OF_NO_EFFECT, *_REFUSED}
    return sorted(name for name, value in content.items() if name not in known and value)


def is_target(config: Content, module: str) -> bool:
    """Whether target_modules names a module, by its name in files: as in PEFT."""
    wanted = config["target_modules"]
    return wanted == "all-linear" or is_named(module, wanted)


def rank_of(config: Content, module: str) -> int:
    """The rank of the adapter of a module, by its name in files."""
    return int(by_pattern(config.get("rank_pattern") or {}, (module,), config.get("r", 8)))


def scaling_of(config: Content, module: str) -> float:
    """The factor of the adapter of a module, by its name in files."""
    alpha = by_pattern(config.get("alpha_pattern") or {}, (module,), config.get("lora_alpha", 8))
    rank = rank_of(config, module)
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _kind(content: Content, where: str) -> list[Problem]:
    kind = content.get("peft_type")
    problems = []
    if kind != LORA:
        problems.append(_problem(
            "peft_type", kind, where, "only low-rank adapters (LoRA, DoRA) are known",
            nearest=f"Nearest: {LORA}",
        ))  # fmt: skip
    if not content.get("target_modules") and not content.get("target_parameters"):
        problems.append(_problem(
            "target_modules", content.get("target_modules"), where,
            "it names the layers of the adapter",
        ))  # fmt: skip
    return problems


def _types(content: Content, where: str) -> list[Problem]:
    problems = []
    for name, types in _TYPES.items():
        value = content.get(name)
        is_type = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if value is not None and not is_type:
            forms = " or ".join(dict.fromkeys(_FORM[kind] for kind in types))
            problems.append(_problem(name, value, where, f"it must be {forms}"))
        elif isinstance(value, list | dict):
            problems += _items(name, value, where)
        elif isinstance(value, str):
            problems += _expressions(name, [value], where)
        elif value is not None and (rule := _out_of_range(name, value)):
            problems.append(_problem(name, value, where, rule))
    return problems


def _out_of_range(name: str, value: float) -> str:
    """The rule that a number breaks; empty for none."""
    if name == "r" and value < 1:
        return "a rank is at least 1"
    if name == "lora_alpha" and not isfinite(value):
        return "it must be a finite number"
    if name == "lora_dropout" and not 0 <= value < 1:
        return "a dropout is at least 0 and below 1"
    return "layers are counted from 0" if name == "layers_to_transform" and value < 0 else ""


_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "layers_to_transform": (lambda n: isinstance(n, int) and n >= 0, "integers, from 0"),
    "rank_pattern": (lambda n: isinstance(n, int) and n >= 1, "integers above 0"),
    "alpha_pattern": (lambda n: isinstance(n, int | float) and isfinite(n), "finite numbers"),
}
"""Field to what its entries are; texts in the others."""


def _items(name: str, value: list[Any] | dict[str, Any], where: str) -> list[Problem]:
    """The problems of the entries of one field."""
    fits, kind = _ENTRIES.get(name, (lambda entry: isinstance(entry, str), "texts"))
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, bool) or not fits(entry):
            return [_problem(name, entry, where, f"its entries are {kind}")]
    return _expressions(name, value, where) if isinstance(value, dict) else []


def _expressions(name: str, texts: Iterable[str], where: str) -> list[Problem]:
    for text in texts:
        try:
            re.compile(text)
        except re.error as error:
            return [_problem(name, text, where, f"not a regular expression: {error}")]
    return []


def _refused(content: Content, where: str) -> list[Problem]:
    problems = []
    for name, reason in _REFUSED.items():
        value = content.get(name)
        if value and value not in _HARMLESS.get(name, ()):
            problems.append(_problem(
                name, value, where, reason, advice="Merge it into its base with PEFT "
                "(merge_and_unload), and load the complete weights",
            ))  # fmt: skip
    init = content.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_THE_BASE):
        problems.append(_problem(
            "init_lora_weights", init, where, "it has changed the weights of the base, so that the "
            "adapter does not belong to the model that it names",
            advice="Convert it with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion)",
        ))  # fmt: skip
    return problems


def _problem(
    name: str, value: Any, where: str, rule: str, *, nearest: str = "", advice: str = ""
) -> Problem:
    shown = repr(value)
    return Problem(
        what=f"{name} = {shown if len(shown) <= 80 else shown[:77] + '...'}", where=where,
        rule=rule, nearest=nearest, advice=advice,
    )  # fmt: skip


Scaling = Callable[[str], float]
"""Module, by its name in files, to the factor of its adapter."""
