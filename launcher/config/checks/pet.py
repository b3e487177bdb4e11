"""Rules about what is trained: adapters and frozen parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.config.checks.check import Check
from launcher.config.pet import adapter_of, lora_of, resumes, written_lora
from launcher.config.provenance import KeyProblem
from launcher.errors import UserError, did_you_mean
from launcher.weights.adapters.config import checked
from launcher.weights.adapters.found import find_adapter
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
    problems = [*_expressions(check), *_files(check)]
    yield from problems
    spec = check.spec
    decoder = spec.decoder if spec is not None else None
    if problems or spec is None or decoder is None:
        return
    lora = lora_of(check.config, spec.family)
    if lora is None:
        return
    modules = linear_modules(decoder.parameters, decoder.num_hidden_layers)
    if adapter_of(check.config) is not None:
        yield from _contradictions(check, lora, modules)
        return  # where it does not fit the model, its tensors do not either
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


def _files(check: Check) -> Iterator[KeyProblem]:
    """The adapter on disk that is named can be read, and is one that can be computed."""
    key = f"{_SECTION}.load_adapter" if check.config.pet_config.load_adapter else "load_checkpoint"
    try:
        found = adapter_of(check.config)
        if found is None:
            return
        checked(found.config, str(found.file))
        path = check.config.load_checkpoint
        is_other = check.config.pet_config.load_adapter and path and not resumes(check.config)
        if is_other and find_adapter(Path(path)) is not None:
            yield check.wrong(
                "load_checkpoint", "it holds an adapter, and pet_config.load_adapter names one too",
                advice="Name one of them; beside load_adapter, load_checkpoint is the base",
            )  # fmt: skip
        if check.trains and is_off(check):
            yield check.wrong(
                f"{_SECTION}.pet_type", f"{found.path} holds an adapter, which is trained further",
                nearest=f"Nearest: {'dora' if found.config.get('use_dora') else 'lora'}",
                advice="Or merge it into its base (python -m launcher.tools.merge_lora), and train "
                "the full model from the result",
            )  # fmt: skip
    except UserError as error:
        for problem in error.problems:
            what = f"{problem.where}: {problem.what}" if problem.where else problem.what
            yield check.wrong(
                key, problem.rule, what=f"{key}: {what}", nearest=problem.nearest,
                advice=problem.advice, also=("load_checkpoint",),
            )  # fmt: skip


def is_off(check: Check) -> bool:
    """Whether the configuration writes that there is no adapter."""
    written = check.provenance.is_written(f"{_SECTION}.pet_type")
    return written and not check.config.pet_config.is_on


def _contradictions(
    check: Check, files: LoraConfig, modules: Sequence[Names]
) -> Iterator[KeyProblem]:
    """What `pet_config` writes about an adapter on disk is what that is."""
    written = written_lora(check.config)
    found = adapter_of(check.config)
    if written is None or found is None:
        return
    common = [names for names in modules if files.targets(names)]
    differs = {
        "lora_rank": any(written.rank_of(n) != files.rank_of(n) for n in common),
        "lora_alpha": any(
            _alpha(written, n) != _alpha(files, n) for n in common
        ),
        "lora_dropout": written.dropout != files.dropout,
        "target_modules": any(written.targets(n) != files.targets(n) for n in modules),
        "use_rslora": written.use_rslora != files.use_rslora,
        "use_dora": written.use_dora != files.use_dora,
        "pet_type": check.config.pet_config.pet_type == "dora" and not files.use_dora,
        "modules_to_save": set(written.modules_to_save) != set(files.modules_to_save),
    }  # fmt: skip
    for key, is_other in differs.items():
        if is_other and check.provenance.is_written(f"{_SECTION}.{key}"):
            field = _IN_FILES[key]
            yield check.wrong(
                f"{_SECTION}.{key}", f"the adapter in {found.path} has its own",
                nearest=f"{found.file} has {field} = {_shown(found.config.get(field))}",
                advice="Remove the key, or write the same",
            )  # fmt: skip


_IN_FILES = {
    "lora_rank": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "target_modules": "target_modules", "use_rslora": "use_rslora", "use_dora": "use_dora",
    "pet_type": "use_dora", "modules_to_save": "modules_to_save",
}  # fmt: skip
"""Key of pet_config to the field of adapter_config.json."""


def _alpha(lora: LoraConfig, names: Names) -> float:
    """lora_alpha of a module."""
    rank = lora.rank_of(names)
    return round(lora.scaling_of(names) * (rank**0.5 if lora.use_rslora else rank), 6)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
