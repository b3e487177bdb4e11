"""The adapter of a model as the content of an `adapter_config.json`, with names of rank files.

Owns how patterns of the configuration become names of layers: a file must mean the same for any
program, whatever it takes `all-linear` for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from launcher.layout.box import Shape
from launcher.weights.adapters.config import LORA
from launcher.weights.tensor_mapping import MappingsOf, shapes_in_files
from models.lora_config import (
    MAGNITUDE,
    LoraConfig,
    Names,
    is_adapter,
    is_named,
    module_names,
    parents,
)
from models.spec import ModelSpec


def adapter_config(
    spec: ModelSpec,
    shapes: Mapping[str, Shape],
    mappings_of: MappingsOf,
    *,
    transposed: bool,
    tied: Mapping[str, str],
) -> dict[str, Any]:
    """The adapter of a model with tensors of these global `shapes`. Each layer with one is named:
    by the ending of its name where all layers with that ending have one, else by its full name.

    `transposed`: the weights of its layers are [inputs, outputs]. `tied`: names in files of tied
    weights that are saved in full, to those they are tied to.
    """
    lora = spec.lora
    assert lora is not None
    stored = {
        name: own
        for own, shape in shapes.items()
        for name in shapes_in_files({own: shape}, mappings_of)
    }
    names = _adapted(spec, shapes, mappings_of)
    ranks = {module: lora.rank_of(own) for module, own in names.items()}
    alphas = {
        module: round(lora.scaling_of(own) * _divisor(lora, ranks[module]), 6)
        for module, own in names.items()
    }
    kept = [name for name, own in stored.items() if not is_adapter(name) and lora.saves(own)]
    modules = {_module(name) for name in stored if name.endswith(".weight")}
    return {
        "peft_type": LORA,
        "task_type": "CAUSAL_LM",
        "r": lora.rank,
        "lora_alpha": _number(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": _short(names, modules),
        "modules_to_save": _saved(lora, kept, stored) or None,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "rank_pattern": _patterns(ranks, lora.rank),
        "alpha_pattern": _patterns(alphas, lora.alpha),
        "bias": "none",
        "fan_in_fan_out": transposed,
        # Without it, PEFT would leave the other end of tied embeddings as it is.
        "ensure_weight_tying": bool(tied),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _adapted(
    spec: ModelSpec, shapes: Mapping[str, Shape], mappings_of: MappingsOf
) -> dict[str, Names]:
    """Every module with an adapter, by its name in files, to its names for patterns."""
    parameters = spec.decoder.parameters if spec.decoder is not None else {}
    found: dict[str, Names] = {}
    for name, shape in shapes.items():
        if is_adapter(name):
            own = module_names(_weight(name), shape, parameters)
            for stored in shapes_in_files({name: shape}, mappings_of):
                found[_module(stored)] = own
    return found


def _weight(name: str) -> str:
    """The weight that a parameter of an adapter belongs to: `x.weight` of `x.lora_A.weight`, the
    stack `experts.up_proj` of `experts.up_proj_lora_A`."""
    module = _module(name)
    return f"{module}.weight" if module != name else name.removesuffix("_lora_A").removesuffix(
        "_lora_B")  # fmt: skip


def _module(name: str) -> str:
    """The module of a weight, or of a parameter of an adapter."""
    for ending in (".lora_A.weight", ".lora_B.weight", f".{MAGNITUDE}", ".weight"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def _divisor(lora: LoraConfig, rank: int) -> float:
    """alpha divided by the factor of an adapter."""
    return float(rank**0.5 if lora.use_rslora else rank)


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _short(modules: Iterable[str], everything: Collection[str]) -> list[str]:
    """`modules` by the endings that name no other module of `everything`, else by full names."""
    chosen = set(modules)
    left = {_leaf(module) for module in everything if module not in chosen}
    return sorted({module if _leaf(module) in left else _leaf(module) for module in chosen})


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Module or ending to its value, of those that have another than the `usual` one."""
    other = {module for module, value in values.items() if value != usual}
    found = {}
    for module in sorted(other):
        same = {value for one, value in values.items() if _leaf(one) == _leaf(module)}
        found[_leaf(module) if len(same) == 1 else module] = _number(values[module])
    return found


def _number(value: float) -> float:
    """An integer where it is one."""
    return int(value) if value == int(value) else value


def _saved(lora: LoraConfig, kept: Sequence[str], everything: Iterable[str]) -> list[str]:
    """modules_to_save, as names in files. PEFT takes every module whose name ends in one of them,
    also in the middle of a word: full names are written where that is another one."""
    modules = {module for name in everything for module in parents(name)}
    is_pattern, entries = isinstance(lora.modules_to_save, str), []
    for name in kept:
        own = parents(name)
        wanted = [_leaf(own[0])] if is_pattern else lora.modules_to_save
        fitting = [entry for entry in wanted
                   if any(is_named(module, (entry,)) for module in own)
                   and all(is_named(module, (entry,)) for module in modules
                           if module.endswith(entry))]  # fmt: skip
        entries.append(fitting[0] if fitting else own[0])
    return list(dict.fromkeys(entries))
