"""How the settings of an adapter name modules: the rules of PEFT. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def is_named(name: str, wanted: str | Sequence[str]) -> bool:
    """Whether a module name is one of `wanted`, or ends in one; a text is a regular expression for
    the full name."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in wanted)


def matches_end(pattern: str, names: Sequence[str]) -> bool:
    """Whether a regular expression matches one of the names of a module, or the end of one from a
    component on."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in names)


def by_pattern(patterns: Mapping[str, Value], names: Sequence[str], otherwise: Value) -> Value:
    """The value of the first pattern that matches the end of one of the names of a module."""
    for pattern, value in patterns.items():
        if matches_end(pattern, names):
            return value
    return otherwise
