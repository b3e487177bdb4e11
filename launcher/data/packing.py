"""Packing: how tokenized documents become rows of a fixed length.

Owns the cut of documents into rows, in two ways:

`StreamRows` (text, packed; conversations with `packing_strategy: concatenate`). The documents are
concatenated and cut every `seq_length` tokens, at the time a row is read. No token is lost: each is
an input once and, unless it begins a document or is context of a conversation, a target once, also
across the border of two rows. Rows without a target (a long question) are left out.

    tokens    a a a a E b b b E c c c c c E          E: the end token of a document
    row 0    [a a a a E b]         labels a a a E - b
    row 1    [b b E c c c]         labels b E - c c c      - : no target (-100)
    row 2    [c c E . . .]         labels c E - - - -      . : padding

`SampleRows` (conversations, and everything that is not packed). A row has complete samples: one
or, packed, as many as first-fit finds room for. A sample of n tokens takes n - 1 inputs, since its
last token is only predicted; a longer sample is cut at the end of the row, and counted. A sample
without a target in its row is dropped, and counted.

Invariants: labels are shifted (labels[t] is the token after input_ids[t]); a target never crosses a
document; packed rows number their documents from 0, and positions restart with each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from launcher.data.rows import NO_TARGET, Counts, Ints, Row
from launcher.data.store import TokenStore

PLAN_ARRAYS = ("row_starts", "samples", "target_counts", "token_counts")
"""The arrays of a RowPlan, in the order of its fields."""


class StreamRows:
    """The stream of all documents, cut every `seq_length` tokens on the fly."""

    kept_documents = None
    """No document is cut at the end of a row."""

    def __init__(self, store: TokenStore, seq_length: int, pad_token: int) -> None:
        self.documents, self._seq_length, self._pad_token = store, seq_length, pad_token
        tokens = len(store.tokens)
        count = max(0, -(-(tokens - 1) // seq_length))  # a last token alone predicts nothing
        self.token_counts = np.full(count, seq_length, dtype=np.int64)
        if count:
            self.token_counts[-1] = min(seq_length, tokens - (count - 1) * seq_length)
        self._pieces: Ints | None = None
        if store.is_target is None:
            lasts = store.starts[1:] - 1  # the last token of each document predicts nothing
            ends = np.bincount(lasts // seq_length, minlength=count)[:count]
            self.target_counts = self.token_counts - ends
        else:
            counts = self._masked_targets(store.starts, store.is_target, count)
            self._pieces = np.flatnonzero(counts)
            self.target_counts = counts[self._pieces]
            self.token_counts = self.token_counts[self._pieces]

    def _masked_targets(self, starts: Ints, is_target: npt.NDArray[np.uint8], count: int) -> Ints:
        """Targets of each of `count` pieces, which are among the tokens after its inputs."""
        if not count:
            return np.zeros(0, dtype=np.int64)
        length = self._seq_length
        counts = np.add.reduceat(is_target, np.arange(count) * length + 1, dtype=np.int64)
        begins = starts[1:-1]  # the first token of a document is no target
        lost = begins[is_target[begins] > 0]
        return counts - np.bincount((lost - 1) // length, minlength=count)[:count]

    def __len__(self) -> int:
        return len(self.token_counts)

    def counts(self, indices: Ints) -> Counts:
        return Counts(self.target_counts[indices], self.token_counts[indices])

    def row(self, index: int) -> Row:
        length = self._seq_length
        tokens, starts = self.documents.tokens, self.documents.starts
        begin = (index if self._pieces is None else int(self._pieces[index])) * length
        piece = tokens[begin : begin + length + 1].astype(np.int64)
        first, last = (
            np.searchsorted(starts, begin),
            np.searchsorted(starts, begin + length, "right"),
        )
        inside = starts[first:last]
        borders = inside - begin  # in the row, 0 to length; the end of the stream is one of them

        input_ids = np.full(length, self._pad_token, dtype=np.int64)
        input_ids[: len(piece)] = piece[:length]
        labels = np.full(length, NO_TARGET, dtype=np.int64)
        labels[: len(piece) - 1] = piece[1:]
        if self.documents.is_target is not None:
            is_target = self.documents.is_target[begin + 1 : begin + length + 1]
            labels[: len(is_target)][is_target == 0] = NO_TARGET
        labels[borders[borders > 0] - 1] = NO_TARGET
        begins = borders[(borders > 0) & (borders < length)]
        return Row(input_ids, labels, *positions_and_documents(begins, length))


class SampleRows:
    """Complete samples in rows, by a plan of `plan_rows`."""

    def __init__(
        self,
        store: TokenStore,
        plan: RowPlan,
        seq_length: int,
        pad_token: int,
        *,
        packed: bool,
    ) -> None:
        self.documents, self._plan, self._packed = store, plan, packed
        self._seq_length, self._pad_token = seq_length, pad_token
        self.target_counts = plan.target_counts
        self.token_counts = plan.token_counts

    @property
    def kept_documents(self) -> Ints:
        """The documents that are in rows, each from its beginning as far as it fits."""
        return self._plan.samples

    def __len__(self) -> int:
        return len(self.token_counts)

    def counts(self, indices: Ints) -> Counts:
        return Counts(self.target_counts[indices], self.token_counts[indices])

    def row(self, index: int) -> Row:
        length, store = self._seq_length, self.documents
        input_ids = np.full(length, self._pad_token, dtype=np.int64)
        labels = np.full(length, NO_TARGET, dtype=np.int64)
        begins = []
        used = 0
        for sample in self._plan.samples[
            self._plan.row_starts[index] : self._plan.row_starts[index + 1]
        ]:
            start, stop = int(store.starts[sample]), int(store.starts[sample + 1])
            count = min(stop - start - 1, length)
            input_ids[used : used + count] = store.tokens[start : start + count]
            targets = store.tokens[start + 1 : start + 1 + count].astype(np.int64)
            if store.is_target is not None:
                is_target = store.is_target[start + 1 : start + 1 + count]
                targets = np.where(is_target, targets, NO_TARGET)
            labels[used : used + count] = targets
            used += count
            begins.append(used)
        if not self._packed:
            return Row(input_ids, labels, None, None)
        borders = np.array([begin for begin in begins if begin < length], dtype=np.int64)
        return Row(input_ids, labels, *positions_and_documents(borders, length))


def positions_and_documents(begins: Ints, length: int) -> tuple[Ints, Ints]:
    """Positions and document indices of a row; all documents but the first begin at `begins`.

    Padding counts as one more document, so that no token attends to it.
    """
    steps = np.zeros(length, dtype=np.int64)
    steps[begins] = 1
    documents = np.cumsum(steps)
    first = np.concatenate([[0], begins])
    return np.arange(length, dtype=np.int64) - first[documents], documents


@dataclass(frozen=True)
class RowPlan:
    """The samples of each row of SampleRows, and how many were cut or dropped."""

    row_starts: Ints
    """[rows + 1]: offset of the first sample of each row in `samples`."""
    samples: Ints
    target_counts: Ints
    token_counts: Ints
    cut: int = 0
    """Samples that were longer than a row."""
    dropped: int = 0
    """Samples without a target in their row."""

    @classmethod
    def of_arrays(cls, arrays: Iterable[Ints]) -> RowPlan:
        """The plan whose PLAN_ARRAYS are these."""
        row_starts, samples, target_counts, token_counts = arrays
        return cls(row_starts, samples, target_counts, token_counts)


def plan_rows(store: TokenStore, seq_length: int, *, packed: bool) -> RowPlan:
    """Assign the samples of a store to rows: one per row, or first-fit in the order of samples."""
    inputs = np.minimum(store.lengths - 1, seq_length)
    targets = _target_counts(store, inputs)
    kept = np.flatnonzero(targets > 0)
    cut = int(np.count_nonzero(store.lengths[kept] - 1 > seq_length))
    row_of = _first_fit(inputs[kept], seq_length) if packed else np.arange(len(kept))
    by_row = np.argsort(row_of, kind="stable")
    rows = int(row_of.max()) + 1 if len(kept) else 0
    counts = np.bincount(row_of, minlength=rows)
    return RowPlan(
        row_starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        samples=kept[by_row].astype(np.int64),
        target_counts=_sums(row_of, targets[kept], rows),
        token_counts=_sums(row_of, inputs[kept], rows),
        cut=cut,
        dropped=len(inputs) - len(kept),
    )


def _sums(row_of: Ints, values: Ints, rows: int) -> Ints:
    sums = np.zeros(rows, dtype=np.int64)
    np.add.at(sums, row_of, values)
    return sums


def _target_counts(store: TokenStore, inputs: Ints) -> Ints:
    """Targets of each sample when its first `inputs` tokens are its inputs."""
    if store.is_target is None:
        return np.maximum(inputs, 0)
    counts = np.zeros(len(inputs), dtype=np.int64)
    some = np.flatnonzero(inputs > 0)
    if len(some) == 0:
        return counts
    begins = store.starts[some] + 1
    borders = np.stack([begins, begins + inputs[some]], axis=1).ravel()
    if borders[-1] == len(store.is_target):  # the last segment runs to the end by itself
        borders = borders[:-1]
    counts[some] = np.add.reduceat(store.is_target, borders, dtype=np.int64)[::2]
    return counts


def _first_fit(lengths: Ints, capacity: int) -> Ints:
    """The row of each sample: the first one with room for it, in the order of the samples.

    A binary tree over the rows has the largest room below each node, so that finding the first row
    with room takes log2(rows) steps (Johnson, "Near-optimal bin packing algorithms", 1973).
    """
    leaves = 1
    while leaves < max(1, len(lengths)):
        leaves *= 2
    room = [capacity] * (2 * leaves)
    row_of = np.zeros(len(lengths), dtype=np.int64)
    for sample, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        row_of[sample] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            largest = left if left >= right else right
            if room[node] == largest:
                break
            room[node] = largest
    return row_of
