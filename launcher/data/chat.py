"""Conversations to tokens, with the tokens that are learnt marked.

Owns where an answer begins and ends in the text that a chat template makes. Invariants:

1. The tokens are those of the whole conversation, tokenised in one piece, as a model meets them.
2. A token is a target only if it belongs to an assistant's answer or to the end-of-turn mark behind
   it; headers, questions and system prompts are context.
3. An answer that cannot be found for certain is an error, never a guess.

A template with `{% generation %}` blocks says itself what an answer is. For any other, the answer
that follows the turns `messages[:k]` is what the rendered conversation has after the rendered
`messages[:k]` with the generation prompt:

    render(messages[:k], with prompt)   <|user|>Why?<|assistant|>
    render(messages)                    <|user|>Why?<|assistant|>Because.<|end|> <|user|>...
                                                                 ^ answer     ^
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.conversations import Conversation
from launcher.data.tokens import backend_of
from launcher.errors import UserError

DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}"
    "{{- (eos_token if eos_token else '<|im_end|>') + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""For a tokenizer without a template: ChatML, each turn ended by the tokenizer's own end token,
so that generation stops there."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BATCH = 256
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenised conversation; `is_target` has a truth value a token."""

    tokens: list[int]
    is_target: npt.NDArray[np.bool_]


def tokenise_conversations(
    conversations: Iterable[Conversation], tokenizer: Any, say: Callable[[str], None]
) -> Iterator[list[Sample]]:
    """The samples of conversations, in batches, in order.

    Raises UserError where the chat template refuses a conversation or hides its answers.
    """
    template = None
    if not getattr(tokenizer, "chat_template", None):
        template = DEFAULT_CHAT_TEMPLATE
        say("the tokenizer has no chat template: a ChatML-like one is used")
    marked = _GENERATION_BLOCK.search(template or str(tokenizer.chat_template)) is not None
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        if marked:
            yield [_by_generation_blocks(conversation, tokenizer) for conversation in batch]
        else:
            rendered = [_render_with_spans(talk, tokenizer, template) for talk in batch]
            yield _tokenise_with_spans(rendered, batch, tokenizer)


def _by_generation_blocks(conversation: Conversation, tokenizer: Any) -> Sample:
    try:
        encoded = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    except Exception as error:
        raise _refused(conversation, error) from error
    mask = np.array(encoded["assistant_masks"], dtype=bool)
    return Sample(tokens=list(encoded["input_ids"]), is_target=mask)


def _render_with_spans(
    conversation: Conversation, tokenizer: Any, template: str | None
) -> tuple[str, list[Span]]:
    """The rendered conversation and the character spans of its answers, with end-of-turn marks."""
    messages = conversation.messages

    def render(count: int, *, prompt: bool = False) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                messages[:count],
                tools=conversation.tools,
                chat_template=template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except Exception as error:
            raise _refused(conversation, error) from error
        return text

    whole = render(len(messages))
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue  # an answer before any question is context
        start = _start(whole, render(index, prompt=True), partial(render, index))
        end: int | None = len(whole)
        if start is not None and index + 1 < len(messages):
            end = _end(whole, start, render(index + 1), message["content"])
        if start is None or end is None:
            raise _hidden(conversation.where, index)
        spans.append((start, _without_space(whole, start, end, message["content"])))
    return whole, spans


def _start(whole: str, prompt: str, before: Callable[[], str]) -> int | None:
    """Where the answer begins that follows `prompt`; None where earlier turns were changed."""
    if whole.startswith(prompt):
        return len(prompt)
    # Some templates put more into the prompt than they keep in the past (an opened thought).
    shared = next(
        (i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b),
        min(len(whole), len(prompt)),
    )
    turns = before()
    return shared if whole.startswith(turns) and shared >= len(turns) else None


def _end(whole: str, start: int, until: str, content: Any) -> int | None:
    """Where the answer ends that begins at `start`; `until` is the rendering that ends with it."""
    if whole.startswith(until):
        return len(until)
    # Some templates render the last answer unlike the same answer in the past (whose thought goes).
    content = content.strip() if isinstance(content, str) else ""
    if not content or content not in until:
        return None
    mark = until[until.rindex(content) + len(content) :]
    position = whole.find(content, start)
    while position >= 0 and not whole.startswith(mark, position + len(content)):
        position = whole.find(content, position + 1)
    return position + len(content) + len(mark) if position >= 0 else None


def _without_space(whole: str, start: int, end: int, content: Any) -> int:
    """The end without the white space behind an end-of-turn mark: generation stops at the mark."""
    answer = whole[start:end].rstrip()
    if isinstance(content, str) and answer.endswith(content.rstrip()):
        return end  # there is no mark but the white space
    return start + len(answer)


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
    encodings = backend_of(tokenizer).encode_batch(texts, add_special_tokens=False)
    for encoding, (_, spans) in zip(encodings, rendered, strict=True):
        begins = np.array([begin for begin, _ in encoding.offsets], dtype=np.int64)
        is_target = np.zeros(len(begins), dtype=bool)
        for start, end in spans:
            is_target |= (begins >= start) & (begins < end)
        samples.append(Sample(tokens=encoding.ids, is_target=is_target))
    return samples


def _by_prefixes(text: str, spans: list[Span], where: str, tokenizer: Any) -> Sample:
    """For a tokenizer that does not say which characters a token stands for."""

    def tokens_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    tokens = tokens_of(text)
    is_target = np.zeros(len(tokens), dtype=bool)
    for index, (start, end) in enumerate(spans):
        before, until = tokens_of(text[:start]), tokens_of(text[:end])
        if tokens[: len(before)] != before or tokens[: len(until)] != until:
            raise _hidden(where, index)
        is_target[len(before) : len(until)] = True
    return Sample(tokens=tokens, is_target=is_target)


def _refused(conversation: Conversation, error: Exception) -> UserError:
    roles = ", ".join(str(message.get("role")) for message in conversation.messages)
    return UserError(
        f"the chat template refuses the conversation ({error})",
        where=conversation.where,
        rule="a conversation must have the turns that the tokenizer's chat template knows",
        nearest=f"Its turns: {roles}",
        advice="Repair the record, or use a tokenizer whose template takes it",
    )


def _hidden(where: str, index: int) -> UserError:
    return UserError(
        f"the answer in turn {index + 1} cannot be found in what the chat template makes of it",
        where=where,
        rule="only answers are learnt, so each must be a part of the rendered conversation",
        nearest="A template with {% generation %} blocks says itself where answers are",
        advice="Use a tokenizer with such a template",
    )
