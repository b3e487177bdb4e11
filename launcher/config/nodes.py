"""Trees of values that know where they were written, and the operations on them.

Invariant: a tree never changes. Every operation returns another tree and shares what is equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Node:
    """A value and the place it was written: `x.yaml:14` or `command line: --epochs`."""

    value: Any
    """A scalar, a `list[Node]` or a `dict[str, Node]`; never changed."""
    where: str
    is_text: bool = False
    """Text of the command line, which the type of its key decides how to read."""

    def plain(self) -> Any:
        """The value without the places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """Every node below this one with its dotted path, parents first."""
        children: Any = ()
        if isinstance(self.value, dict):
            children = self.value.items()
        elif isinstance(self.value, list):
            children = ((str(index), child) for index, child in enumerate(self.value))
        for key, child in children:
            child_path = f"{path}.{key}" if path else str(key)
            yield child_path, child
            yield from child.walk(child_path)


class NoPlace(Exception):
    """A path leads into something without such a key; the text is the reason."""


def from_plain(value: Any, where: str) -> Node:
    """A tree of nodes that were all written at `where`."""
    if isinstance(value, dict):
        return Node(value={str(k): from_plain(v, where) for k, v in value.items()}, where=where)
    if isinstance(value, (list, tuple)):
        return Node(value=[from_plain(item, where) for item in value], where=where)
    return Node(value=value, where=where)


def merge(below: Node, above: Node) -> Node:
    """Maps merge key by key, anything else in `above` replaces what is `below`."""
    if not (isinstance(below.value, dict) and isinstance(above.value, dict)):
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(value=merged, where=above.where)


def find(tree: Node, key: str) -> Node | None:
    """The node at a dotted key, None when nothing is written there."""
    node = tree
    for name in key.split("."):
        if isinstance(node.value, dict) and name in node.value:
            node = node.value[name]
        elif isinstance(node.value, list) and name.isdigit() and int(name) < len(node.value):
            node = node.value[int(name)]
        else:
            return None
    return node


def put(tree: Node, key: str, node: Node) -> Node:
    """The tree with `node` at a dotted key, in new sections where there are none.

    Raises NoPlace inside a scalar, and beyond the end of a list.
    """
    return _put(tree, key.split("."), node, "")


def _put(tree: Node, names: Sequence[str], node: Node, reached: str) -> Node:
    if not names:
        return node
    name, path = names[0], f"{reached}.{names[0]}".lstrip(".")
    if isinstance(tree.value, list):
        items = list(tree.value)
        index = _index(name, len(items))
        items[index] = _put(items[index], names[1:], node, path)
        return replace(tree, value=items)
    if tree.value is None:
        tree = Node(value={}, where=node.where)
    if not isinstance(tree.value, dict):
        raise NoPlace(f"`{reached}` = {tree.value!r} is not a section")
    child = tree.value.get(name, Node(value=None, where=node.where))
    return replace(tree, value={**tree.value, name: _put(child, names[1:], node, path)})


def _index(name: str, length: int) -> int:
    if name.isdigit() and int(name) < length:
        return int(name)
    held = f"its indices are 0 to {length - 1}" if length else "it is empty"
    raise NoPlace(f"`{name}` is not an index of this list: {held}")


def without(tree: Node, key: str) -> Node:
    """The tree without a dotted key; the same tree when nothing is written there."""
    return _without(tree, key.split(".")) if find(tree, key) is not None else tree


def _without(tree: Node, names: Sequence[str]) -> Node:
    name: Any = int(names[0]) if isinstance(tree.value, list) else names[0]
    content = tree.value.copy()
    if len(names) == 1:
        del content[name]
    else:
        content[name] = _without(content[name], names[1:])
    return replace(tree, value=content)
