"""Rows of plain token files, memory-mapped.

A stream is cut every `seq_length` tokens, with the token after each as its label, in the way of
`StreamRows` (launcher/data/packing.py); several files are one stream, in their order. A 2-D array
has a row each already.

`packed` keeps documents apart: one ends with the token `eod`, and with its file. Then the last
token of a document has no target, and positions begin again; otherwise every token predicts the
next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.packing import positions_and_documents
from launcher.data.rows import NO_TARGET, Counts, Ints, Row
from launcher.data.token_files.header import TokenFile

_READ_AT_ONCE = 1 << 24
PADDING = 0
"""The input of positions after the end of the stream; they have no target."""


class TokenFileRows:
    """The rows of some files of one shape."""

    kept_documents: Ints | None = None
    """All of them: rows are cut from a stream."""

    def __init__(
        self, files: Sequence[TokenFile], seq_length: int, *, packed: bool, eod: int | None
    ) -> None:
        """`files`: streams, or rows of seq_length or seq_length + 1 tokens."""
        self._arrays = [_mapped(file) for file in files]
        self._columns = files[0].columns
        self._length, self._packed, self._eod = seq_length, packed, eod
        self._ends = np.cumsum([file.count for file in files], dtype=np.int64)
        """Tokens up to the end of each file."""
        self.tokens = int(self._ends[-1])

    def __len__(self) -> int:
        if self._columns is not None:
            return self.tokens // self._columns
        return max(0, -(-(self.tokens - 1) // self._length))  # a last token predicts nothing

    def row(self, index: int) -> Row:
        length = self._length
        piece, borders = self._piece(index)
        inputs = np.full(length, PADDING, dtype=np.int64)
        inputs[: min(len(piece), length)] = piece[:length]
        labels = np.full(length, NO_TARGET, dtype=np.int64)
        labels[: len(piece) - 1] = piece[1:]
        if not self._packed:
            return Row(inputs, labels, None, None)
        labels[borders[borders > 0] - 1] = NO_TARGET
        begins = borders[(borders > 0) & (borders < length)]
        return Row(inputs, labels, *positions_and_documents(begins, length))

    def counts(self, indices: Ints) -> Counts:
        length = self._length
        sizes = np.minimum(self.tokens - indices * length, length + 1)
        if self._columns is not None:
            sizes = np.full(len(indices), self._columns, dtype=np.int64)
        targets = np.minimum(sizes - 1, length)
        if self._packed:
            for place, index in enumerate(indices.tolist()):
                piece, borders = self._piece(index)
                inside = (borders > 0) & (borders < len(piece))
                targets[place] -= np.count_nonzero(inside)
        return Counts(targets, np.minimum(sizes, length))

    @property
    def documents(self) -> TokenDocuments:
        """What rows are cut from: all tokens are read for the end tokens."""
        return TokenDocuments(self._read, self._document_ends())

    def _document_ends(self) -> Ints:
        if self._columns is not None:
            return np.arange(self._columns, self.tokens + 1, self._columns, dtype=np.int64)
        ends = [self._ends]
        if self._eod is not None:
            for begin in range(0, self.tokens, _READ_AT_ONCE):
                part = self._read(begin, min(begin + _READ_AT_ONCE, self.tokens))
                ends.append(np.flatnonzero(part == self._eod) + begin + 1)
        return np.unique(np.concatenate(ends))

    def _piece(self, index: int) -> tuple[Ints, Ints]:
        """The tokens of a row (int64, up to seq_length + 1) and, packed, where documents begin in
        them (0 to seq_length), the end of the stream being one of those places."""
        if self._columns is not None:
            begin, count = index * self._columns, self._columns
        else:
            begin, count = index * self._length, self._length + 1
        piece = self._read(begin, min(begin + count, self.tokens))
        if not self._packed:
            return piece, np.zeros(0, dtype=np.int64)
        marks = [np.zeros(0, dtype=np.int64)]
        if self._eod is not None:
            marks.append(np.flatnonzero(piece == self._eod) + 1)
        if self._columns is None:
            inside = (self._ends >= begin) & (self._ends <= begin + self._length)
            marks.append(self._ends[inside] - begin)
        borders = np.unique(np.concatenate(marks))
        return piece, borders[borders <= self._length]

    def _read(self, begin: int, stop: int) -> Ints:
        """Tokens of the joined files."""
        file = int(np.searchsorted(self._ends, begin, side="right"))
        parts = []
        while begin < stop:
            first = int(self._ends[file - 1]) if file else 0
            end = min(int(self._ends[file]), stop)
            parts.append(self._arrays[file][begin - first : end - first])
            begin, file = end, file + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


class TokenDocuments:
    """The documents of a stream, or the rows of an array, by where each ends."""

    def __init__(self, read: Callable[[int, int], Ints], ends: Ints) -> None:
        """`read`: tokens from one place to another."""
        self._read, self._ends = read, ends
        self.lengths: Ints = np.diff(ends, prepend=0)

    def document(self, index: int) -> Ints:
        """The tokens of a document."""
        end = int(self._ends[index])
        return self._read(end - int(self.lengths[index]), end)


def _mapped(file: TokenFile) -> npt.NDArray[Any]:
    """The tokens of a file, 1-D."""
    dtype = np.dtype(file.dtype).newbyteorder("<" if file.byte_order == "<" else ">")
    if file.count == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(file.path, dtype=dtype, mode="r", offset=file.begin, shape=(file.count,)).view(
        np.ndarray
    )
