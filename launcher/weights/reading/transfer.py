"""Bytes from files into memory: positioned reads of runs. Torch-free.

Owns how a run is read. Long runs are read straight into their place. Short ones would cost a system
call each: where the file has them back to back they come in one read and are spread in memory;
where it has not, they are copied out of a mapped window of the file (`window.py`).
Invariant: a file is believed to be as long as it was when its header was checked, or the read fails
and says so.
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
from typing import NamedTuple

import numpy as np

from launcher.errors import UserError
from launcher.weights.reading.strided_copy import StridedCopy
from launcher.weights.reading.window import Bytes, Window, changed, ended

SHORT_RUN = 16 << 10
"""Bytes below which a run is not worth a system call of its own."""

VIEWS = 256
"""Tensors that a system call reads at most; systems take 1,024 or more."""


class Files:
    """Files opened for reading, each once, until `close`; from several threads, each of which has a
    window of its own."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._windows: dict[int, Window] = {}

    def descriptor(
        self, path: Path, expected_bytes: int | None = None, modified: int | None = None
    ) -> int:
        """The descriptor of `path`. Raises `UserError` when it cannot be opened, has not
        `expected_bytes`, or was not written last when `modified` says (nanoseconds)."""
        with self._lock:
            if path not in self._open:
                self._open[path] = _open(path, expected_bytes, modified)
            return self._open[path]

    def window(self) -> Window:
        """What the calling thread has mapped."""
        thread = threading.get_ident()
        if thread not in self._windows:
            self._windows[thread] = Window()
        return self._windows[thread]

    def read(self, path: Path, views: Sequence[memoryview], position: int) -> int:
        """Fill `views` in turn with the bytes of `path` from `position` on. Returns their number.

        Raises `UserError` when the file cannot be read or ends too early.
        """
        descriptor, nbytes = self.descriptor(path), sum(map(len, views))
        self.window().pull(descriptor, path, position, position + nbytes)
        read_exactly(descriptor, path, views, position)
        return nbytes

    def close(self) -> None:
        """Close them all; no thread reads them any more."""
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
    """The file opened; a save of many ranks may be more files than a process opens unasked."""
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
    """Read `runs` of the file `path` into `memory` (its first byte is memory offset 0).

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
    """Runs of a file, and the memory that they go to."""

    path: Path
    strided_copy: StridedCopy
    memory: Bytes


def read_all(files: Files, transfers: Iterable[Transfer]) -> int:
    """Read transfers. Neighbours that are one run each and lie end to end in their file
    come in one system call: the small tensors of many experts, say. Returns the bytes read."""
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
    """Whether a run begins in the file where `last` ends."""
    stop = last.strided_copy.file_offset + last.strided_copy.length
    return transfer.path == last.path and transfer.strided_copy.file_offset == stop


def _read_row(files: Files, row: Sequence[Transfer]) -> int:
    """Read single runs that lie end to end. Returns the bytes read."""
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
    shape = (*(count for count, _, _ in strided_copy.loops), strided_copy.length)
    file_strides = (*(stride for _, stride, _ in strided_copy.loops), 1)
    memory_strides = (*(stride for _, _, stride in strided_copy.loops), 1)
    np.copyto(
        np.ndarray(shape, np.uint8, memory, strided_copy.memory_offset, memory_strides),
        np.ndarray(shape, np.uint8, source, 0, file_strides),
    )


def read_exactly(
    descriptor: int, path: Path, view: memoryview | Sequence[memoryview], position: int
) -> None:
    """Fill `view`, or several of them in turn, with the bytes of the file from `position` on."""
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
