"""The rows of a stream, as a rank reads them: row n is the n-th of the run.

Owns the position of a stream: which row each block begins with. Invariants:

1. The number of rows of a block is known only when it is made, so that the first row of a block is
   found by walking over the blocks before it, from the nearest position that is known: the start
   of the run, the cursor of a checkpoint, or the journal in the cache folder.
2. What is read is a function of the row number alone; the cursor and the journal only save work.
3. Going back is possible: the producer makes the blocks again.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from xxhash import xxh3_64_intdigest

from launcher.data.build import open_rows
from launcher.data.loaders.base import Recipe
from launcher.data.rows import ENDLESS, Counts, Ints, Row, Rows
from launcher.data.streaming.producer import POLL_SECONDS
from launcher.data.streaming.ring import Ring
from launcher.errors import UserError

MESSAGE_SECONDS = 10.0
_ENTRY = struct.Struct("<qqQ")
"""Of the journal: block, its first row, and a hash of both."""


class Producer(Protocol):
    """What makes the blocks, as the leading rank knows it."""

    def error(self) -> Exception | None:
        """How it has ended, where it could not leave that in the ring."""
        ...

    def close(self) -> None: ...


class StreamingRows:
    """Rows without an end."""

    def __init__(
        self,
        ring: Ring,
        reader: int,
        recipe: Recipe,
        journal: Journal,
        start: Callable[[], Producer] | None,
        end: Callable[[], None] | None = None,
    ) -> None:
        """`reader`: the number of this rank on its machine. `start`: starts the producer, on the
        leading rank alone, which also writes the journal; `end` is called when the stream is
        closed."""
        self._ring, self._reader, self._recipe = ring, reader, recipe
        self._journal, self._start, self._end = journal, start, end
        self._leads = start is not None
        self._producer: Producer | None = None
        self._known = {0: 0}
        """Blocks to their first rows: where a walk may begin."""
        self._base = 0
        self._firsts = array("q", [0])
        """The first rows of the blocks from `_base` on; the last is that of a block not opened."""
        self._low, self._wanted = -1, -1
        self._opened: dict[int, Rows] = {}
        self._lock = threading.RLock()
        self._closed = threading.Event()

    def __len__(self) -> int:
        return ENDLESS

    def row(self, index: int) -> Row:
        with self._lock:
            block, inside = self._locate(index)
            return self._open(block).row(inside)

    def counts(self, indices: Ints) -> Counts:
        """As of all rows; the blocks before the first of `indices` are given up."""
        targets, tokens = np.zeros_like(indices), np.zeros_like(indices)
        with self._lock:
            if indices.size:
                self._give_up_before(self._locate(int(indices.min()), walks=True)[0])
            places = [self._locate(int(index)) for index in indices]
            blocks = np.array([block for block, _ in places], dtype=np.int64)
            inside = np.array([number for _, number in places], dtype=np.int64)
            for block in np.unique(blocks):
                mine = blocks == block
                found = self._open(int(block)).counts(inside[mine])
                targets[mine], tokens[mine] = found
        return Counts(targets, tokens)

    def cursor(self, row: int) -> dict[str, int]:
        """Where a resumed run that begins with `row` may start: a block and its first row."""
        with self._lock:
            block, first = self._nearest(row)
            return {"block": block, "first_row": first}

    def seek(self, cursor: Mapping[str, Any] | None) -> None:
        """Learn the position in a checkpoint."""
        if cursor is not None:
            with self._lock:
                self._known[int(cursor["block"])] = int(cursor["first_row"])

    def close(self) -> None:
        """End the producer; whoever waits for a block gives up."""
        self._closed.set()
        if self._producer is not None:
            self._producer.close()
        if self._end is not None:
            self._end()

    def _locate(self, row: int, *, walks: bool = False) -> tuple[int, int]:
        """The block of a row, and its number in it. With `walks`, the blocks that are passed are
        not kept."""
        if not self._firsts[0] <= row < self._firsts[-1]:
            self._go_near(row)
        while row >= self._firsts[-1]:
            block = self._base + len(self._firsts) - 1
            if walks:
                self._give_up_before(block)
            first = self._firsts[-1] + len(self._open(block))
            self._firsts.append(first)
            if self._leads:
                self._journal.add(block + 1, first)
        at = bisect_right(self._firsts, row) - 1
        return self._base + at, row - self._firsts[at]

    def _go_near(self, row: int) -> None:
        """Begin the walk at the last position that is known before `row`, where it is nearer."""
        block, first = self._nearest(row)
        walked = self._base + len(self._firsts) - 1
        if row < self._firsts[0] or block > walked:
            self._base, self._firsts = block, array("q", [first])

    def _nearest(self, row: int) -> tuple[int, int]:
        found = [self._journal.nearest(row), *self._known.items()]
        if self._firsts[0] <= row:
            at = bisect_right(self._firsts, row) - 1
            found.append((self._base + at, self._firsts[at]))
        # Blocks without rows begin with the same row: the last of them saves most.
        return max((block, first) for block, first in found if first <= row)

    def _give_up_before(self, block: int) -> None:
        self._publish(block, max(self._wanted, block))
        for number in [number for number in self._opened if number < block]:
            del self._opened[number]

    def _publish(self, low: int, wanted: int) -> None:
        if (low, wanted) != (self._low, self._wanted):
            self._low, self._wanted = low, wanted
            self._ring.publish_reader(self._reader, low, wanted)

    def _open(self, block: int) -> Rows:
        if block not in self._opened:
            self._opened[block] = self._wait_for(block)
        return self._opened[block]

    def _start_producer(self) -> None:
        start, self._start = self._start, None
        if start is None:
            return
        try:
            self._producer = start()
        except UserError as error:  # which the other ranks of the machine wait for
            self._ring.fail(error.problems, is_user_error=True)
            raise

    def _error(self) -> Exception | None:
        is_gone = self._leads and not self._ring.folder.exists()
        if is_gone and not self._closed.is_set():  # this rank deletes it when it closes
            return UserError(
                "was deleted while the job runs",
                where=str(self._ring.folder),
                rule="blocks that are tokenized ahead are kept in the data cache",
                advice="Resume the run",
            )
        error = None if self._producer is None else self._producer.error()
        return self._ring.error() or error

    def _wait_for(self, block: int) -> Rows:
        started = time.monotonic()
        messages = 0
        low = block if self._low < 0 else min(self._low, block)
        self._publish(low, block)
        self._start_producer()
        while not self._closed.is_set():
            error = self._error()  # first: a block may be ready before an error
            try:
                return open_rows(self._ring.block(block), self._recipe)
            except FileNotFoundError:
                if error is not None:
                    raise error from None
            if time.monotonic() - started > MESSAGE_SECONDS * (messages + 1):
                messages += 1
                self._recipe.log(
                    f"waiting for data: block {block} of the stream is being tokenized"
                )
            self._closed.wait(POLL_SECONDS)
        raise RuntimeError("the stream was closed")


class Journal:
    """The first rows of blocks, as runs of the same data and order found them.

    An append-only file of _ENTRY, which several jobs may write to. Entries with a wrong hash are
    not used, nor is anything after a torn one. Losing it costs time alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        entire = content[: len(content) // _ENTRY.size * _ENTRY.size]
        entries = [
            (first, block)
            for block, first, check in _ENTRY.iter_unpack(entire)
            if check == _check(block, first)
        ]
        self._entries = np.array(sorted(set(entries)) or np.zeros((0, 2)), dtype=np.int64)
        """(first row, block): blocks are in order as well."""

    def nearest(self, row: int) -> tuple[int, int]:
        """The last block that is known to begin at or before `row`, and its first row."""
        at = int(np.searchsorted(self._entries[:, 0], row, side="right"))
        return (int(self._entries[at - 1, 1]), int(self._entries[at - 1, 0])) if at else (0, 0)

    def add(self, block: int, first: int) -> None:
        """Append one entry. A file that cannot be written is none."""
        at = int(np.searchsorted(self._entries[:, 1], block))
        if at < len(self._entries) and self._entries[at, 1] == block:
            return
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, _ENTRY.pack(block, first, _check(block, first)))
            finally:
                os.close(descriptor)
        except OSError:
            return


def _check(block: int, first: int) -> int:
    return xxh3_64_intdigest(struct.pack("<qq", block, first))
