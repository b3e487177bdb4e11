"""The producer: makes the rows of blocks ahead of training.

Owns the loop that fills a ring, in a process of its own (`worker`) or in a thread. Invariants: the
rows of a block are a pure function of its number; the ring has at most `cache_bytes` and
BLOCKS_AHEAD, unless one batch needs more; an error ends the producer and is left in the ring, so
that readers meet it when they need the block.
"""

from __future__ import annotations

import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.schema import DatasetSection
from launcher.data.build import assign_rows, open_rows
from launcher.data.chat_rendering import ChatSettings
from launcher.data.column_map import MappedColumns
from launcher.data.loaders import loader_of
from launcher.data.loaders.base import Log, Recipe
from launcher.data.records import Record
from launcher.data.store import TokenWriter
from launcher.data.streaming.index import ShardIndex
from launcher.data.streaming.order import Block, BlockOrder
from launcher.data.streaming.ranges import Ranges
from launcher.data.streaming.reading import BlockReader
from launcher.data.streaming.ring import Ring
from launcher.data.streaming.shards import Shard
from launcher.data.tally import Tally
from launcher.errors import Problem, UserError
from launcher.json_text import printable

BLOCKS_AHEAD = 32
POLL_SECONDS = 0.02
WARNINGS_SECONDS = 600.0


Records = tuple[Block, list[Record | UserError], Record | None]
"""A block, its records, and the first one of its shard where that is not among them."""


@dataclass(frozen=True, kw_only=True)
class Production:
    """What a producer needs; it can be sent to another process."""

    section: DatasetSection
    tokenizer: Any
    seq_length: int
    model_config: Mapping[str, Any]
    chat: ChatSettings
    source: Sequence[ShardIndex]
    seed: int
    ring: Path
    readers: int
    """Ranks that read the ring."""

    def recipe(self, log: Log) -> Recipe:
        return Recipe(
            section=self.section,
            tokenizer=self.tokenizer,
            seq_length=self.seq_length,
            cache_dir=self.ring.parent,
            log=log,
            model_config=self.model_config,
            chat=self.chat,
        )


def produce(
    production: Production,
    stopped: threading.Event,
    log: Log,
    open_shard: Callable[[Shard], Ranges] = Shard.ranges,
) -> None:
    """Fill the ring until `stopped` is set. An error is left in the ring."""
    ring = Ring(production.ring)
    try:
        with closing(_Producer(production, ring, log, open_shard)) as producer:
            while not stopped.is_set():
                if not producer.make_next():
                    stopped.wait(POLL_SECONDS)
    except UserError as error:
        ring.fail(error.problems, is_user_error=True)
    except OSError as error:
        if production.ring.exists():  # else the job has ended
            log(str(_not_written(error)))
            ring.fail([_not_written(error)], is_user_error=True)
    except BaseException as error:
        log(traceback.format_exc())
        what = f"the producer of the stream failed: {type(error).__name__}: {error}"
        ring.fail([Problem(what=what)], is_user_error=False)


def _not_written(error: OSError) -> Problem:
    return Problem(
        what=f"a block of the stream cannot be written ({error.strerror or error})",
        where=str(error.filename or ""),
        rule="blocks that are tokenized ahead are kept in the data cache",
        advice="Free some space, set a smaller streaming_cache_gb, or set another output_dir",
    )


