"""The index of a source: where each block of consecutive records is.

Owns the division of shards into blocks, and its cache. Invariants:

1. Blocks are a pure function of the content of a shard, `shuffle_buffer` and `num_samples`; a block
   never crosses shards, nor row groups of Parquet.
2. Parquet costs the footer of each file; JSON lines cost one pass over each file, in parallel. A
   shard is indexed again only when its size or version has changed.
3. The content of JSON lines is hashed block by block, so that a changed one is found when it is
   read. Parquet is identified by its footer, which has the place and the statistics of every
   column.
"""

from __future__ import annotations

import io
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64, xxh3_128

from launcher.data.loaders.base import Log
from launcher.data.streaming.gzip_members import GzipFile
from launcher.data.streaming.ranges import SEQUENTIAL_BYTES, RangeFile, Ranges
from launcher.data.streaming.shards import Shard
from launcher.errors import UserError
from launcher.json_text import printable

INDEX_VERSION = 1
"""Part of every key: raise it when blocks would be divided in another way."""
BLOCK_BYTES = 64 << 20
"""A block of large records ends early, after this many bytes."""
SHARDS_AT_ONCE = 8
PROGRESS_SECONDS = 10.0
FOLDER = "stream_index"
_PARQUET_TAIL = 8
"""Bytes after the footer: its length and the mark PAR1."""

BLOCK = np.dtype([
    ("first", "<i8"),    # number of its first record in the shard, from 0
    ("records", "<i8"),
    ("start", "<i8"),    # JSON lines: offset in the content; Parquet: row in its group
    ("stop", "<i8"),     # the end of the same
    ("line", "<i8"),     # JSON lines: number of its first line, from 1; Parquet: its row group
    ("segment", "<i8"),  # blocks of one segment are read in order: a row group, or a gzip file
    ("hash", "<u8"),     # JSON lines: xxh3_64 of its bytes
])  # fmt: skip
"""One block of a shard."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The blocks of one shard."""

    shard: Shard
    blocks: npt.NDArray[Any]
    """BLOCK [blocks]"""
    members: npt.NDArray[np.int64]
    """[members, 2] of a gzip file, as GzipFile has them; empty for others."""
    first_line: bytes
    """JSON lines: the line of the first record."""
    content: str
    """Hash of what the shard has, apart from its name."""

    @property
    def records(self) -> int:
        return int(self.blocks["records"].sum())


def index_source(
    shards: list[Shard], block_records: int, limit: int | None, cache_dir: Path, log: Log
) -> list[ShardIndex]:
    """The indices of the shards, at most `limit` records of them, from the cache or made now."""
    folder = cache_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    found: list[ShardIndex] = []
    left = limit
    progress = _Progress(shards, log)
    for one in _in_parallel(shards, block_records, limit, folder, progress):
        found.append(one if left is None else _first_records(one, left))
        if left is not None:
            left -= found[-1].records
            if left == 0:
                break
    return [one for one in found if len(one.blocks)]


def _in_parallel(
    shards: list[Shard],
    block_records: int,
    limit: int | None,
    folder: Path,
    progress: _Progress,
) -> Iterator[ShardIndex]:
    """The indices in order, a few of them made ahead."""
    with ThreadPoolExecutor(SHARDS_AT_ONCE, thread_name_prefix="index") as threads:
        waiting: deque[Future[ShardIndex]] = deque()
        try:
            for shard in shards:
                waiting.append(
                    threads.submit(_index_of, shard, block_records, limit, folder, progress)
                )
                if len(waiting) > SHARDS_AT_ONCE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Progress:
    """A log line every few seconds, for sources that take long."""

    def __init__(self, shards: list[Shard], log: Log) -> None:
        self._total, self._log = sum(shard.size for shard in shards), log
        self._done: dict[str, int] = {}
        self._last = time.monotonic()
        self._lock = threading.Lock()

    def report(self, shard: Shard, done: int) -> None:
        """`done` bytes of a shard are indexed; called in the threads that do it."""
        with self._lock:
            self._done[shard.location] = done
            now = time.monotonic()
            if now - self._last < PROGRESS_SECONDS:
                return
            self._last = now
            indexed = sum(self._done.values())
        self._log(f"indexing: {indexed / 1e9:,.1f} of {self._total / 1e9:,.1f} GB")


def _first_records(index: ShardIndex, limit: int) -> ShardIndex:
    """The index without the records after the first `limit`."""
    blocks = index.blocks[index.blocks["first"] < limit].copy()
    if len(blocks):
        blocks["records"][-1] = min(blocks["records"][-1], limit - blocks["first"][-1])
    return ShardIndex(shard=index.shard, blocks=blocks, members=index.members,
                      first_line=index.first_line, content=index.content)  # fmt: skip


def _index_of(
    shard: Shard, block_records: int, limit: int | None, folder: Path, progress: _Progress
) -> ShardIndex:
    key = [INDEX_VERSION, BLOCK_BYTES, shard.location, shard.size, shard.version,
           shard.form, block_records, limit]  # fmt: skip
    path = folder / f"{xxh3_128(repr(key).encode()).hexdigest()}.npz"
    cached = _cached(path, shard)
    if cached is not None:
        progress.report(shard, shard.size)
        return cached
    if shard.is_parquet:
        made = _index_parquet(shard, block_records)
    else:
        made = _index_lines(shard, block_records, limit, progress)
    progress.report(shard, shard.size)
    _store(path, made)
    return made


