"""The interfaces of data loaders, and the samples they may yield."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from launcher.config.schema import DataLoaderSection, DatasetSection
from launcher.data.chat_rendering import ChatSettings
from launcher.data.files import DataFile
from launcher.data.packing import RowPlan
from launcher.data.progress import OnProgress, ignore_progress
from launcher.data.records import Record
from launcher.data.rows import RowDataset, Rows
from launcher.data.store import TokenStore
from launcher.data.tally import Tally
from launcher.errors import UserError

Log = Callable[[str], None]
SampleT = TypeVar("SampleT")


class Document(NamedTuple):
    """One text and where it was read."""

    where: str
    """A path, or `path:line`."""
    text: str


class TokenBatch(NamedTuple):
    """Some samples as token ids."""

    tokens: list[list[int]]
    is_target: Sequence[npt.NDArray[np.bool_ | np.uint8]] = ()
    """For each token whether it counts for the loss (0: it does not); empty: all of them do."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dataset is prepared, and where it is kept."""

    section: DatasetSection
    tokenizer: Any
    """None where the data are tokens already."""
    seq_length: int
    cache_dir: Path
    log: Log
    on_progress: OnProgress = ignore_progress
    """Called now and then by work that takes long, in the thread that does it."""
    workers: int = 1
    """Processes that may tokenize."""
    model_config: Mapping[str, Any] = field(default_factory=dict)
    """The config.json of the model, for the ids of its special tokens."""
    chat: ChatSettings = field(default_factory=ChatSettings)
    """How conversations are rendered."""
    phase: str = "train"
    """`train`, or `valid` for evaluation: which split is read where files have several."""

    @property
    def loader(self) -> DataLoaderSection:
        """The section of the one data loader."""
        assert isinstance(self.section.data_loader, DataLoaderSection)
        return self.section.data_loader


@dataclass(frozen=True, kw_only=True)
class FromRecords(Generic[SampleT]):
    """How parts of a file of records become samples, which streaming needs."""

    samples: Callable[
        [Iterable[Record | UserError], DataLoaderSection, Tally, Record | None], Iterator[SampleT]
    ]
    """The samples of consecutive records of a file, in order, given the section, the counts of what
    is left out, and the first record of the file; None: it is among the records."""
    column: Callable[[DataLoaderSection], str] | None = None
    """The one column that is used, without column_map; None: all of them."""


@dataclass(frozen=True, kw_only=True)
class DataLoader(Generic[SampleT]):
    """How one `data_loader.type` reads its files."""

    find_files: Callable[[DataLoaderSection], list[DataFile]]
    """The files that the section names, in a reproducible order."""
    read_file: Callable[[Path, DataLoaderSection, Path, Tally], Iterator[SampleT]]
    """The samples of one file, given the section, a folder for caches and the counts of what is
    left out."""
    tokenize: Callable[[Iterable[SampleT], Recipe, Tally], Iterator[TokenBatch]]
    """The tokens of samples, in batches, in order."""
    read_files: (
        Callable[[list[DataFile], DataLoaderSection, Path, Tally], Iterator[SampleT]] | None
    ) = None
    """The samples of all files, where they cannot be read one by one (`record_files.
    needs_all_files`): a slice, or a step such as a shuffle, goes over all of them."""
    from_records: FromRecords[SampleT] | None = None
    """None: its files cannot be streamed."""
    has_targets: bool = False
    """Whether only some tokens count for the loss, as in conversations. Such samples are cut from
    one stream of tokens only with `packing_strategy: concatenate`."""
    plan: Callable[[TokenStore, int], RowPlan] | None = None
    """How its documents are assigned to rows of a length; None: by `packing`."""
    rows: Callable[[TokenStore, RowPlan, int, int], Rows] | None = None
    """With `plan`: the rows of a store, given their length and the padding token."""
    sequences: int = 1
    """Sequences of a row."""
    unit: str = "documents"
    """What its samples are, for log lines."""
    paths_key: str = "dataset_dir"
    """The key that a user sets to name the files."""


LOOKED_AT = 256
"""Rows in which an end token is looked for."""


def warn_without_end_token(rows: Rows, token: int, key: str, log: Log) -> None:
    """Log a warning where `token`, the value of `key`, ends no document in a sample of rows: they
    are then not kept apart. Rows are spread over all of the data."""
    step = max(len(rows) // LOOKED_AT, 1)
    indices = range(0, len(rows), step)
    if any((rows.row(index).input_ids == token).any() for index in indices):
        return
    log(
        f"warning: none of {len(indices)} rows that were looked at has the token {token} of {key}, "
        "so no document ends in them"
    )


@dataclass(frozen=True, kw_only=True)
class RowLoader:
    """How one `data_loader.type` opens files that hold tokens already: they are read in place."""

    prepare: Callable[[Recipe], str]
    """Check the files, and make in `cache_dir` what `open` needs; called on one rank of each file
    system. The result is passed to `open` on every rank of it. Raises UserError."""
    open: Callable[[Recipe, str], RowDataset]
    """The rows, memory-mapped. Called on every rank."""
    paths_key: str = "dataset_dir"
    """The key that a user sets to name the files."""
