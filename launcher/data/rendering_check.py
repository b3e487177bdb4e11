"""Checks which parts of a conversation its chat template leaves out of the rendered text.

Owns the rule: a turn that is left out is an error, a field that is left out is counted. Ordinary
conversations cost a text search for their turns; only where that is not enough is the template
rendered again with a part removed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from launcher.data.conversations import Conversation, Turn
from launcher.data.fields import METADATA
from launcher.data.records import shown
from launcher.data.strictness import Strictness, is_absent
from launcher.data.templates import THOUGHTS, ChatTemplate
from launcher.errors import UserError

_TAIL = 40
"""Characters. Many templates leave out the reasoning at the beginning of earlier answers."""
_SYSTEM = ("system", "developer")


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A rendered conversation, and how it ends."""

    conversation: Conversation
    template: ChatTemplate
    text: str
    prompt: bool = False
    """With the generation prompt."""
    continues: bool = False
    """Within the last turn."""

    @property
    def messages(self) -> list[Turn]:
        """The turns of the conversation."""
        return self.conversation.messages

    def is_unchanged_by(self, messages: list[Turn], *, with_tools: bool = True) -> bool:
        """Whether other messages render as the same text."""
        try:
            found = self.template.render(
                self.conversation, messages, prompt=self.prompt, continues=self.continues,
                with_tools=with_tools,
            )  # fmt: skip
        except UserError:
            return False  # the template depends on what was changed
        return found == self.text


def check_rendering(rendering: Rendering, strictness: Strictness) -> None:
    """Check that a rendered conversation has all turns and fields.

    Raises UserError for a turn that is left out, unless `strictness` only counts it.
    """
    conversation = rendering.conversation
    for index in _suspects(conversation.messages, rendering.text):
        if _is_left_out(rendering, index):
            _left_out(conversation, index, strictness)
    _count_thoughts(rendering, strictness)
    if conversation.tools or any(len(message) > 2 for message in conversation.messages):
        _check_fields(rendering, strictness)


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


def _is_left_out(rendering: Rendering, index: int) -> bool:
    """Whether the text stays the same when the content of turn `index` changes."""
    messages, shown = list(rendering.messages), rendering.template.shown
    message = messages[index]
    if (message["role"], "content") in shown:
        return False
    messages[index] = {**message, "content": message["content"] + " x"}
    if rendering.is_unchanged_by(messages):
        return True
    if message["role"] not in (*_SYSTEM, "user"):  # a template may show only some of these
        shown.add((message["role"], "content"))
    return False


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


def _count_thoughts(rendering: Rendering, strictness: Strictness) -> None:
    """Count answers whose thoughts the template knows and leaves out, as many do in earlier turns;
    fields that it does not know at all are counted as fields."""
    thoughts = Counter(_thought(message, rendering.template) for message in rendering.messages)
    thoughts.pop("", None)
    dropped = sum(
        max(count - rendering.text.count(thought), 0) for thought, count in thoughts.items()
    )
    if dropped:
        strictness.tally.dropped_thoughts.add(rendering.conversation.where)
        strictness.tally.dropped_thoughts_turns += dropped


def _thought(message: Turn, template: ChatTemplate) -> str:
    """The thoughts before an answer: a field, or the text before `</think>`."""
    if message["role"] != "assistant":
        return ""
    if template.thoughts_name and len(message) > 2:
        given = next((message[name] for name in THOUGHTS if message.get(name)), "")
        if isinstance(given, str) and given.strip():
            return given.strip()
    before, mark, _ = message["content"].partition("</think>")
    return before.rpartition("<think>")[2].strip() if mark else ""


def _check_fields(rendering: Rendering, strictness: Strictness) -> None:
    conversation, messages = rendering.conversation, rendering.messages
    known = rendering.template.shown
    fields = {
        (message["role"], name)
        for message in messages
        for name, value in message.items()
        if name not in ("role", "content", *METADATA) and not is_absent(value)
    }
    if rendering.template.thoughts_name:  # counted by turn
        fields = {(role, name) for role, name in fields if name not in THOUGHTS}
    for role, name in sorted(fields - known):
        without = [
            {key: value for key, value in message.items() if key != name}
            if message["role"] == role
            else message
            for message in messages
        ]
        if rendering.is_unchanged_by(without):
            strictness.tally.hidden_fields.add(f"messages[].{name}", conversation.where)
        else:
            known.add((role, name))
    if conversation.tools and ("", "tools") not in known:
        if rendering.is_unchanged_by(messages, with_tools=False):
            strictness.tally.hidden_fields.add("tools", conversation.where)
        else:
            known.add(("", "tools"))
