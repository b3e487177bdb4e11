"""Block files: a new file written in blocks from several threads, durable in the end.

Owns how bytes get to the disk. On a local disk they bypass the page cache (O_DIRECT): a checkpoint
is not worth a place in the cache, and no writeback competes with the training step for the CPU.
O_DIRECT needs memory and offsets at multiples of `ALIGNMENT`, so a block is gathered in a buffer,
which costs the same copy as the cache would. Elsewhere (in memory, over a network) each piece is
written from where it is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import numpy as np

ALIGNMENT = 4096
"""Of offsets, lengths and memory, in bytes: no disk needs more."""

_DIRECT = getattr(os, "O_DIRECT", 0)
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
"""Of Linux: sync_file_range(descriptor, offset, bytes, flags)."""
_BEGIN_WRITING = 2


class BlockFile:
    """A new file at `path`. Blocks have `block_bytes` (the last may have fewer) and begin at
    multiples of `ALIGNMENT`; `writers` threads write at a time. Raises `OSError`."""

    def __init__(self, path: Path, block_bytes: int, writers: int) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
        aligned = block_bytes % ALIGNMENT == 0
        self._is_direct = aligned and _is_on_disk(self._descriptor) and _go_direct(self._descriptor)
        for _ in range(writers if self._is_direct else 0):
            self._buffers.put(mmap.mmap(-1, block_bytes))

    def write(self, pieces: Sequence[memoryview], position: int) -> None:
        """Write `pieces`, one after another, from `position` on. If they do not end at a multiple
        of `ALIGNMENT`, the file may be longer until it is finished."""
        if self._is_direct:
            self._write_direct(pieces, position)
            return
        start = position
        for piece in pieces:
            write_all(self._descriptor, piece, position)
            position += len(piece)
        begin_writing(self._descriptor, start, position - start)

    def _write_direct(self, pieces: Sequence[memoryview], position: int) -> None:
        aligned = _one_aligned(pieces)
        if aligned is not None:
            write_all(self._descriptor, aligned, position)
            return
        buffer = self._buffers.get()
        try:
            memory = np.frombuffer(buffer, np.uint8)
            filled = 0
            for piece in pieces:
                memory[filled : filled + len(piece)] = np.frombuffer(piece, np.uint8)
                filled += len(piece)
            padded = -(-filled // ALIGNMENT) * ALIGNMENT
            memory[filled:padded] = 0
            with memoryview(buffer) as view:
                write_all(self._descriptor, view[:padded], position)
        finally:
            self._buffers.put(buffer)

    def finish(self, nbytes: int) -> None:
        """Give the file its size and make it durable."""
        os.ftruncate(self._descriptor, nbytes)
        os.fsync(self._descriptor)

    def __enter__(self) -> BlockFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        os.close(self._descriptor)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._path)


def _one_aligned(pieces: Sequence[memoryview]) -> memoryview | None:
    """`pieces` as one view, where they are contiguous in memory and aligned."""
    first = end = _address(pieces[0])
    for piece in pieces:
        if _address(piece) != end:
            return None
        end += len(piece)
    if first % ALIGNMENT or end % ALIGNMENT:
        return None
    return memoryview((ctypes.c_ubyte * (end - first)).from_address(first)).cast("B")


def _address(piece: memoryview) -> int:
    return np.frombuffer(piece, np.uint8).ctypes.data


def _is_on_disk(descriptor: int) -> bool:
    """Whether the file is on a block device of this machine; other file systems have the major
    number 0."""
    return os.major(os.fstat(descriptor).st_dev) != 0


def _go_direct(descriptor: int) -> bool:
    """Bypass the page cache from now on, where the file system can."""
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _DIRECT)
    except OSError:
        return False
    return bool(_DIRECT)


def begin_writing(descriptor: int, position: int, nbytes: int) -> None:
    """Start writeback of a range of a file, so that fsync waits for little."""
    if _SYNC_FILE_RANGE is not None:
        place = (ctypes.c_int64(position), ctypes.c_int64(nbytes))
        _SYNC_FILE_RANGE(descriptor, *place, _BEGIN_WRITING)


def write_all(descriptor: int, view: memoryview, position: int) -> None:
    """Write all of `view` to the file from `position` on."""
    was_refused = False
    while view:
        try:
            count = os.pwrite(descriptor, view, position)
        except OSError as error:
            if error.errno != errno.EINVAL or was_refused:
                raise
            was_refused = True
            _leave_direct(descriptor)  # retry, also where another thread has left it already
            continue
        view, position = view[count:], position + count


def _leave_direct(descriptor: int) -> None:
    """Write through the page cache from now on, after a partial write or one that is not aligned as
    this disk needs."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
