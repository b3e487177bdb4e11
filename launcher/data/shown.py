"""What of a conversation its chat template leaves out of the text.

Owns the rule: a turn that does not reach the text is an error, a field that does not is counted. A
template is only asked by rendering again where its text alone does not answer, so that ordinary
conversations cost a search for their turns.
"""

from __future__ import annotations

from launcher.data.conversations import Conversation, Turn
from launcher.data.fields import METADATA
from launcher.data.records import shown
from launcher.data.strictness import Strictness, is_absent
from launcher.data.templates import ChatTemplate
from launcher.errors import UserError

_TAIL = 40
"""Characters. Many templates leave out the thoughts at the beginning of earlier answers."""
_SYSTEM = ("system", "developer")


def check_shown(
    conversation: Conversation, template: ChatTemplate, text: str, strictness: Strictness
) -> None:
    """Check what of a conversation `text` shows, which is its rendering by `template`.

    Raises UserError for a turn that is left out, unless `strictness` only counts it.
    """
    for index in _suspects(conversation.messages, text):
        if _is_left_out(conversation, template, text, index):
            _left_out(conversation, index, strictness)
    if conversation.tools or any(len(message) > 2 for message in conversation.messages):
        _check_fields(conversation, template, text, strictness)


def _suspects(messages: list[Turn], text: str) -> list[int]:
    """Turns whose content does not stand in the text, or not as often as it should."""
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
    """Whether another content of the turn `index` gives the same text."""
    messages = list(conversation.messages)
    message = messages[index]
    if (message["role"], "content") in template.shown:
        return False
    messages[index] = {**message, "content": message["content"] + " x"}
    if _renders_as(conversation, template, messages, text):
        return True
    if message["role"] not in (*_SYSTEM, "user"):  # of these a template may show some turns alone
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
        return False  # the template looks at what was changed


def _left_out(conversation: Conversation, index: int, strictness: Strictness) -> None:
    message = conversation.messages[index]
    role = message["role"]
    if message.get("tool_calls"):
        strictness.tally.hidden_fields.add("content beside tool_calls", conversation.where)
        return
    error = UserError(
        f"the chat template leaves out turn {index + 1} ({role}): {shown(message['content'])}",
        where=conversation.where,
        rule="every turn of a conversation must reach its text",
        nearest="The template has room for one system text" if role in _SYSTEM else "",
        advice="Repair the record, use a tokenizer whose template takes it, or pass over such "
        "turns with data_loader.strict_fields: False",
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
