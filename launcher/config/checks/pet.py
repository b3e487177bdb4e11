"""Rules about what is trained: adapters and frozen parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from launcher.config.checks.check import Check
from launcher.config.pet import lora_of
from launcher.config.provenance import KeyProblem
from launcher.errors import did_you_mean
from models.lora_config import (
    LoraConfig,
    Names,
    is_expert,
    is_frozen,
    is_named,
    linear_modules,
    unmatched,
)
from models.spec import DecoderConfig

_SECTION = "pet_config"


def adapters(check: Check) -> Iterator[KeyProblem]:
    """The adapter has layers to be on, and is one that can be computed there."""
    problems = list(_expressions(check))
    yield from problems
    lora = lora_of(check.config)
    decoder = check.spec.decoder if check.spec is not None else None
    if problems or lora is None or decoder is None:
        return
    modules = linear_modules(decoder.parameters, decoder.num_hidden_layers)
    beyond = [n for n in lora.layers or () if not 0 <= n < decoder.num_hidden_layers]
    if beyond:
        last = decoder.num_hidden_layers - 1
        yield check.wrong(
            f"{_SECTION}.layers_to_transform", f"the layers of the model are 0 to {last}"
        )
        return
    yield from _targets(check, lora, modules)
    yield from _experts(check, lora, modules)
    yield from _saved(check, lora, decoder)


def frozen(check: Check) -> Iterator[KeyProblem]:
    """Every pattern of `freeze` names a parameter."""
    decoder = check.spec.decoder if check.spec is not None else None
    if not check.config.freeze or decoder is None:
        return
    names = _parameters(decoder)
    if all(is_frozen(name, check.config.freeze) for name in names):
        yield check.wrong(
            "freeze", "it names all parameters of the model, and nothing is left to train",
            advice="Name fewer of them",
        )  # fmt: skip
    for pattern in check.config.freeze:
        if not any(is_frozen(name, (pattern,)) for name in names):
            yield check.wrong(
                "freeze", "it names no parameter of the model", what=f"freeze: {pattern}",
                nearest=did_you_mean(pattern, _parts(names)),
                advice="Write a name, its ending, or a regular expression for full names",
            )  # fmt: skip


def _expressions(check: Check) -> Iterator[KeyProblem]:
    """Texts of target_modules and exclude_modules are regular expressions."""
    for key in ("target_modules", "exclude_modules"):
        value = getattr(check.config.pet_config, key)
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            yield check.wrong(
                f"{_SECTION}.{key}", f"not a regular expression: {error}",
                advice="Write a list of names, or a regular expression for full names",
            )  # fmt: skip


def _targets(check: Check, lora: LoraConfig, modules: Sequence[Names]) -> Iterator[KeyProblem]:
    names = [name for module in modules for name in module]
    for entry in unmatched(lora, modules):
        yield check.wrong(
            f"{_SECTION}.target_modules",
            "it names no linear layer of the model",
            what=f"{_SECTION}.target_modules: {entry}",
            nearest=did_you_mean(entry, _parts(names))
            or f"The linear layers are {', '.join(_endings(names))}",
            advice="Write `all-linear`, names or their endings, or a regular expression",
        )
    if not any(lora.targets(module) for module in modules) and not unmatched(lora, modules):
        yield check.wrong(
            f"{_SECTION}.exclude_modules" if lora.exclude_modules else f"{_SECTION}.target_modules",
            "no layer of the model has an adapter then",
            nearest=f"The linear layers are {', '.join(_endings(names))}",
        )


def _experts(check: Check, lora: LoraConfig, modules: Sequence[Names]) -> Iterator[KeyProblem]:
    if not any(is_expert(module[0]) and lora.targets(module) for module in modules):
        return
    advice = "Leave the projections of experts out of target_modules, or set it to"
    if lora.dropout:
        yield check.wrong(
            f"{_SECTION}.lora_dropout", "adapters of routed experts have no dropout",
            advice=f"{advice} 0",
        )  # fmt: skip
    if lora.use_dora:
        key = "use_dora" if check.config.pet_config.use_dora else "pet_type"
        yield check.wrong(
            f"{_SECTION}.{key}", "not built for routed experts", advice=f"{advice} lora"
        )


def _saved(check: Check, lora: LoraConfig, decoder: DecoderConfig) -> Iterator[KeyProblem]:
    names = _parameters(decoder)
    modules = sorted({name.rpartition(".")[0] for name in names})
    for entry in lora.modules_to_save:
        if not any(is_named(module, (entry,)) for module in modules):
            yield check.wrong(
                f"{_SECTION}.modules_to_save", "it names no module of the model",
                what=f"{_SECTION}.modules_to_save: {entry}",
                nearest=did_you_mean(entry, _parts(names)),
            )  # fmt: skip


def _parameters(decoder: DecoderConfig) -> list[str]:
    """The names of all parameters that a decoder of this family may have."""
    return [
        f"model.layers.{layer}.{kind}" if not kind.startswith(("model.", "lm_head.")) else kind
        for kind in decoder.parameters for layer in range(decoder.num_hidden_layers)
    ]  # fmt: skip


def _parts(names: Sequence[str]) -> set[str]:
    """Single components of names, without numbers."""
    return {part for name in names for part in name.split(".") if not part.isdecimal()}


def _endings(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))
