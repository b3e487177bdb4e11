"""PreferenceDataLoader and FeedbackDataLoader: pairs of answers, and answers that were judged.

A dialogue is rendered by the chat template of the tokenizer, as instruction data is. Plain text is
tokenized as it is, with the first token that the tokenizer adds to a text, and the end token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launcher.config.schema import DataLoaderSection
from launcher.data.chat import Sample, count_without_targets, tokenize_conversations
from launcher.data.conversations import Conversation
from launcher.data.files import DataFile
from launcher.data.loaders.base import DataLoader, Recipe, TokenBatch
from launcher.data.preference_rows import (
    UNDESIRABLE,
    JudgedRows,
    PairRows,
    plan_judged,
    plan_pairs,
)
from launcher.data.preferences import Answer, Judged, Pair, PlainText, judged_of, pairs_of
from launcher.data.record_files import find_record_files, records_of_file, records_of_files
from launcher.data.strictness import Strictness
from launcher.data.tally import Tally
from launcher.data.tokens import backend_of, exact_offsets

_BATCH = 128


def _strictness(section: DataLoaderSection, tally: Tally) -> Strictness:
    return Strictness(strict=section.strict_fields, tally=tally)


def _read_file(
    read: Any, path: Path, section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Any]:
    found: Iterator[Any] = read(
        records_of_file(path, section, cache_dir), section.format, _strictness(section, tally)
    )
    return found


def _read_files(
    read: Any, files: list[DataFile], section: DataLoaderSection, cache_dir: Path, tally: Tally
) -> Iterator[Any]:
    found: Iterator[Any] = read(
        records_of_files(files, section, cache_dir), section.format, _strictness(section, tally)
    )
    return found


def _tokenize_pairs(samples: Iterable[Pair], recipe: Recipe, tally: Tally) -> Iterator[TokenBatch]:
    iterator = iter(samples)
    while batch := list(islice(iterator, _BATCH)):
        answers = [answer for pair in batch for answer in (pair.chosen, pair.rejected)]
        found = _tokenize(answers, recipe, tally)
        kept: list[Sample] = []
        for pair, chosen, rejected in zip(batch, found[0::2], found[1::2], strict=True):
            if chosen.tokens == rejected.tokens:
                tally.equal_answers.add(pair.where)
            if chosen.tokens and rejected.tokens:  # a store drops what has no tokens
                kept += (chosen, rejected)
        if kept:
            yield TokenBatch([s.tokens for s in kept], [s.is_target for s in kept])


def _tokenize_judged(
    samples: Iterable[Judged], recipe: Recipe, tally: Tally
) -> Iterator[TokenBatch]:
    iterator = iter(samples)
    while batch := list(islice(iterator, _BATCH)):
        found = _tokenize([judged.answer for judged in batch], recipe, tally)
        kept = [(j, s) for j, s in zip(batch, found, strict=True) if s.tokens]
        if kept:
            marks = [1 if judged.is_desirable else UNDESIRABLE for judged, _ in kept]
            yield TokenBatch(
                [s.tokens for _, s in kept],
                [s.is_target.astype(np.uint8) * m for m, (_, s) in zip(marks, kept, strict=True)],
            )


def _tokenize(answers: Sequence[Answer], recipe: Recipe, tally: Tally) -> list[Sample]:
    """The tokens of each answer with its prompt; those of the answer alone are targets."""
    conversations = [answer for answer in answers if isinstance(answer, Conversation)]
    texts = [answer for answer in answers if isinstance(answer, PlainText)]
    strictness = _strictness(recipe.loader, tally)
    rendered = iter(
        sample
        for batch in tokenize_conversations(
            conversations, recipe.tokenizer, recipe.log, strictness, recipe.seq_length, recipe.chat
        )
        for sample in batch
    )
    plain = iter(_tokenize_texts(texts, recipe, tally) if texts else [])
    return [next(plain if isinstance(answer, PlainText) else rendered) for answer in answers]


def _tokenize_texts(texts: Sequence[PlainText], recipe: Recipe, tally: Tally) -> list[Sample]:
    recipe.log("note: prompts and answers that are plain text are used without a chat template")
    tokenizer = recipe.tokenizer
    first = _first_token(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    samples = []
    for text, (tokens, count) in zip(texts, _encode(texts, tokenizer), strict=True):
        more = end if tokens[-1:] != end else []
        is_target = np.ones(len(first) + len(tokens) + len(more), dtype=bool)
        is_target[: len(first) + count] = False
        sample = Sample(tokens=[*first, *tokens, *more], is_target=is_target)
        count_without_targets(sample, text.where, tally, recipe.seq_length)
        samples.append(sample)
    return samples


def _first_token(tokenizer: Any) -> list[int]:
    """The begin token, where the tokenizer adds one to a text."""
    added = list(tokenizer("a")["input_ids"])
    return added[:1] if added and added[0] == tokenizer.bos_token_id else []


def _encode(texts: Sequence[PlainText], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """The tokens of prompt and completion as one text, and how many of them are the prompt's; a
    token across the border belongs to the completion."""
    full = [text.prompt + text.completion for text in texts]
    if getattr(tokenizer, "is_fast", False):
        with exact_offsets(backend_of(tokenizer)) as backend:
            encodings = backend.encode_batch(full, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            ends = (end for _, end in encoding.offsets)
            yield encoding.ids, sum(end <= len(text.prompt) for end in ends)
        return
    for text, joined in zip(texts, full, strict=True):
        tokens = list(tokenizer(joined, add_special_tokens=False)["input_ids"])
        alone = list(tokenizer(text.prompt, add_special_tokens=False)["input_ids"])
        pairs = enumerate(zip(tokens, alone, strict=False))
        shared = min(len(tokens), len(alone))
        yield tokens, next((i for i, (a, b) in pairs if a != b), shared)


PREFERENCE_LOADER = DataLoader(
    find_files=find_record_files,
    read_file=partial(_read_file, pairs_of),
    read_files=partial(_read_files, pairs_of),
    tokenize=_tokenize_pairs,
    has_targets=True,
    unit="pairs",
    paths_key="dataset_files",
    plan=plan_pairs,
    rows=PairRows,
    sequences=2,
)
FEEDBACK_LOADER = DataLoader(
    find_files=find_record_files,
    read_file=partial(_read_file, judged_of),
    read_files=partial(_read_files, judged_of),
    tokenize=_tokenize_judged,
    has_targets=True,
    unit="answers",
    paths_key="dataset_files",
    plan=plan_judged,
    rows=JudgedRows,
    sequences=2,
)
