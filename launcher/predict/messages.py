"""Conversations as prompts: from JSON to the turns that the chat template renders.

Owns which JSON values are a conversation, and which are a text. The turns themselves are read by
`launcher.data.conversations`, as in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.data.conversations import Conversation, conversations_of
from launcher.data.records import Record, kind_of
from launcher.data.strictness import Strictness, is_absent, names_of, surrogate_error
from launcher.errors import Problem, UserError, did_you_mean
from launcher.json_text import lone_surrogate

_FORMS = {"messages": "messages", "conversations": "sharegpt"}
"""Field with the turns to the format of the record."""
_BESIDE_TEXT = ("system", "tools")
"""Fields that make a conversation of a record with a text."""
_OTHER_NAMES = {
    **dict.fromkeys(("text", "input", "instruction", "question", "query", "content"), "prompt"),
    **dict.fromkeys(("chat", "dialog", "dialogue", "turns", "message"), "messages"),
}
"""What other programs call these fields."""
_EXAMPLE = 'Write {"messages": [{"role": "user", "content": "..."}]} or {"prompt": "..."}'


def is_message(value: Any) -> bool:
    """Whether a value is one message, and not a record."""
    return isinstance(value, dict) and "role" in value and "messages" not in value


def text_of(value: Any, where: str, strictness: Strictness) -> str | None:
    """The text of a JSON string, or of a record with `prompt`; None for other values."""
    if isinstance(value, str):
        return _encodable(value, where, "prompt")
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        return None
    if any(name in value for name in _FORMS):
        return None
    if any(not is_absent(value.get(name)) for name in _BESIDE_TEXT):
        return None
    strictness.check_fields(Record(where, value), value, {"prompt", *_BESIDE_TEXT})
    return _encodable(value["prompt"], where, "prompt")


def conversation_of(value: Any, where: str, strictness: Strictness) -> Conversation:
    """The conversation of a list of messages, or of a record with `messages`, `conversations` or
    `prompt`. Raises UserError with `where`."""
    record = _record(value, where)
    form = next(_FORMS[name] for name in _FORMS if name in record)
    is_prompt = isinstance(value, dict) and not any(name in value for name in _FORMS)
    try:
        (found,) = conversations_of([Record(where, record)], form, strictness)
    except UserError as error:
        renamed = is_prompt and "prompt" in value
        raise UserError(_of_prompt(problem, renamed) for problem in error.problems) from None
    return found


def _record(value: Any, where: str) -> dict[str, Any]:
    """The record with its turns under the name of a format."""
    if isinstance(value, list):
        return {"messages": value}
    if not isinstance(value, dict):
        raise UserError(
            f"is {kind_of(value)}",
            where=where,
            rule="a prompt is a string, a list of messages, or an object with one of them",
            advice=_EXAMPLE,
        )
    if any(name in value for name in _FORMS):
        return dict(value)
    if is_message(value):
        return {"messages": [value]}
    if "prompt" not in value:
        raise _without_prompt(value, where)
    others = {name: inner for name, inner in value.items() if name != "prompt"}
    prompt = value["prompt"]
    if not isinstance(prompt, str | list):
        raise UserError(
            f"`prompt` is {kind_of(prompt)}",
            where=where,
            rule="it is a string, or a list of messages",
            advice=_EXAMPLE,
        )
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return {"messages": prompt, **others}


def _without_prompt(value: Mapping[str, Any], where: str) -> UserError:
    names = (*_FORMS, "prompt")
    near = next((_OTHER_NAMES[name] for name in value if name in _OTHER_NAMES), "")
    hints = (did_you_mean(str(name), names) for name in value)
    return UserError(
        f"has the keys {names_of(value)}",
        where=where,
        rule="a record of prompts has `messages`, `conversations` or `prompt`",
        nearest=f"did you mean `{near}`?" if near else next(filter(None, hints), ""),
        advice=_EXAMPLE,
    )


def _encodable(text: str, where: str, name: str) -> str:
    if wrong := lone_surrogate(text):
        raise surrogate_error(where, name, wrong)
    return text


def _of_prompt(problem: Problem, renamed: bool) -> Problem:
    """A problem of a record of training as one of a prompt: predict has no data_loader. `renamed`:
    its turns are in the field `prompt`."""
    advice = "Fix the conversation" if "data_loader" in problem.advice else problem.advice
    what = problem.what.replace("'messages", "'prompt") if renamed else problem.what
    nearest = "" if renamed and problem.nearest.startswith("Keys found") else problem.nearest
    return replace(problem, what=what, nearest=nearest, advice=advice)
