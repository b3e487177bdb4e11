"""Rows of several datasets as one, and some of the rows of a dataset.

Owns the numbers of rows in a mixture: those of its sources one after another. Invariant: the rows
of the sources are alike, so that any of them can be in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate

import numpy as np
from xxhash import xxh3_128

from launcher.data.order import GlobalOrder
from launcher.data.rows import Counts, Ints, Row, RowDataset, RowSource
from launcher.errors import UserError


class JoinedRows:
    """The rows of datasets, one after another: `Rows`."""

    def __init__(self, datasets: Mapping[str, RowDataset]) -> None:
        """`datasets`: by name, with equal seq_length, none of them empty."""
        self._datasets = tuple(datasets.values())
        self._starts = np.array([0, *accumulate(map(len, self._datasets))], dtype=np.int64)
        firsts = [dataset.row(0) for dataset in self._datasets]
        self._has_positions = any(row.position_ids is not None for row in firsts)
        self._has_documents = any(row.document_ids is not None for row in firsts)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """One row. A row of one document has its positions and document where others have some."""
        source = int(np.searchsorted(self._starts, index, "right")) - 1
        row = self._datasets[source].row(index - int(self._starts[source]))
        if self._has_positions and row.position_ids is None:
            row = row._replace(position_ids=np.arange(len(row.input_ids), dtype=np.int64))
        if self._has_documents and row.document_ids is None:
            row = row._replace(document_ids=np.zeros(len(row.input_ids), dtype=np.int64))
        return row

    def counts(self, indices: Ints) -> Counts:
        """Targets and tokens of the rows `indices`."""
        counts = Counts(*(np.zeros(len(indices), dtype=np.int64) for _ in Counts._fields))
        sources = np.searchsorted(self._starts, indices, "right") - 1
        for source in np.unique(sources):
            own = sources == source
            found = self._datasets[source].counts(indices[own] - self._starts[source])
            counts.targets[own], counts.tokens[own] = found
        return counts


class LimitedRows:
    """The first rows of a dataset in some order: `Rows`."""

    def __init__(self, dataset: RowDataset, limit: int, order: GlobalOrder) -> None:
        self._dataset, self._limit, self._order = dataset, limit, order

    def __len__(self) -> int:
        return self._limit

    def row(self, index: int) -> Row:
        """One row, 0 <= index < limit."""
        return self._dataset.row(self._order.row(index))

    def counts(self, indices: Ints) -> Counts:
        """Targets and tokens of the rows `indices`."""
        return self._dataset.counts(self._order.rows(indices))


def limited(dataset: RowDataset, limit: int, seed: int, *, shuffle: bool) -> RowDataset:
    """The first `limit` rows of an epoch of a dataset: with `shuffle` of the epoch that begins with
    `seed`. They are the same in every epoch of a run, in an order of their own."""
    if limit >= len(dataset):
        return dataset
    order = GlobalOrder(len(dataset), seed, shuffle)
    content = f"{dataset.content}/{limit}/{seed if shuffle else ''}"
    return replace(
        dataset,
        rows=LimitedRows(dataset, limit, order),
        content=xxh3_128(content.encode()).hexdigest(),
        vocab_size=None,  # the rows of `dataset` are checked, with their own numbers
    )


def joined(datasets: Mapping[str, RowDataset], seq_length: int) -> RowDataset:
    """The rows of datasets, by name, one after another. Raises UserError, which names the dataset,
    where rows have another length than `seq_length`."""
    for name, dataset in datasets.items():
        if dataset.seq_length != seq_length:
            raise UserError(
                f"source `{name}`: its rows have {dataset.seq_length} tokens",
                rule=f"all sources of a mixture have rows of seq_length {seq_length}",
                nearest=f"Nearest: seq_length: {dataset.seq_length}",
                advice="Prepare the source again with this length, or set seq_length to its own",
            )
    content = "/".join(f"{name}:{dataset.content}" for name, dataset in datasets.items())
    return RowDataset(
        rows=JoinedRows(datasets),
        seq_length=seq_length,
        packed=any(dataset.packed for dataset in datasets.values()),
        content=xxh3_128(content.encode()).hexdigest(),
        sequences=max(dataset.sequences for dataset in datasets.values()),
        name="the mixture",
        sources=tuple(RowSource(name, dataset) for name, dataset in datasets.items()),
    )
