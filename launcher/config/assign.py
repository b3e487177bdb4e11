"""Writing what the command line says into the tree of the YAML files.

Owns the meaning of an assignment: literal texts, `--options`, and Hydra's grammar (`a.b=c`,
`+a.b=c`, `~a.b`, list positions such as `callbacks.0.prefix`). Hydra only parses; its own words
about structure never reach the user.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.config.command_line import Assignment
from launcher.config.files import canonical
from launcher.config.nodes import Node, from_plain, parse_value
from launcher.config.schema import Config, info_of
from launcher.config.suggest import did_you_mean_key, section_of
from launcher.config.typing_rules import hints, members
from launcher.errors import Problem, UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """What the schema says about a dotted key."""

    annotation: Any
    """Its type; Any inside open sections and lists."""
    is_open: bool
    """Whether keys of any name may stand here."""
    is_known: bool


def place_of(path: str) -> Place:
    """The schema's view of a dotted key."""
    kind: type | None = Config
    names = path.split(".")
    for index, name in enumerate(names):
        if kind is None:
            return Place(Any, is_open=True, is_known=True)
        fields = {key.name: key for key in dataclasses.fields(kind)}
        if name not in fields or info_of(fields[name]).open_keys:
            is_open = any(info_of(key).open_keys for key in fields.values())
            return Place(Any, is_open=is_open, is_known=False)
        annotation = hints(kind)[name]
        if index == len(names) - 1:
            return Place(annotation, is_open=False, is_known=True)
        kind = section_of(annotation) if name != "callbacks" else None
        if kind is None and not _holds_more(annotation):
            return Place(Any, is_open=False, is_known=False)
    return Place(Any, is_open=False, is_known=True)


def _holds_more(annotation: Any) -> bool:
    shapes = [getattr(kind, "__origin__", kind) for kind in members(annotation)]
    return any(shape in (dict, list, Any) for shape in shapes)


def apply(tree: Node, assignment: Assignment) -> None:
    """Write one assignment into `tree`. Raises UserError where there is no such place."""
    if assignment.kind == "override":
        _override(tree, assignment)
        return
    key = canonical(assignment.key)
    if assignment.only_present and tree.value.get(key.split(".")[0]) is None:
        return
    value = _text_node(key, assignment)
    _set(tree, key, value, assignment.where)


def _text_node(key: str, assignment: Assignment) -> Node:
    text, where = assignment.text, assignment.where
    if isinstance(text, list):
        return from_plain(text, where)
    annotation = place_of(key).annotation
    takes_text = str in members(annotation)
    if assignment.kind == "option" and not takes_text:
        text = text.replace("(", "[").replace(")", "]")
        if "," in text and text[:1] not in "[{\"'":
            text = f"[{text}]"
    if text[:1] in ("{", "[") and not takes_text:
        return from_plain(parse_value(text), where)
    return Node(value=text, where=where, is_text=True)


def _override(tree: Node, assignment: Assignment) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    text, where = str(assignment.text), assignment.where
    try:
        parsed = OverridesParser.create().parse_override(text)
        if parsed.is_sweep_override() or parsed.package is not None:
            raise HydraException("a sweep or a package")
        value = parsed.value()
    except HydraException:
        raise UserError(_bad_grammar(text, where)) from None
    key = canonical(parsed.key_or_group.replace("/", "."))
    if parsed.type == OverrideType.DEL:
        _delete(tree, key, value, where)
    elif parsed.type == OverrideType.CHANGE:
        _set(tree, key, from_plain(value, where), where)
    else:
        _add(tree, key, from_plain(value, where), where)


def _bad_grammar(text: str, where: str) -> Problem:
    key, _, value = text.partition("=")
    quoted = value.replace("'", "\\'")
    return Problem(
        what=f"`{text}` is not a valid override",
        where=where,
        rule="an override is key.path=value in Hydra's grammar, without sweeps",
        advice=f"Write `--{key.lstrip('+~')} {value!r}` to set the literal text, "
        f"or quote it: \"{key}='{quoted}'\"",
    )


