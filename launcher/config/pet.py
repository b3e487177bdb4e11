"""The adapter that a configuration describes, or names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.config.schema import Config
from launcher.extensions import JOINED_MODULES, installed
from launcher.weights.adapters.config import checked
from launcher.weights.adapters.found import FoundAdapter, find_adapter, no_adapter
from models.lora_config import LoraConfig


def lora_of(
    config: Config, family: str = "", found: FoundAdapter | None = None
) -> LoraConfig | None:
    """The adapter of the configuration; None: the full model is trained, or loaded. That of files
    has the values in these; `family` (model_type) is needed to understand their names of modules.
    `found`: `adapter_of(config)`, where it is known. Raises `UserError` for files that cannot be
    read."""
    found = found or adapter_of(config)
    if found is not None:
        return lora_from(checked(found.config, str(found.file)), family)
    return written_lora(config)


def written_lora(config: Config) -> LoraConfig | None:
    """The adapter that `pet_config` describes, whatever files it names; None without one."""
    section = config.pet_config
    if not section.is_on:
        return None

    def names(value: str | list[str]) -> str | tuple[str, ...]:
        return value if isinstance(value, str) else tuple(value)

    return LoraConfig(
        rank=section.lora_rank,
        alpha=section.lora_alpha,
        dropout=section.lora_dropout,
        target_modules=names(section.target_modules),
        exclude_modules=names(section.exclude_modules),
        modules_to_save=tuple(section.modules_to_save),
        use_rslora=section.use_rslora,
        use_dora=section.use_dora or section.pet_type == "dora",
        layers=None if section.layers_to_transform is None else tuple(section.layers_to_transform),
        rank_pattern=section.rank_pattern,
        alpha_pattern=section.alpha_pattern,
    )


def lora_from(content: Mapping[str, Any], family: str = "") -> LoraConfig:
    """The adapter of an adapter_config.json, whose fields are checked."""
    apart = _apart(family)

    def names(value: str | list[str] | None) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return _pattern(value, apart)
        return tuple(sorted({part for name in value or () for part in _parts(name, apart)}))

    layers = content["layers_to_transform"]
    return LoraConfig(
        rank=content["r"],
        alpha=float(content["lora_alpha"]),
        dropout=float(content["lora_dropout"]),
        target_modules=names(content["target_modules"]),
        exclude_modules=names(content["exclude_modules"]),
        modules_to_save=_pattern(_ending_in(content["modules_to_save"] or ()), apart) or (),
        use_rslora=content["use_rslora"],
        use_dora=content["use_dora"],
        layers=None
        if layers is None or layers == []
        else tuple([layers] if isinstance(layers, int) else layers),
        rank_pattern={_pattern(k, apart): v for k, v in content["rank_pattern"].items()},
        alpha_pattern={_pattern(k, apart): v for k, v in content["alpha_pattern"].items()},
    )


def _apart(family: str) -> dict[str, list[str]]:
    """Last part of the name of a module in files to those of the modules it is in the model."""
    joined = installed(JOINED_MODULES).get(family, {})
    leaf = lambda name: name.rpartition(".")[2]  # noqa: E731
    return {leaf(name): [leaf(part) for part in parts] for name, parts in joined.items()}


def _parts(name: str, apart: Mapping[str, list[str]]) -> list[str]:
    """A name of modules in files, as names of modules of the model."""
    found = next((joined for joined in apart if joined in name), None)
    return [name] if found is None else [name.replace(found, part) for part in apart[found]]


def _ending_in(names: Sequence[str]) -> str:
    """The modules that PEFT takes for those of modules_to_save: it compares endings of names, also
    within a word (`norm` is `input_layernorm` too), and passes over what names no module."""
    return f".*({'|'.join(map(re.escape, names))})" if names else ""


def _pattern(pattern: str, apart: Mapping[str, list[str]]) -> str:
    """A regular expression for names in files, as one for names of modules of the model."""
    for joined, parts in apart.items():
        pattern = pattern.replace(joined, f"({'|'.join(parts)})")
    return pattern


def adapter_of(config: Config) -> FoundAdapter | None:
    """The adapter on disk that a run starts from: that of pet_config.load_adapter, or what
    load_checkpoint holds. None without one, and for what a run resumes. Raises `UserError`."""
    if config.pet_config.load_adapter:
        path = Path(config.pet_config.load_adapter)
        found = find_adapter(path)
        if found is None:
            raise no_adapter(path)
        return found
    if not config.load_checkpoint or resumes(config):
        return None
    return find_adapter(Path(config.load_checkpoint))


def resumes(config: Config) -> bool:
    """Whether load_checkpoint is the folder of the checkpoints that a run resumes from."""
    return config.run_mode in ("train", "finetune") and config.resume_training is not False
