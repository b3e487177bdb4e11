"""From a tree of written values to the typed configuration.

Owns the checks of single keys: known name, type, null, choices, bounds, classification. All
problems are gathered; a key with a problem keeps its default, and is listed in `bad` so that no
rule complains about what only follows from it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.config.command_line import nearest_flag
from launcher.config.nodes import Node, from_plain, parse_value
from launcher.config.provenance import KeyProblem
from launcher.config.schema import (
    CALLBACKS,
    PLANNED_CALLBACKS,
    CallbackSection,
    Config,
    FieldInfo,
    RegisteredCallbackSection,
    info_of,
)
from launcher.config.suggest import nearest_key, section_of
from launcher.config.typing_rules import (
    WrongType,
    convert,
    convert_text,
    describe,
    hints,
    out_of_bounds,
)
from launcher.errors import did_you_mean


class Reader:
    """Reads one tree. The results beside the Config: problems, places, bad, no_effect."""

    def __init__(self, tree: Node) -> None:
        self.tree = tree
        self.problems: list[KeyProblem] = []
        self.places: dict[str, str] = {}
        self.bad: set[str] = set()
        self.no_effect: list[str] = []

    def config(self) -> Config:
        """The typed configuration; `problems` says what was wrong on the way."""
        result = self.section(Config, self.tree, "", "")
        assert isinstance(result, Config)
        return result

    def section(self, kind: type, node: Node, path: str, label: str) -> Any:
        """One section; `label` is its name in suggestions (it differs from `path` in lists)."""
        if node.is_text:
            node = from_plain(parse_value(node.value), node.where)
        if node.value is None:
            return kind()
        if not isinstance(node.value, dict):
            self._wrong_type(path, node, describe(dict))
            return kind()
        fields = {key.name: key for key in dataclasses.fields(kind)}
        open_field = next((key for key in fields.values() if info_of(key).open_keys), None)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            child_path = f"{path}.{name}" if path else name
            if name in fields and not info_of(fields[name]).open_keys:
                self._record(child_path, child)
                self._field(kind, fields[name], child, child_path, label, values)
            elif open_field is not None:
                self._record(child_path, child)
                values.setdefault(open_field.name, {})[name] = _open_value(child)
                if info_of(open_field).status == "no effect":
                    self.no_effect.append(child_path)
            else:
                self._unknown(name, child, path, label)
        return kind(**values)

    def _record(self, path: str, node: Node) -> None:
        self.places[path] = node.where
        for inner, child in node.walk(path):
            self.places[inner] = child.where

    def _field(
        self,
        kind: type,
        key: dataclasses.Field[Any],
        node: Node,
        path: str,
        label: str,
        values: dict[str, Any],
    ) -> None:
        annotation, info = hints(kind)[key.name], info_of(key)
        inner_label = f"{label}.{key.name}" if label else key.name
        if key.name == "callbacks" and kind is Config:
            values[key.name] = self._callbacks(node, path)
            return
        inner = section_of(annotation)
        if inner is not None:
            if not (node.value is None and info.none_means_absent):
                values[key.name] = self.section(inner, node, path, inner_label)
            return
        try:
            value = self._value(annotation, node, key)
        except WrongType as error:
            self._wrong_type(path, node, str(error), default=_default(key))
            return
        if self._is_allowed(path, node, value, info):
            values[key.name] = value
            self._classify(path, node, value, info)

    def _value(self, annotation: Any, node: Node, key: dataclasses.Field[Any]) -> Any:
        if node.is_text:
            value = convert_text(annotation, node.value)
        elif node.value is None and _default(key) == "":
            value = ""  # null is how many YAML files write an empty path
        else:
            value = convert(annotation, _open_value(node))
        if isinstance(value, str) and "${" in value and key.name != "input_data":
            raise WrongType("a plain value (`${...}` is not interpolated, YAML anchors are)")
        return value

    def _is_allowed(self, path: str, node: Node, value: Any, info: FieldInfo) -> bool:
        shown = f"{path} = {value!r}"
        for number in value if isinstance(value, list) else [value]:
            problem = out_of_bounds(number, info)
            if problem:
                self._add(KeyProblem(what=shown, where=node.where, rule=problem, key=path))
                return False
        if not info.choices or value is None:
            return True
        for word in value if isinstance(value, list) else [value]:
            if any(word == choice and type(word) is type(choice) for choice in info.choices):
                continue
            if word in info.planned:
                self._not_built(path, node, shown, f"Use {_listed(info.choices)}")
            else:
                self._add(
                    KeyProblem(
                        what=shown,
                        where=node.where,
                        rule=f"must be one of: {_listed(info.choices)}",
                        nearest=_nearest_word(word, (*info.choices, *info.planned)),
                        key=path,
                    )
                )
            return False
        return True

    def _classify(self, path: str, node: Node, value: Any, info: FieldInfo) -> None:
        if info.status == "no effect":
            self.no_effect.append(path)
        elif info.status == "not built yet" and not _asks_for_nothing(value, info):
            self._not_built(path, node, f"{path} = {value!r}", info.why)

    def _callbacks(self, node: Node, path: str) -> list[CallbackSection]:
        if node.is_text:
            node = from_plain(parse_value(node.value), node.where)
        if node.value is None:
            return []
        if not isinstance(node.value, list):
            advice = "Write each callback as `- type: ...`"
            self._wrong_type(path, node, "a list of callbacks", advice=advice)
            return []
        return [self._callback(entry, f"{path}.{i}") for i, entry in enumerate(node.value)]

    def _callback(self, node: Node, path: str) -> CallbackSection:
        """One entry; a wrong one stays as an empty callback, so that positions keep."""
        if not isinstance(node.value, dict):
            self._wrong_type(path, node, "a section with the key `type`")
            return RegisteredCallbackSection()
        name = node.value["type"].value if "type" in node.value else None
        if not isinstance(name, str) or not name:
            near = next((key for key in node.value if did_you_mean(key, ["type"])), "")
            self._add(
                KeyProblem(
                    what=f"{path} has no `type`",
                    where=node.where,
                    rule="every callback must have a type",
                    nearest=f"did you mean `{path}.type`, not `{path}.{near}`?" if near else "",
                    advice=f"Known types: {', '.join(CALLBACKS)}",
                    key=path,
                )
            )
        elif name in CALLBACKS:
            callback: CallbackSection = self.section(
                CALLBACKS[name], node, path, f"callbacks[{name}]"
            )
            return callback
        elif name in PLANNED_CALLBACKS:
            where = node.value["type"]
            self._not_built(f"{path}.type", where, f"{path}.type = {name!r}", "Leave it out")
        elif self._has_register_path():
            plain = {key: _open_value(child) for key, child in node.value.items() if key != "type"}
            return RegisteredCallbackSection(type=name, arguments=plain)
        else:
            self._add(
                KeyProblem(
                    what=f"{path}.type = {name!r}",
                    where=node.value["type"].where,
                    rule="unknown callback",
                    nearest=did_you_mean(name, (*CALLBACKS, *PLANNED_CALLBACKS)),
                    advice="Set register_path to the file that defines your own callback",
                    key=f"{path}.type",
                )
            )
        return RegisteredCallbackSection()

    def _has_register_path(self) -> bool:
        node = self.tree.value.get("register_path")
        return node is not None and bool(node.value)

    def _unknown(self, name: str, node: Node, path: str, label: str) -> None:
        if not path and node.where == f"command line: --{name}":
            self._unknown_flag(name, node)
            return
        shown = f"{path}.{name}" if path else name
        nearest = nearest_key(name, label)
        if path != label and nearest.startswith(f"{label}."):
            nearest = path + nearest[len(label) :]
        rule = f"`{path}` has no such key" if path else "there is no such key at the top level"
        self._add(
            KeyProblem(
                what=f"unknown key `{shown}`",
                where=node.where,
                rule=rule,
                nearest=f"did you mean `{nearest}`?" if nearest else "",
                advice="" if nearest else "See docs/configuration.md for all keys",
                key=shown,
            )
        )
        self.bad.add(nearest)

    def _unknown_flag(self, name: str, node: Node) -> None:
        key = nearest_key(name, "")
        as_key = f"did you mean `--{key}`?" if key and not key.startswith("callbacks[") else ""
        self._add(
            KeyProblem(
                what=f"unknown flag `--{name}`",
                where="command line",
                rule="it is neither a flag nor a key at the top level",
                nearest=nearest_flag(name) or as_key,
                advice="See `python run.py --help`",
                key=name,
            )
        )
        self.bad.add(key)

    def _wrong_type(
        self, path: str, node: Node, needed: str, *, default: Any = None, advice: str = ""
    ) -> None:
        if not advice and node.value is None:
            advice = f"Remove the key to use the default ({default!r})"
        value = "null" if node.value is None else repr(node.plain())
        if len(value) > 60:
            value = value[:57] + "..."
        self._add(
            KeyProblem(
                what=f"{path} = {value}",
                where=node.where,
                rule=f"must be {needed}",
                advice=advice,
                key=path,
            )
        )

    def _not_built(self, path: str, node: Node, what: str, advice: str) -> None:
        self._add(
            KeyProblem(what=what, where=node.where, rule="not built yet", advice=advice, key=path)
        )

    def _add(self, problem: KeyProblem) -> None:
        self.bad.add(problem.key)
        if any(_is_reported_elsewhere(known, problem) for known in self.problems):
            return
        self.problems.append(problem)


def _is_reported_elsewhere(known: KeyProblem, problem: KeyProblem) -> bool:
    """Whether `problem` is the same line, read a second time through the alias of a data set."""
    if "_dataset_task." not in f"{known.key} {problem.key}" or known.where != problem.where:
        return False
    return known.key.rpartition(".")[2] == problem.key.rpartition(".")[2]


def _open_value(node: Node) -> Any:
    return parse_value(node.value) if node.is_text else _read_texts(node)


def _read_texts(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _open_value(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_open_value(child) for child in node.value]
    return node.value


def _default(key: dataclasses.Field[Any]) -> Any:
    if key.default is not dataclasses.MISSING:
        return key.default
    return key.default_factory() if key.default_factory is not dataclasses.MISSING else None


def _asks_for_nothing(value: Any, info: FieldInfo) -> bool:
    return any(value == harmless and type(value) is type(harmless) for harmless in info.harmless)


def _listed(choices: tuple[Any, ...]) -> str:
    return ", ".join(str(choice) for choice in choices)


def _nearest_word(word: Any, known: tuple[Any, ...]) -> str:
    texts = [choice for choice in known if isinstance(choice, str)]
    by_lower = {text.lower(): text for text in reversed(texts)}
    found = did_you_mean(str(word).lower(), by_lower, cutoff=0.5)
    for lower, text in by_lower.items():
        if found == f"did you mean `{lower}`?":
            return f"did you mean `{text}`?"
    return found
