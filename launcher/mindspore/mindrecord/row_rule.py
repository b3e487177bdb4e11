"""What becomes of a row: tokens, labels, mask, and the documents in it.

Owns the rules of MindFormers' causal language models, for a row of L tokens:

    columns                       tokens      labels          targets, if no loss_mask is given
    input_ids                     ids[:-1]    ids[1:]         where the token is not padding
    input_ids, labels unshifted   ids[:-1]    labels[1:]      and the label is not ignore_token_id
    input_ids, labels shifted     ids         labels          the same

A loss mask decides instead of the padding; it is cut as the tokens are. An ignored label is never a
target, with a loss mask either. With `eod_token` each token of this value ends a document:
documents are kept apart in attention and positions restart. The loss at their borders counts, as
there: the first token of a document is a target of the end of the one before.

Source: mindformers/models/llama/llama.py (construct), dataset/causal_language_model_dataset.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.packing import positions_and_documents
from launcher.data.rows import NO_TARGET, Ints, Row


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """How the columns of a row become tokens and labels."""

    seq_length: int
    shifted: bool
    """Whether labels[t] belongs to input_ids[t] already."""
    pad_token: int | None
    """Positions with this token are no targets."""
    fill_token: int = 0
    """What short rows are filled with: the padding, where the model has it."""
    ignore_token: int = NO_TARGET
    eod_token: int | None = None
    """What ends a document; None: a row is one document."""
    packed: bool = False
    """Whether rows have documents and positions, as packed rows of another source do."""

    @property
    def longest(self) -> int:
        """Tokens that a row may have in its file."""
        return self.seq_length + (not self.shifted)

    def cut(
        self, ids: Ints, labels: Ints | None, mask: npt.NDArray[Any] | None
    ) -> tuple[Ints, Ints]:
        """Tokens and labels of a row, not padded: int64 of one length."""
        if self.shifted and labels is not None:
            tokens, targets = ids, labels
        else:
            tokens, targets = ids[:-1], (ids if labels is None else labels)[1:]
            mask = None if mask is None else mask[:-1]
        counts = np.ones(len(tokens), dtype=np.bool_)
        if mask is not None:
            counts = mask != 0
        elif self.pad_token is not None:
            counts = tokens != self.pad_token
        if labels is not None:
            counts &= targets != self.ignore_token
            counts &= targets != NO_TARGET
        return tokens, targets if counts.all() else np.where(counts, targets, NO_TARGET)

    def tokens_of(self, tokens: Ints, labels: Ints) -> int:
        """Tokens without padding, of what `cut` returns."""
        if self.pad_token is None:
            return len(tokens)
        return int(np.count_nonzero((tokens != self.pad_token) | (labels != NO_TARGET)))

    def row(self, ids: Ints, labels: Ints | None, mask: npt.NDArray[Any] | None) -> Row:
        """The row of seq_length; what is shorter is padded at the end, without targets."""
        tokens, targets = self.cut(ids, labels, mask)
        used = len(tokens)
        input_ids = np.full(self.seq_length, self.fill_token, dtype=np.int64)
        row_labels = np.full(self.seq_length, NO_TARGET, dtype=np.int64)
        input_ids[:used], row_labels[:used] = tokens, targets
        if not self.packed:
            return Row(input_ids, row_labels, None, None)
        begins = np.zeros(0, dtype=np.int64)
        if self.eod_token is not None:
            begins = np.flatnonzero(tokens == self.eod_token) + 1
            begins = begins[begins < used]
        if used < self.seq_length:
            begins = np.append(begins, used)
        return Row(input_ids, row_labels, *positions_and_documents(begins, self.seq_length))


def is_shifted(rows: list[tuple[Ints, Ints]], ignore_token: int) -> bool | None:
    """Whether the labels of some rows (ids, labels) belong to the token before them.

    None where neither is so in all rows, or both are: the labels are other tokens, or all equal.
    """
    unshifted = shifted = True
    for ids, labels in rows:
        counts = (labels != ignore_token) & (labels != NO_TARGET)
        unshifted = unshifted and bool((labels == ids)[counts].all())
        shifted = shifted and bool((labels[:-1] == ids[1:])[counts[:-1]].all())
    return shifted if shifted != unshifted else None
