"""Writing the values of the command line over the tree of the YAML files.

Owns the meaning of an assignment: literal texts, `--options`, and Hydra's grammar (`a.b=c`,
`+a.b=c`, `~a.b`, list positions such as `callbacks.0.prefix`). Hydra only parses; its own messages
about structure are never shown.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from launcher.config.aliases import canonical
from launcher.config.command_line import Assignment
from launcher.config.extra_keys import extra_key, extra_names, is_extra_section
from launcher.config.nodes import Node, NoPlace, find, from_plain, put, without
from launcher.config.schema import Config, info_of
from launcher.config.suggest import did_you_mean_key, list_section_of, section_of
from launcher.config.typing_rules import hints, members
from launcher.config.yaml_reader import parse_value
from launcher.errors import Problem, UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """What the schema knows about a dotted key."""

    annotation: Any
    """Its type; Any inside open sections and lists."""
    is_open: bool
    """Whether keys of any name are allowed here."""
    is_known: bool


def place_of(path: str) -> Place:
    """The schema's view of a dotted key."""
    return _place_in(Config, "", path.split("."))


def _place_in(kind: type, label: str, names: list[str]) -> Place:
    """The place of `names` below a section, `label` its name in the schema."""
    for index, name in enumerate(names):
        section = ".".join([label, *names[:index]]).lstrip(".")
        fields = {key.name: key for key in dataclasses.fields(kind)}
        if name not in fields or info_of(fields[name]).open_keys:
            return _extra_place(section, names[index:])
        annotation = hints(kind)[name]
        if index == len(names) - 1:
            return Place(annotation, is_open=False, is_known=True)
        entry = list_section_of(annotation) if name != "callbacks" else None
        if entry is not None and names[index + 1].isdecimal():
            rest = names[index + 2 :]
            known = Place(entry, is_open=False, is_known=True)
            return _place_in(entry, f"{section}.{name}[]".lstrip("."), rest) if rest else known
        inner = section_of(annotation) if name != "callbacks" else None
        if inner is None:
            is_open = _holds_more(annotation)
            return Place(Any, is_open=is_open, is_known=is_open)
        kind = inner
    raise AssertionError("a dotted key has a name")


def _extra_place(section: str, names: list[str]) -> Place:
    """The same for a key without a field."""
    for index, name in enumerate(names):
        key = extra_key(section, name)
        if key is not None and index == len(names) - 1:
            is_known = name in extra_names(section)
            return Place(key.annotation, is_open=not is_known, is_known=is_known)
        if key is not None:
            is_open = _holds_more(key.annotation)
            return Place(Any, is_open=is_open, is_known=is_open)
        section = f"{section}.{name}".lstrip(".")
        if not is_extra_section(section):
            return Place(Any, is_open=False, is_known=False)
    return Place(Any, is_open=False, is_known=True)


def _holds_more(annotation: Any) -> bool:
    shapes = [getattr(kind, "__origin__", kind) for kind in members(annotation)]
    return any(shape in (dict, list, Any) for shape in shapes)


def assigned(tree: Node, assignment: Assignment) -> Node:
    """The tree with one assignment. Raises UserError where there is no such place."""
    if assignment.kind == "override":
        return _override(tree, assignment)
    key = canonical(assignment.key)
    if assignment.only_present and tree.value.get(key.split(".")[0]) is None:
        return tree
    return _set(tree, key, _text_node(key, assignment))


def _text_node(key: str, assignment: Assignment) -> Node:
    text, where = assignment.text, assignment.where
    if isinstance(text, list):
        return from_plain(text, where)
    takes_text = str in members(place_of(key).annotation)
    if assignment.kind == "option" and not takes_text:
        text = text.replace("(", "[").replace(")", "]")
        if "," in text and text[:1] not in "[{\"'":
            text = f"[{text}]"
    if text[:1] in ("{", "[") and not takes_text:
        return from_plain(parse_value(text), where)
    return Node(value=text, where=where, is_text=True)


def _override(tree: Node, assignment: Assignment) -> Node:
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
        return _deleted(tree, key, value, where)
    if parsed.type == OverrideType.CHANGE:
        return _set(tree, key, from_plain(value, where))
    return _added(tree, key, from_plain(value, where))


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
    nearest = "" if place_of(key).is_known else did_you_mean_key(name, section)
    return UserError(f"`{key}`", where=where, rule=rule, nearest=nearest, advice=advice)


def _set(tree: Node, key: str, value: Node) -> Node:
    try:
        return put(tree, key, value)
    except NoPlace as error:
        raise _unknown(key, value.where, str(error), _with_index(tree, key)) from None


def _with_index(tree: Node, key: str) -> str:
    """Advice for a key that leads into a list without saying which entry."""
    names = key.split(".")
    for end in range(1, len(names)):
        reached = find(tree, ".".join(names[:end]))
        if reached is not None and isinstance(reached.value, list) and not names[end].isdecimal():
            entry = ".".join([*names[:end], "0", *names[end:]])
            if names[0] == "callbacks" or not place_of(entry).is_known:
                return ""
            return f"Write `{entry}=...` for the first entry of the list"
    return ""


def _added(tree: Node, key: str, value: Node) -> Node:
    """`+key=value`: a new key of an open section, or new entries of a list."""
    place, present = place_of(key), find(tree, key)
    is_list = any(getattr(kind, "__origin__", kind) is list for kind in members(place.annotation))
    if is_list or (present is not None and isinstance(present.value, list)):
        present = present or Node(value=[], where=value.where)
        if present.is_text or not isinstance(present.value, list):
            raise _unknown(
                key, value.where, f"{present.plain()!r} is not a list",
                "`+` adds an entry to a list: write a list in the file, `- ` before each entry",
            )  # fmt: skip
        entries = value.value if isinstance(value.value, list) else [value]
        return _set(tree, key, dataclasses.replace(present, value=[*present.value, *entries]))
    if place.is_open or key.startswith("callbacks.") or (
        place.is_known and place.annotation is Any
    ):  # fmt: skip
        return _set(tree, key, value)
    if place.is_known:
        raise UserError(
            f"`+{key}`: `{key}` is a key of the schema",
            where=value.where,
            rule="`+` adds new keys to open sections and entries to lists",
            advice=f"Write `{key}=...`",
        )
    raise _unknown(
        key,
        value.where,
        "there is no such key, and its section takes no other keys",
        "`+` adds keys to model.model_config, context and your own callbacks only",
    )


def _deleted(tree: Node, key: str, value: Any, where: str) -> Node:
    """`~key`: ignore the value of files and flags; `~key=value` only if it is this value."""
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
    return without(tree, key)
