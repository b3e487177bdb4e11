"""Rules about memory: what is recomputed, and what is moved to the host.

The forms are MindFormers'. An *entry* is True, False or a number of layers; a list has one entry a
pipeline rank, or is a list of such lists, one for each stage of a rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from launcher.config.checks.check import Check
from launcher.config.derived import stages_per_rank
from launcher.config.provenance import KeyProblem
from launcher.errors import did_you_mean

_ENTRY = "every entry must be True, False or a number of layers"
_SELECTIONS = ("select_recompute", "select_recompute_exclude")
_BY_OPERATION = ("recompute_operations", "memory_budget")
_STAGES = ("parallel_config.pipeline_stage",)
_SWAPS = {
    "layer_swap": ("layers", "backward_prefetch"),
    "op_swap": ("op_name", "layers", "backward_prefetch"),
}


def recompute(check: Check) -> Iterator[KeyProblem]:
    """recompute is a boolean, or has entries for the pipeline ranks."""
    if not check.lays_out:
        return
    key = "recompute_config.recompute"
    value = check.value(key)
    found = list(_entries(check, key, value))
    yield from found
    if isinstance(value, list) and not found:
        yield from _too_many(check, key, value)


def _too_many(check: Check, key: str, value: list[Any]) -> Iterator[KeyProblem]:
    """No entry is larger than the number of layers."""
    most = check.decoder.num_hidden_layers if check.decoder else None
    rows = [item if isinstance(item, list) else [item] for item in value]
    if most is not None and any(int(item) > most for row in rows for item in row):
        fitting = [[min(item, most) for item in row] for row in rows]
        near = fitting if isinstance(value[0], list) else [row[0] for row in fitting]
        yield check.wrong(
            key,
            f"the model has {most} layers",
            nearest=f"Nearest: {near}",
            also=("model", "model.model_config"),
        )


def select_recompute(check: Check) -> Iterator[KeyProblem]:
    """Selections are a boolean, patterns, entries, or patterns with entries."""
    for name in _SELECTIONS if check.lays_out else ():
        key = f"recompute_config.{name}"
        value = check.value(key)
        if isinstance(value, dict):
            for pattern, entries in value.items():
                yield from _pattern(check, key, pattern)
                yield from _entries(check, f"{key}.{pattern}", entries, parent=key)
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            for pattern in value:
                yield from _pattern(check, key, pattern)
        else:
            yield from _entries(check, key, value)


def by_operation(check: Check) -> Iterator[KeyProblem]:
    """Recomputation by operation is not combined with another choice for the same layers."""
    section = check.config.recompute_config
    keys = [name for name in _BY_OPERATION if getattr(section, name) not in (None, False)]
    if not check.lays_out or not keys:
        return
    key = f"recompute_config.{keys[0]}"
    if len(keys) == 2:
        yield check.wrong(
            key,
            "either products are kept, or what a budget allows",
            nearest="Nearest: False",
            advice="Or leave memory_budget out",
            also=(f"recompute_config.{keys[1]}",),
        )
    others = {
        "recompute_config.select_recompute": bool(section.select_recompute),
        "recompute_config.recompute": section.recompute is True,
        "swap_config.swap": check.config.swap_config.swap,
    }
    rules = {
        "swap_config.swap": "what is kept by operation stays on the device",
        "recompute_config.recompute": "all layers are recomputed in full",
    }
    for other, is_on in others.items():
        if is_on:
            rule = rules.get(other, "the same layers are recomputed by module")
            yield check.wrong(
                key, f"not supported with {other}: {rule}",
                nearest=f"Nearest: {'None' if keys[0] == 'memory_budget' else 'False'}",
                advice=f"Or set {other}: False",
                also=(other,),
            )  # fmt: skip


def _pattern(check: Check, key: str, pattern: Any) -> Iterator[KeyProblem]:
    try:
        re.compile(str(pattern))
    except re.error as error:
        yield check.wrong(
            key,
            f"not a valid regular expression: {error}",
            what=f"{key}: {str(pattern)!r}",
        )


def _entries(check: Check, key: str, value: Any, *, parent: str = "") -> Iterator[KeyProblem]:
    """The problem of a boolean or a list of entries."""
    ranks, each = check.config.parallel_config.pipeline_stage, stages_per_rank(check.config)
    shown, rule, near = f"{key} = {value!r}", "", ""
    if isinstance(value, bool):
        return
    if not isinstance(value, list):
        rule = "must be true, false or a list of entries"
    elif any(isinstance(item, list) for item in value):
        rows = [item if isinstance(item, list) else [item] for item in value]
        if not all(map(_are_entries, rows)):
            rule = _ENTRY
        elif len(rows) > each or any(len(row) > ranks for row in rows):
            rule = (
                f"must be at most {each} lists (stages per rank) of at most {ranks} entries (ranks)"
            )
            near = f"Nearest: {[row[:ranks] for row in rows[:each]]}"
    elif not _are_entries(value):
        rule = _ENTRY
    elif len(value) > ranks:
        rule = f"must have at most one entry per pipeline rank (pipeline_stage is {ranks})"
        near = f"Nearest: {value[:ranks]}"
    if rule:
        yield check.wrong(parent or key, rule, what=shown, nearest=near, also=_STAGES)


def _are_entries(row: list[Any]) -> bool:
    return all(type(item) is bool or (type(item) is int and item >= 0) for item in row)


def swap(check: Check) -> Iterator[KeyProblem]:
    """What is moved to the host has known keys and existing layers."""
    for name, known in _SWAPS.items() if check.lays_out else ():
        key = f"swap_config.{name}"
        for index, entry in enumerate(check.value(key) or ()):
            yield from _swap(check, f"{key}.{index}", entry, known)


def _swap(check: Check, key: str, entry: Any, known: tuple[str, ...]) -> Iterator[KeyProblem]:
    if not isinstance(entry, dict):
        yield check.wrong(key, f"must be a section with {', '.join(known)}")
        return
    for name in entry:
        if name not in known:
            yield check.wrong(
                f"{key}.{name}",
                f"known keys are {', '.join(known)}",
                what=f"unknown key `{key}.{name}`",
                nearest=did_you_mean(str(name), known),
            )
    if "op_name" in known and not _are_names(entry.get("op_name")):
        yield check.wrong(f"{key}.op_name", "must be the name of a module, or a list of names")
    if "layers" in entry:
        yield from _swap_layers(check, f"{key}.layers", entry["layers"])
    prefetch = entry.get("backward_prefetch", 1)
    if not (type(prefetch) is int and prefetch >= 1) and prefetch != "Auto":
        yield check.wrong(
            f"{key}.backward_prefetch", "must be an integer of at least 1, or Auto",
            nearest="Nearest: 1",
        )  # fmt: skip


def _are_names(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name for name in names)


def _swap_layers(check: Check, key: str, value: Any) -> Iterator[KeyProblem]:
    if isinstance(value, bool):
        return
    if not isinstance(value, list) or not all(type(layer) is int for layer in value):
        yield check.wrong(key, "must be true, false or a list of layer indices")
        return
    count = check.decoder.num_hidden_layers if check.decoder else None
    if count is not None and any(not 0 <= layer < count for layer in value):
        yield check.wrong(
            key,
            f"layer indices are 0 to {count - 1}",
            nearest=f"Nearest: {[layer for layer in value if 0 <= layer < count]}",
            also=("model", "model.model_config"),
        )


def warnings(check: Check) -> Iterator[str]:
    """Swapping that is configured and not switched on."""
    for name in _SWAPS:
        key = f"swap_config.{name}"
        if check.value(key) and not check.config.swap_config.swap and check.lays_out:
            yield f"{check.provenance.where(key)}: {key}: no effect without swap: True"
