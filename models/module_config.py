"""config.json of a family that runs through its transformers module, merged with the user's keys.

Owns the merge: a key of the user replaces that key under any of its names, a section is merged,
rope settings are written where the family's configuration class reads them. A key that the class
would ignore is a problem. Pure functions over plain dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.errors import did_you_mean
from models.config_class import COMMON_KEYS, ConfigClass, mentioned
from models.keys import NOT_BUILT
from models.module_sizes import ModuleSizes
from models.reading import ROPE_MAPS, Reading
from models.spec import Problems

_KEPT = ("rope_theta", "partial_rotary_factor")
"""Rope settings that are kept where only the scaling is overridden."""

_OLDER = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""Rope setting -> its name in GPT-NeoX outside `rope_parameters`."""


def module_config(
    family: str, known: ConfigClass, base: Mapping[str, Any], reading: Reading, problems: Problems
) -> dict[str, Any]:
    """The content of config.json for the module of `family`; `known`: its configuration class."""
    config = dict(base)
    _note_ignored(family, known, base, reading)
    rope = {key: value for key, value in reading.rope.items() if known.has_rope}
    values = reading.values | {k: v for k, v in reading.rope.items() if k not in rope}
    if "partial_rotary_factor" in values and _has_partial_rotary(family, known, base):
        rope["partial_rotary_factor"] = values.pop("partial_rotary_factor")
    for key, value in values.items():
        if _check_key(key, known, reading, problems):
            _check_not_overridden(family, key, known, base, reading, problems)
            _write(config, key, value, known, reading, problems)
    if rope:
        _write_rope(config, rope, known, reading, problems)
    ModuleSizes(config, known, reading, problems).run()
    return config | {"model_type": family}


def _note_ignored(
    family: str, known: ConfigClass, base: Mapping[str, Any], reading: Reading
) -> None:
    """Note the keys of config.json that neither the class nor the model of `family` has."""
    rope = (*ROPE_MAPS, *_KEPT, "original_max_position_embeddings") if known.has_rope else ()
    ignored = [
        key for key, value in base.items()
        if not (known.has(key) or key in COMMON_KEYS or key in known.old_keys or key in rope)
        and value is not None and not key.startswith("_") and key not in NOT_BUILT
        and not mentioned(family, key)
    ]  # fmt: skip
    if ignored:
        reading.notes.append(f"config.json: {', '.join(ignored)}: {known.name} has no such key")


def _check_key(key: str, known: ConfigClass, reading: Reading, problems: Problems) -> bool:
    if known.has(key) or key in COMMON_KEYS:
        return True
    written = reading.written.get(key, key)
    problems.log(
        f"model.model_config.{written}",
        f"{known.name} has no such key",
        nearest=did_you_mean(written, [*known.defaults, *known.synonyms, *COMMON_KEYS]),
        key=written,
    )
    return False


def _check_not_overridden(
    family: str, key: str, known: ConfigClass, base: Mapping[str, Any], reading: Reading,
    problems: Problems,
) -> None:  # fmt: skip
    """A key from which another is derived has no effect if config.json has the latter, and a list
    with one entry a layer must match the number of layers."""
    for target, sources in known.derived.items():
        names = known.names_of(target)
        held = next((base[name] for name in names if base.get(name) is not None), None)
        if key not in sources or held is None or not reading.values.keys().isdisjoint(names):
            continue
        layers = key == known.key("num_hidden_layers") and isinstance(held, list)
        rule = f"no effect: config.json has {target}"
        if layers and len(held) != reading.values[key]:
            rule = f"{target} of config.json has {len(held)} entries"
        elif mentioned(family, key):
            continue
        advice = f"Set model.model_config.{target}, or set it to null to derive it"
        problems.add(reading.written[key], reading.values[key], rule, advice=advice)


