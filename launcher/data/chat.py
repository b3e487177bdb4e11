"""Conversations to tokens, with the tokens that are learnt marked.

Owns where an answer begins and ends in the text that a chat template makes. Invariants:

1. The tokens are those of the whole conversation, tokenised in one piece, as a model meets them.
2. A token is a target only if it holds a character of an assistant's answer or of the end-of-turn
   mark behind it; headers, questions and system prompts are context. A token across the beginning
   of an answer (` Yes` behind `ASSISTANT: `) belongs to the answer.
3. An answer that cannot be found for certain is an error, never a guess.

A template with `{% generation %}` blocks says itself what an answer is. For any other, the answer
that follows the turns `messages[:k]` is what the rendered conversation has after the rendered
`messages[:k]` with the generation prompt:

    render(messages[:k], with prompt)   <|user|>Why?<|assistant|>
    render(messages)                    <|user|>Why?<|assistant|>Because.<|end|> <|user|>...
                                                                 ^ answer     ^

Where a template renders the end of a conversation in another way (Phi-3 ends it with a token, gpt-oss
ends the last answer alone with `<|return|>`, Qwen3 keeps the last thought alone), the answer ends
before the text that stays when another answer is put in its place; its mark is the first special
token of that text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, count, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.conversations import Conversation
from launcher.data.records import MAX_PROBLEMS
from launcher.data.shown import check_shown
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.data.templates import ChatTemplate, ChatTemplates, Span
from launcher.data.tokens import backend_of, exact_offsets
from launcher.errors import Problem, UserError

_BATCH = 256
_TAIL = 8
"""Characters of a prompt that show whether a conversation ends in one."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenised conversation; `is_target` has a truth value a token."""

    tokens: list[int]
    is_target: npt.NDArray[np.bool_]


def tokenise_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    say: Callable[[str], None],
    strictness: Strictness | None = None,
    seq_length: int | None = None,
) -> Iterator[list[Sample]]:
    """The samples of conversations, in batches, in order.

    What of them is not learnt, in rows of `seq_length` tokens, is counted in the tally of
    `strictness`. Raises UserError where the chat template refuses a conversation, leaves out a turn
    or hides an answer.
    """
    strictness = strictness or Strictness(strict=True, tally=Tally())
    templates = ChatTemplates(tokenizer)
    if templates.is_default:
        say("the tokenizer has no chat template: a ChatML-like one is used")
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        rendered = _render(batch, templates, strictness)
        samples = _tokenise_with_spans(rendered, batch, tokenizer)
        for conversation, sample in zip(batch, samples, strict=True):
            _count(sample, conversation.where, strictness.tally, seq_length)
        yield samples


def _count(sample: Sample, where: str, tally: Tally, seq_length: int | None) -> None:
    """Count a sample of which nothing is learnt: its first token is never predicted, and its row
    predicts `seq_length` tokens."""
    if not sample.is_target[1:].any():
        tally.nothing_to_learn.add(where)
    elif seq_length is not None and not sample.is_target[1 : seq_length + 1].any():
        tally.answer_beyond_row.add(where)


def _render(
    batch: list[Conversation], templates: ChatTemplates, strictness: Strictness
) -> list[tuple[str, list[Span]]]:
    rendered = []
    problems: list[Problem] = []
    for conversation in batch:
        try:
            template = templates.of(conversation)
            text, spans = _with_spans(conversation, template)
            check_shown(conversation, template, text, strictness)
        except UserError as error:
            problems += (found for found in error.problems if found not in problems)
            if len(problems) >= MAX_PROBLEMS:
                break
        else:
            rendered.append((text, spans))
    if problems:
        raise UserError(problems)
    return rendered


def _with_spans(conversation: Conversation, template: ChatTemplate) -> tuple[str, list[Span]]:
    """The rendered conversation and the character spans of its learnt answers, with their marks."""
    if not template.marks_answers:
        return _with_found_spans(conversation, template)
    text, spans = template.render_marked(conversation, conversation.messages)
    if conversation.context_turns:
        turns = _turns_of_blocks(conversation, template, len(spans))
        spans = [
            span
            for span, turn in zip(spans, turns, strict=True)
            if turn not in conversation.context_turns
        ]
    return text, spans


def _turns_of_blocks(conversation: Conversation, template: ChatTemplate, blocks: int) -> list[int]:
    """The turn (index of `messages`) of each generation block: those that the turn adds."""
    turns: list[int] = []
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            _, spans = template.render_marked(conversation, conversation.messages[: index + 1])
            turns += [index] * (len(spans) - len(turns))
    if len(turns) != blocks:
        raise _hidden(conversation.where, max(conversation.context_turns))
    return turns


def _with_found_spans(conversation: Conversation, template: ChatTemplate) -> tuple[str, list[Span]]:
    messages = conversation.messages
    whole = template.render(conversation, messages)
    return whole, [
        _found_span(whole, conversation, template, index)
        for index, message in enumerate(messages)  # an answer before any question is context
        if message["role"] == "assistant" and index and index not in conversation.context_turns
    ]


def _found_span(whole: str, conversation: Conversation, template: ChatTemplate, index: int) -> Span:
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
        raise _hidden(conversation.where, index)
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
    shared = _shared(whole, prompt)
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


def _tokenise_with_spans(
    rendered: list[tuple[str, list[Span]]], conversations: list[Conversation], tokenizer: Any
) -> list[Sample]:
    texts = [text for text, _ in rendered]
    if not getattr(tokenizer, "is_fast", False):
        return [
            _by_prefixes(text, spans, conversation.where, tokenizer)
            for (text, spans), conversation in zip(rendered, conversations, strict=True)
        ]
    samples = []
    with exact_offsets(backend_of(tokenizer)) as backend:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    for encoding, (_, spans) in zip(encodings, rendered, strict=True):
        flat = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64)
        begins, ends = flat[0::2], flat[1::2]
        is_target = np.zeros(len(begins), dtype=bool)
        for start, end in spans:
            # A token of no characters (a prefix that the tokenizer adds) counts where it stands.
            is_target |= (begins < end) & ((ends > start) | (begins >= start))
        samples.append(Sample(tokens=encoding.ids, is_target=is_target))
    return samples


def _by_prefixes(text: str, spans: list[Span], where: str, tokenizer: Any) -> Sample:
    """For a tokenizer that does not say which characters a token stands for: the tokens of the text
    before a position are those of the whole text, up to a token that goes across the position."""

    def tokens_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    def length_of(part: list[int]) -> int:
        return len(tokenizer.decode(part, skip_special_tokens=False))

    def before(position: int) -> tuple[int, bool]:
        """Tokens that lie before a character, and whether one more goes across it."""
        alone = tokens_of(text[:position])
        shared = _shared(tokens, alone)
        if shared == len(alone):
            return shared, False
        length, count = length_of(alone), shared
        while count < len(tokens) and length_of(tokens[: count + 1]) <= length:
            count += 1
        return count, length_of(tokens[:count]) < length

    tokens = tokens_of(text)
    is_target = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        first, _ = before(start)
        last, is_across = before(end)
        is_target[first : last + is_across] = True
    return Sample(tokens=tokens, is_target=is_target)


def _shared(left: Any, right: Any) -> int:
    """Items at the beginning that two sequences have in common."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _hidden(where: str, index: int) -> UserError:
    return UserError(
        f"the answer in turn {index + 1} cannot be found in what the chat template makes of it",
        where=where,
        rule="only answers are learnt, so each must be a part of the rendered conversation",
        nearest="A template with {% generation %} blocks says itself where answers are",
        advice="Use a tokenizer with such a template",
    )
