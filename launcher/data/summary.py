"""A summary of a dataset: how many rows, tokens and documents, how long, how often the same.

Owns the definitions of these numbers. Nothing of a dataset is changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from xxhash import xxh3_64_intdigest

from launcher.data.rows import NO_TARGET, Ints, Row, RowDataset

ROWS_AT_ONCE = 1 << 16


class Documents(Protocol):
    """The documents behind rows, each an array of token ids."""

    @property
    def lengths(self) -> Ints: ...
    def document(self, index: int) -> Ints: ...


@runtime_checkable
class HasDocuments(Protocol):
    """Rows that know the documents they were made from."""

    @property
    def documents(self) -> Documents: ...
    @property
    def kept_documents(self) -> Ints | None:
        """Those that rows have, cut where they are longer than a row; None: all, uncut."""
        ...


class Losses(NamedTuple):
    """What no row has, of documents that were read."""

    cut: int = 0
    """Documents longer than a row, which end with it."""
    cut_tokens: int = 0
    left_out: int = 0
    """Documents that are in no row, as they would have no target there."""
    left_out_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Numbers of one dataset; those of documents are of the first `documents_read` of them."""

    rows: int
    seq_length: int
    sequences: int = 1
    """Sequences of a row."""
    tokens: int
    """Inputs of all rows, without padding."""
    targets: int
    lengths: Ints
    """Tokens of each document that was read, the end token included."""
    duplicates: int
    """Documents equal to an earlier one."""
    losses: Losses | None
    """None where the documents are known from their rows alone."""
    is_complete: bool
    """Whether all documents were read."""

    @property
    def padding(self) -> float:
        """Share of all positions."""
        return 1 - self.tokens / (self.rows * self.sequences * self.seq_length)


def summarize(dataset: RowDataset, most_documents: int) -> Summary:
    """The summary of a dataset, of at most `most_documents` documents (or rows of unknown ones)."""
    tokens = targets = 0
    for first in range(0, len(dataset), ROWS_AT_ONCE):
        indices = np.arange(first, min(first + ROWS_AT_ONCE, len(dataset)), dtype=np.int64)
        counts = dataset.counts(indices)
        tokens, targets = tokens + int(counts.tokens.sum()), targets + int(counts.targets.sum())
    rows = dataset.rows
    if isinstance(rows, HasDocuments):
        found = len(rows.documents.lengths)
        documents = (rows.documents.document(i) for i in range(min(found, most_documents)))
        is_complete = found <= most_documents
    else:
        read = min(len(dataset), most_documents)
        documents = (part for i in range(read) for part in documents_of(dataset.row(i)))
        is_complete = read == len(dataset)
    lengths, duplicates = _measure(documents)
    return Summary(
        rows=len(dataset), seq_length=dataset.seq_length, sequences=dataset.sequences,
        tokens=tokens, targets=targets,
        lengths=lengths, duplicates=duplicates, is_complete=is_complete,
        losses=_losses(rows.kept_documents, lengths, dataset.seq_length)
        if isinstance(rows, HasDocuments)
        else None,
    )  # fmt: skip


def _losses(kept: Ints | None, lengths: Ints, seq_length: int) -> Losses:
    if kept is None:
        return Losses()
    is_kept = np.zeros(len(lengths), dtype=bool)
    is_kept[kept[kept < len(lengths)]] = True
    beyond = np.maximum(lengths[is_kept] - 1 - seq_length, 0)  # the last token is only predicted
    others = lengths[~is_kept]
    return Losses(int(np.count_nonzero(beyond)), int(beyond.sum()), len(others), int(others.sum()))


def documents_of(row: Row) -> Iterator[Ints]:
    """The documents of a row, without padding: positions without a target at its end."""
    if row.labels.ndim == 2:
        for sequence in zip(row.input_ids, row.labels, strict=True):
            yield from documents_of(Row(*sequence, None, None))
        return
    targets = np.flatnonzero(row.labels != NO_TARGET)
    if not len(targets):
        return
    end = int(targets[-1]) + 1
    if row.document_ids is None:
        yield row.input_ids[:end]
        return
    borders = np.flatnonzero(np.diff(row.document_ids[:end])) + 1
    yield from np.split(row.input_ids[:end], borders)


def _measure(documents: Iterator[Ints]) -> tuple[Ints, int]:
    """Lengths of documents, and how many are equal to an earlier one."""
    lengths: list[int] = []
    seen: set[int] = set()
    for document in documents:
        lengths.append(len(document))
        seen.add(xxh3_64_intdigest(np.ascontiguousarray(document, dtype="<i8").tobytes()))
    return np.array(lengths, dtype=np.int64), len(lengths) - len(seen)
