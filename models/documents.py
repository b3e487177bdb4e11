"""Which tokens of packed rows belong together, and how attention over them is cut into tiles.

Owns host arithmetic alone: nothing here is on a GPU, so nothing waits for one. The documents of a
row are consecutive and cover it, so that their lengths describe them completely:

    document ids   0 0 0 0 1 1 2 2 2        lengths   4 2 3 0 0 0 0 0 0

Invariants: lengths are int32 [rows, width] on the CPU, zeros may be anywhere, and each row sums to
the number of its keys. The width is that of the rows where a loader makes them, so that shapes do
not change from batch to batch. Padding is a document like any other: no token of another one
attends to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


class OnHost:
    """A tensor that stays on the CPU. Wrappers of a module (FSDP, DDP) move the tensors among its
    arguments to the GPU; they do not look into an object like this."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def document_lengths(document_ids: Tensor) -> Tensor:
    """The lengths of the documents of rows, int32 [..., length], in order, then zeros, of their
    `document_ids` [..., length] (integers on the CPU, equal within a document)."""
    rows = document_ids.reshape(-1, document_ids.shape[-1])
    begins = torch.ones_like(rows)
    begins[:, 1:] = rows[:, 1:] != rows[:, :-1]
    index = begins.cumsum(1) - 1
    lengths = torch.zeros(rows.shape, dtype=torch.int32)
    lengths.scatter_add_(1, index, torch.ones(rows.shape, dtype=torch.int32))
    return lengths.view(document_ids.shape)


def lengths_of_ids(document_ids: Tensor) -> Tensor | None:
    """As `document_lengths`, of ids on any device (those of a GPU are waited for). None where the
    tokens of one id may not be consecutive, as ids decrease somewhere: only a mask can express it."""
    ids = document_ids.cpu()
    return None if bool((ids[:, 1:] < ids[:, :-1]).any()) else document_lengths(ids)


def lengths_of_padding(key_mask: Tensor) -> Tensor | None:
    """The lengths [rows, 2] of the padding on the left of rows, and of the rest, of a `key_mask`
    [rows, total] that is False for padding. None where it is not on the left alone."""
    seen = key_mask.cpu()
    if bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        return None
    return lengths_of_counts((~seen).sum(1).tolist(), seen.shape[1])


def lengths_of_counts(padding: Sequence[int], total: int) -> Tensor:
    """The lengths [rows, 2] of `padding` tokens on the left of rows of `total`, and of the rest."""
    return torch.tensor([[count, total - count] for count in padding], dtype=torch.int32)


def one_document(total: int) -> Tensor:
    """The lengths [1, 1] of any number of rows of one document of `total` tokens each."""
    return torch.full((1, 1), total, dtype=torch.int32)


@dataclass(frozen=True)
class Document:
    """Consecutive tokens of a row that attend to each other, as indices in the row."""

    row: int
    start: int
    stop: int
    first_query: int
    """The first of them that is a query; the others are keys alone. Less than `stop`."""


@dataclass(frozen=True)
class Tile:
    """Queries of some rows that are computed together, and all keys that they attend to, as indices
    in the row. The last key is that of the last query."""

    rows: slice
    queries: range
    keys: range

    @property
    def is_causal(self) -> bool:
        """Whether there are as many queries as keys: then a window, if any, excludes no key before
        a query, and a kernel needs no mask."""
        return len(self.queries) == len(self.keys)

    def mask(self, window: int | None, device: torch.device) -> Tensor:
        """[queries, keys] bool, True where a query attends to a key."""
        queries = torch.arange(self.queries.start, self.queries.stop, device=device)[:, None]
        keys = torch.arange(self.keys.start, self.keys.stop, device=device)
        allowed = keys <= queries
        return allowed if window is None else allowed & (keys > queries - window)