def _cached(path: Path, shard: Shard) -> ShardIndex | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return ShardIndex(
                shard=shard,
                blocks=arrays["blocks"],
                members=arrays["members"],
                first_line=arrays["first_line"].tobytes(),
                content=str(arrays["content"]),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _store(path: Path, index: ShardIndex) -> None:
    scratch = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with scratch.open("wb") as file:
            np.savez(
                file,
                blocks=index.blocks,
                members=index.members,
                first_line=np.frombuffer(index.first_line, dtype=np.uint8),
                content=np.array(index.content),
            )
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _index_parquet(shard: Shard, block_records: int) -> ShardIndex:
    ranges = shard.ranges()
    file = parquet_file(ranges)
    _refuse_double_columns(file.schema_arrow.names, ranges.name)
    metadata = file.metadata
    parts, first = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        count = int(group.num_rows)
        row_bytes = max(1, int(group.total_byte_size) // max(1, count))
        size = max(1, min(block_records, BLOCK_BYTES // row_bytes))
        starts = np.arange(0, count, size)
        blocks = np.zeros(len(starts), dtype=BLOCK)
        blocks["start"], blocks["stop"] = starts, np.minimum(starts + size, count)
        blocks["records"] = blocks["stop"] - blocks["start"]
        blocks["first"] = first + starts
        blocks["line"] = blocks["segment"] = number
        parts.append(blocks)
        first += count
    length = int.from_bytes(ranges.read(ranges.size - _PARQUET_TAIL, ranges.size - 4), "little")
    footer = ranges.read(ranges.size - _PARQUET_TAIL - length, ranges.size)
    return ShardIndex(
        shard=shard,
        blocks=np.concatenate([np.zeros(0, dtype=BLOCK), *parts]),
        members=np.zeros((0, 2), dtype=np.int64),
        first_line=b"",
        content=xxh3_128(b"%d/" % ranges.size + footer).hexdigest(),
    )


def _refuse_double_columns(names: list[str], where: str) -> None:
    """Raise UserError for two columns of one name: a record would have the last of them."""
    double = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if double is not None:
        raise UserError(
            f"has two columns {printable(double)!r}",
            where=where,
            rule="each column of a Parquet file has a name of its own",
            advice="Rename or drop one of them with pyarrow",
        )


def parquet_file(ranges: Ranges) -> Any:
    """A `pyarrow.parquet.ParquetFile` over a shard, which reads column chunks piece by piece.

    Raises UserError where pyarrow is missing or cannot read the file.
    """
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UserError(
            "the `pyarrow` library is not installed",
            rule="Parquet files are read with it",
            advice="Install it: pip install 'slipway[data]'",
        ) from error
    try:
        file = pa.PythonFile(RangeFile(ranges), mode="r")
        return ParquetFile(file, buffer_size=SEQUENTIAL_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"cannot be read as Parquet ({reason})",
            where=ranges.name,
            rule="a file named *.parquet is a Parquet file",
            advice="Inspect it with pyarrow.parquet.read_table, and write it again",
        ) from error


def _index_lines(
    shard: Shard, block_records: int, limit: int | None, progress: _Progress
) -> ShardIndex:
    ranges = shard.ranges()
    raw: RangeFile | GzipFile = GzipFile(ranges) if shard.is_gzip else RangeFile(ranges)
    divider = _Divider(block_records)
    with io.BufferedReader(raw, SEQUENTIAL_BYTES) as file:
        _refuse_other_forms(file.peek(4)[:64], ranges.name)
        for line in file:
            if divider.add(line):
                progress.report(shard, raw.bytes_read)
            if limit is not None and divider.records >= limit:
                break
    blocks = divider.finish()
    if not shard.is_gzip:
        blocks["segment"] = np.arange(len(blocks))
    members = raw.members if isinstance(raw, GzipFile) else []
    return ShardIndex(
        shard=shard,
        blocks=blocks,
        members=np.array(members, dtype=np.int64).reshape(-1, 2),
        first_line=divider.first_line,
        content=xxh3_128(blocks.tobytes()).hexdigest(),
    )


class _Divider:
    """Divides lines into blocks of records, which are the lines that are not blank."""

    def __init__(self, block_records: int) -> None:
        self._block_records = block_records
        self._blocks: list[tuple[int, ...]] = []
        self._line = self._begin_line = 1
        self._position = self._begin = 0
        self._in_block = 0
        self._hash = xxh3_64()
        self.records = 0
        self.first_line = b""

    def add(self, line: bytes) -> bool:
        """Add a line; whether a block ends with it."""
        self._line += 1
        self._position += len(line)
        self._hash.update(line)
        if not line.strip():
            return False
        self.first_line = self.first_line or line
        self.records += 1
        self._in_block += 1
        size = self._position - self._begin
        if self._in_block < self._block_records and size < BLOCK_BYTES:
            return False
        self._end_block()
        return True

    def _end_block(self) -> None:
        if self._in_block:
            first = self.records - self._in_block
            self._blocks.append((first, self._in_block, self._begin, self._position,
                                 self._begin_line, 0, self._hash.intdigest()))  # fmt: skip
        self._begin, self._begin_line, self._in_block = self._position, self._line, 0
        self._hash = xxh3_64()

    def finish(self) -> npt.NDArray[Any]:
        """The blocks."""
        self._end_block()
        return np.array(self._blocks, dtype=BLOCK)


def _refuse_other_forms(begin: bytes, name: str) -> None:
    """Raise UserError for a JSON list, and for encodings with more than one byte a character."""
    if begin.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        raise UserError(
            "is UTF-16 or UTF-32",
            where=name,
            rule="streaming reads JSON lines in UTF-8",
            advice="Convert the file (iconv -t UTF-8), or set streaming: False",
        )
    if begin.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise UserError(
            "is a JSON list",
            where=name,
            rule="streaming reads JSON lines: one object a line",
            advice="Convert the file (jq -c '.[]'), or set streaming: False",
        )
