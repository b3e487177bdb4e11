"""Second names of keys become the keys themselves.

Owns how the dict `ALIASES` is applied: to every file before it is merged with others, and to the
keys of the command line.
"""

from __future__ import annotations

from launcher.config.extra_keys import ALIASES
from launcher.config.nodes import Node, NoPlace, find, put, without
from launcher.errors import Problem, UserError


def canonical(path: str) -> str:
    """The dotted key that may be written under its second name."""
    for alias, key in ALIASES.items():
        if path == alias or path.startswith(f"{alias}."):
            path = key + path[len(alias) :]
    return path


def without_aliases(tree: Node) -> Node:
    """The tree of one file with every second name replaced. Raises UserError where the two names of
    a key have different values."""
    problems: list[Problem] = []
    for alias, key in ALIASES.items():
        tree = moved(tree, alias, key, problems)
    if problems:
        raise UserError(problems)
    return tree


def moved(tree: Node, alias: str, key: str, problems: list[Problem]) -> Node:
    """The tree with what is written at `alias` at `key`; sections that are at both are united."""
    node = find(tree, alias)
    if node is None:
        return tree
    tree = without(tree, alias)
    try:
        return put(tree, key, _united(find(tree, key), node, alias, key, problems))
    except NoPlace:
        return tree  # a section of another type, which is reported when it is read


def _united(
    present: Node | None, node: Node, alias: str, key: str, problems: list[Problem]
) -> Node:
    if present is None:
        return node
    if isinstance(present.value, dict) and isinstance(node.value, dict):
        united = {
            name: _united(
                present.value.get(name), child, f"{alias}.{name}", f"{key}.{name}", problems
            )
            for name, child in node.value.items()
        }
        return Node(value={**present.value, **united}, where=present.where)
    if present.plain() != node.plain():
        problems.append(
            Problem(
                what=f"`{alias}` = {node.plain()!r}, but `{key}` = {present.plain()!r}",
                where=node.where,
                rule=f"these are two names of one key (the other is at {present.where})",
                advice=f"Remove `{alias}`",
            )
        )
    return present
