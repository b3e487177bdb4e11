"""Batches: the samples of one optimizer step, for one data rank.

Owns the mapping from consumed samples to tensors. Invariants:

1. `Loader.step` is a pure function of the number of samples consumed before it. There is no
   iterator state: a resume calls it with another number.
2. The samples of a global batch, and their order, do not depend on how many ranks or micro steps
   share it. Sample j of the batch goes to micro step m, data rank r and index b where
   j = m * (data_parallel * batch_size) + r * batch_size + b.
3. Prefetching (one step, in a thread) does not change the results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from launcher.data.order import Order
from launcher.data.rows import NO_TARGET, Ints, Row, RowDataset
from models.documents import document_lengths


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; tensors on the CPU, int64 unless noted otherwise."""

    input_ids: torch.Tensor
    """[batch, seq_length]; of preferences [batch, 2, seq_length], as labels are."""
    labels: torch.Tensor
    """[batch, seq_length], already shifted: the next token of each input; -100 is ignored."""
    position_ids: torch.Tensor | None
    """[batch, seq_length], from 0 in each document; None where a row is one document."""
    document_ids: torch.Tensor | None
    """[batch, seq_length], index of the document in its row; None where a row is one document."""
    document_lengths: torch.Tensor | None
    """int32 [batch, seq_length], the lengths of the documents of each row, in order, then zeros:
    the same as `document_ids`, for attention, which needs it on the host."""
    sample_ids: torch.Tensor
    """[batch], index of each sample over all epochs of the run; -1: filler."""
    rows: torch.Tensor | None = None
    """[batch], index of each row in the dataset; -1: filler. None where nobody asks for it."""
    is_desirable: torch.Tensor | None = None
    """bool [batch]: whether an answer was judged good; None where answers were not judged."""
    sources: torch.Tensor | None = None
    """bool [batch, sources]: whether a row is of a source of the mixture; no source for filler.
    None where the data is no mixture."""


class SourceCounts(NamedTuple):
    """Of a global batch of a mixture, for each source."""

    samples: list[int]
    targets: list[int]
    """Labels other than -100."""


@dataclass(frozen=True)
class StepData:
    """The batches of one data rank in one optimizer step, and counts of the global batch."""

    batches: list[Batch]
    """One for each micro step."""
    target_tokens: int
    """Labels other than -100 in the global batch, all ranks: the denominator of the loss."""
    input_tokens: int
    """Tokens of the global batch without padding."""
    first_sample: int
    samples: int
    sources: SourceCounts | None = None
    """None where the data is no mixture."""


