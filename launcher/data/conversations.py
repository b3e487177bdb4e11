"""Conversations for instruction tuning: the formats `alpaca`, `messages` and `sharegpt`.

Owns what a record of each format means as turns with `role` and `content`, the form that chat
templates take. Invariant: a record that does not fit its format is an error that names file and
line, never a guess; the format is what the user says, else what a file's first record looks like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.data.records import Record, read_records
from launcher.errors import UserError, did_you_mean

FORMATS = ("alpaca", "messages", "sharegpt")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation: `role` and `content` a turn, in the form that chat templates take."""

    where: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def conversations_of_file(
    path: Path, wanted: str | None, cache_dir: Path
) -> Iterator[Conversation]:
    """The conversations of one file, in the format `wanted` (of FORMATS) or the detected one."""
    if wanted is not None and wanted not in FORMATS:
        raise UserError(
            f"data_loader.format = {wanted!r}",
            rule=f"it must be one of {', '.join(FORMATS)}",
            nearest=did_you_mean(wanted, FORMATS),
            advice="Leave it out to have it detected",
        )
    form = wanted
    for record in read_records(path, cache_dir):
        form = form or _detect(record)
        yield _READERS[form](record)


def _detect(record: Record) -> str:
    keys = record.value
    if _has_turns(keys.get("messages"), "role"):
        return "messages"
    if _has_turns(keys.get("conversations"), "from"):
        return "sharegpt"
    if "instruction" in keys and "output" in keys:
        return "alpaca"
    raise UserError(
        f"has the keys {', '.join(keys) or 'none'}",
        where=record.where,
        rule="instruction data is alpaca (instruction, input, output), messages (messages: role, "
        "content) or sharegpt (conversations: from, value)",
        advice="Rename the keys; plain text is read by HFDataLoader",
    )


def _has_turns(value: Any, key: str) -> bool:
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]
    )


def _alpaca(record: Record) -> Conversation:
    instruction = _string(record, record.value, "instruction", "alpaca")
    more = _string(record, record.value, "input", "alpaca", optional=True)
    answer = _string(record, record.value, "output", "alpaca")
    system = _string(record, record.value, "system", "alpaca", optional=True)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction},
        {"role": "assistant", "content": answer},
    ]
    return Conversation(where=record.where, messages=messages)


def _messages(record: Record) -> Conversation:
    messages = []
    for turn in _turns(record, "messages", "messages"):
        role = _string(record, turn, "role", "messages")
        # Parquet gives every key that any turn of the file has, as null.
        message = {name: value for name, value in turn.items() if value is not None}
        messages.append({**message, "role": role, "content": message.get("content", "")})
    return Conversation(where=record.where, messages=messages, tools=_tools(record))


def _sharegpt(record: Record) -> Conversation:
    messages = []
    for turn in _turns(record, "conversations", "sharegpt"):
        speaker = _string(record, turn, "from", "sharegpt")
        role = _SHAREGPT_ROLES.get(speaker.lower())
        if role is None:
            raise UserError(
                f"has a turn from {speaker!r}",
                where=record.where,
                rule=f"a sharegpt turn is from one of {', '.join(_SHAREGPT_ROLES)}",
                nearest=did_you_mean(speaker.lower(), _SHAREGPT_ROLES),
                advice="Repair the record or take it out",
            )
        messages.append({"role": role, "content": _string(record, turn, "value", "sharegpt")})
    if record.value.get("system"):
        system = _string(record, record.value, "system", "sharegpt")
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(where=record.where, messages=messages, tools=_tools(record))


_READERS = {"alpaca": _alpaca, "messages": _messages, "sharegpt": _sharegpt}


def _turns(record: Record, key: str, form: str) -> list[dict[str, Any]]:
    turns = record.value.get(key)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        return turns
    raise _wrong_key(record, record.value, key, form, "a list of turns that is not empty")


def _string(
    record: Record, owner: Mapping[str, Any], key: str, form: str, *, optional: bool = False
) -> str:
    value = owner.get(key)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    raise _wrong_key(record, owner, key, form, "a string")


def _wrong_key(
    record: Record, owner: Mapping[str, Any], key: str, form: str, rule: str
) -> UserError:
    shown = f"{key!r} = {owner[key]!r}" if key in owner else f"{key!r} is missing"
    return UserError(
        shown if len(shown) < 80 else shown[:77] + "...",
        where=record.where,
        rule=f"in the {form} format it must be {rule}",
        nearest=f"Keys found: {', '.join(owner)}",
        advice=f"Repair the record, or set data_loader.format ({', '.join(FORMATS)})",
    )


def _tools(record: Record) -> list[Any] | None:
    tools = record.value.get("tools")
    if isinstance(tools, str) and tools.strip():
        with suppress(json.JSONDecodeError):  # Parquet data sets often keep them as a string
            tools = json.loads(tools)
    if not tools:
        return None
    if isinstance(tools, list):
        return tools
    raise _wrong_key(record, record.value, "tools", "messages", "a list of tools, or JSON of one")
