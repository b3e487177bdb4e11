"""Where a turn begins and ends in a rendered conversation.

Owns that search, for answers of templates without `{% generation %}` blocks and for turns of other
roles. The template is rendered again with other turns, and the results are compared; the text of a
turn is never searched for, since it may occur twice. What ends a turn is its end mark: a special
token behind it, or where the template writes none the one that begins the next turn.

Some templates render the end of a conversation differently (Phi-3 adds a token, gpt-oss ends only
the last answer with `<|return|>`, Qwen3 keeps only the last reasoning). There an answer ends before
the text that stays the same when its content is replaced; its end-of-turn mark is the first special
token of that text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any

from launcher.data.conversations import Conversation
from launcher.data.templates import THOUGHTS, ChatTemplate, Span
from launcher.errors import UserError

_TAIL = 8
"""Characters of a prompt that are compared with the end of a conversation."""


def answer_span(
    text: str, conversation: Conversation, template: ChatTemplate, index: int
) -> tuple[Span, bool]:
    """The span of the answer in turn `index` in the rendered conversation, and whether the text
    before it is what predict renders for the turns before it."""
    messages = conversation.messages

    def render(turns: int, *, prompt: bool = False) -> str:
        return template.render(conversation, messages[:turns], prompt=prompt)

    around = _Around(conversation, template, index)
    prompt = render(index, prompt=True)
    start = _start(text, prompt, partial(render, index))
    if start is None:
        start = _start_after_question(text, _Around(conversation, template, index - 1))
    end: int | None = len(text)
    if index + 1 < len(messages):
        end = _end(text, render(index + 1), around)
    elif (
        text.endswith(prompt[-_TAIL:])
        and render(index) == prompt
        and _always_prompts(prompt, around)
    ):
        end = _end_by_mark(text, around.after(len(messages)), around)
    if start is None or end is None or end < start:
        raise answer_not_found(conversation.where, index)
    end = _without_space(text, start, end, messages[index]["content"], around)
    end = _at_first_mark(text, start, end, around)
    return (start, _with_next_mark(text, start, end, template)), text.startswith(prompt)


def turn_span(text: str, conversation: Conversation, template: ChatTemplate, index: int) -> Span:
    """The span of the content of turn `index`, with the end mark where one follows it."""
    around = _Around(conversation, template, index)
    before, after = around.split(len(conversation.messages))
    start, end = len(before), len(text) - len(after)
    is_there = before or after
    if not is_there or not text.startswith(before) or not text.endswith(after) or end < start:
        raise turn_not_found(conversation, index)
    space = len(after) - len(after.lstrip())
    mark = mark_at(after, space, template)
    if not mark or not (text.rstrip().endswith(mark) or _is_end_mark(mark, around)):
        return start, end
    return start, end + space + len(mark)


def _is_end_mark(mark: str, around: _Around) -> bool:
    """Whether the special token behind a turn ends it, and does not begin an answer: the generation
    prompt then has another one behind it."""
    if mark == around.template.tokenizer.eos_token:
        return True
    prompt = around.split(around.index + 1, prompt=True)[1]
    rest = prompt.partition(mark)[2]
    return any(token in rest for token in around.template.special_tokens if token)


def block_span(text: str, span: Span, template: ChatTemplate) -> Span:
    """The span of a generation block without white space behind its end mark, and with the mark
    where the block ends before it: a model that never learns the mark never stops."""
    start, end = span
    if has_end_mark(text, span, template):
        return start, start + len(text[start:end].rstrip())
    return start, _with_next_mark(text, start, end, template)


def has_end_mark(text: str, span: Span, template: ChatTemplate) -> bool:
    """Whether the text of a span ends with a special token, apart from white space."""
    start, end = span
    end = start + len(text[start:end].rstrip())
    return start < end and any(
        text.endswith(token, 0, end) for token in template.special_tokens if token
    )


def _with_next_mark(text: str, start: int, end: int, template: ChatTemplate) -> int:
    """The end of an answer with the special token right behind it, where it has none of its own
    (GLM-4 ends an answer with the token that begins the next turn)."""
    if has_end_mark(text, (start, end), template):
        return end
    return end + len(mark_at(text, end, template))


def mark_at(text: str, place: int, template: ChatTemplate) -> str:
    """The longest special token at a place of the text; empty where there is none."""
    found = [token for token in template.special_tokens if token and text.startswith(token, place)]
    return max(found, key=len, default="")


@dataclass(frozen=True)
class _Around:
    """What a template writes around the content of turn `index`, found by rendering a unique probe
    in its place."""

    conversation: Conversation
    template: ChatTemplate
    index: int

    def split(self, turns: int, *, prompt: bool = False) -> tuple[str, str]:
        """The text before and after the content in the rendered `messages[:turns]`; two empty
        strings where the template omits it."""
        messages = list(self.conversation.messages[:turns])
        messages[self.index] = {**messages[self.index], "content": self.probe}
        text = self.template.render(self.conversation, messages, prompt=prompt)
        before, found, after = text.rpartition(self.probe)
        return (before, after) if found else ("", "")

    @cached_property
    def probe(self) -> str:
        """Digits that occur nowhere else, since no template changes digits."""
        texts = str(self.conversation.messages) + str(self.conversation.tools) + self.template.text
        return next(probe for probe in map(str, count(10**9 + 7)) if probe not in texts)

    def after(self, turns: int) -> str:
        """The text after the content in the rendered `messages[:turns]`."""
        return self.split(turns)[1]

    @cached_property
    def mark(self) -> str:
        """What the template writes after the turn where the conversation ends with it."""
        return self.after(self.index + 1)


def _start(text: str, prompt: str, before: Callable[[], str]) -> int | None:
    """Where the answer to `prompt` begins; None where earlier turns are rendered differently."""
    if text.startswith(prompt):
        return len(prompt)
    # Some templates put more into the prompt than they keep in earlier turns (`<think>`).
    shared = common_prefix(text, prompt)
    turns = before()
    return shared if text.startswith(turns) and shared >= len(turns) else None


def _start_after_question(text: str, question: _Around) -> int | None:
    """The same where later turns change how earlier ones are rendered (a system prompt that moves
    to the last question, a mark at the end of the conversation): the answer begins after what the
    prompt has after the last question."""
    prompt_end = question.split(question.index + 1, prompt=True)[1]
    after = question.split(len(question.conversation.messages))[1]
    if not prompt_end or not after.startswith(prompt_end) or not text.endswith(after):
        return None
    return len(text) - len(after) + len(prompt_end)


def _end(text: str, until: str, around: _Around) -> int | None:
    """Where the answer ends; `until` is the rendering that ends with it."""
    if text.startswith(until):
        return len(until)
    # Some templates render the last answer differently (earlier ones lose their reasoning), or end
    # the conversation with a mark of its own.
    after = around.after(len(around.conversation.messages))
    if not after or not text.endswith(after):
        return None
    if around.mark and after.startswith(around.mark):
        return len(text) - len(after) + len(around.mark)
    return _end_by_mark(text, after, around)


def _end_by_mark(text: str, after: str, around: _Around) -> int | None:
    """Where the answer followed by `after` ends: after the first special token there."""
    if not after or not text.endswith(after):
        return None
    places = [(after.find(token), token) for token in around.template.special_tokens]
    found = [(place, -len(token), token) for place, token in places if place >= 0]
    if not found:
        return None
    place, _, token = min(found)
    return len(text) - len(after) + place + len(token)


def _always_prompts(prompt: str, around: _Around) -> bool:
    """Whether a template that always adds a generation prompt adds one after the last answer too:
    it writes the same after answer and question, and the answer begins there."""
    question = _Around(around.conversation, around.template, around.index - 1)
    is_same = around.mark == question.mark != ""
    return is_same and around.split(len(around.conversation.messages))[0] == prompt


def _without_space(text: str, start: int, end: int, content: str, around: _Around) -> int:
    """The end without white space after an end-of-turn mark: generation stops at the mark."""
    answer = text[start:end].rstrip()
    if content.strip():
        is_marked = not answer.endswith(content.rstrip())
    else:
        is_marked = bool(answer and around.mark.strip())
    return start + len(answer) if is_marked else end  # else the white space is the mark


def _at_first_mark(text: str, start: int, end: int, around: _Around) -> int:
    """The end behind the first mark after the content that white space follows: what comes then (a
    token that ends the conversation, as in Phi-3) is written after generation has stopped."""
    marks = around.template.mark_before_space
    message = around.conversation.messages[around.index]
    if not marks.search(text, start, end) or message.keys() - {"role", "content", *THOUGHTS}:
        return end
    after = around.after(len(around.conversation.messages))
    if not after or not text.endswith(after):
        return end
    found = marks.search(text, max(start, len(text) - len(after)), end)
    return found.end(1) if found else end


def common_prefix(left: Any, right: Any) -> int:
    """Length of the common prefix of two sequences."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def turn_not_found(conversation: Conversation, index: int) -> UserError:
    """The error for a turn of another role that was not found in the rendered text."""
    role = conversation.messages[index]["role"]
    return UserError(
        f"turn {index + 1} ({role}) cannot be found in the rendered conversation",
        where=conversation.where,
        rule="loss is computed on the roles of data_loader.train_on_roles, so each of their turns "
        "must be a part of the rendered conversation",
        advice=f"Take {role} out of train_on_roles, or set `train: false` in the turn",
    )


def answer_not_found(where: str, index: int) -> UserError:
    """The error for an answer, `messages[index]`, that was not found in the rendered text."""
    return UserError(
        f"the answer in turn {index + 1} cannot be found in the rendered conversation",
        where=where,
        rule="loss is computed on answers, so each must be a part of the rendered conversation",
        nearest="{% generation %} blocks in a chat template mark answers",
        advice="Use a tokenizer with such a template",
    )