def _unknown(key: str, where: str, rule: str, advice: str = "") -> UserError:
    section, _, name = key.rpartition(".")
    is_known = place_of(key).is_known
    nearest = "" if is_known else did_you_mean_key(name, section)
    return UserError(f"`{key}`", where=where, rule=rule, nearest=nearest, advice=advice)


def _set(tree: Node, key: str, value: Node, where: str, *, appending: bool = False) -> None:
    *sections, last = key.split(".")
    node = tree
    for depth, name in enumerate(sections):
        child = _child(node, name, key, where)
        if child is None or child.value is None:
            child = Node(value={}, where=where)
            if isinstance(node.value, list):
                node.value.append(child)
            else:
                node.value[name] = child
        if child.is_text and isinstance(child.value, str):
            child.value, child.is_text = from_plain(parse_value(child.value), where).value, False
        if not isinstance(child.value, (dict, list)):
            reached = ".".join(sections[: depth + 1])
            raise _unknown(key, where, f"`{reached}` = {child.value!r} is not a section")
        node = child
    if isinstance(node.value, list):
        _child(node, last, key, where)
        node.value[int(last)] = value
    else:
        node.value[last] = value


def _child(node: Node, name: str, key: str, where: str) -> Node | None:
    if isinstance(node.value, dict):
        child: Node | None = node.value.get(name)
        return child
    if not name.isdigit() or int(name) >= len(node.value):
        count = len(node.value)
        held = f"its indices are 0 to {count - 1}" if count else "it is empty"
        raise _unknown(key, where, f"`{name}` is not an index of this list: {held}")
    entry: Node = node.value[int(name)]
    return entry


def find(tree: Node, key: str) -> Node | None:
    """The node at a dotted key, None when nothing is written there."""
    node = tree
    for name in key.split("."):
        if isinstance(node.value, dict):
            child = node.value.get(name)
        elif isinstance(node.value, list) and name.isdigit() and int(name) < len(node.value):
            child = node.value[int(name)]
        else:
            return None
        if child is None:
            return None
        node = child
    return node


def _add(tree: Node, key: str, value: Node, where: str) -> None:
    """`+key=value`: a new key of an open section, or a new entry of a list."""
    place = place_of(key)
    is_list = any(getattr(kind, "__origin__", kind) is list for kind in members(place.annotation))
    present = find(tree, key)
    if is_list or (present is not None and isinstance(present.value, list)):
        if present is None:
            present = Node(value=[], where=where)
            _set(tree, key, present, where)
        if present.is_text or not isinstance(present.value, list):
            raise _unknown(key, where, f"{present.plain()!r} is not a list")
        present.value += value.value if isinstance(value.value, list) else [value]
    elif place.is_open or _is_inside_entry(key) or (place.is_known and place.annotation is Any):
        _set(tree, key, value, where)
    elif place.is_known:
        raise UserError(
            f"`+{key}`: `{key}` is a key of the schema",
            where=where,
            rule="`+` adds new keys to open sections and entries to lists",
            advice=f"Write `{key}=...`",
        )
    else:
        raise _unknown(
            key,
            where,
            "there is no such key, and its section takes no other keys",
            "`+` adds keys to model.model_config, context and your own callbacks only",
        )


def _is_inside_entry(key: str) -> bool:
    return key.startswith("callbacks.")


def _delete(tree: Node, key: str, value: Any, where: str) -> None:
    """`~key`: forget what the files and flags say; `~key=value` only if they say that."""
    node = find(tree, key)
    if node is None:
        raise _unknown(key, where, "the key is not set, so it cannot be removed")
    if value is not None and node.plain() != value:
        raise UserError(
            f"`~{key}={value}`: the value is {node.plain()!r}",
            where=where,
            rule="`~key=value` removes the key only if it has this value",
            advice=f"Write `~{key}`",
        )
    *sections, last = key.split(".")
    parent = find(tree, ".".join(sections)) if sections else tree
    assert parent is not None
    if isinstance(parent.value, list):
        del parent.value[int(last)]
    else:
        del parent.value[last]
