"""Rows back to text, in pieces that carry loss and pieces that do not.

Owns which token of a row is learnt: the one that a label names. The token after the last input of a
document is known by its label alone, and is shown too. Invariant: the pieces of a document joined
are the text of its tokens; a character of several tokens is never divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from launcher.data.answers import common_prefix
from launcher.data.rows import NO_TARGET, Ints, Row

MOST_PIECES = 40
"""Pieces of a document that are decoded; the rest of it is only counted."""


class Piece(NamedTuple):
    """Neighbouring tokens of a document that carry loss, or that do not."""

    text: str
    is_learnt: bool


class DecodedDocument(NamedTuple):
    """One document of a row."""

    pieces: list[Piece]
    tokens_left: int
    """Tokens behind the last piece."""
    has_context: bool
    """Whether a token beside the first one, which is never predicted, carries no loss."""


def sequences_of(row: Row, tokens: int) -> list[tuple[str, Row, int]]:
    """The sequences of a row, what each is called, and its inputs before padding: of most data one
    without a name, with `tokens` inputs; of preferences those that are compared."""
    if row.input_ids.ndim == 1:
        return [("", row, tokens)]
    names = ["chosen", "rejected"]
    if row.is_desirable is not None:  # the other one is made of other answers
        names = ["desirable" if row.is_desirable else "undesirable"]
    both = zip(names, row.input_ids, row.labels, strict=False)
    return [
        (name, Row(inputs, labels, None, None), _end_of_targets(labels))
        for name, inputs, labels in both
    ]


def _end_of_targets(labels: Ints) -> int:
    """The number of inputs up to the last target."""
    targets = np.flatnonzero(labels != NO_TARGET)
    return int(targets[-1]) + 1 if len(targets) else 0


def decoded_documents(row: Row, tokens: int, tokenizer: Any) -> Iterator[DecodedDocument]:
    """The documents of a sequence with `tokens` inputs before its padding (at least those up to the
    last target); the ids as text where `tokenizer` is None."""
    for ids, is_learnt in _documents(row, tokens):
        yield _decoded(ids, is_learnt, tokenizer)


def _documents(row: Row, tokens: int) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens of each document, and for each of them whether it carries loss."""
    end = max(tokens, _end_of_targets(row.labels))
    borders: Ints = np.array([], dtype=np.int64)
    if row.document_ids is not None:
        borders = np.flatnonzero(np.diff(row.document_ids[:end])) + 1
    for begin, stop in zip([0, *borders], [*borders, end], strict=True):
        labels = row.labels[begin:stop]
        ids = [*row.input_ids[begin:stop].tolist()]
        is_learnt = [False, *(labels[:-1] != NO_TARGET).tolist()][: len(ids)]
        if len(labels) and labels[-1] != NO_TARGET:
            ids.append(int(labels[-1]))
            is_learnt.append(True)
        if ids:
            yield ids, is_learnt


def _decoded(ids: list[int], is_learnt: list[bool], tokenizer: Any) -> DecodedDocument:
    runs = [(learnt, len(list(run))) for learnt, run in groupby(is_learnt)]
    has_context = not all(is_learnt[1:])
    shown = runs[:MOST_PIECES]
    count = sum(length for _, length in shown)
    texts = _texts(ids[:count], [length for _, length in shown], tokenizer)
    pieces = [Piece(text, learnt) for text, (learnt, _) in zip(texts, shown, strict=True)]
    return DecodedDocument(pieces, len(ids) - count, has_context)


def _texts(ids: list[int], lengths: list[int], tokenizer: Any) -> list[str]:
    """The text of each run of tokens. A run alone may decode to other text (a leading space, a part
    of a character), so the text of all of them is cut where that of the runs before ends."""
    if tokenizer is None:
        stops = np.cumsum(lengths)
        runs = zip([0, *stops[:-1]], stops, strict=True)
        return [" ".join(map(str, ids[begin:stop])) + " " for begin, stop in runs]
    complete = _decode(ids, tokenizer)
    places = [0]
    for stop in np.cumsum(lengths)[:-1]:
        shared = common_prefix(complete, _decode(ids[:stop], tokenizer))
        places.append(max(shared, places[-1]))
    return [
        complete[begin:end] for begin, end in zip(places, [*places[1:], len(complete)], strict=True)
    ]


def _decode(ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
