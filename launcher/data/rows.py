"""Rows: what a model is trained on, whatever the files they come from.

Owns the interface between the sources of rows and everything after them (order, batches, loss).
Invariants: a dataset is equal on every rank; a row is a pure function of its index; labels are
shifted (labels[t] is the token after input_ids[t]).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_128

from launcher.errors import UserError

ENDLESS = 1 << 62
"""The length of rows that never end."""
NO_TARGET = -100
"""The label of a position without a target."""
COUNTED_AT_ONCE = 1 << 20
"""Rows whose counts are in memory at one time."""

Ints = npt.NDArray[np.int64]


class Row(NamedTuple):
    """One row: int64 arrays of seq_length; positions and documents are None where a row is one
    document. Of preferences: [2, seq_length], two sequences that belong together."""

    input_ids: Ints
    labels: Ints
    position_ids: Ints | None
    document_ids: Ints | None
    is_desirable: bool | None = None
    """Whether an answer was judged good; None where it was not judged."""


class Counts(NamedTuple):
    """Of some rows: int64 arrays with one entry for each."""

    targets: Ints
    """Labels other than NO_TARGET; of preferences: 1 for each sample."""
    tokens: Ints
    """Tokens without padding."""


class Rows(Protocol):
    """A source of rows."""

    def __len__(self) -> int: ...
    def row(self, index: int) -> Row: ...
    def counts(self, indices: Ints) -> Counts: ...


@runtime_checkable
class Streamed(Protocol):
    """What rows that are made while they are read can do, beside `Rows`."""

    def cursor(self, row: int) -> dict[str, Any]:
        """Where a resumed run that begins with `row` may start to read, as JSON values."""
        ...

    def seek(self, cursor: Mapping[str, Any] | None) -> None:
        """Learn the cursor in a checkpoint of the same data and order."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...


class RowSource(NamedTuple):
    """A dataset whose rows are a part of those of a mixture."""

    name: str
    dataset: RowDataset

    @property
    def rows(self) -> int:
        """How many they are."""
        return len(self.dataset)


@dataclass(frozen=True, kw_only=True)
class RowDataset:
    """The rows of a dataset."""

    rows: Rows
    seq_length: int
    packed: bool
    """Whether a row may have several documents."""
    content: str
    """Hash of what decides the rows, apart from the two fields above."""
    largest_token: int | None = None
    """The largest token id, which must be within the model's vocabulary. None: not known, each row
    is checked when it is read."""
    vocab_size: int | None = None
    """Tokens of the model's vocabulary; None: rows are not checked."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that decide the rows, beside the fields above, as JSON values: a resume names those
    that have changed."""
    name: str = "the dataset"
    """What error messages call it."""
    sequences: int = 1
    """Sequences of a row: two in data of preferences."""
    cached_in: str = ""
    """The folder of the data cache with its tokens; empty where they are read in place."""
    sources: tuple[RowSource, ...] = ()
    """Of a mixture: the datasets whose rows these are, one after another."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_endless(self) -> bool:
        """Whether its rows are those of the run, epoch after epoch: row n is sample n."""
        return len(self) == ENDLESS

    @property
    def stream(self) -> Streamed | None:
        """The rows where they are made while they are read."""
        return self.rows if isinstance(self.rows, Streamed) else None

    @property
    def fingerprint(self) -> str:
        """What a resumed run compares: the content, and how it is cut into rows."""
        return xxh3_128(f"{self.content}/{self.seq_length}/{self.packed}".encode()).hexdigest()

    def counts(self, indices: Ints) -> Counts:
        """Targets and tokens of the rows `indices` (int64 [n])."""
        return self.rows.counts(indices)

    @cached_property
    def _source_ends(self) -> Ints:
        return np.cumsum([source.rows for source in self.sources], dtype=np.int64)

    def source_of(self, indices: Ints) -> Ints:
        """The index in `sources` of the rows `indices` (int64 [n]); of a mixture only."""
        return np.searchsorted(self._source_ends, indices, "right").astype(np.int64)

    def total_targets(self) -> int:
        """Targets of all rows."""
        firsts = range(0, len(self), COUNTED_AT_ONCE)
        parts = (np.arange(first, min(first + COUNTED_AT_ONCE, len(self))) for first in firsts)
        return sum(int(self.counts(part).targets.sum()) for part in parts)

    def row(self, index: int) -> Row:
        """One row, 0 <= index < len. Raises UserError for a token outside the vocabulary."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = self.rows.row(index)
        if self.vocab_size is not None and self.largest_token is None:
            self._check_tokens(row, index, self.vocab_size)
        return row

    def _check_tokens(self, row: Row, index: int, vocab_size: int) -> None:
        tokens = row.input_ids
        targets = row.labels[row.labels != NO_TARGET]
        largest = max(int(tokens.max()), int(targets.max(initial=0)))
        smallest = min(int(tokens.min()), int(targets.min(initial=0)))
        if smallest < 0 or largest >= vocab_size:
            raise UserError(
                f"row {index} of {self.name} has token {smallest if smallest < 0 else largest}",
                rule=f"the vocabulary of the model has {vocab_size} tokens, numbered from 0",
                advice="Use data that was tokenized with the tokenizer of the model",
            )
