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
from launcher.weights.adapters.matching import matches_end
from models.lora_config import (
    ALL_LINEAR,
    HEAD,
    MAGNITUDE,
    PARTS,
    LoraConfig,
    Names,
    is_expert,
    is_frozen,
    is_named,
    linear_modules,
    parents,
    unmatched,
)
from models.spec import DecoderConfig

_SECTION = "pet_config"
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


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
    modules = _modules(decoder)
    if adapter_of(check.config) is not None:
        yield from _contradictions(check, lora, modules, decoder)
        return  # where it does not fit the model, its tensors do not either
    beyond = [n for n in lora.layers or () if not 0 <= n < decoder.num_hidden_layers]
    if beyond:
        last = decoder.num_hidden_layers - 1
        yield check.wrong(
            f"{_SECTION}.layers_to_transform", f"the layers of the model are 0 to {last}"
        )
        return
    yield from _targets(check, lora, modules)
    yield from _patterns(check, lora, modules)
    yield from _kind(check)
    yield from _experts(check, lora, modules)
    yield from _saved(check, lora, decoder)


def frozen(check: Check) -> Iterator[KeyProblem]:
    """Every pattern of `freeze` names a parameter, and something is left to train."""
    spec = check.spec
    decoder = spec.decoder if spec is not None else None
    if not check.config.freeze or spec is None or decoder is None:
        return
    try:
        lora = lora_of(check.config, spec.family)
    except UserError:
        return  # reported by `adapters`
    base = _parameters(decoder)
    own = [] if lora is None else _of_adapters(lora, _modules(decoder))
    saved = base if lora is None else [name for name in base if lora.saves(name)]
    if all(is_frozen(name, check.config.freeze) for name in (*own, *saved)):
        yield check.wrong(
            "freeze", "it names all parameters that would be trained",
            advice="Name fewer of them",
        )  # fmt: skip
    elif lora is not None and saved and all(is_frozen(n, check.config.freeze) for n in saved):
        yield check.wrong(
            "freeze",
            f"{_SECTION}.modules_to_save trains what it names",
            advice="Remove one of them",
        )
    for pattern in check.config.freeze:
        if not any(is_frozen(name, (pattern,)) for name in (*base, *own)):
            yield check.wrong(
                "freeze", "it names no parameter of the model", what=f"freeze: {pattern}",
                nearest=_of_glob(pattern) or did_you_mean(pattern, _parts(base)),
                advice="Write a name, its ending, or a regular expression for full names",
            )  # fmt: skip


def _of_glob(pattern: str) -> str:
    """The regular expression that a pattern of file names means."""
    try:
        re.compile(pattern)
    except re.error:
        if "*" in pattern:
            meant = re.sub(r"(?<!\.)\*", ".*", pattern)
            return f"did you mean `{meant}`?"
    return ""


def _of_adapters(lora: LoraConfig, modules: Sequence[Names]) -> list[str]:
    """The names of all parameters of the adapters."""
    names = [module[0] for module in modules if lora.targets(module)]
    endings = ["_lora_A", "_lora_B"], ["." + part + ".weight" for part in PARTS]
    found = [f"{name}{end}" for name in names for end in endings[not is_expert(name)]]
    return found + ([f"{name}.{MAGNITUDE}" for name in names] if lora.use_dora else [])


