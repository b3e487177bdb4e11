"""Conversations for instruction tuning: the formats `alpaca`, `messages` and `sharegpt`.

Owns how a record of each format becomes turns with `role` and `content`, the input of chat
templates (`fields` lists the fields). Invariant: a record that does not fit its format is an error
with file and record, never a guess. The format is `data_loader.format`, else it is detected from
the first record of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launcher.data.fields import (
    ASSISTANT_FIELDS,
    OTHER_DATA,
    RECORD_FIELDS,
    ROLES,
    SHAREGPT_ROLES,
    TURN_FIELDS,
    WEIGHTS,
)
from launcher.data.record_files import without_null
from launcher.data.records import Record, convert_records, shown
from launcher.data.strictness import (
    LENIENT,
    Strictness,
    check_encodable,
    is_absent,
    names_of,
    surrogate_error,
    wrong_field,
)
from launcher.errors import UserError, did_you_mean
from launcher.json_text import NotJson, lone_surrogate, parse, printable

FORMATS = ("alpaca", "messages", "sharegpt")

Turn = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation: turns with `role` and `content`, the input of chat templates."""

    where: str
    messages: list[Turn]
    tools: list[Any] | None = None
    """Its own tools; an empty list: none, whatever the configuration has."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    context_turns: frozenset[int] = frozenset()
    """Answers (indices of `messages`) that do not count for the loss."""


def conversations_of(
    records: Iterable[Record | UserError],
    given_format: str | None,
    strictness: Strictness,
    first_record: Record | None = None,
) -> Iterator[Conversation]:
    """The conversations of records, in the given format (of FORMATS) or that of the first record,
    `first_record` where it is not among them."""
    if given_format is not None and given_format not in FORMATS:
        raise UserError(
            f"data_loader.format = {given_format!r}",
            rule=f"it must be one of {', '.join(FORMATS)}",
            nearest=did_you_mean(given_format, FORMATS),
            advice="Leave it out to detect it",
        )
    form = given_format
    if given_format is None and first_record is not None:
        form = _detect(first_record)

    def conversation_of(record: Record) -> Conversation:
        nonlocal form
        if given_format is None:
            _refuse_two_formats(record)
        form = form or _detect(record)
        return _READERS[form](without_null(record), strictness)

    return convert_records(records, conversation_of)


def _formats(record: Record) -> list[str]:
    keys = record.value
    found = {
        "messages": _has_turns(keys.get("messages"), "role"),
        "sharegpt": _has_turns(keys.get("conversations"), "from"),
        "alpaca": "instruction" in keys and "output" in keys,
    }
    return [name for name, is_it in found.items() if is_it]


def _detect(record: Record) -> str:
    found = _formats(record)
    if found:
        return found[0]
    raise UserError(
        f"has the keys {names_of(record.value)}",
        where=record.where,
        rule="instruction data is alpaca (instruction, input, output), messages (messages: role, "
        "content) or sharegpt (conversations: from, value)",
        nearest=_turns_found(record),
        advice="Name its columns in data_loader.column_map; plain text is read by HFDataLoader",
    )


def _turns_found(record: Record) -> str:
    """The fields of the first turn of a value that looks like turns; empty without one."""
    for key, value in record.value.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return f"The turns of `{printable(key[:60])}` have {names_of(value[0])}"
    return ""


def _refuse_two_formats(record: Record) -> None:
    found = _formats(record)
    if len(found) > 1:
        raise UserError(
            f"matches the formats {' and '.join(found)}",
            where=record.where,
            rule="a record has one conversation",
            advice="Set data_loader.format",
        )


def _has_turns(value: Any, key: str) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]
    )


def _alpaca(record: Record, strictness: Strictness) -> Conversation:
    strictness.check_fields(record, record.value, RECORD_FIELDS["alpaca"])
    question = [
        _string(record, record.value, "instruction", "alpaca"),
        _string(record, record.value, "input", "alpaca", optional=True),
    ]
    answer = _string(record, record.value, "output", "alpaca")
    messages = [
        *_history(record, strictness),
        {"role": "user", "content": "\n\n".join(part for part in question if part)},
        {"role": "assistant", "content": answer},
    ]
    return _conversation(record, messages, [None] * len(messages), strictness)


def _history(record: Record, strictness: Strictness) -> list[Turn]:
    """Earlier turns, `[[question, answer], ...]`; all answers are targets, as in LLaMA-Factory."""
    history = record.value.get("history")
    if is_absent(history):
        return []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        rule = "in the alpaca format it must be a list of [question, answer] pairs of strings"
        error = wrong_field(record.where, "history", history, rule)
        strictness.wrong(error, "history", record.where)
        return []
    check_encodable(record, history, "history")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(roles, pair, strict=True)
    ]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


def _messages(record: Record, strictness: Strictness) -> Conversation:
    strictness.check_fields(record, record.value, RECORD_FIELDS["messages"])
    turns = _turns(record, "messages", "messages")
    messages = [_message(record, index, turn, strictness) for index, turn in enumerate(turns)]
    return _conversation(
        record, messages, _weights(record, messages, turns, strictness), strictness
    )


def _message(record: Record, index: int, turn: Turn, strictness: Strictness) -> Turn:
    inside = f"messages[{index}]."
    # Other fields are passed to the template; `rendering_check` counts those it does not use.
    if not OTHER_DATA.keys().isdisjoint(turn):
        strictness.check_fields(record, turn, turn.keys() - OTHER_DATA.keys(), "messages[].")
    role = _string(record, turn, "role", "messages", inside)
    if role not in ROLES:
        error = UserError(
            f"'{inside}role' = {shown(role)}",
            where=record.where,
            rule=f"a role of the messages format is one of {', '.join(sorted(ROLES))}",
            nearest=_nearest_role(role),
            advice=LENIENT,
        )
        strictness.wrong(error, "messages[].role", record.where)
    message = {
        name: value for name, value in turn.items() if value is not None and name not in WEIGHTS
    }
    return message | {"role": role} | _content(record, turn, role, inside, strictness)


def _nearest_role(role: str) -> str:
    name = SHAREGPT_ROLES.get(role.strip().lower())
    return f"did you mean `{name}`?" if name else did_you_mean(role.lower(), ROLES)


def _content(
    record: Record, turn: Turn, role: str, inside: str, strictness: Strictness
) -> dict[str, Any]:
    """The content of a message as one string, and its tool calls as templates expect them."""
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(record, part, inside) for part in content)
    elif content is None and role == "assistant" and any(map(turn.get, ASSISTANT_FIELDS)):
        content = ""
    elif not isinstance(content, str):
        raise _wrong_key(record, turn, "content", "messages", "a string", inside)
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


def _sharegpt(record: Record, strictness: Strictness) -> Conversation:
    strictness.check_fields(record, record.value, RECORD_FIELDS["sharegpt"])
    turns = _turns(record, "conversations", "sharegpt")
    messages = []
    for index, turn in enumerate(turns):
        inside = f"conversations[{index}]."
        strictness.check_fields(record, turn, TURN_FIELDS["sharegpt"], "conversations[].")
        speaker = _string(record, turn, "from", "sharegpt", inside)
        role = SHAREGPT_ROLES.get(speaker.lower())
        if role is None:
            raise UserError(
                f"has a turn from {shown(speaker)}",
                where=record.where,
                rule=f"a sharegpt turn is from one of {', '.join(SHAREGPT_ROLES)}",
                nearest=did_you_mean(speaker.lower(), SHAREGPT_ROLES),
                advice="Fix or remove the record",
            )
        content = _string(record, turn, "value", "sharegpt", inside)
        messages.append({"role": role, "content": content})
    return _conversation(
        record, messages, _weights(record, messages, turns, strictness), strictness
    )


_READERS: dict[str, Callable[[Record, Strictness], Conversation]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}


def _weights(
    record: Record, messages: list[Turn], turns: list[Turn], strictness: Strictness
) -> list[bool | None]:
    """For each turn, whether its weight makes it a target; None without a weight."""
    found = []
    for index, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        inside = f"turn {index + 1}: "
        is_target = strictness.is_target(record, turn, inside)
        if is_target and message["role"] != "assistant":
            error = UserError(
                f"{inside}a turn with the role {shown(message['role'])} has a weight of 1",
                where=record.where,
                rule="loss is computed on answers of the assistant only",
                advice=LENIENT,
            )
            strictness.wrong(error, "weight", record.where)
        found.append(is_target)
    return found


def _conversation(
    record: Record, messages: list[Turn], targets: list[bool | None], strictness: Strictness
) -> Conversation:
    """The conversation of turns, with the system prompt, tools and weight of the record."""
    default = strictness.is_target(record, record.value)
    system = _system(record, messages, strictness)
    if system:
        messages, targets = [{"role": "system", "content": system}, *messages], [None, *targets]
    return Conversation(
        where=record.where,
        messages=messages,
        tools=_tools(record, strictness),
        context_turns=frozenset(
            index
            for index, (message, weight) in enumerate(zip(messages, targets, strict=True))
            if message["role"] == "assistant" and (default if weight is None else weight) is False
        ),
    )


def _system(record: Record, messages: list[Turn], strictness: Strictness) -> str:
    """The system prompt of the record, where it is not among its turns already."""
    system = record.value.get("system")
    if is_absent(system):
        return ""
    if not isinstance(system, str):
        error = wrong_field(record.where, "system", system, "it must be a string")
        strictness.wrong(error, "system", record.where)
        return ""
    if wrong := lone_surrogate(system):
        raise surrogate_error(record.where, "system", wrong)
    turns = [turn["content"] for turn in messages if turn["role"] in ("system", "developer")]
    if not turns:
        return system
    if turns == [system]:
        return ""
    raise UserError(
        f"has two system prompts: 'system' = {shown(system)} and a turn {shown(turns[0])}",
        where=record.where,
        rule="a conversation has one system prompt",
        advice="Merge them, or remove one",
    )


def _turns(record: Record, key: str, form: str) -> list[Turn]:
    turns = record.value.get(key)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return turns
    raise _wrong_key(record, record.value, key, form, "a list of turns that is not empty")


def _string(
    record: Record,
    owner: Mapping[str, Any],
    key: str,
    form: str,
    inside: str = "",
    *,
    optional: bool = False,
) -> str:
    value = owner.get(key)
    if isinstance(value, str):
        if wrong := lone_surrogate(value):
            raise surrogate_error(record.where, f"{inside}{key}", wrong)
        return value
    if value is None and optional:
        return ""
    raise _wrong_key(record, owner, key, form, "a string", inside)


def _wrong_key(
    record: Record, owner: Mapping[str, Any], key: str, form: str, rule: str, inside: str = ""
) -> UserError:
    name = f"'{inside}{key}'"
    text = f"{name} = {shown(owner[key])}" if key in owner else f"{name} is missing"
    return UserError(
        text if len(text) < 80 else text[:77] + "...",
        where=record.where,
        rule=f"in the {form} format it must be {rule}",
        nearest=f"Keys found: {names_of(owner)}",
        advice=f"Fix the record, or set data_loader.format ({', '.join(FORMATS)})",
    )


def _tools(record: Record, strictness: Strictness) -> list[Any] | None:
    tools = record.value.get("tools")
    if isinstance(tools, str) and tools.strip():  # Parquet data sets often keep them as a string
        with suppress(NotJson):  # a wrong value, which the error below shows
            tools = parse(tools)
    if is_absent(tools.strip() if isinstance(tools, str) else tools):
        return None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        check_encodable(record, tools, "tools")
        return tools
    rule = "it must be a list of tools (objects), or JSON of one"
    error = wrong_field(record.where, "tools", record.value["tools"], rule)
    strictness.wrong(error, "tools", record.where)
    return None