def _write(
    config: dict[str, Any], key: str, value: Any, known: ConfigClass, reading: Reading,
    problems: Problems,
) -> None:  # fmt: skip
    """Replace `key` in `config` under all of its names; other keys of a section are kept."""
    before = [config.pop(name) for name in known.names_of(key) if name in config]
    section = known.sections.get(key)
    if isinstance(value, Mapping) and section is not None:
        for inner in value:
            if not section.has(inner) and inner not in COMMON_KEYS:
                problems.log(
                    f"model.model_config.{key}.{inner}",
                    f"{section.name} has no such key",
                    nearest=did_you_mean(inner, [*section.defaults, *section.synonyms]),
                    key=reading.written[key],
                )
        if before and isinstance(before[0], Mapping):
            value = {**before[0], **value}
    config[key] = value


def _has_partial_rotary(family: str, known: ConfigClass, base: Mapping[str, Any]) -> bool:
    """Whether the family reads `partial_rotary_factor` from its rope settings."""
    in_rope = "partial_rotary_factor" in (base.get("rope_parameters") or {})
    return known.has_rope and (in_rope or mentioned(family, "partial_rotary_factor"))


def _write_rope(
    config: dict[str, Any], given: Mapping[str, Any], known: ConfigClass, reading: Reading,
    problems: Problems,
) -> None:  # fmt: skip
    """Write rope settings of the user, in the spelling of config.json."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    by_layer = _layer_types_of(old or new) or list(known.rope_kinds)
    if by_layer:
        _write_rope_by_layer(config, given, by_layer, reading, problems)
        return
    for key in ("rope_parameters", "rope_scaling"):
        if key not in given:
            continue
        written = dict(given[key] or {})
        if new and not old:
            kept = {name: new[name] for name in _KEPT if name in new}
            new = kept | (written or {"rope_type": "default"})
            config["rope_parameters"] = new
        else:
            config.pop("rope_scaling", None)
            config[key] = written or None
            old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    single = {key: value for key, value in given.items() if key in _KEPT and value is not None}
    if single:
        _write_single(config, old, new, single, known, reading, problems)


def _write_rope_by_layer(
    config: dict[str, Any], given: Mapping[str, Any], by_layer: list[str], reading: Reading,
    problems: Problems,
) -> None:  # fmt: skip
    """Write rope settings of the user for the layer types that they name."""
    for key, written in given.items():
        if not isinstance(written, Mapping) or not _layer_types_of(written):
            _report_by_layer(key, by_layer, reading, problems)
            return
        before = config.get("rope_scaling") or config.get("rope_parameters") or {}
        before = before if _layer_types_of(before) else {}
        config.pop("rope_scaling", None)
        config["rope_parameters"] = {**before, **written}


def _write_single(
    config: dict[str, Any], old: Mapping[str, Any], new: Mapping[str, Any],
    single: Mapping[str, Any], known: ConfigClass, reading: Reading, problems: Problems,
) -> None:  # fmt: skip
    """Write single rope settings of the user where the class reads them."""
    if not (old or new) and "rope_parameters" in known.derived:
        _report_rope_default(next(iter(single)), known, reading, problems)
    elif new and not old:
        config["rope_parameters"] = {**new, **single}
    else:
        older = {key: name for key, name in _OLDER.items() if name in known.old_keys}
        config |= {older.get(key, key): value for key, value in single.items()}
        if not old.keys().isdisjoint(single):
            config["rope_scaling"] = {**old, **single}


def _layer_types_of(rope: Mapping[str, Any]) -> list[str]:
    """The layer types of rope settings by layer type; empty where all layers share them."""
    if not any(isinstance(value, Mapping) for value in rope.values()):
        return []
    return [kind for kind, value in rope.items() if isinstance(value, Mapping | None)]


def _report_rope_default(
    key: str, known: ConfigClass, reading: Reading, problems: Problems
) -> None:
    written = reading.written.get(key, key)
    problems.log(
        f"model.model_config.{written}",
        f"{known.name} derives its rope settings if none are given",
        advice="Set model.model_config.rope_parameters: {rope_type: default, rope_theta: ...}",
        key=written,
    )


def _report_by_layer(key: str, by_layer: list[str], reading: Reading, problems: Problems) -> None:
    written = reading.written.get(key, key)
    kinds = ", ".join(f"{kind}: {{rope_theta: ...}}" for kind in by_layer)
    problems.log(
        f"model.model_config.{written}",
        "this family has rope settings by layer type",
        advice=f"Set model.model_config.rope_parameters: {{{kinds}}}",
        key=written,
    )
