"""Checks which parts of a conversation its chat template leaves out of the rendered text.

Owns the rule: a turn that is left out is an error, a field that is left out is counted. Ordinary
conversations cost a text search for their turns; only where that is not enough is the template
rendered again with a part removed.
"""

from __future__ import annotations

from launcher.data.conversations import Conversation, Turn
from launcher.data.fields import METADATA
from launcher.data.records import shown
from launcher.data.strictness import Strictness, is_absent
from launcher.data.templates import ChatTemplate
from launcher.errors import UserError

_TAIL = 40
"""Characters. Many templates leave out the reasoning at the beginning of earlier answers."""
_SYSTEM = ("system", "developer")


def check_rendering(
    conversation: Conversation, template: ChatTemplate, text: str, strictness: Strictness
) -> None:
    """Check that `text`, the conversation rendered by `template`, has all turns and fields.

    Raises UserError for a turn that is left out, unless `strictness` only counts it.
    """
    for index in _suspects(conversation.messages, text):
        if _is_left_out(conversation, template, text, index):
            _left_out(conversation, index, strictness)
    if conversation.tools or any(len(message) > 2 for message in conversation.messages):
        _check_fields(conversation, template, text, strictness)


def _suspects(messages: list[Turn], text: str) -> list[int]:
    """Turns whose content is not found in the text, or not as often as it should be."""
    contents = [message["content"].strip() for message in messages]
    systems = sum(message["role"] in _SYSTEM for message in messages)
    found = []
    for index, (message, content) in enumerate(zip(messages, contents, strict=True)):
        role = message["role"]
        sought = content[-_TAIL:].lstrip() if role == "assistant" else content
        if content and (
            sought not in text
            or (systems > 1 and role in _SYSTEM)
            or (contents.count(content) > 1 and text.count(sought) < contents.count(content))
        ):
            found.append(index)
    return found


def _is_left_out(conversation: Conversation, template: ChatTemplate, text: str, index: int) -> bool:
    """Whether the text stays the same when the content of turn `index` changes."""
    messages = list(conversation.messages)
    message = messages[index]
    if (message["role"], "content") in template.shown:
        return False
    messages[index] = {**message, "content": message["content"] + " x"}
    if _renders_as(conversation, template, messages, text):
        return True
    if message["role"] not in (*_SYSTEM, "user"):  # a template may show only some of these
        template.shown.add((message["role"], "content"))
    return False


def _renders_as(
    conversation: Conversation,
    template: ChatTemplate,
    messages: list[Turn],
    text: str,
    *,
    with_tools: bool = True,
) -> bool:
    try:
        return template.render(conversation, messages, with_tools=with_tools) == text
    except UserError:
        return False  # the template depends on what was changed


def _left_out(conversation: Conversation, index: int, strictness: Strictness) -> None:
    message = conversation.messages[index]
    role = message["role"]
    if message.get("tool_calls"):
        strictness.tally.hidden_fields.add("content beside tool_calls", conversation.where)
        return
    error = UserError(
        f"the chat template leaves out turn {index + 1} ({role}): {shown(message['content'])}",
        where=conversation.where,
        rule="every turn of a conversation must be in its rendered text",
        nearest="The template has room for one system prompt" if role in _SYSTEM else "",
        advice="Fix the record, use a tokenizer whose template supports it, or ignore such turns "
        "with data_loader.strict_fields: False",
    )
    strictness.wrong(error, f"content of {role} turns", conversation.where)


def _check_fields(
    conversation: Conversation, template: ChatTemplate, text: str, strictness: Strictness
) -> None:
    messages = conversation.messages
    fields = {
        (message["role"], name)
        for message in messages
        for name, value in message.items()
        if name not in ("role", "content", *METADATA) and not is_absent(value)
    }
    for role, name in sorted(fields - template.shown):
        without = [
            {key: value for key, value in message.items() if key != name}
            if message["role"] == role
            else message
            for message in messages
        ]
        if _renders_as(conversation, template, without, text):
            strictness.tally.hidden_fields.add(f"messages[].{name}", conversation.where)
        else:
            template.shown.add((role, name))
    if conversation.tools and ("", "tools") not in template.shown:
        if _renders_as(conversation, template, messages, text, with_tools=False):
            strictness.tally.hidden_fields.add("tools", conversation.where)
        else:
            template.shown.add(("", "tools"))
