"""Bytes from files into memory: positioned reads of runs. Torch-free.

Owns how a run is read. Long runs are read straight into their place. Short ones would cost a system
call each: where the file has them back to back they come in one read and are spread in memory;
where it has not, they are copied out of a mapped window of the file, which is let go at once.
Invariant: a file is believed to be as long as it was when its header was checked, or the read fails
and says so.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
import threading
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.weights.reading.runs import Runs

SHORT_RUN = 16 << 10
"""Bytes below which a run is not worth a system call of its own."""

Bytes = npt.NDArray[np.uint8]


class Files:
    """Files opened for reading, each once, until `close`; from several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(
        self, path: Path, expected_bytes: int | None = None, modified: int | None = None
    ) -> int:
        """The descriptor of `path`. Raises `UserError` when it cannot be opened, has not
        `expected_bytes`, or was not written last when `modified` says (nanoseconds)."""
        with self._lock:
            if path not in self._open:
                self._open[path] = _open(path, expected_bytes, modified)
            return self._open[path]

    def close(self) -> None:
        """Close them all."""
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
        problem = _changed(f"{path} has {found.st_size} bytes",
                           f"it had {expected_bytes} when its header was read")  # fmt: skip
    elif modified is not None and found.st_mtime_ns != modified:
        problem = _changed(f"{path} was replaced", "it must stay as its header was read")
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


def read_runs(descriptor: int, path: Path, runs: Runs, memory: Bytes) -> int:
    """Read `runs` of an open file into `memory` (its first byte is memory offset 0).

    Returns the bytes read. `path` is for messages.
    """
    if not runs.nbytes:
        return 0
    if not runs.loops or runs.length >= SHORT_RUN:
        view = memory.data
        for position, start, length in runs:
            read_exactly(descriptor, path, view[start : start + length], position)
    elif runs.file_span == runs.nbytes:
        staging = np.empty(runs.nbytes, np.uint8)
        read_exactly(descriptor, path, staging.data, runs.file_offset)
        _spread(runs, staging, 0, memory)
    else:
        start = runs.file_offset - runs.file_offset % mmap.ALLOCATIONGRANULARITY
        length = runs.file_offset + runs.file_span - start
        if os.fstat(descriptor).st_size < start + length:
            raise _ended(path)
        try:
            with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start) as window:
                source = np.frombuffer(window, np.uint8)
                _spread(runs, source, runs.file_offset - start, memory)
                del source  # the window cannot be closed while it is looked at
        except OSError as error:
            raise UserError(f"{path} cannot be mapped: {error.strerror}") from error
    return runs.nbytes


def _spread(runs: Runs, source: Bytes, start: int, memory: Bytes) -> None:
    shape = (*(count for count, _, _ in runs.loops), runs.length)
    file_strides = (*(stride for _, stride, _ in runs.loops), 1)
    memory_strides = (*(stride for _, _, stride in runs.loops), 1)
    np.copyto(
        np.ndarray(shape, np.uint8, memory, runs.memory_offset, memory_strides),
        np.ndarray(shape, np.uint8, source, start, file_strides),
    )


def read_exactly(descriptor: int, path: Path, view: memoryview, position: int) -> None:
    """Fill `view` with the bytes of the file from `position` on."""
    while view:
        try:
            count = os.preadv(descriptor, [view], position)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        if count == 0:
            raise _ended(path)
        view, position = view[count:], position + count


def _ended(path: Path) -> UserError:
    return _changed(f"{path} ended early", "it was longer when its header was read")


def _changed(what: str, rule: str) -> UserError:
    return UserError(what, rule=rule, advice="Something writes to it: try again when that is done")
