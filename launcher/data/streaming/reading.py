"""Reading the records of a block, and nothing before it where the format allows.

Owns the open readers. Invariants: memory is bounded by the blocks in work and the READERS_KEPT
readers that are kept; records are those of the index, or UserError (JSON lines by their hash, local
files also by their time, row groups by the size and version of the file when they are opened). What
a block costs:

    JSON lines     its range of bytes
    JSON lines.gz  from the present position, else from the last member that begins before it
    Parquet        from the present position in its row group, else from the start of that group
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol, TypeVar

from xxhash import xxh3_64

from launcher.data.records import Record, records_of_lines
from launcher.data.streaming.gzip_members import GzipFile
from launcher.data.streaming.index import ShardIndex, parquet_file
from launcher.data.streaming.order import SEGMENTS_AT_ONCE, Block
from launcher.data.streaming.ranges import SEQUENTIAL_BYTES, Ranges, changed
from launcher.data.streaming.remote import is_url
from launcher.data.streaming.shards import Shard
from launcher.errors import UserError

READERS_KEPT = 2 * SEGMENTS_AT_ONCE
_ARROW_BATCH = 256

KeyT = TypeVar("KeyT")
T = TypeVar("T")


class BlockReader:
    """Reads blocks in any order; fast in the order of `BlockOrder`."""

    def __init__(
        self, column: str | None, open_shard: Callable[[Shard], Ranges] = Shard.ranges
    ) -> None:
        """`column`: the one column of Parquet that is read; None: all."""
        self._column, self._open_shard = column, open_shard
        self._readers: OrderedDict[tuple[str, int], _Sequential] = OrderedDict()
        self._ranges: OrderedDict[str, Ranges] = OrderedDict()
        self._firsts: OrderedDict[str, Record] = OrderedDict()

    def records(self, block: Block) -> Iterator[Record | UserError]:
        """The records of a block, in the order of the file."""
        shard = block.index.shard
        ranges = self._kept(self._ranges, shard.location, lambda: self._open_shard(shard))
        if not is_url(shard.location):
            ranges.check_unchanged()
        if shard.is_parquet:
            return self._of_parquet(block, ranges)
        entry = block.entry
        start, stop = int(entry["start"]), int(entry["stop"])
        if shard.is_gzip:
            reader = self._sequential(block, start, lambda: _GzipReader(block.index, ranges, start))
            content = reader.take(start, stop)
        else:
            content = ranges.read(start, stop)
        if xxh3_64(content).intdigest() != int(entry["hash"]):
            raise changed(shard.name, f"{shard.name}:{entry['line']}")
        records = records_of_lines(shard.name, io.BytesIO(content), int(entry["line"]), start)
        return islice(records, block.records)

    def first_record(self, block: Block) -> Record | None:
        """The first record of the shard of a block; None where the block begins with it."""
        index = block.index
        if block.is_first:
            return None
        if index.shard.is_parquet:
            name = index.shard.location
            return self._kept(self._firsts, name, lambda: self._first_of_parquet(block))
        found = next(records_of_lines(index.shard.name, [index.first_line], 1, 0))
        if isinstance(found, UserError):
            raise found
        return found

    def _of_parquet(self, block: Block, ranges: Ranges) -> Iterator[Record]:
        start, stop = int(block.entry["start"]), int(block.entry["stop"])
        group = int(block.entry["line"])
        before = int(block.entry["first"]) - start
        reader = self._sequential(
            block, start, lambda: _GroupReader(ranges, group, self._column, before)
        )
        return iter(reader.take(start, stop)[: block.records])

    def _first_of_parquet(self, block: Block) -> Record:
        if self._column is not None:
            names = parquet_file(self._open_shard(block.index.shard)).schema_arrow.names
            return Record(f"{block.index.shard.name}, record 1", dict.fromkeys(names))
        entry = block.index.blocks[0]
        reader = _GroupReader(self._open_shard(block.index.shard), int(entry["line"]), None, 0)
        return reader.take(0, 1)[0]

    def _sequential(self, block: Block, start: int, make: Callable[[], _Sequential]) -> Any:
        """The reader of the segment of a block, at or before `start`."""
        key = (block.index.shard.location, int(block.entry["segment"]))
        kept = self._readers.get(key)
        if kept is not None and not kept.can_reach(start):
            del self._readers[key]
        return self._kept(self._readers, key, make)

    @staticmethod
    def _kept(table: OrderedDict[KeyT, T], key: KeyT, make: Callable[[], T]) -> T:
        """The entry of a table of the newest READERS_KEPT."""
        if key not in table:
            table[key] = make()
        table.move_to_end(key)
        while len(table) > READERS_KEPT:
            table.popitem(last=False)
        return table[key]


class _Sequential(Protocol):
    """A reader that goes forward."""

    def can_reach(self, start: int) -> bool: ...
    def take(self, start: int, stop: int) -> Any: ...


class _GzipReader:
    """The content of a gzip file from the last member at or before a position."""

    def __init__(self, index: ShardIndex, ranges: Ranges, start: int) -> None:
        self._members = index.members
        member = index.members[index.members[:, 1] <= start][-1]
        raw = GzipFile(ranges, (int(member[0]), int(member[1])))
        self._file = io.BufferedReader(raw, SEQUENTIAL_BYTES)
        self._position = int(member[1])
        self._name = ranges.name

    def can_reach(self, start: int) -> bool:
        """Whether going on is the shortest way there."""
        later = (self._members[:, 1] > self._position) & (self._members[:, 1] <= start)
        return start >= self._position and not later.any()

    def take(self, start: int, stop: int) -> bytes:
        while self._position < start:
            self._position += len(self._read(min(SEQUENTIAL_BYTES, start - self._position)))
        content = self._read(stop - start)
        self._position = stop
        return content

    def _read(self, count: int) -> bytes:
        content = self._file.read(count)
        if len(content) != count:
            raise changed(self._name)
        return content


class _GroupReader:
    """The rows of one row group, converted to records a few at a time."""

    def __init__(self, ranges: Ranges, group: int, column: str | None, before: int) -> None:
        """`before`: rows of the file before the group."""
        ranges.check_unchanged()
        file = parquet_file(ranges)
        # The error for a missing column is raised by the conversion, which shows the others.
        columns = [column] if column in file.schema_arrow.names else None
        self._batches = file.iter_batches(_ARROW_BATCH, row_groups=[group], columns=columns)
        self._name, self._before = ranges.name, before
        self._position = 0
        self._rows: list[Record] = []

    def can_reach(self, start: int) -> bool:
        return start >= self._position

    def take(self, start: int, stop: int) -> list[Record]:
        self._skip(start)
        while len(self._rows) < stop - start:
            self._rows += self._records(self._batch(), self._position + len(self._rows))
        taken, self._rows = self._rows[: stop - start], self._rows[stop - start :]
        self._position = stop
        return taken

    def _skip(self, start: int) -> None:
        while self._position < start:
            count = min(start - self._position, len(self._rows))
            if count:
                self._rows = self._rows[count:]
                self._position += count
                continue
            batch = self._batch()
            inside = min(start - self._position, batch.num_rows)
            self._position += inside
            self._rows = self._records(batch.slice(inside), self._position)

    def _batch(self) -> Any:
        try:
            batch = next(self._batches, None)
        except UserError:
            raise
        except Exception as error:  # of pyarrow, which has many
            reason = (str(error) or repr(error)).splitlines()[0]
            raise UserError(
                f"cannot be read as Parquet ({reason})",
                where=f"{self._name}, after record {self._before + self._position}",
                rule="it is read with pyarrow, which must know its types",
                advice="Inspect it with pyarrow.parquet.read_table, and write it again",
            ) from error
        if batch is None:
            raise changed(self._name)
        return batch

    def _records(self, batch: Any, first: int) -> list[Record]:
        """The rows of a batch, whose first one has this number in the group, from 0."""
        number = self._before + first + 1
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = self._one_by_one(batch, number)
        return [
            Record(f"{self._name}, record {number + at}", row, has_all_columns=True)
            for at, row in enumerate(rows)
        ]

    def _one_by_one(self, batch: Any, number: int) -> list[Any]:
        rows = []
        for at in range(batch.num_rows):
            try:
                rows += batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"has a string that is not UTF-8 (byte 0x{error.object[error.start]:02x} "
                    f"at its offset {error.start})",
                    where=f"{self._name}, record {number + at}",
                    rule="a string of a Parquet file is UTF-8",
                    advice="Fix the record, or encode its strings as UTF-8",
                ) from error
        return rows
