"""Checks of one key: its type, bounds, choices and classification.

Owns the messages about them. Pure: a problem is returned, never collected here.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, get_args, get_origin

from launcher.config.draft import asks_for_nothing
from launcher.config.nodes import Node
from launcher.config.provenance import KeyProblem
from launcher.config.schema import FieldInfo
from launcher.config.typing_rules import WrongType, convert, convert_text, members, out_of_bounds
from launcher.config.yaml_reader import parse_value
from launcher.errors import did_you_mean

_LONGEST = 60
_SWITCHES = {
    **dict.fromkeys(("on", "yes", "enable", "enabled", "1"), "True"),
    **dict.fromkeys(("off", "no", "none", "disable", "disabled", "0"), "False"),
}
"""Other words for the values of a switch."""


def plain_value(node: Node) -> Any:
    """The value of a node, with every text of the command line inside it parsed."""
    if node.is_text:
        return parse_value(node.value)
    if isinstance(node.value, dict):
        return {key: plain_value(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain_value(child) for child in node.value]
    return node.value


def nearest_value(annotation: Any, node: Node) -> str:
    """`Nearest: [0]`, for a value where a list of such values is needed, or `Nearest: True`, for
    another word of a switch; else empty. Not for lists of numbers, which have a length of their own
    (`betas`)."""
    value = plain_value(node)
    if value is None or isinstance(value, (list, dict)):
        return ""
    if bool in members(annotation) and (word := _SWITCHES.get(str(value).lower())):
        return f"Nearest: {word}"
    for member in members(annotation):
        if get_origin(member) is list and float not in get_args(member):
            with suppress(WrongType):
                return f"Nearest: {convert(member, [value])!r}"
    return ""


def typed_value(annotation: Any, node: Node, *, interpolates: bool = False) -> Any:
    """The value of a node as this type. Raises WrongType.

    `interpolates`: `${...}` is allowed, because it is not a reference in this key.
    """
    value = convert_text(annotation, node.value) if node.is_text else convert(
        annotation, plain_value(node)
    )  # fmt: skip
    if isinstance(value, str) and "${" in value and not interpolates:
        raise WrongType("a plain value (`${...}` is not interpolated, YAML anchors are)")
    return value


def wrong_value(path: str, node: Node, value: Any, info: FieldInfo) -> KeyProblem | None:
    """The problem of a value of the right type: a bound, a choice, or something not built yet."""
    shown = f"{path} = {value!r}"
    for item in value if isinstance(value, list) else [value]:
        if rule := out_of_bounds(item, info):
            return KeyProblem(what=shown, where=node.where, rule=rule, key=path)
    if info.choices and value is not None:
        for word in value if isinstance(value, list) else [value]:
            if not _is_among(word, info.choices):
                return _wrong_choice(path, node, word, info, shown)
    if info.status == "not built yet" and not _is_among(value, info.harmless):
        return not_built(path, node.where, shown, info.why)
    return None


def asks_for_nothing_of(info: FieldInfo, node: Node) -> bool:
    """Whether the value of a key that is not built is neutral, of whatever type: null, off, zero or
    empty. Zero is no neutral factor, and False no neutral value of a switch that is on here."""
    value = plain_value(node)
    if info.status != "not built yet" or not asks_for_nothing(value):
        return False
    is_number = isinstance(value, (int, float))
    return not (is_number and any(info.harmless))


def _is_among(value: Any, known: tuple[Any, ...]) -> bool:
    return any(value == item and type(value) is type(item) for item in known)


def _wrong_choice(path: str, node: Node, word: Any, info: FieldInfo, shown: str) -> KeyProblem:
    choices = ", ".join(map(str, info.choices))
    if word in info.planned:
        return not_built(path, node.where, shown, f"Use {choices}")
    return KeyProblem(
        what=shown,
        where=node.where,
        rule=f"must be one of: {choices}",
        nearest=_nearest_word(word, info),
        key=path,
    )


def _nearest_word(word: Any, info: FieldInfo) -> str:
    same = info.words.get(str(word).lower())
    if same is None and any(isinstance(choice, bool) for choice in info.choices):
        same = _SWITCHES.get(str(word).lower())
    if same is not None:
        return f"did you mean `{same}`?" if same else ""
    texts = [choice for choice in (*info.choices, *info.planned) if isinstance(choice, str)]
    by_lower = {text.lower(): text for text in reversed(texts)}
    found = did_you_mean(str(word).lower(), by_lower, cutoff=0.5)
    for lower, text in by_lower.items():
        if found == f"did you mean `{lower}`?":
            return f"did you mean `{text}`?"
    return found


def not_built(path: str, where: str, what: str, advice: str) -> KeyProblem:
    """The problem of something that is known and not built yet."""
    return KeyProblem(what=what, where=where, rule="not built yet", advice=advice, key=path)


def wrong_type(
    path: str, node: Node, needed: str, advice: str = "", nearest: str = ""
) -> KeyProblem:
    """The problem of a value of another type."""
    if not advice and node.value is None:
        advice = "Remove the key"
    value = "null" if node.value is None else repr(node.plain())
    if len(value) > _LONGEST:
        value = value[: _LONGEST - 3] + "..."
    return KeyProblem(
        what=f"{path} = {value}",
        where=node.where,
        rule=f"must be {needed}",
        nearest=nearest,
        advice=advice,
        key=path,
    )
