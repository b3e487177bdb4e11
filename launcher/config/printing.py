"""A resolved configuration as YAML, with the origin of every value.

Invariant: read again, the text gives an equal configuration. Keys without effect or not built yet
are in it only where the user set them. `trust_remote_code` stays a comment: a file cannot give that
permission.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from launcher.config.provenance import DEFAULT, Provenance
from launcher.config.schema import (
    Config,
    IgnoredCallbackSection,
    RegisteredCallbackSection,
    info_of,
)
from launcher.config.yaml_reader import parse_value

_HEADER = "# A resolved configuration: every value with the place it came from.\n"
_COMMAND_LINE_ONLY = "trust_remote_code"


def to_yaml(config: Config, provenance: Provenance) -> str:
    """The configuration as YAML, one key a line with its origin as a comment."""
    return _HEADER + "\n".join(_Printer(provenance).section(config, "", 0)) + "\n"


class _Printer:
    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance

    def section(self, section: Any, path: str, depth: int) -> Iterator[str]:
        """The lines of one dataclass."""
        for key in dataclasses.fields(section):
            value, info = getattr(section, key.name), info_of(key)
            key_path = f"{path}.{key.name}" if path else key.name
            if info.open_keys:
                yield from self._map(value, path, depth)
            elif key_path == _COMMAND_LINE_ONLY:
                if value:
                    yield f"# {key_path}: true  # {self.provenance.where(key_path)}; only there"
            elif dataclasses.is_dataclass(value):
                yield from self._inner(
                    key.name, list(self.section(value, key_path, depth + 1)), key_path, depth
                )
            elif self.provenance.is_written(key_path) or (
                info.status == "effective" and not info.none_means_absent
            ):
                yield from self._entry(key.name, value, key_path, depth)
        for extra_path, value in self.provenance.extra.items():
            parent, _, name = extra_path.rpartition(".")
            if parent == path:
                yield from self._entry(name, value, extra_path, depth)

    def _inner(self, name: str, lines: list[str], path: str, depth: int) -> Iterator[str]:
        if lines:
            yield f"{'  ' * depth}{name}:{self._origin(path)}"
            yield from lines

    def _origin(self, path: str) -> str:
        return f"  # {self.provenance.where(path)}".replace("\n", " ")

    def _open_origin(self, path: str) -> str:
        """Inside open maps and lists every value was written, at least with its section."""
        where = self.provenance.nearest(path) or DEFAULT
        return f"  # {where}".replace("\n", " ")

    def _map(self, values: dict[str, Any], path: str, depth: int) -> Iterator[str]:
        for name, value in values.items():
            yield from self._entry(name, value, f"{path}.{name}", depth, is_open=True)

    def _entry(
        self, name: str, value: Any, path: str, depth: int, *, is_open: bool = False
    ) -> Iterator[str]:
        indent, key = "  " * depth, text_scalar(name)
        origin = self._open_origin(path) if is_open else self._origin(path)
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:{origin}"
            yield from self._map(value, path, depth + 1)
        elif isinstance(value, list) and any(not _is_scalar(item) for item in value):
            yield f"{indent}{key}:{origin}"
            for index, item in enumerate(value):
                yield from self._item(item, f"{path}.{index}", depth + 1)
        else:
            yield f"{indent}{key}: {flow(value)}{origin}"

    def _item(self, item: Any, path: str, depth: int) -> Iterator[str]:
        """One entry of a list, `- ` before its first line."""
        if isinstance(item, (RegisteredCallbackSection, IgnoredCallbackSection)):
            item = {"type": item.type, **item.arguments}
        if dataclasses.is_dataclass(item):
            lines = list(self.section(item, path, depth + 1))
        elif isinstance(item, dict) and item:
            lines = list(self._map(item, path, depth + 1))
        elif isinstance(item, list) and any(not _is_scalar(part) for part in item):
            lines = [
                line
                for index, part in enumerate(item)
                for line in self._item(part, f"{path}.{index}", depth + 1)
            ]
        else:
            lines = [f"{'  ' * (depth + 1)}{flow(item)}{self._open_origin(path)}"]
        yield f"{'  ' * depth}- {lines[0].lstrip()}"
        yield from lines[1:]


def _is_scalar(value: Any) -> bool:
    return not isinstance(value, (dict, list)) and not dataclasses.is_dataclass(value)


def flow(value: Any) -> str:
    """A plain value in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{text_scalar(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    return text_scalar(str(value))


def _number(value: float) -> str:
    if math.isnan(value):
        return ".nan"
    if math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    mantissa, e, exponent = repr(value).partition("e")
    if e and "." not in mantissa:
        mantissa += ".0"  # every YAML reader reads 1.0e-05 as a number
    return mantissa + e + exponent


def text_scalar(text: str) -> str:
    """A YAML scalar that reads back as this text: plain where that is safe, else quoted."""
    plain = (
        text.isascii()
        and text.replace("_", "").replace(".", "").replace("/", "").replace("-", "").isalnum()
    )
    if plain and text[0] not in "-" and parse_value(text) == text:
        return text
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character == "\n":
        return "\\n"
    if character.isprintable():
        return character
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
