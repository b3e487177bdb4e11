"""Audit: the checksums of files, checked while their bytes are streamed.

Owns the check of what a stream reads, without reading any byte twice. A block is hashed when any
of it is used; the rest of it is read for that. Unused blocks are not read. Cheapest when files are
read front to back, correct in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import UserError
from launcher.weights.formats.rank_metadata import Checksums, read_rank_metadata
from launcher.weights.formats.safetensors import Header
from launcher.weights.reading.checksums import changed, check_file
from launcher.weights.reading.transfer import Bytes, read_exactly
from launcher.weights.source import Source
from launcher.weights.streaming.portion import Taken


class Audit:
    """The files of a source that have checksums. For one thread at a time.

    A file with one checksum over all of it is read for that first. Raises `UserError`.
    """

    def __init__(self, source: Source, descriptor: Callable[[Path], int]) -> None:
        self._files = {}
        for path, header in source.headers.items():
            check_file(path, header)
            rank_metadata = (
                read_rank_metadata(path, header) if "slipway" in header.metadata else None
            )
            if rank_metadata is not None and rank_metadata.checksums.values:
                self._files[path] = _Blocks(path, header, rank_metadata.checksums, descriptor)

    def take(self, taken: Taken) -> None:
        """Hash the next bytes that were read. Raises `UserError` when a block was changed."""
        blocks = self._files.get(taken.path)
        if blocks is not None:
            blocks.take(taken.position, taken.view)

    def finish(self) -> None:
        """Check the blocks that are not complete yet. Raises `UserError`."""
        for blocks in self._files.values():
            blocks.end()


class _Blocks:
    """One file: the block that is being hashed, and the position in it."""

    def __init__(
        self, path: Path, header: Header, checksums: Checksums, descriptor: Callable[[Path], int]
    ) -> None:
        self._path, self._header, self._checksums = path, header, checksums
        self._descriptor = descriptor
        self._index: int | None = None
        self._position = self._stop = 0
        self._hasher = xxhash.xxh3_64()

    def take(self, position: int, view: memoryview) -> None:
        while view:
            index = (position - self._header.data_start) // self._checksums.block_bytes
            if index != self._index or position < self._position:
                self.end()
                self._begin(index)
            self._fill(position)
            part = view[: self._stop - position]
            self._hasher.update(part)
            position += len(part)
            view, self._position = view[len(part) :], position
            if position == self._stop:
                self.end()

    def end(self) -> None:
        """Finish the current block, if any."""
        if self._index is None:
            return
        self._fill(self._stop)
        if self._hasher.hexdigest() != self._checksums.values[self._index]:
            raise UserError(
                changed(self._path, self._header, self._start(self._index), self._stop),
                advice="Choose another checkpoint",
            )
        self._index = None

    def _begin(self, index: int) -> None:
        self._index, self._position = index, self._start(index)
        end = self._position + self._checksums.block_bytes
        self._stop = min(end, self._header.file_bytes)
        self._hasher = xxhash.xxh3_64()

    def _start(self, index: int) -> int:
        return self._header.data_start + index * self._checksums.block_bytes

    def _fill(self, position: int) -> None:
        """Hash the bytes up to `position`, which the stream does not use."""
        if self._position < position:
            gap: Bytes = np.empty(position - self._position, np.uint8)
            read_exactly(self._descriptor(self._path), self._path, gap.data, self._position)
            self._hasher.update(gap.data)
            self._position = position
