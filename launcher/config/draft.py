"""A configuration of another program while it is translated into keys of this one.

Owns the tree on its way and the record of what was changed, from which `--migrate` explains every
line. A translation is a function over a `Draft`; `launcher.extensions.TRANSLATIONS` names them.
They run on the merged tree, before it is typed. Invariants: every key that a translation removes is
in `changes`; of two spellings of one key the command line wins over files, and two places in files
with different values are a problem.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from launcher.config.nodes import Node, NoPlace, find, from_plain, put, without
from launcher.config.provenance import KeyProblem

Kind = Literal["renamed", "replaced", "no effect", "needs you"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one key that was written."""

    kind: Kind
    key: str
    """Dotted, as it was written."""
    value: Any
    where: str
    new_keys: tuple[str, ...] = ()
    """The keys that stand for it here."""
    why: str = ""
    """One clause: why it has no effect, what the new value is made of, what is to be given."""


@dataclass
class Draft:
    """The tree on its way; the lists are filled while it is translated."""

    tree: Node
    changes: list[Change] = field(default_factory=list)
    problems: list[KeyProblem] = field(default_factory=list)

    def find(self, key: str) -> Node | None:
        """The node at a dotted key, None when nothing is written there."""
        return find(self.tree, key)

    def plain(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key without places; `default` when nothing is written there."""
        node = self.find(key)
        return default if node is None else node.plain()

    def rename(self, key: str, new: str, why: str = "") -> None:
        """Move what is written at `key` to `new`, where nothing or the same value is written."""
        node = self.find(key)
        if node is not None:
            self._take(key, node, "renamed", (new,), why)
            self._put(key, new, node)

    def replace(self, key: str, values: dict[str, Any], why: str = "") -> None:
        """Replace what is written at `key` by other keys with these plain values; none of them
        means that the value asks for nothing."""
        node = self.find(key)
        if node is None:
            return
        self._take(key, node, "replaced" if values else "no effect", tuple(values), why)
        for new, value in values.items():
            self._put(key, new, from_plain(value, node.where))

    def drop(self, key: str, why: str) -> None:
        """Remove what is written at `key`: it has no effect here."""
        self.replace(key, {}, why)

    def drop_all(self, keys: Iterable[str], why: str) -> None:
        """`drop` for several keys."""
        for key in keys:
            self.drop(key, why)

    def prune(self, section: str) -> None:
        """Remove a section whose keys were all taken away."""
        node = self.find(section)
        if node is not None and node.value == {}:
            self.tree = without(self.tree, section)

    def imply(self, key: str, value: Any, source: str) -> None:
        """Write `key` where it is not written, at the place of the key `source`."""
        origin = self.find(source)
        if origin is not None and self.find(key) is None:
            with suppress(NoPlace):  # a section of another type, which is reported when it is read
                self.tree = put(self.tree, key, from_plain(value, origin.where))

    def need(self, key: str, why: str) -> None:
        """Note that the user must give something at `key`, such as a path; the key stays."""
        node = self.find(key)
        value, where = (None, "") if node is None else (node.plain(), node.where)
        self.changes.append(Change(kind="needs you", key=key, value=value, where=where, why=why))

    def refuse(
        self,
        key: str,
        rule: str,
        *,
        nearest: str = "",
        advice: str = "",
        also: tuple[str, ...] = (),
    ) -> None:
        """Add a problem with what is written at `key`, which stays where it is."""
        node = self.find(key)
        self.problems.append(
            KeyProblem(
                what=key if node is None else f"{key} = {node.plain()!r}",
                where="" if node is None else node.where,
                rule=rule, nearest=nearest, advice=advice, key=key, also=also,
            )
        )  # fmt: skip

    def _take(self, key: str, node: Node, kind: Kind, new: tuple[str, ...], why: str) -> None:
        self.tree = without(self.tree, key)
        self.changes.append(
            Change(
                kind=kind, key=key, value=node.plain(), where=node.where, new_keys=new, why=why
            )
        )  # fmt: skip

    def _put(self, old: str, new: str, node: Node) -> None:
        present = self.find(new)
        if present is not None and present.plain() != node.plain():
            if is_from_command_line(present) and not is_from_command_line(node):
                return
            if not is_from_command_line(node) or is_from_command_line(present):
                self.problems.append(_two_values(old, node, new, present))
                return
        try:
            self.tree = put(self.tree, new, node)
        except NoPlace as error:
            self.problems.append(
                KeyProblem(what=f"{old} = {node.plain()!r}", where=node.where, rule=str(error),
                           advice=f"`{old}` is `{new}` here", key=new)
            )  # fmt: skip


def asks_for_nothing(value: Any) -> bool:
    """Whether a value of a key that is not needed is neutral: null, off, zero or empty."""
    return value is None or value == 0 or value in ("", [], {})


def is_from_command_line(node: Node) -> bool:
    """Whether a value was given on the command line."""
    return node.where.startswith("command line")


def _two_values(old: str, node: Node, new: str, present: Node) -> KeyProblem:
    return KeyProblem(
        what=f"`{old}` = {node.plain()!r}, but `{new}` = {present.plain()!r}",
        where=node.where,
        rule=f"these set one value (the other is at {present.where})",
        advice=f"Remove `{old}`",
        key=new,
    )
