"""Rows of preferences: two padded sequences that belong together.

    pair       chosen     p p p a a E . .     prompt p, answer a, end E, padding .
               rejected   p p p b E . . .
    judged     answer     p p p a a E . .     and whether it is a good one
               mismatch   p p p c c c E .     the same prompt with the answer of the sample before

The mismatch is what KTO estimates the divergence from the reference with (Ethayarajh et al., 2024,
section 4.1). Both sequences are in one row, so that they are in the same micro-batch on the same
rank. Invariants: a row has a target in each of its sequences (in a judged one: in its answer); a
sequence longer than a row is cut at its end; a row counts as one target, as the loss is a mean over
samples.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.packing import RowPlan
from launcher.data.rows import NO_TARGET, Counts, Ints, Row
from launcher.data.store import TokenStore

UNDESIRABLE = 2
"""In `TokenStore.is_target`: a target of an answer that was judged bad; 1 of any other."""


class PairRows:
    """Pairs: documents 2i and 2i + 1 of a store are the chosen and the rejected sequence of i."""

    def __init__(self, store: TokenStore, plan: RowPlan, seq_length: int, pad_token: int) -> None:
        self.documents, self._plan = store, plan
        self._length, self._pad_token = seq_length, pad_token

    @property
    def kept_documents(self) -> Ints:
        """The documents that are in rows, each from its beginning as far as it fits."""
        return (self._plan.samples[:, None] * 2 + np.arange(2)).reshape(-1)

    def __len__(self) -> int:
        return len(self._plan.samples)

    def counts(self, indices: Ints) -> Counts:
        """As those of `Rows`; a sample is one target."""
        return Counts(self._plan.target_counts[indices], self._plan.token_counts[indices])

    def row(self, index: int) -> Row:
        """input_ids and labels are int64 [2, seq_length]."""
        pair = int(self._plan.samples[index])
        both = [_document(self.documents, 2 * pair + number) for number in range(2)]
        return _row(both, self._length, self._pad_token, None)


class JudgedRows:
    """Judged answers, one document each, with the mismatch of each."""

    def __init__(self, store: TokenStore, plan: RowPlan, seq_length: int, pad_token: int) -> None:
        self.documents, self._plan = store, plan
        self._length, self._pad_token = seq_length, pad_token

    @property
    def kept_documents(self) -> Ints:
        """The documents that are in rows."""
        return self._plan.samples

    def __len__(self) -> int:
        return len(self._plan.samples)

    def counts(self, indices: Ints) -> Counts:
        """As those of `Rows`; a sample is one target."""
        return Counts(self._plan.target_counts[indices], self._plan.token_counts[indices])

    def row(self, index: int) -> Row:
        """input_ids and labels are int64 [2, seq_length]."""
        tokens, marks = _document(self.documents, int(self._plan.samples[index]))
        others, other_marks = _document(self.documents, int(self._plan.samples[index - 1]))
        prompt, answer = (1 + int(np.argmax(found[1:] > 0)) for found in (marks, other_marks))
        mismatch = np.concatenate([tokens[:prompt], others[answer:]])
        is_target = np.concatenate([np.zeros_like(marks[:prompt]), other_marks[answer:]])
        is_desirable = not bool((marks == UNDESIRABLE).any())
        both = [(tokens, marks), (mismatch, is_target)]
        return _row(both, self._length, self._pad_token, is_desirable)


def _document(store: TokenStore, index: int) -> tuple[Ints, npt.NDArray[np.uint8]]:
    assert store.is_target is not None
    span = slice(int(store.starts[index]), int(store.starts[index + 1]))
    return store.tokens[span].astype(np.int64), store.is_target[span]


def _row(
    sequences: list[tuple[Ints, npt.NDArray[np.uint8]]],
    length: int,
    pad_token: int,
    is_desirable: bool | None,
) -> Row:
    input_ids = np.full((len(sequences), length), pad_token, dtype=np.int64)
    labels = np.full((len(sequences), length), NO_TARGET, dtype=np.int64)
    for line, (tokens, is_target) in enumerate(sequences):
        count = min(len(tokens) - 1, length)
        input_ids[line, :count] = tokens[:count]
        labels[line, :count] = np.where(is_target[1 : count + 1], tokens[1 : count + 1], NO_TARGET)
    return Row(input_ids, labels, None, None, is_desirable)


def plan_pairs(store: TokenStore, seq_length: int) -> RowPlan:
    """One row for each pair with a target on both sides."""
    inputs = np.minimum(store.lengths - 1, seq_length)
    begins = _answer_begins(store)
    has_target = np.all(((begins >= 0) & (begins <= inputs)).reshape(-1, 2), axis=-1)
    is_cut = np.any((store.lengths - 1 > seq_length).reshape(-1, 2), axis=-1)
    return _plan(has_target, is_cut, inputs.reshape(-1, 2).sum(1)[has_target])


def plan_judged(store: TokenStore, seq_length: int) -> RowPlan:
    """One row for each answer with a target."""
    inputs = np.minimum(store.lengths - 1, seq_length)
    begins = _answer_begins(store)
    has_target = (begins >= 0) & (begins <= inputs)
    is_cut = store.lengths - 1 > seq_length
    kept = np.flatnonzero(has_target)
    answers = np.roll((store.lengths - begins)[kept], 1)
    mismatches = np.minimum(begins[kept] + answers - 1, seq_length)
    return _plan(has_target, is_cut, inputs[kept] + mismatches)


def _plan(is_kept: Any, is_cut: Any, tokens: Ints) -> RowPlan:
    """One row for each sample that is kept, given bool [samples]; `tokens` of each of these."""
    kept = np.flatnonzero(is_kept).astype(np.int64)
    return RowPlan(
        row_starts=np.arange(len(kept) + 1, dtype=np.int64),
        samples=kept,
        target_counts=np.ones(len(kept), dtype=np.int64),
        token_counts=tokens.astype(np.int64),
        cut=int(is_cut[kept].sum()),
        dropped=len(is_kept) - len(kept),
    )


def _answer_begins(store: TokenStore) -> Ints:
    """The index of the first target of each document that is predicted (the first token is not); -1
    without one."""
    assert store.is_target is not None
    begins = np.full(len(store.lengths), -1, dtype=np.int64)
    for index, (start, stop) in enumerate(pairwise(store.starts.tolist())):
        marks = store.is_target[start + 1 : stop] > 0
        if marks.any():
            begins[index] = 1 + int(marks.argmax())
    return begins
