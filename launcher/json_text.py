"""JSON text to values, with one kind of error for everything that Python's own parser raises.

Owns the reasons why a text cannot be read as JSON. Imports nothing of the project.
Beside syntax errors Python raises RecursionError (about a thousand levels) and ValueError (integers
of more than `sys.get_int_max_str_digits()` digits), both without a position.

`STRICT` follows RFC 8259 where Python's default does not: `NaN` and `Infinity` are refused, and so
is a duplicate key, of which Python silently keeps the last.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any


class NotJson(ValueError):
    """The text cannot be read as JSON; `position` (characters) is None where Python has none."""

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.position = reason, position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotJson(f"duplicate key {printable(twice)!r}")
    return content


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object may repeat a key with the same value, as some files written by hand do."""
    content = dict(pairs)
    if len(content) != len(pairs):
        for name, value in pairs:
            if content[name] != value:
                raise NotJson(f"{printable(name)!r} is given twice with different values")
    return content


def _constant(name: str) -> Any:
    raise NotJson(f"{name} is not a JSON value")


PLAIN = json.JSONDecoder()
"""Python's own rules."""
UNAMBIGUOUS = json.JSONDecoder(object_pairs_hook=_unambiguous)
"""For files of a hub."""
STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)


def parse(text: str, decoder: json.JSONDecoder = PLAIN) -> Any:
    """The value of a complete text. Raises NotJson."""
    return _guarded(lambda: decoder.decode(text), text, 0)


def parse_at(text: str, position: int, decoder: json.JSONDecoder = PLAIN) -> tuple[Any, int]:
    """The value that begins at `position`, and the position behind it. Raises NotJson."""
    value, end = _guarded(lambda: decoder.raw_decode(text, position), text, position)
    return value, end


def _guarded(read: Callable[[], Any], text: str, position: int) -> Any:
    try:
        return read()
    except NotJson:
        raise
    except json.JSONDecodeError as error:
        raise NotJson(error.msg, error.pos) from None
    except RecursionError:
        raise NotJson("nested too deeply", _deepest(text, position)) from None
    except ValueError:
        digits = sys.get_int_max_str_digits()
        place = _long_number(text, position, digits)
        raise NotJson(f"a number of more than {digits} digits", place) from None


_PARTS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]|\d+', re.DOTALL)
"""Strings, brackets and digits, so that brackets and digits inside strings do not count."""


def _deepest(text: str, position: int) -> int:
    """Where the value that begins at `position` is nested most."""
    depth, deepest, place = 0, 0, position
    for part in _PARTS.finditer(text, position):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part[0], 0)
        if depth > deepest:
            deepest, place = depth, part.start()
        if depth <= 0:
            break
    return place


def _long_number(text: str, position: int, digits: int) -> int:
    parts = _PARTS.finditer(text, position)
    found = (part.start() for part in parts if part[0].isdigit() and len(part[0]) > digits)
    return next(found, position)


def line_and_column(text: str, position: int) -> tuple[int, int]:
    """Line and column, both from 1, of a position (characters)."""
    before = text.rfind("\n", 0, position)
    return text.count("\n", 0, position) + 1, position - before


def lone_surrogate(text: str) -> str:
    """The first character of `text` that cannot be encoded (`\\ud83d`), else empty."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(text[error.start]):04x}"
    return ""


def printable(text: str) -> str:
    """`text` with lone surrogates written as escapes, so that it can be printed everywhere."""
    return text.encode(errors="backslashreplace").decode()


def strings_in(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every string inside a value, keys of objects included, with its place (`tools[0].name`).

    Without recursion, so that `value` may have any depth.
    """
    waiting = [(name, value)]
    while waiting:
        place, item = waiting.pop()
        if isinstance(item, str):
            yield place, item
        elif isinstance(item, dict):
            waiting += [(f"{place}.{printable(str(key))}", inner) for key, inner in item.items()]
            yield from ((place, key) for key in item if isinstance(key, str))
        elif isinstance(item, (list, tuple)):
            waiting += [(f"{place}[{index}]", inner) for index, inner in enumerate(item)]
