"""Bytes from files into memory: positioned reads of strided copies. Torch-free.

Owns how a run is read. Long runs are read directly into their place. Short runs would cost a system
call each: where they are contiguous in the file, one read gets them all and they are spread in
memory; otherwise they are copied from a mapped window of the file (`window.py`).
Invariant: a file has the size it had when its header was checked, or the read fails with an error.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.weights.reading.strided_copy import StridedCopy
from launcher.weights.reading.window import Bytes, Window, changed, ended

SHORT_RUN = 16 << 10
"""Runs shorter than this do not get a system call of their own."""

WORDS = (1, 2, 4, 8)
"""Lengths of a run that are copied as one integer."""

TILE = 256
"""Rows and columns of what is copied at a time where dims are swapped."""

Words = npt.NDArray[np.unsignedinteger[Any]]

VIEWS = 256
"""Buffers of one preadv call; systems allow 1,024 or more."""


class Files:
    """Files open for reading, each opened once, until `close`. Used from several threads, each with
    a window of its own."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._windows: dict[int, Window] = {}

    def descriptor(
        self, path: Path, expected_bytes: int | None = None, modified: int | None = None
    ) -> int:
        """The descriptor of `path`. Raises `UserError` when it cannot be opened, or when size or
        modification time (nanoseconds) are not as expected."""
        with self._lock:
            if path not in self._open:
                self._open[path] = _open(path, expected_bytes, modified)
            return self._open[path]

    def window(self) -> Window:
        """The window of the calling thread."""
        thread = threading.get_ident()
        if thread not in self._windows:
            self._windows[thread] = Window()
        return self._windows[thread]

    def read(self, path: Path, views: Sequence[memoryview], position: int) -> int:
        """Fill `views` one after another with the bytes of `path` from `position` on. Returns their
        number.

        Raises `UserError` when the file cannot be read or ends too early.
        """
        descriptor, nbytes = self.descriptor(path), sum(map(len, views))
        self.window().pull(descriptor, path, position, position + nbytes)
        read_exactly(descriptor, path, views, position)
        return nbytes

    def close(self) -> None:
        """Close all files; no thread may still read them."""
        while self._windows:
            self._windows.popitem()[1].close()
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Files:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()


def _open(path: Path, expected_bytes: int | None, modified: int | None) -> int:
    try:
        descriptor = _descriptor(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise UserError(f"{path} is not a file")
    problem = None
    if expected_bytes is not None and found.st_size != expected_bytes:
        problem = changed(f"{path} has {found.st_size} bytes",
                           f"it had {expected_bytes} when its header was read")  # fmt: skip
    elif modified is not None and found.st_mtime_ns != modified:
        problem = changed(f"{path} was replaced", "it must stay as its header was read")
    if problem is not None:
        os.close(descriptor)
        raise problem
    return descriptor


def _descriptor(path: Path) -> int:
    """Open a file; raises the limit of open files if needed, as a save has a file for each rank."""
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE or soft == hard:
            raise
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return os.open(path, flags)


def read_strided(files: Files, path: Path, strided_copy: StridedCopy, memory: Bytes) -> int:
    """Read the runs of `strided_copy` from `path` into `memory` (its first byte is offset 0).

    Returns the bytes read.
    """
    if not strided_copy.nbytes:
        return 0
    if not strided_copy.loops or strided_copy.length >= SHORT_RUN:
        view, descriptor, window = memory.data, files.descriptor(path), files.window()
        for position, start, length in strided_copy:
            window.pull(descriptor, path, position, position + length)
            read_exactly(descriptor, path, view[start : start + length], position)
    elif strided_copy.file_span == strided_copy.nbytes:
        staging = np.empty(strided_copy.nbytes, np.uint8)
        files.read(path, [staging.data], strided_copy.file_offset)
        _spread(strided_copy, staging, memory)
    else:
        start, stop = strided_copy.file_offset, strided_copy.file_offset + strided_copy.file_span
        source = files.window().over(files.descriptor(path), path, start, stop)
        _spread(strided_copy, source, memory)
    return strided_copy.nbytes


class Transfer(NamedTuple):
    """A strided copy from a file, and the memory it goes to."""

    path: Path
    strided_copy: StridedCopy
    memory: Bytes


def read_all(files: Files, transfers: Iterable[Transfer]) -> int:
    """Read transfers. Adjacent single runs, such as the small tensors of many experts, are read in
    one system call. Returns the bytes read."""
    done, row = 0, list[Transfer]()
    for transfer in transfers:
        if row and (len(row) == VIEWS or not _is_next(row[-1], transfer)):
            done += _read_row(files, row)
            row = []
        if transfer.strided_copy.loops:
            done += read_strided(files, *transfer)
        elif transfer.strided_copy.nbytes:
            row.append(transfer)
    return done + _read_row(files, row)


def _is_next(last: Transfer, transfer: Transfer) -> bool:
    """Whether a run begins where `last` ends."""
    stop = last.strided_copy.file_offset + last.strided_copy.length
    return transfer.path == last.path and transfer.strided_copy.file_offset == stop


def _read_row(files: Files, row: Sequence[Transfer]) -> int:
    """Read adjacent single runs in one call. Returns the bytes read."""
    if not row:
        return 0
    views = []
    for _, strided_copy, memory in row:
        view = memory.data[
            strided_copy.memory_offset : strided_copy.memory_offset + strided_copy.length
        ]
        if len(view) != strided_copy.length:
            raise ValueError(f"{strided_copy} do not fit into {len(memory)} bytes of memory")
        views.append(view)
    return files.read(row[0].path, views, row[0].strided_copy.file_offset)


def _spread(strided_copy: StridedCopy, source: Bytes, memory: Bytes) -> None:
    """Copy the runs from `source`, whose first byte is that of the first run, to their places."""
    loops, kind = [*strided_copy.loops], np.dtype(np.uint8)
    if strided_copy.length in WORDS:  # single elements, as in a transposed matrix
        kind = np.dtype(f"u{strided_copy.length}")
    else:
        loops.append((strided_copy.length, 1, 1))
    shape, file_strides, memory_strides = zip(*loops, strict=True)
    target = np.ndarray(shape, kind, memory, strided_copy.memory_offset, memory_strides)
    origin = np.ndarray(shape, kind, source, 0, file_strides)
    if kind.itemsize == strided_copy.length and len(loops) > 1:
        _in_tiles(target, origin)
    else:
        np.copyto(target, origin)


def _in_tiles(target: Words, origin: Words) -> None:
    """Copy tile by tile in the last two dims: where they are swapped, lines of the cache that hold
    neighbours in one of the arrays are used up before they are dropped."""
    rows, columns = target.shape[-2:]
    for row in range(0, rows, TILE):
        for column in range(0, columns, TILE):
            tile = (..., slice(row, row + TILE), slice(column, column + TILE))
            target[tile] = origin[tile]


def read_exactly(
    descriptor: int, path: Path, view: memoryview | Sequence[memoryview], position: int
) -> None:
    """Fill one or more views with the bytes of the file from `position` on."""
    views = [part for part in ([view] if isinstance(view, memoryview) else view) if part]
    while views:
        try:
            count = os.preadv(descriptor, views, position)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise ended(path)
        position += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
