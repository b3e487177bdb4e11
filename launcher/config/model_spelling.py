"""Keys of `model.model_config` in the spelling of config.json, for `--migrate`.

Owns which keys get another name: MindFormers' spellings that mean the same for this family.
Invariant: under the new names the model is the same one, which is checked for every configuration,
because a spelling may be a key of its own in the configuration class of a family.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from launcher.config.derived import read_config_json
from launcher.config.nodes import Node, find, put
from launcher.config.schema import Config
from launcher.errors import UserError
from models import keys
from models.families import ModelSpec, model_spec

SECTION = "model.model_config"
_SPELLINGS = keys.ALIASES | keys.PRECISIONS


def new_names(config: Config, bad_keys: Set[str] = frozenset()) -> dict[str, str]:
    """The keys of model_config that are spelled differently in config.json, to that spelling.
    Empty for a model that cannot be described without its `bad_keys`."""
    written = {
        name: value
        for name, value in config.model.model_config.items()
        if f"{SECTION}.{name}" not in bad_keys
    }
    names = {
        name: new
        for name in written
        if (new := _SPELLINGS.get(name, name)) != name and new not in config.model.model_config
    }
    try:
        base = read_config_json(config)
        same = _parts(model_spec(written, base)) == _parts(
            model_spec(renamed(written, names), base)
        )
    except UserError:
        return {}
    return names if same and len(set(names.values())) == len(names) else {}


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A map under these names, in its order."""
    return {names.get(name, name): value for name, value in values.items()}


def in_hub_spelling(config: Config) -> Config:
    """A configuration whose model_config has these names."""
    values = renamed(config.model.model_config, new_names(config))
    return replace(config, model=replace(config.model, model_config=values))


def with_names(tree: Node, names: Mapping[str, str]) -> Node:
    """A tree whose model_config has these names."""
    section = find(tree, SECTION)
    if not names or section is None:
        return tree
    return put(tree, SECTION, replace(section, value=renamed(section.value, names)))


def _parts(spec: ModelSpec) -> tuple[Any, ...]:
    """What a model is, without the notes about spellings."""
    return spec.hf_config, spec.precision, spec.seq_length
