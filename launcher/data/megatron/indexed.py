"""A Megatron dataset in memory maps: its sequences, documents and tokens.

Invariants: nothing is copied but what is asked for; after `check` every sequence lies inside the
`.bin` file, so that no later read can fail. The layout of the files is in `header.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.megatron.header import (
    FLOATS,
    HEADER,
    IndexHeader,
    damaged,
    index_path,
    read_header,
    tokens_path,
)

CHECKED_AT_ONCE = 1 << 16
"""Sequences that are checked at one time: arrays that the processor caches."""


@dataclass(frozen=True, kw_only=True)
class IndexedDataset:
    """One dataset; the arrays are read-only memory maps."""

    prefix: Path
    header: IndexHeader
    lengths: npt.NDArray[np.int32]
    """[sequences]: tokens of each."""
    offsets: npt.NDArray[np.int64]
    """[sequences]: byte of its first token in the `.bin` file."""
    borders: npt.NDArray[np.int64]
    """[documents + 1]: document d is the sequences borders[d] to borders[d + 1] - 1."""
    modes: npt.NDArray[np.int8] | None
    """[sequences]: in multimodal datasets."""
    tokens: npt.NDArray[Any]
    """The `.bin` file as tokens."""

    def __len__(self) -> int:
        """The number of sequences."""
        return len(self.lengths)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.borders) - 1

    def sequence(self, index: int, begin: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Tokens of sequence `index`, of the type of the file; `count` of them from `begin`."""
        length = int(self.lengths[index])
        stop = length if count is None else min(begin + count, length)
        first = int(self.offsets[index]) // self.header.token_bytes
        return self.tokens[first + begin : first + max(begin, stop)]

    def document(self, index: int) -> npt.NDArray[Any]:
        """The tokens of all sequences of document `index`."""
        parts = [self.sequence(i) for i in range(*map(int, self.borders[index : index + 2]))]
        return np.concatenate(parts) if parts else self.tokens[:0]

    def check(self) -> None:
        """Check lengths, offsets and borders. Raises UserError with the file and the byte."""
        header = self.header
        # Reading costs less than touching every page of a map once.
        with index_path(self.prefix).open("rb", buffering=0) as file:
            for begin in range(0, len(self), CHECKED_AT_ONCE):
                count = min(CHECKED_AT_ONCE, len(self) - begin)
                lengths = _numbers(file, HEADER.size + 4 * begin, "<i4", count)
                offsets = _numbers(file, header.offsets_at + 8 * begin, "<i8", count)
                self._check_sequences(lengths, offsets, begin)
            self._check_borders(file)

    def _check_sequences(
        self, lengths: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], begin: int
    ) -> None:
        """Check some sequences, of which the first is number `begin`."""
        index, size = index_path(self.prefix), self.header.token_bytes
        limit = len(self.tokens) * size
        if (bad := _first(lengths < 0)) is not None:
            raise damaged(index, HEADER.size + 4 * (begin + bad),
                          f"sequence {begin + bad} has {lengths[bad]} tokens",
                          "a length is at least 0")  # fmt: skip
        # The bits of all offsets together: negative if one is, and a multiple of `size` if all are.
        bits = int(np.bitwise_or.reduce(offsets))
        largest = limit - lengths * np.int64(size)
        if bits >= 0 and bits % size == 0 and bool((offsets <= largest).all()):
            return
        bad = _first((offsets < 0) | (offsets % size != 0) | (offsets > largest)) or 0
        raise damaged(index, self.header.offsets_at + 8 * (begin + bad),
                      f"sequence {begin + bad} is {lengths[bad]} tokens from byte {offsets[bad]}",
                      f"{tokens_path(self.prefix)} has {limit} bytes, {size} for a token",
                      )  # fmt: skip

    def _check_borders(self, file: RawIOBase) -> None:
        at, index = self.header.borders_at, index_path(self.prefix)
        for place, expected in ((0, 0), (self.documents, len(self))):
            if self.borders[place] != expected:
                raise damaged(index, at + 8 * place, f"document border {self.borders[place]}",
                              f"it must be {expected}")  # fmt: skip
        for begin in range(0, self.documents, CHECKED_AT_ONCE):
            count = min(CHECKED_AT_ONCE + 1, self.documents + 1 - begin)
            part = _numbers(file, at + 8 * begin, "<i8", count)
            if (bad := _first(part[1:] < part[:-1])) is not None:
                raise damaged(index, at + 8 * (begin + bad + 1),
                              f"document border {part[bad + 1]} after {part[bad]}",
                              "borders never decrease")  # fmt: skip


def _numbers(file: RawIOBase, begin: int, dtype: str, count: int) -> npt.NDArray[Any]:
    """Some numbers of a file from byte `begin`."""
    found = np.empty(count, dtype=dtype)
    file.seek(begin)
    if file.readinto(found.data) != found.nbytes:
        raise OSError(f"the index became shorter while it was read, at byte {begin}")
    return found


def _first(mask: npt.NDArray[np.bool_]) -> int | None:
    """The first place where a mask is true."""
    place = int(mask.argmax()) if mask.size else 0
    return place if mask.size and mask[place] else None


def open_indexed(prefix: str | Path, *, check: bool = True) -> IndexedDataset:
    """Map the dataset `prefix` (its path without extension).

    `check`: read the index once and check all of it, which takes about a second for 10^8 sequences.
    Raises UserError for files that are missing or damaged, or whose values are no token ids.
    """
    header = read_header(prefix)
    index, data = index_path(prefix), tokens_path(prefix)
    if header.code in FLOATS:
        raise damaged(index, 17, f"type of tokens {header.dtype}", "token ids are integers")
    raw = np.memmap(index, dtype=np.uint8, mode="r").view(np.ndarray)

    def part(begin: int, stop: int, dtype: str) -> npt.NDArray[Any]:
        return raw[begin:stop].view(dtype)

    dtype = np.dtype(header.dtype).newbyteorder("<")
    tokens = np.zeros(0, dtype)
    if data.stat().st_size:
        tokens = np.memmap(data, dtype=dtype, mode="r").view(np.ndarray)
    modes_stop = header.modes_at + header.sequences
    dataset = IndexedDataset(
        prefix=index.with_suffix(""),
        header=header,
        lengths=part(HEADER.size, header.offsets_at, "<i4"),
        offsets=part(header.offsets_at, header.borders_at, "<i8"),
        borders=part(header.borders_at, header.modes_at, "<i8"),
        modes=part(header.modes_at, modes_stop, "<i1") if header.has_modes else None,
        tokens=tokens,
    )
    if check:
        dataset.check()
    return dataset
