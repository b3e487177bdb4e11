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

from launcher.config.chat_template import RESERVED_ARGUMENTS
from launcher.data.fields import (
    OTHER_DATA,
    RECORD_FIELDS,
    ROLES,
    SHAREGPT_ROLES,
    TEMPLATE_KWARGS,
    TURN_FIELDS,
    WEIGHTS,
)
from launcher.data.learnt import ASSISTANT_ANSWERS, LearntTurns, marks_of
from launcher.data.message_fields import FORMATS, Turn, message_content, string_of, wrong_key
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

__all__ = ["FORMATS", "Conversation", "Turn", "conversations_of"]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation: turns with `role` and `content`, the input of chat templates."""

    where: str
    messages: list[Turn]
    tools: list[Any] | None = None
    """Its own tools; an empty list: none, whatever the configuration has."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    learnt_roles: frozenset[str] = ASSISTANT_ANSWERS.roles
    """Roles whose turns count for the loss."""
    context_turns: frozenset[int] = frozenset()
    """Turns of these roles (indices of `messages`) that do not count."""

    @property
    def learnt_turns(self) -> list[int]:
        """The turns that count for the loss."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] in self.learnt_roles and index not in self.context_turns
        ]


def conversations_of(
    records: Iterable[Record | UserError],
    given_format: str | None,
    strictness: Strictness,
    first_record: Record | None = None,
    learnt: LearntTurns = ASSISTANT_ANSWERS,
) -> Iterator[Conversation]:
    """The conversations of records, in the given format (of FORMATS) or that of the first record,
    `first_record` where it is not among them. Raises UserError for the first wrong records."""
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
        record = without_null(record)
        turns, marks = _READERS[form](record, strictness, learnt)
        return _conversation(record, turns, marks, strictness, learnt)

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


Marks = list[bool | None]
"""For each turn, whether its weight makes it count for the loss; None without a weight."""


def _alpaca(
    record: Record, strictness: Strictness, learnt: LearntTurns
) -> tuple[list[Turn], Marks]:
    strictness.check_fields(record, record.value, RECORD_FIELDS["alpaca"])
    question = [
        string_of(record, record.value, "instruction", "alpaca"),
        string_of(record, record.value, "input", "alpaca", optional=True),
    ]
    answer = string_of(record, record.value, "output", "alpaca")
    messages = [
        *_history(record, strictness),
        {"role": "user", "content": "\n\n".join(part for part in question if part)},
        {"role": "assistant", "content": answer},
    ]
    return messages, [None] * len(messages)


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


def _messages(
    record: Record, strictness: Strictness, learnt: LearntTurns
) -> tuple[list[Turn], Marks]:
    strictness.check_fields(record, record.value, RECORD_FIELDS["messages"])
    turns = _turns(record, "messages", "messages")
    messages = [_message(record, index, turn, strictness) for index, turn in enumerate(turns)]
    roles = [message["role"] for message in messages]
    return messages, marks_of(record, roles, turns, strictness, learnt)


def _message(record: Record, index: int, turn: Turn, strictness: Strictness) -> Turn:
    inside = f"messages[{index}]."
    # Other fields are passed to the template; `rendering_check` counts those it does not use.
    if not OTHER_DATA.keys().isdisjoint(turn):
        strictness.check_fields(record, turn, turn.keys() - OTHER_DATA.keys(), "messages[].")
    role = string_of(record, turn, "role", "messages", inside)
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
    return message | {"role": role} | message_content(record, turn, role, inside)


def _nearest_role(role: str) -> str:
    name = SHAREGPT_ROLES.get(role.strip().lower())
    return f"did you mean `{name}`?" if name else did_you_mean(role.lower(), ROLES)


def _sharegpt(
    record: Record, strictness: Strictness, learnt: LearntTurns
) -> tuple[list[Turn], Marks]:
    strictness.check_fields(record, record.value, RECORD_FIELDS["sharegpt"])
    turns = _turns(record, "conversations", "sharegpt")
    messages = []
    for index, turn in enumerate(turns):
        inside = f"conversations[{index}]."
        strictness.check_fields(record, turn, TURN_FIELDS["sharegpt"], "conversations[].")
        speaker = string_of(record, turn, "from", "sharegpt", inside)
        role = SHAREGPT_ROLES.get(speaker.lower())
        if role is None:
            raise UserError(
                f"has a turn from {shown(speaker)}",
                where=record.where,
                rule=f"a sharegpt turn is from one of {', '.join(SHAREGPT_ROLES)}",
                nearest=did_you_mean(speaker.lower(), SHAREGPT_ROLES),
                advice="Fix or remove the record",
            )
        content = string_of(record, turn, "value", "sharegpt", inside)
        messages.append({"role": role, "content": content})
    roles = [message["role"] for message in messages]
    return messages, marks_of(record, roles, turns, strictness, learnt)


_READERS: dict[str, Callable[[Record, Strictness, LearntTurns], tuple[list[Turn], Marks]]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
}


def _conversation(
    record: Record,
    messages: list[Turn],
    marks: Marks,
    strictness: Strictness,
    learnt: LearntTurns,
) -> Conversation:
    """The conversation of turns, with the system prompt, tools and weight of the record."""
    system = _system(record, messages, strictness)
    if system:
        messages, marks = [{"role": "system", "content": system}, *messages], [None, *marks]
    roles = [message["role"] for message in messages]
    return Conversation(
        where=record.where,
        messages=messages,
        tools=_tools(record, strictness),
        template_kwargs=_template_kwargs(record, strictness),
        learnt_roles=learnt.roles,
        context_turns=learnt.context(roles, marks, strictness.is_target(record, record.value)),
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
    raise wrong_key(record, record.value, key, form, "a list of turns that is not empty")


def _tools(record: Record, strictness: Strictness) -> list[Any] | None:
    """The tools of a record; an empty list: it has none; None: that is open."""
    tools = _parsed(record.value.get("tools"))
    if tools is None or tools == "":
        return None
    if isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools):
        check_encodable(record, tools, "tools")
        return tools
    rule = "it must be a list of tools (objects), or JSON of one"
    error = wrong_field(record.where, "tools", record.value["tools"], rule)
    strictness.wrong(error, "tools", record.where)
    return None


def _template_kwargs(record: Record, strictness: Strictness) -> dict[str, Any]:
    """The arguments of the chat template that a record has of its own."""
    value = _parsed(record.value.get(TEMPLATE_KWARGS))
    if is_absent(value):
        return {}
    name, rule = TEMPLATE_KWARGS, "it must be an object with arguments of the chat template"
    if isinstance(value, dict):
        check_encodable(record, value, name)
        given = {key: item for key, item in value.items() if item is not None}
        wrong = sorted(RESERVED_ARGUMENTS.intersection(given))
        if not wrong:
            return given
        name, value = f"{name}.{wrong[0]}", given[wrong[0]]
        rule = "this argument is set by the launcher"
    strictness.wrong(wrong_field(record.where, name, value, rule), name, record.where)
    return {}


def _parsed(value: Any) -> Any:
    """A value that Parquet data sets often keep as a string of JSON; one that is not JSON stays as
    it is."""
    if isinstance(value, str):
        with suppress(NotJson):
            return parse(value) if value.strip() else ""
    return value