class Loader:
    """The steps of a run over one dataset, for one data rank."""

    def __init__(
        self,
        dataset: RowDataset,
        order: Order,
        *,
        batch_size: int,
        micro_steps: int,
        data_parallel: int,
        data_rank: int,
        prefetch: bool = True,
        pin_memory: bool | None = None,
    ) -> None:
        """`batch_size`: rows per micro step and data rank; `pin_memory` None: if CUDA exists."""
        if not 0 <= data_rank < data_parallel:
            raise ValueError(f"data rank {data_rank} of {data_parallel}")
        self._dataset = dataset
        self.follow(order)
        self._shape = (micro_steps, data_parallel, batch_size)
        self._data_rank = data_rank
        self._pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._prefetch = prefetch
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[StepData]] | None = None

    @property
    def dataset(self) -> RowDataset:
        """The rows."""
        return self._dataset

    @property
    def order(self) -> Order:
        """The order of the samples."""
        return self._order

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources of a mixture; none where the data is no mixture."""
        return tuple(source.name for source in self._dataset.sources)

    def follow(self, order: Order) -> None:
        """Read the samples in another order of the same rows; not while steps are read ahead."""
        if order.size != len(self._dataset):
            raise ValueError(f"an order of {order.size} rows for {len(self._dataset)}")
        self._order = order

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all ranks."""
        micro_steps, data_parallel, batch_size = self._shape
        return micro_steps * data_parallel * batch_size

    def step(self, consumed_samples: int) -> StepData:
        """The step that begins with global sample `consumed_samples`."""
        data = self._take_prefetched(consumed_samples) or self._read(consumed_samples)
        if self._prefetch:
            self._start_prefetch(consumed_samples + self.global_batch)
        return data

    def close(self) -> None:
        """End the prefetch thread, and the producer of a stream; without a stream, a later `step`
        starts a new thread."""
        self._ahead = None
        if self._dataset.stream is not None:
            self._dataset.stream.close()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def cursor(self, data_position: int) -> dict[str, Any] | None:
        """Where a run that resumes at this sample may start to read a stream; None: no stream."""
        stream = self._dataset.stream
        return None if stream is None else stream.cursor(data_position)

    def seek(self, cursor: Mapping[str, Any] | None) -> None:
        """Learn the cursor of a checkpoint of the same data and order."""
        if self._dataset.stream is not None:
            self._dataset.stream.seek(cursor)

    def _read(self, consumed_samples: int) -> StepData:
        samples = consumed_samples + np.arange(self.global_batch, dtype=np.int64)
        rows = self._order.rows(samples)
        mine = samples.reshape(self._shape)[:, self._data_rank]
        my_rows = rows.reshape(self._shape)[:, self._data_rank]
        counts = self._dataset.counts(rows)
        return StepData(
            batches=[
                _batch(self._dataset, micro_rows, ids, self._pin_memory)
                for micro_rows, ids in zip(my_rows, mine, strict=True)
            ],
            target_tokens=int(counts.targets.sum()),
            input_tokens=int(counts.tokens.sum()),
            first_sample=consumed_samples,
            samples=self.global_batch,
            sources=self._count_sources(rows, counts.targets) if self._dataset.sources else None,
        )

    def _count_sources(self, rows: Ints, targets: Ints) -> SourceCounts:
        of_source = self._dataset.source_of(rows)
        each = [of_source == index for index in range(len(self._dataset.sources))]
        return SourceCounts(
            [int(own.sum()) for own in each], [int(targets[own].sum()) for own in each]
        )

    def _take_prefetched(self, consumed_samples: int) -> StepData | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != consumed_samples:
            return None
        return ahead[1].result()

    def _start_prefetch(self, consumed_samples: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead = consumed_samples, self._thread.submit(self._read, consumed_samples)


def evaluation_batches(
    dataset: RowDataset,
    batch_size: int,
    data_parallel: int,
    data_rank: int,
    *,
    pin_memory: bool | None = None,
) -> Iterator[Batch]:
    """Every row of a dataset exactly once over all ranks, in order, as `batches_of_rows`. The
    number of targets over all ranks is `dataset.total_targets()`."""
    every = np.arange(len(dataset), dtype=np.int64)
    return batches_of_rows(
        dataset, every, batch_size, data_parallel, data_rank, pin_memory=pin_memory
    )


def batches_of_rows(
    dataset: RowDataset,
    rows: Ints,
    batch_size: int,
    data_parallel: int,
    data_rank: int,
    *,
    pin_memory: bool | None = None,
) -> Iterator[Batch]:
    """The rows `rows` of a dataset exactly once over all ranks, in this order.

    All ranks get the same number of batches of the same shape, so that collectives match: the last
    ones are filled with rows whose labels are all -100 (sample id -1). Batch b of data rank r has
    the rows from (b * data_parallel + r) * batch_size on.
    """
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    stride = data_parallel * batch_size
    for begin in range(data_rank * batch_size, -(-len(rows) // stride) * stride, stride):
        indices = np.full(batch_size, -1, dtype=np.int64)
        there = rows[begin : begin + batch_size]
        indices[: len(there)] = there
        yield _batch(dataset, indices, indices, pin)


def _filler_row(dataset: RowDataset) -> Row:
    row = dataset.row(0)
    return row._replace(labels=np.full_like(row.labels, NO_TARGET))


def _batch(dataset: RowDataset, indices: Ints, sample_ids: Ints, pin_memory: bool) -> Batch:
    """The rows `indices`, filler for -1."""
    rows = [dataset.row(int(i)) if i >= 0 else _filler_row(dataset) for i in indices]

    def stack(name: str) -> torch.Tensor | None:
        arrays = [getattr(row, name) for row in rows]
        return None if arrays[0] is None else tensor(np.stack(arrays))

    def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
        made = torch.from_numpy(values)
        return made.pin_memory() if pin_memory else made

    input_ids, labels, ids = stack("input_ids"), stack("labels"), stack("document_ids")
    assert input_ids is not None
    assert labels is not None
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=stack("position_ids"),
        document_ids=ids,
        document_lengths=None if ids is None else tensor(document_lengths(ids).numpy()),
        sample_ids=tensor(sample_ids.copy()),
        rows=tensor(indices.copy()) if dataset.sequences > 1 else None,
        is_desirable=None
        if rows[0].is_desirable is None
        else tensor(np.array([row.is_desirable for row in rows])),
        sources=tensor(_of_sources(dataset, indices)) if dataset.sources else None,
    )


def _of_sources(dataset: RowDataset, indices: Ints) -> npt.NDArray[np.bool_]:
    """[rows, sources]: whether a row is of a source."""
    of_source = np.where(indices >= 0, dataset.source_of(indices), -1)
    result: npt.NDArray[np.bool_] = of_source[:, None] == np.arange(len(dataset.sources))
    return result
