"""A printed configuration that is read again: its defaults are defaults again.

Owns that step. `launcher.config.printing` writes every value, with `# default` behind those that
nobody set. Some keys that are left out mean something else than their default: a generation setting
is that of the model's file, `epochs` does not limit `max_steps`. Invariant: only a line with the
comment `# default` and the default of this version is left out; a value that was edited is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from launcher.config.nodes import Node
from launcher.config.provenance import DEFAULT
from launcher.config.schema import CALLBACKS, Config, info_of
from launcher.config.suggest import list_section_of, section_of
from launcher.config.typing_rules import hints

HEADER = "# A resolved configuration: every value with the place it came from.\n"
"""The first line of a printed configuration."""


def without_defaults(tree: Node, text: str) -> Node:
    """The tree of a file with this text; of a printed configuration without its defaults."""
    if not text.startswith(HEADER):
        return tree
    lines = enumerate(text.splitlines(), start=1)
    marked = frozenset(n for n, line in lines if line.endswith(f"  # {DEFAULT}"))
    return _section(Config, tree, marked)


def _section(kind: type, node: Node, marked: Set[int]) -> Node:
    if not isinstance(node.value, dict):
        return node
    fields = {key.name: key for key in dataclasses.fields(kind)}
    kept = {}
    for name, child in node.value.items():
        key = fields.get(name)
        if key is not None:
            child = _inner(hints(kind)[name], child, marked, name)
            if _line(child) in marked and _is_default(key, child):
                continue
        kept[name] = child
    return dataclasses.replace(node, value=kept)


def _inner(annotation: Any, node: Node, marked: Set[int], name: str) -> Node:
    """A section, or a list of sections, without the defaults in it; any other value as it is."""
    if isinstance(node.value, list):
        entry = list_section_of(annotation)
        items = [
            _section(found, item, marked)
            if (found := _callback(item) if name == "callbacks" else entry) is not None else item
            for item in node.value
        ]  # fmt: skip
        return dataclasses.replace(node, value=items)
    inner = section_of(annotation)
    return node if inner is None else _section(inner, node, marked)


def _callback(node: Node) -> type | None:
    kind = node.value.get("type") if isinstance(node.value, dict) else None
    return CALLBACKS.get(kind.value) if kind is not None and isinstance(kind.value, str) else None


def _is_default(key: dataclasses.Field[Any], node: Node) -> bool:
    if key.default is dataclasses.MISSING:
        assert key.default_factory is not dataclasses.MISSING
        default = key.default_factory()
        if dataclasses.is_dataclass(default):
            return node.value == {} and not info_of(key).none_means_absent
    else:
        default = key.default
    value = node.plain()
    return type(value) is type(default) and bool(value == default)


def _line(node: Node) -> int:
    return int(node.where.rpartition(":")[2])
