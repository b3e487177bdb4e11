"""Conversations to tokens, with a mask of the tokens that count for the loss (the targets).

Owns which tokens are targets (`target_spans` finds the characters). Invariants:

1. The rendered conversation is tokenized in one piece, as in inference.
2. A token is a target only if it has a character of a learnt turn (by default an assistant's
   answer) or of the end-of-turn mark after it; headers and the other turns are context. A token
   across the beginning of an answer (` Yes` after `ASSISTANT: `) belongs to the answer, and is
   counted, since predict ends its prompt with another one.
3. An answer whose place is not certain is an error, never a guess.

`{% generation %}` blocks mark the answers of a template that has them. For any other template, the
answer to the turns `messages[:k]` is what follows the rendered `messages[:k]` with the generation
prompt:

    render(messages[:k], with prompt)   <|user|>Why?<|assistant|>
    render(messages)                    <|user|>Why?<|assistant|>Because.<|end|> <|user|>...
                                                                 ^ answer     ^
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.answers import common_prefix
from launcher.data.chat_rendering import ChatRenderer, ChatSettings
from launcher.data.conversations import Conversation
from launcher.data.records import MAX_PROBLEMS
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.data.target_spans import INSIDE_TOKEN, target_spans
from launcher.data.templates import Span
from launcher.data.tokens import backend_of, exact_offsets
from launcher.errors import Problem, UserError

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tokenized conversation; `is_target` has one value for each token."""

    tokens: list[int]
    is_target: npt.NDArray[np.bool_]


def tokenize_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Any,
    log: Callable[[str], None],
    strictness: Strictness | None = None,
    seq_length: int | None = None,
    settings: ChatSettings | None = None,
) -> Iterator[list[Sample]]:
    """The samples of conversations, in batches, in order.

    Samples without a target in a row of `seq_length` tokens are counted in the tally of
    `strictness`. Raises UserError where the chat template rejects a conversation or omits a turn,
    and where an answer cannot be found.
    """
    renderer = ChatRenderer(tokenizer, settings, strictness)
    if renderer.templates.is_default:
        log("the tokenizer has no chat template: using a ChatML-like one")
    iterator = iter(conversations)
    while batch := list(islice(iterator, _BATCH)):
        rendered = _render(batch, renderer)
        samples = _tokenize_with_spans(rendered, batch, tokenizer, renderer.strictness.tally)
        for conversation, sample in zip(batch, samples, strict=True):
            count_without_targets(sample, conversation.where, renderer.strictness.tally, seq_length)
        yield samples


def count_without_targets(sample: Sample, where: str, tally: Tally, seq_length: int | None) -> None:
    """Count a sample without targets: its first token is never predicted, and its row predicts
    `seq_length` tokens."""
    if not sample.is_target[1:].any():
        tally.without_target.add(where)
    elif seq_length is not None and not sample.is_target[1 : seq_length + 1].any():
        tally.answer_beyond_row.add(where)


def _render(batch: list[Conversation], renderer: ChatRenderer) -> list[tuple[str, list[Span]]]:
    rendered = []
    problems: list[Problem] = []
    for conversation in batch:
        try:
            text, spans = target_spans(renderer.row(conversation), renderer.strictness.tally)
        except UserError as error:
            problems += (found for found in error.problems if found not in problems)
            if len(problems) >= MAX_PROBLEMS:
                break
        else:
            rendered.append((text, spans))
    if problems:
        raise UserError(problems)
    return rendered


def _tokenize_with_spans(
    rendered: list[tuple[str, list[Span]]],
    conversations: list[Conversation],
    tokenizer: Any,
    tally: Tally,
) -> list[Sample]:
    texts = [text for text, _ in rendered]
    if not getattr(tokenizer, "is_fast", False):
        return [
            _by_prefixes(text, spans, conversation.where, tokenizer, tally)
            for (text, spans), conversation in zip(rendered, conversations, strict=True)
        ]
    samples = []
    with exact_offsets(backend_of(tokenizer)) as backend:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    for encoding, (_, spans), talk in zip(encodings, rendered, conversations, strict=True):
        flat = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64)
        begins, ends = flat[0::2], flat[1::2]
        is_target = np.zeros(len(begins), dtype=bool)
        for start, end in spans:
            # A token without characters (a prefix that the tokenizer adds) counts as nothing.
            is_target |= (begins < end) & ((ends > start) | (begins >= start))
            if ((begins < start) & (ends > start)).any():
                tally.other_context.add(INSIDE_TOKEN, talk.where)
        samples.append(Sample(tokens=encoding.ids, is_target=is_target))
    return samples


def _by_prefixes(text: str, spans: list[Span], where: str, tokenizer: Any, tally: Tally) -> Sample:
    """For a tokenizer without offsets: the tokens of the text before a position equal those of the
    full text, except for a token across the position."""

    def tokens_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    def length_of(part: list[int]) -> int:
        return len(tokenizer.decode(part, skip_special_tokens=False))

    def before(position: int) -> tuple[int, bool]:
        """The number of tokens before a character, and whether the next one is across it."""
        alone = tokens_of(text[:position])
        shared = common_prefix(tokens, alone)
        if shared == len(alone):
            return shared, False
        length, count = length_of(alone), shared
        while count < len(tokens) and length_of(tokens[: count + 1]) <= length:
            count += 1
        return count, length_of(tokens[:count]) < length

    tokens = tokens_of(text)
    is_target = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        first, is_inside = before(start)
        if is_inside:
            tally.other_context.add(INSIDE_TOKEN, where)
        last, is_across = before(end)
        is_target[first : last + is_across] = True
    return Sample(tokens=tokens, is_target=is_target)
