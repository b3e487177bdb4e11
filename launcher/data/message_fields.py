"""Reading the fields of one turn or record: strings, the content of a message, tool calls.

Owns how a value that is not what it should be is reported: with file, record and field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.data.fields import ASSISTANT_FIELDS
from launcher.data.records import Record, shown
from launcher.data.strictness import (
    check_encodable,
    is_absent,
    names_of,
    surrogate_error,
    wrong_field,
)
from launcher.errors import UserError
from launcher.json_text import NotJson, lone_surrogate, parse

FORMATS = ("alpaca", "messages", "sharegpt")

Turn = dict[str, Any]


def message_content(record: Record, turn: Turn, role: str, inside: str) -> dict[str, Any]:
    """The content of a message as one string, and its tool calls as templates expect them."""
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(record, part, inside) for part in content)
    elif content is None and role == "assistant" and any(map(turn.get, ASSISTANT_FIELDS)):
        content = ""
    elif not isinstance(content, str):
        raise wrong_key(record, turn, "content", "messages", "a string", inside)
    more = {name: value for name, value in turn.items() if name not in ("role", "content")}
    if more:
        check_encodable(record, more, inside.removesuffix("."))
    if wrong := lone_surrogate(content):
        raise surrogate_error(record.where, f"{inside}content", wrong)
    if is_absent(turn.get("tool_calls")):
        return {"content": content}
    return {"content": content, "tool_calls": _calls(record, turn["tool_calls"], inside)}


def _part(record: Record, part: Any, inside: str) -> str:
    """The text of one part of a content that is a list, as in OpenAI's format."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text")
        if isinstance(text, str):
            return text
    raise UserError(
        f"'{inside}content' has the part {shown(part)}",
        where=record.where,
        rule='only text is supported: a content part must be {"type": "text", "text": ...}',
        advice="Fix or remove the record",
    )


def _calls(record: Record, calls: Any, inside: str) -> list[Any]:
    """Tool calls with their arguments as objects: OpenAI has JSON in a string, which templates
    would encode as JSON once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        rule = "it must be a list of objects"
        raise wrong_field(record.where, f"{inside}tool_calls", calls, rule)
    return [_call(record, call, f"{inside}tool_calls[{n}]") for n, call in enumerate(calls)]


def _call(record: Record, call: dict[str, Any], place: str) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _call(record, function, f"{place}.function")}
    arguments = call.get("arguments")
    if not isinstance(arguments, str) or not arguments.strip():
        return call
    try:
        return {**call, "arguments": parse(arguments)}
    except NotJson as error:
        rule = f"it must be JSON ({error.reason})"
        raise wrong_field(record.where, f"{place}.arguments", arguments, rule) from None


def string_of(
    record: Record,
    owner: Mapping[str, Any],
    key: str,
    form: str,
    inside: str = "",
    *,
    optional: bool = False,
) -> str:
    """The string in field `key` of a record or a turn (`inside`); empty where an optional one is
    absent. Raises UserError."""
    value = owner.get(key)
    if isinstance(value, str):
        if wrong := lone_surrogate(value):
            raise surrogate_error(record.where, f"{inside}{key}", wrong)
        return value
    if value is None and optional:
        return ""
    raise wrong_key(record, owner, key, form, "a string", inside)


def wrong_key(
    record: Record, owner: Mapping[str, Any], key: str, form: str, rule: str, inside: str = ""
) -> UserError:
    """The error for a field that is missing or has a value of another type."""
    name = f"'{inside}{key}'"
    text = f"{name} = {shown(owner[key])}" if key in owner else f"{name} is missing"
    return UserError(
        text if len(text) < 80 else text[:77] + "...",
        where=record.where,
        rule=f"in the {form} format it must be {rule}",
        nearest=f"Keys found: {names_of(owner)}",
        advice=f"Fix the record, or set data_loader.format ({', '.join(FORMATS)})",
    )
