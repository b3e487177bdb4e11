"""The order of a stream: which block is the n-th of the run, and the order of records in it.

Owns pure functions of (index, seed, number). Invariants: an epoch has every block once; the
formulas never change, because a resumed run depends on them (tests have golden values).

Blocks of a segment (a row group of Parquet, a gzip file) are read in order, since a position inside
is reached only by reading what is before it; a block of plain JSON lines is a segment by itself.
An epoch permutes the segments of all shards and reads SEGMENTS_AT_ONCE of them at a time, one block
of each in turn:

    permuted segments    C A D B       two at a time: C A, then D B
    their blocks         c0 c1 c2 / a0 a1 / d0 / b0 b1
    the epoch            c0 a0 c1 a1 c2 | d0 b0 b1

Without shuffling, blocks and records are in the order of the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64

from launcher.data.order import GlobalOrder
from launcher.data.rows import ENDLESS
from launcher.data.streaming.index import ShardIndex

SEGMENTS_AT_ONCE = 8

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """One block of a source."""

    number: int
    """Among all blocks of the source, in the order of the files."""
    index: ShardIndex
    entry: Any
    """Its entry of `index.blocks`."""
    is_first: bool
    """Whether it begins with the first record of its shard."""

    @property
    def records(self) -> int:
        return int(self.entry["records"])


class BlockOrder:
    """The blocks of a run, epoch after epoch."""

    def __init__(self, source: Sequence[ShardIndex], seed: int, *, shuffle: bool) -> None:
        self._source, self._seed, self._shuffle = source, seed, shuffle
        counts = np.array([len(index.blocks) for index in source], dtype=np.int64)
        self._ends = np.cumsum(counts)
        self._epoch: tuple[int, Ints] = (-1, np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        """Blocks of an epoch."""
        return int(self._ends[-1])

    def block(self, number: int) -> Block:
        """The block with this number in the run, from 0."""
        epoch, place = divmod(number, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self.epoch(epoch)
        return self._of_source(int(self._epoch[1][place]))

    def epoch(self, epoch: int) -> Ints:
        """The numbers of the blocks in the source, in the order of one epoch."""
        if not self._shuffle:
            return np.arange(len(self))
        segments, within = self._segments
        count = int(segments[-1]) + 1
        samples = epoch * count + np.arange(count)
        place = np.empty(count, dtype=np.int64)
        place[GlobalOrder(count, self._seed).rows(samples)] = np.arange(count)
        mine = place[segments]
        return np.lexsort((mine, within, mine // SEGMENTS_AT_ONCE))

    def records(self, block: Block, number: int, count: int) -> Ints:
        """The order of `count` samples of the block with this number in the run."""
        if not self._shuffle or not count:
            return np.arange(count)
        seed = xxh3_64(f"{self._seed}/{block.number}".encode()).intdigest()
        epoch = number // len(self)
        return GlobalOrder(count, seed).rows(epoch * count + np.arange(count))

    def _of_source(self, number: int) -> Block:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        index = self._source[shard]
        inside = number - int(self._ends[shard]) + len(index.blocks)
        return Block(number, index, index.blocks[inside], inside == 0)

    @cached_property
    def _segments(self) -> tuple[Ints, Ints]:
        """For each block the number of its segment in the source, and its place in the segment."""
        shards = np.repeat(np.arange(len(self._source)), np.diff(self._ends, prepend=0))
        own = np.concatenate([index.blocks["segment"] for index in self._source])
        begins = np.ones(len(own), dtype=bool)
        begins[1:] = (np.diff(shards) != 0) | (np.diff(own) != 0)
        segments = np.cumsum(begins) - 1
        return segments, np.arange(len(own)) - np.flatnonzero(begins)[segments]


@dataclass(frozen=True)
class StreamOrder:
    """The order of the samples of a stream: row n of it is sample n of the run."""

    seed: int
    shuffle: bool = True
    size: int = ENDLESS

    def rows(self, global_samples: npt.ArrayLike) -> Ints:
        """The rows of many global samples: the same numbers."""
        return np.asarray(global_samples, dtype=np.int64)