class _Producer:
    def __init__(
        self, production: Production, ring: Ring, log: Log, open_shard: Callable[[Shard], Ranges]
    ) -> None:
        self._production, self._ring = production, ring
        self._recipe = production.recipe(log)
        loader = self._recipe.loader
        conversion = loader_of(loader).from_records
        assert conversion is not None
        self._conversion = conversion
        column = conversion.column(loader) if conversion.column and not loader.column_map else None
        self._reader = BlockReader(column, open_shard)
        self._order = BlockOrder(production.source, production.seed, shuffle=loader.is_shuffled)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._ahead: dict[int, Future[Records]] = {}
        self._limit = int(loader.streaming_cache_gb * 2**30)
        self._bytes: dict[int, int] = {}
        """Of the blocks that are in the ring."""
        self._columns = MappedColumns(loader.column_map) if loader.column_map else None
        self._with_unseen = _Passes(len(self._order))
        """Blocks while a column of column_map was in no record."""
        self._without_rows = _Passes(len(self._order))
        self._tally = Tally()
        self._warnings = _Warnings(log)

    def make_next(self) -> bool:
        """Make the first block that is needed and not there; False when there is none."""
        readers = self._ring.readers(self._production.readers)
        if not readers:
            return False
        low, wanted = min(low for low, _ in readers), max(wanted for _, wanted in readers)
        if len(readers) == self._production.readers:
            self._delete_before(low)
        for number in range(low, max(wanted + 1, low + BLOCKS_AHEAD)):
            # What a rank waits for is looked at: it may have been deleted by somebody.
            if number in self._bytes and (number > wanted or self._ring.block(number).exists()):
                continue
            if number > wanted and not self._has_room():
                return False
            self._make(number)
            return True
        return False

    def _has_room(self) -> bool:
        """Whether one more block fits, as large as the largest that is there."""
        sizes = self._bytes.values()
        return not sizes or sum(sizes) + max(sizes) <= self._limit

    def _delete_before(self, low: int) -> None:
        for number in [number for number in self._bytes if number < low]:
            # In this order: a reader that goes back waits for the block to be made again.
            shutil.rmtree(self._ring.block(number), ignore_errors=True)
            del self._bytes[number]

    def _make(self, number: int) -> None:
        scratch = self._ring.folder / f".{number}.tmp"
        scratch.mkdir()
        try:
            metadata = self._write(number, scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)  # the error needs room on a full disk
            raise
        rows = len(open_rows(scratch, self._recipe))
        self._bytes[number] = sum(file.stat().st_size for file in scratch.iterdir())
        scratch.rename(self._ring.block(number))
        if self._without_rows.is_complete(number, not rows):
            raise self._nothing_to_train_on(metadata)
        lines = self._tally.warnings(self._recipe.seq_length) + self._warnings.of_rows()
        lines += self._unseen_columns()
        self._warnings.report(lines, (number + 1) % len(self._order) == 0)

    def _write(self, number: int, folder: Path) -> dict[str, Any]:
        """Write the rows of a block; returns the metadata of its folder."""
        block, records, first = self._read(number)
        samples = list(self._conversion.samples(records, self._recipe.loader, self._tally, first))
        self._tally.documents += len(samples)
        order = self._order.records(block, number, len(samples))
        metadata = self._tokenized(folder, (samples[at] for at in order))
        metadata["warnings"] = self._tally.warnings(self._recipe.seq_length)
        assign_rows(folder, self._recipe, metadata, durable=False)
        self._warnings.count(metadata)
        return metadata

    def _tokenized(self, folder: Path, samples: Iterable[Any]) -> dict[str, Any]:
        """Write the token store of a block; returns its metadata."""
        loader = loader_of(self._recipe.loader)
        writer = TokenWriter(folder, with_targets=loader.has_targets, durable=False)
        try:
            for batch in loader.tokenize(samples, self._recipe, self._tally):
                writer.add(*batch)
            return writer.finish()
        finally:
            writer.close()

    def _read(self, number: int) -> Records:
        """The records of a block; those of the next one are read while it is tokenized."""
        ahead = self._ahead.get(number) or self._thread.submit(self._records, number)
        records = ahead.result()
        self._ahead = {number + 1: self._thread.submit(self._records, number + 1)}
        return records

    def _records(self, number: int) -> Records:
        """Called in one thread alone, which has the readers and the order."""
        block = self._order.block(number)
        first, columns = self._reader.first_record(block), self._columns
        if columns is None:
            return block, list(self._reader.records(block)), first
        found = columns.map(self._reader.records(block), begins_file=first is None)
        records = list(found)
        if self._with_unseen.is_complete(number, bool(columns.unseen)):
            columns.finish()
        return block, records, None if first is None else columns.first(first)

    def _unseen_columns(self) -> list[str]:
        """The warning of columns that no record had until now."""
        unseen = self._columns.unseen if self._columns is not None else []
        names = ", ".join(f"`{printable(name)}`" for name in unseen)
        return [f"warning: no record has {names} of column_map"] if names else []

    def close(self) -> None:
        """End the thread that reads."""
        self._thread.shutdown(cancel_futures=True)

    def _nothing_to_train_on(self, metadata: dict[str, Any]) -> UserError:
        shown = ", ".join(index.shard.name for index in self._production.source[:3])
        return UserError(
            f"data_loader: {shown} has nothing to train on: {len(self._order)} block(s) in a row "
            "have no row",
            rule="a dataset needs at least two tokens of text, or one answer that fits into a row",
            advice="; ".join(metadata["warnings"]) or "Look into the files",
        )


class _Passes:
    """Whether something was so in all blocks of an epoch."""

    def __init__(self, blocks: int) -> None:
        self._blocks, self._count, self._newest = blocks, 0, -1

    def is_complete(self, number: int, is_so: bool) -> bool:
        """Whether it was so in each block of an epoch that ends with the block `number`."""
        self._count = (self._count if number == self._newest + 1 else 0) + 1 if is_so else 0
        self._newest = number
        is_end = (number + 1) % self._blocks == 0
        return is_so and is_end and self._count >= self._blocks


class _Warnings:
    """Logs what was left out: a new kind at once, new counts at the end of an epoch or later."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._shown: list[str] = []
        self._kinds = 0
        self._time = time.monotonic()
        self._cut = 0

    def count(self, metadata: dict[str, Any]) -> None:
        """Count the samples of a block that were cut."""
        self._cut += metadata.get("cut", 0)

    def of_rows(self) -> list[str]:
        """The warning of samples that were cut, where there are some."""
        return [f"warning: {self._cut} sample(s) longer than a row were cut"] if self._cut else []

    def report(self, lines: list[str], is_end_of_epoch: bool) -> None:
        """Log the lines that are new where it is time to."""
        now = time.monotonic()
        is_late = now - self._time > WARNINGS_SECONDS
        if len(lines) > self._kinds or is_end_of_epoch or is_late:
            for line in lines:
                if line not in self._shown:
                    self._log(f"stream so far: {line}")
            self._shown, self._kinds, self._time = lines, len(lines), now
