"""From a tree of written values to the typed configuration.

Owns known and unknown keys, sections and callbacks; launcher/config/key_checks.py checks the value
of one key. All problems are collected. A key with a problem keeps its default and is listed in
`bad_keys`, so that no rule reports what only follows from it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.config.command_line import nearest_flag
from launcher.config.extra_keys import (
    PLANNED_CALLBACKS,
    ExtraKey,
    extra_key,
    extra_names,
    is_extra_section,
)
from launcher.config.key_checks import (
    asks_for_nothing_of,
    nearest_value,
    not_built,
    plain_value,
    typed_value,
    wrong_type,
    wrong_value,
)
from launcher.config.nodes import Node, find, from_plain
from launcher.config.provenance import KeyProblem
from launcher.config.schema import (
    CALLBACKS,
    CallbackSection,
    Config,
    RegisteredCallbackSection,
    info_of,
)
from launcher.config.suggest import (
    is_misspelt,
    list_section_of,
    nearest_key,
    remark,
    section_of,
    word_elsewhere,
)
from launcher.config.typing_rules import WrongType, describe, hints
from launcher.config.yaml_reader import parse_value
from launcher.errors import did_you_mean


class Reader:
    """Reads one tree; the other fields are filled while doing so."""

    def __init__(self, tree: Node) -> None:
        register_path = find(tree, "register_path")
        self.has_register_path = register_path is not None and bool(register_path.value)
        self.problems: list[KeyProblem] = []
        self.places: dict[str, str] = {}
        self.bad_keys: set[str] = set()
        self.no_effect: list[str] = []
        self.extra: dict[str, Any] = {}
        """Dotted key to value of the keys without a field."""
        self.config: Config = self._section(Config, tree, "", "")

    def _section(self, kind: type, node: Node, path: str, label: str) -> Any:
        """One section; `label` is its name in the schema, which differs from `path` in lists."""
        children = self._children(node, path)
        fields = {key.name: key for key in dataclasses.fields(kind)}
        open_field = next((key for key in fields.values() if info_of(key).open_keys), None)
        values: dict[str, Any] = {}
        for name, child in children.items():
            child_path, child_label = _joined(path, name), _joined(label, name)
            key = fields.get(name)
            if key is not None and key is not open_field:
                self._record(child_path, child)
                self._field(hints(kind)[name], key, child, child_path, child_label, values)
            elif open_field is not None:
                self._record(child_path, child)
                values.setdefault(open_field.name, {})[name] = plain_value(child)
                if info_of(open_field).status == "no effect":
                    self.no_effect.append(child_path)
            elif not self._is_extra(name, child, path, label):
                self._unknown(name, child, path, label)
        return kind(**values)

    def _children(self, node: Node, path: str) -> dict[str, Node]:
        if node.is_text:
            node = from_plain(parse_value(node.value), node.where)
        if node.value is None:
            return {}
        if not isinstance(node.value, dict):
            self._add(wrong_type(path, node, describe(dict)))
            return {}
        return node.value

    def _record(self, path: str, node: Node) -> None:
        self.places[path] = node.where
        for inner, child in node.walk(path):
            self.places[inner] = child.where

    def _field(
        self, annotation: Any, key: dataclasses.Field[Any], node: Node, path: str, label: str,
        values: dict[str, Any],
    ) -> None:  # fmt: skip
        info, inner = info_of(key), section_of(annotation)
        if path == "callbacks":
            values[key.name] = self._callbacks(node, path)
        elif (entry := list_section_of(annotation)) is not None and is_list(node):
            values[key.name] = self._list_of_sections(
                entry, node, path, label, may_be_empty=inner is None
            )
        elif inner is not None:
            if not (node.value is None and info.none_means_absent):
                values[key.name] = self._section(inner, node, path, label)
        elif node.value is None and key.default == "":
            values[key.name] = ""  # null is how many YAML files write an empty path
        elif not asks_for_nothing_of(info, node):
            default = f"Remove the key to use the default ({_default(key)!r})"
            advice = default if node.value is None else ""
            known = ExtraKey(annotation=annotation, info=info)
            is_right, value = self._value(known, node, path, advice)
            if is_right:
                values[key.name] = value

    def _value(self, key: ExtraKey, node: Node, path: str, advice: str = "") -> tuple[bool, Any]:
        """Whether the value of a key is right, and the value."""
        try:
            value = typed_value(key.annotation, node, interpolates=path.startswith("input_data"))
        except WrongType as error:
            near = nearest_value(key.annotation, node)
            self._add(wrong_type(path, node, str(error), advice, near))
            return False, None
        if problem := wrong_value(path, node, value, key.info):
            self._add(problem)
            return False, None
        if key.info.status == "no effect":
            self.no_effect.append(path)
        return True, value

    def _is_extra(self, name: str, node: Node, path: str, label: str) -> bool:
        """Read a key or a section without a field; False where there is none of this name."""
        path, label, section = _joined(path, name), _joined(label, name), label
        key = extra_key(section, name)
        if key is None and not is_extra_section(label):
            return False
        if name not in extra_names(section) and is_misspelt(name, section):
            return False
        self._record(path, node)
        if key is None:
            self._extra_section(node, path, label)
        elif asks_for_nothing_of(key.info, node) or (node.value is None and key.annotation is str):
            self.extra[path] = plain_value(node)
            if key.info.status == "no effect":
                self.no_effect.append(path)
        else:
            is_right, value = self._value(key, node, path)
            if is_right:
                self.extra[path] = value
        return True

    def _extra_section(self, node: Node, path: str, label: str) -> None:
        """Read a section without a field; it keeps what is right in it, and is left out if that is
        nothing."""
        values: dict[str, Any] = {}
        for name, child in self._children(node, path).items():
            if not self._is_extra(name, child, path, label):
                self._unknown(name, child, path, label)
            elif (inner := _joined(path, name)) in self.extra:
                values[name] = self.extra.pop(inner)
        if values:
            self.extra[path] = values

    def _list_of_sections(
        self, kind: type, node: Node, path: str, label: str, *, may_be_empty: bool
    ) -> list[Any]:
        if node.is_text:
            node = from_plain(parse_value(node.value), node.where)
        if not node.value and not may_be_empty:
            self._add(wrong_type(path, node, "a section, or a list of at least one section"))
        return [
            self._section(kind, entry, f"{path}.{i}", f"{label}[]")
            for i, entry in enumerate(node.value)
        ]

    def _callbacks(self, node: Node, path: str) -> list[CallbackSection]:
        if node.is_text:
            node = from_plain(parse_value(node.value), node.where)
        if node.value is None:
            return []
        if not isinstance(node.value, list):
            advice = "Write each callback as `- type: ...`"
            self._add(wrong_type(path, node, "a list of callbacks", advice))
            return []
        return [self._callback(entry, f"{path}.{i}") for i, entry in enumerate(node.value)]

    def _callback(self, node: Node, path: str) -> CallbackSection:
        """One entry; a wrong one stays as an empty callback, so that positions keep."""
        if not isinstance(node.value, dict):
            self._add(wrong_type(path, node, "a section with the key `type`"))
            return RegisteredCallbackSection()
        kind = node.value.get("type")
        name = kind.value if kind is not None else None
        if kind is None or not isinstance(name, str) or not name:
            self._add(_without_type(path, node))
        elif name in CALLBACKS:
            found: CallbackSection = self._section(
                CALLBACKS[name], node, path, f"callbacks[{name}]"
            )
            return found
        elif name in PLANNED_CALLBACKS:
            what = f"{path}.type = {name!r}"
            self._add(not_built(f"{path}.type", kind.where, what, "Remove it"))
        elif self.has_register_path:
            arguments = {key: value for key, value in plain_value(node).items() if key != "type"}
            return RegisteredCallbackSection(type=name, arguments=arguments)
        else:
            self._add(_unknown_callback(path, name, kind.where))
        return RegisteredCallbackSection()

    def _unknown(self, name: str, node: Node, path: str, label: str) -> None:
        if not path and node.where == f"command line: --{name}":
            nearest = nearest_key(name, "")
            self._add(_unknown_flag(name, nearest))
            self.bad_keys.add(nearest)
            return
        nearest = nearest_key(name, label)
        if path != label and nearest.startswith(f"{label}."):
            nearest = path + nearest[len(label) :]
        shown = _joined(path, name)
        self._add(
            KeyProblem(
                what=f"unknown key `{shown}`",
                where=node.where,
                rule=f"there is no such key {f'in `{path}`' if path else 'at the top level'}",
                nearest=f"did you mean `{nearest}`?" if nearest else "",
                advice=remark(name) if nearest else "See docs/configuration.md for all keys",
                key=shown,
            )
        )
        self.bad_keys.add(nearest)

    def _add(self, problem: KeyProblem) -> None:
        self.bad_keys.add(problem.key)
        if not any(_is_reported(known, problem) for known in self.problems):
            self.problems.append(problem)


def _default(key: dataclasses.Field[Any]) -> Any:
    if key.default is not dataclasses.MISSING:
        return key.default
    return key.default_factory() if key.default_factory is not dataclasses.MISSING else None


def is_list(node: Node) -> bool:
    """Whether a node is a list, perhaps as text of the command line."""
    value = parse_value(node.value) if node.is_text else node.value
    return isinstance(value, list)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_reported(known: KeyProblem, problem: KeyProblem) -> bool:
    """Whether `problem` is the same line, read a second time through the alias of a data set."""
    if "_dataset_task." not in f"{known.key} {problem.key}" or known.where != problem.where:
        return False
    return known.key.rpartition(".")[2] == problem.key.rpartition(".")[2]


def _without_type(path: str, node: Node) -> KeyProblem:
    near = next((key for key in node.value if did_you_mean(key, ["type"])), "")
    return KeyProblem(
        what=f"{path} has no `type`",
        where=node.where,
        rule="every callback must have a type",
        nearest=f"did you mean `{path}.type`, not `{path}.{near}`?" if near else "",
        advice=f"Known types: {', '.join(CALLBACKS)}",
        key=path,
    )


def _unknown_callback(path: str, name: str, where: str) -> KeyProblem:
    return KeyProblem(
        what=f"{path}.type = {name!r}",
        where=where,
        rule="unknown callback",
        nearest=did_you_mean(name, (*CALLBACKS, *PLANNED_CALLBACKS)),
        advice="Set register_path to the file that defines your own callback",
        key=f"{path}.type",
    )


def _unknown_flag(name: str, key: str) -> KeyProblem:
    is_known, is_in_list = bool(word_elsewhere(name)), key.startswith("callbacks[")
    as_key = f"did you mean `{'' if is_in_list else '--'}{key}`?" if key else ""
    if is_in_list and not is_known:
        as_key = ""
    is_its_name = key.rpartition(".")[2] == name
    return KeyProblem(
        what=f"unknown flag `--{name}`",
        where="command line",
        rule="it is neither a flag nor a key at the top level",
        nearest=as_key if as_key and (is_its_name or is_known) else nearest_flag(name) or as_key,
        advice="See `python run.py --help`",
        key=name,
    )
