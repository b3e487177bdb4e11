"""Where an answer begins and ends in the text that a chat template makes of a conversation.

Owns that search, for templates without `{% generation %}` blocks. A template is asked again with
other turns; nothing is searched for that may stand in the text twice.

Where a template renders the end of a conversation in another way (Phi-3 ends it with a token,
gpt-oss ends the last answer alone with `<|return|>`, Qwen3 keeps the last thought alone), an answer
ends before the text that stays when another answer is put in its place; its mark is the first
special token of that text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any

from launcher.data.conversations import Conversation
from launcher.data.templates import ChatTemplate, Span
from launcher.errors import UserError

_TAIL = 8
"""Characters of a prompt that show whether a conversation ends in one."""


def found_span(whole: str, conversation: Conversation, template: ChatTemplate, index: int) -> Span:
    """The span of the answer in turn `index` in the rendered conversation."""
    messages = conversation.messages

    def render(turns: int, *, prompt: bool = False) -> str:
        return template.render(conversation, messages[:turns], prompt=prompt)

    around = _Around(conversation, template, index)
    prompt = render(index, prompt=True)
    start = _start(whole, prompt, partial(render, index))
    if start is None:
        start = _start_behind_question(whole, _Around(conversation, template, index - 1))
    end: int | None = len(whole)
    if index + 1 < len(messages):
        end = _end(whole, render(index + 1), around)
    elif (
        whole.endswith(prompt[-_TAIL:]) and render(index) == prompt and _asks_again(prompt, around)
    ):
        end = _end_by_mark(whole, around.behind(len(messages)), around)
    if start is None or end is None or end < start:
        raise hidden_answer(conversation.where, index)
    return start, _without_space(whole, start, end, messages[index]["content"], around)


@dataclass(frozen=True)
class _Around:
    """What a template writes around the content of turn `index`: it is asked with another content
    there, whose text is known and stands nowhere else."""

    conversation: Conversation
    template: ChatTemplate
    index: int

    def split(self, turns: int, *, prompt: bool = False) -> tuple[str, str]:
        """The text before and behind the content in the rendered `messages[:turns]`; two empty
        texts where the template leaves it out."""
        messages = list(self.conversation.messages[:turns])
        messages[self.index] = {**messages[self.index], "content": self.probe}
        text = self.template.render(self.conversation, messages, prompt=prompt)
        before, found, behind = text.rpartition(self.probe)
        return (before, behind) if found else ("", "")

    @cached_property
    def probe(self) -> str:
        """A content that stands nowhere else: digits, which no template changes."""
        texts = str(self.conversation.messages) + str(self.conversation.tools) + self.template.text
        return next(probe for probe in map(str, count(10**9 + 7)) if probe not in texts)

    def behind(self, turns: int) -> str:
        """The text behind the content in the rendered `messages[:turns]`."""
        return self.split(turns)[1]

    @cached_property
    def mark(self) -> str:
        """What the template writes behind the turn where the conversation ends with it."""
        return self.behind(self.index + 1)


def _start(whole: str, prompt: str, before: Callable[[], str]) -> int | None:
    """Where the answer begins that follows `prompt`; None where earlier turns were changed."""
    if whole.startswith(prompt):
        return len(prompt)
    # Some templates put more into the prompt than they keep in the past (an opened thought).
    shared = shared_items(whole, prompt)
    turns = before()
    return shared if whole.startswith(turns) and shared >= len(turns) else None


def _start_behind_question(whole: str, question: _Around) -> int | None:
    """The same where earlier turns are rendered in another way once more turns follow (a system
    text that moves to the last question, an end mark of the conversation): the answer begins behind
    what the prompt has behind the last question."""
    asked = question.split(question.index + 1, prompt=True)[1]
    behind = question.split(len(question.conversation.messages))[1]
    if not asked or not behind.startswith(asked) or not whole.endswith(behind):
        return None
    return len(whole) - len(behind) + len(asked)


def _end(whole: str, until: str, around: _Around) -> int | None:
    """Where the answer ends; `until` is the rendering that ends with it."""
    if whole.startswith(until):
        return len(until)
    # Some templates render the last answer unlike the same answer in the past (whose thought goes),
    # or end the conversation with a mark of its own.
    behind = around.behind(len(around.conversation.messages))
    if not behind or not whole.endswith(behind):
        return None
    if around.mark and behind.startswith(around.mark):
        return len(whole) - len(behind) + len(around.mark)
    return _end_by_mark(whole, behind, around)


def _end_by_mark(whole: str, behind: str, around: _Around) -> int | None:
    """Where the answer ends that has `behind` behind it, by the first special token there."""
    if not behind or not whole.endswith(behind):
        return None
    places = [(behind.find(token), token) for token in around.template.special_tokens]
    found = [(place, -len(token), token) for place, token in places if place >= 0]
    if not found:
        return None
    place, _, token = min(found)
    return len(whole) - len(behind) + place + len(token)


def _asks_again(prompt: str, around: _Around) -> bool:
    """Whether a template that always asks for an answer does so behind the last one too: it has the
    same behind answer and question, and the answer begins there."""
    question = _Around(around.conversation, around.template, around.index - 1)
    is_same = around.mark == question.mark != ""
    return is_same and around.split(len(around.conversation.messages))[0] == prompt


def _without_space(whole: str, start: int, end: int, content: str, around: _Around) -> int:
    """The end without the white space behind an end-of-turn mark: generation stops at the mark."""
    answer = whole[start:end].rstrip()
    if content.strip():
        is_marked = not answer.endswith(content.rstrip())
    else:
        is_marked = bool(answer and around.mark.strip())
    return start + len(answer) if is_marked else end  # else there is no mark but the white space


def shared_items(left: Any, right: Any) -> int:
    """Items at the beginning that two sequences have in common."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def hidden_answer(where: str, index: int) -> UserError:
    """The error for the answer in turn `index` (of messages) that no span is known of."""
    return UserError(
        f"the answer in turn {index + 1} cannot be found in what the chat template makes of it",
        where=where,
        rule="only answers are learnt, so each must be a part of the rendered conversation",
        nearest="A template with {% generation %} blocks says itself where answers are",
        advice="Use a tokenizer with such a template",
    )
