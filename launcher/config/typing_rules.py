"""From a written value to the type of its field.

Owns conversion and the names of types in messages ("an integer"). OmegaConf's typed nodes convert
the scalars; this file chooses between the types of a field that allows several.
"""

from __future__ import annotations

import functools
import math
import types
import typing
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Union

from launcher.config.schema import FieldInfo

WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    types.NoneType: "null",
    list: "a list",
    dict: "a section (key: value)",
}


class WrongType(Exception):
    """The value is not of the declared type; the text names the expected type."""


@dataclass
class _Scalars:
    """OmegaConf checks and converts what is assigned to these fields."""

    integer: int = 0
    number: float = 0.0
    boolean: bool = False


_CELL = {int: "integer", float: "number", bool: "boolean"}


@functools.cache
def _cells() -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(_Scalars)


@functools.cache
def hints(section: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass."""
    return typing.get_type_hints(section)


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def describe(annotation: Any) -> str:
    """The annotation in words: `an integer or null`."""
    words = []
    for member in members(annotation):
        origin = typing.get_origin(member) or member
        word = WORDS.get(origin, "a value")
        arguments = typing.get_args(member)
        if origin is list and arguments and arguments[0] in WORDS:
            word = f"a list of {_PLURALS[arguments[0]]}"
        words.append(word)
    return " or ".join(words)


_PLURALS = {int: "integers", float: "numbers", bool: "booleans", str: "strings"}


def convert(annotation: Any, value: Any) -> Any:
    """`value` as the first type of `annotation` that it has, else as the first it converts to.

    Raises WrongType. A string that is a number becomes one where only a number is allowed.
    """
    alternatives = members(annotation)
    if Any in alternatives:
        return value
    if bool in alternatives and isinstance(value, str) and _boolean(value):
        return value.strip().lower() == "true"
    for alternative in alternatives:
        if alternative in (int, float, bool, str) and type(value) is alternative:
            return value
    for alternative in alternatives:
        try:
            return _convert_to(alternative, value)
        except WrongType:
            continue
    raise WrongType(describe(annotation))


def convert_text(annotation: Any, text: str) -> Any:
    """The value of a text of the command line: the text itself where the type allows strings."""
    from launcher.config.yaml_reader import parse_value

    alternatives = members(annotation)
    if types.NoneType in alternatives and text in ("null", "None"):
        return None
    if str in alternatives:
        wants_list = any(typing.get_origin(kind) is list for kind in alternatives)
        as_yaml = parse_value(text)
        if wants_list and isinstance(as_yaml, list):
            with suppress(WrongType):  # a list of other things is a text: messages as JSON
                return convert(annotation, as_yaml)
        if isinstance(as_yaml, (bool, int)) and type(as_yaml) in alternatives:
            return as_yaml
        return convert(annotation, text)
    if bool in alternatives and (int in alternatives or not _boolean(text)):
        value = parse_value(text)
        return convert(annotation, value if not isinstance(value, bool) or _boolean(text) else text)
    return convert(annotation, parse_value(text))


def _convert_to(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if kind is types.NoneType:
        if value is None:
            return None
    elif origin is list:
        if isinstance(value, list):
            element = (typing.get_args(kind) or (Any,))[0]
            return [convert(element, item) for item in value]
    elif origin is dict:
        if isinstance(value, dict):
            return value
    elif kind is str:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return str(value)
    elif kind in (int, float, bool):
        return _scalar(kind, value)
    raise WrongType(describe(kind))


def _scalar(kind: type, value: Any) -> Any:
    from omegaconf.errors import OmegaConfBaseException

    if value is None or isinstance(value, (list, dict)) or (kind is bool and not _boolean(value)):
        raise WrongType(describe(kind))
    if isinstance(value, str) and "$" in value:  # never an interpolation
        raise WrongType(describe(kind))
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)  # 1e6 is meant as an integer
    cells, cell = _cells(), _CELL[kind]
    try:
        cells[cell] = value
    except OmegaConfBaseException:
        raise WrongType(describe(kind)) from None
    return cells[cell]


def out_of_bounds(value: Any, info: FieldInfo) -> str:
    """The message for the bound that a number violates; empty when it violates none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if info.minimum is not None and value < info.minimum:
        return f"must be at least {info.minimum}"
    if info.above is not None and value <= info.above:
        return f"must be above {info.above}"
    if info.maximum is not None and value > info.maximum:
        return f"must be at most {info.maximum}"
    return ""


def _boolean(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, str) and value.strip().lower() in ("true", "false")
    )