def _expressions(check: Check) -> Iterator[KeyProblem]:
    """What is a regular expression can be one."""
    section = check.config.pet_config
    texts = [
        *((key, text) for key in ("target_modules", "exclude_modules")
          if isinstance(text := getattr(section, key), str)),
        *(("rank_pattern", text) for text in section.rank_pattern),
        *(("alpha_pattern", text) for text in section.alpha_pattern),
    ]  # fmt: skip
    for key, text in texts:
        try:
            re.compile(text)
        except re.error as error:
            yield check.wrong(
                f"{_SECTION}.{key}", f"not a regular expression: {error}",
                nearest=_of_glob(text),
                advice="Write names, or a regular expression for full names",
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
    check: Check, files: LoraConfig, modules: Sequence[Names], decoder: DecoderConfig
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
        "modules_to_save": any(written.saves(n) != files.saves(n) for n in _parameters(decoder)),
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
    for entry in unmatched(lora.target_modules, modules):
        is_embedding = entry.rpartition(".")[2] in _EMBEDDINGS
        yield check.wrong(
            f"{_SECTION}.target_modules",
            "it names no linear layer of the model",
            what=f"{_SECTION}.target_modules: {entry}",
            nearest=_nearest_target(entry, isinstance(lora.target_modules, str), modules),
            advice=f"Train an embedding in full: {_SECTION}.modules_to_save" if is_embedding else
            "Write `all-linear`, a list of names or their endings, or a regular expression",
        )  # fmt: skip
    if not any(map(lora.targets, modules)) and not unmatched(lora.target_modules, modules):
        keys = ("exclude_modules", "modules_to_save", "layers_to_transform")
        section = check.config.pet_config
        written = (k for k in keys if check.provenance.is_written(f"{_SECTION}.{k}"))
        key = next((k for k in written if getattr(section, k) is not None), "target_modules")
        yield check.wrong(
            f"{_SECTION}.{key}", "no layer of the model has an adapter then",
            nearest=f"The linear layers are {', '.join(_endings(modules))}",
        )  # fmt: skip


def _nearest_target(entry: str, is_text: bool, modules: Sequence[Names]) -> str:
    """What an entry of target_modules means that names no layer."""
    if re.sub(r"[ _]", "-", entry.strip().lower()) in ("all", "all-linear", "*", "linear"):
        return f"did you mean `target_modules: {ALL_LINEAR}`?"
    parts = re.split(r"[,|\s]+", entry.strip(" ,|")) if is_text else []
    if parts and not unmatched(tuple(parts), modules):
        return f"did you mean `[{', '.join(parts)}]`?"
    endings = _endings(modules)
    return did_you_mean(entry, endings) or f"The linear layers are {', '.join(endings)}"


def _patterns(check: Check, lora: LoraConfig, modules: Sequence[Names]) -> Iterator[KeyProblem]:
    """Entries of exclude_modules, rank_pattern and alpha_pattern name layers."""
    for entry in unmatched(lora.exclude_modules, modules) if lora.exclude_modules else ():
        if check.provenance.is_written(f"{_SECTION}.exclude_modules"):
            yield check.wrong(
                f"{_SECTION}.exclude_modules", "it names no linear layer of the model",
                what=f"{_SECTION}.exclude_modules: {entry}",
                nearest=_nearest_target(entry, isinstance(lora.exclude_modules, str), modules),
            )  # fmt: skip
    adapted = [names for names in modules if lora.targets(names)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(lora, key).items():
            what = f"{_SECTION}.{key}: {pattern}: {value}"
            if not 0 < value < float("inf"):
                yield check.wrong(f"{_SECTION}.{key}", "must be above 0", what=what)
            elif adapted and not any(matches_end(pattern, names) for names in adapted):
                yield check.wrong(
                    f"{_SECTION}.{key}", "it matches no layer with an adapter", what=what,
                    nearest=did_you_mean(pattern, _endings(adapted)),
                    advice="Write the ending of a name, or a regular expression for it",
                )  # fmt: skip


def _kind(check: Check) -> Iterator[KeyProblem]:
    section, key = check.config.pet_config, f"{_SECTION}.use_dora"
    if section.pet_type == "dora" and not section.use_dora and check.provenance.is_written(key):
        yield check.wrong(
            key, "pet_type: dora is the same as use_dora: True", advice="Remove one of them"
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
    modules = {module for name in names for module in parents(name)}
    for entry in lora.modules_to_save:
        if not any(is_named(module, (entry,)) for module in modules):
            is_tied = decoder.tie_word_embeddings and entry == HEAD
            yield check.wrong(
                f"{_SECTION}.modules_to_save",
                "the head is tied to the embedding" if is_tied else
                "it names no module of the model",
                what=f"{_SECTION}.modules_to_save: {entry}",
                nearest="did you mean `embed_tokens`?" if is_tied else
                did_you_mean(entry, _parts(names)),
            )  # fmt: skip


def _modules(decoder: DecoderConfig) -> list[Names]:
    """The modules of a decoder that may have an adapter."""
    found = linear_modules(decoder.parameters, decoder.num_hidden_layers)
    return [names for names in found if names[0] != HEAD or not decoder.tie_word_embeddings]


def _parameters(decoder: DecoderConfig) -> list[str]:
    """The names of all parameters that a decoder of this family may have."""
    names = [
        f"model.layers.{layer}.{kind}" if not kind.startswith(("model.", "lm_head.")) else kind
        for kind in decoder.parameters for layer in range(decoder.num_hidden_layers)
    ]  # fmt: skip
    is_tied = decoder.tie_word_embeddings
    return [name for name in names if not (is_tied and name == f"{HEAD}.weight")]


def _parts(names: Sequence[str]) -> set[str]:
    """Single components of names, without numbers."""
    return {part for name in names for part in name.split(".") if not part.isdecimal()}


def _endings(modules: Sequence[Names]) -> list[str]:
    return list(dict.fromkeys(n.rpartition(".")[2] for names in modules for n in names))