@dataclass(frozen=True, eq=False)
class DocumentPlan:
    """The documents of the rows of one forward."""

    rows: int
    total: int
    """Keys of a row."""
    queries: int
    """Queries of a row: its last tokens."""
    documents: tuple[Document, ...]
    alike: bool
    """Whether all rows have the same documents; `documents` are then those of the first one."""

    def cumulative(self) -> tuple[list[int], list[int], int, int]:
        """For a kernel of variable lengths over the queries and keys of all rows, one row after
        another: the cumulative numbers of queries and of keys [documents + 1 each], and the largest
        number of queries and of keys of a document.

        Documents without queries are part of the keys: they have none, and are written as such.
        """
        queries, keys = [0], [0]
        for row in range(self.rows):
            for document in self._of_row(row):
                queries.append(document.stop - document.first_query)
                keys.append(document.stop - document.start)
        longest_query, longest_key = max(queries), max(keys)
        return (
            list(accumulate(queries)), list(accumulate(keys)), longest_query, longest_key
        )  # fmt: skip

    def tiles(self, window: int | None, most_queries: int | None = None) -> Iterator[Tile]:
        """Tiles that cover all queries, each query once. `most_queries` of a tile, where scores
        are in memory; None: documents are not cut, except by the window."""
        for document in self.documents:
            rows = slice(0, self.rows) if self.alike else slice(document.row, document.row + 1)
            for queries, first_key in _cut(document, window, most_queries):
                yield Tile(rows, queries, range(first_key, queries.stop))

    def _of_row(self, row: int) -> Iterator[Document]:
        return (d for d in self._by_row()[0 if self.alike else row])

    def _by_row(self) -> list[list[Document]]:
        found: list[list[Document]] = [[] for _ in range(self.rows)]
        for document in self.documents:
            found[document.row].append(document)
        return found


def _cut(
    document: Document, window: int | None, most_queries: int | None
) -> Iterator[tuple[range, int]]:
    """(queries, first key) of the tiles of a document."""
    start = document.first_query
    while start < document.stop:
        reach = document.stop if most_queries is None else start + most_queries
        first_key = document.start
        if window is not None and document.stop - document.start > window:
            full = document.start + window  # queries before this one see all tokens before them
            if start < full:
                reach = min(reach, full)
            else:
                reach = min(reach, start + window_block(window))
                first_key = start - window + 1
        elif start > document.start and most_queries is None:
            reach = min(reach, start + QUERIES_WITH_A_MASK)
        stop = min(reach, document.stop)
        yield range(start, stop), first_key
        start = stop


QUERIES_WITH_A_MASK = 256
"""Queries of a tile with a mask, so that the mask is linear in the number of keys."""


def window_block(window: int) -> int:
    """Queries of a tile within a window. It has `window - 1` keys more than queries, and all scores
    of both are computed: few queries waste less, but make more calls. Measured on a CPU (1 core, 8
    heads of 64, window 512, 4096 tokens): 143 ms with 128, 166 with 256, 253 with 512."""
    return 1 if window == 1 else min(max(window // 4, 64), QUERIES_WITH_A_MASK)


@lru_cache(maxsize=16)
def _plan(lengths: bytes, rows_given: int, rows: int, queries: int) -> DocumentPlan:
    values = torch.frombuffer(bytearray(lengths), dtype=torch.int32).view(rows_given, -1).tolist()
    by_row = [[length for length in row if length] for row in values]
    alike = all(row == by_row[0] for row in by_row)
    total = sum(by_row[0])
    documents = []
    for number, row in enumerate(by_row[:1] if alike else by_row):
        if sum(row) != total:
            raise ValueError(f"documents of {sum(row)} tokens in a row of {total}")
        ends = list(accumulate(row))
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            first = max(start, total - queries)
            documents.append(Document(number, start, stop, min(first, stop)))
    return DocumentPlan(rows, total, queries, tuple(documents), alike)


@lru_cache(maxsize=4)
def _bounds(lengths: bytes, rows: int) -> tuple[list[int], list[int]]:
    values = torch.frombuffer(bytearray(lengths), dtype=torch.int32).view(rows, -1).long()
    starts = values.cumsum(1) - values
    of_tokens = torch.stack([s.repeat_interleave(n) for s, n in zip(starts, values, strict=True)])
    return of_tokens.amin(0).tolist(), of_tokens.amax(0).tolist()


def document_bounds(lengths: Tensor) -> tuple[list[int], list[int]]:
    """For each token index, where its document begins: in the row where it begins first, and in the
    row where it begins last."""
    return _bounds(lengths.contiguous().numpy().tobytes(), lengths.shape[0])


def document_plan(lengths: Tensor, rows: int, queries: int) -> DocumentPlan:
    """The plan of `rows` rows with documents of these `lengths`; those of one row are the lengths
    of all of them. `queries`: of each row, its last tokens. ValueError if rows are not equally
    long. The last plans are cached: all layers of a step have the same."""
    return _plan(lengths.contiguous().numpy().tobytes(), lengths.shape[0], rows, queries)
