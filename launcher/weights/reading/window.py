"""A window: the part of a file that one reader has mapped. Torch-free.

Owns mappings of files, which move on with the reads (unmapping interrupts every core that runs the
process, so it is not done for each read), and prefetching into the page cache. The kernel reads
ahead for sequential reads, in pages that grow. Ranks that each read their part of one tensor after
another jump, and would get few, small pages:

    file      |  tensor one   |  tensor two   |        block   |. . . .|. . . .|
    rank 1    |   xxxx        |   xxxx        |                one huge page each, read when any
                                                               byte of it is touched

A block (2 MiB) of a mapping with huge pages is read as one page, together with the next: cold files
are then read as fast in parts as from end to end. Blocks in the page cache are not touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.weights.reading import pages

WINDOW_BYTES = 32 << 20
"""Bytes of a file that a reader keeps mapped, at most, where a single portion is not longer."""

PULLED_BYTES = 512 << 10
"""Reads of at least this length prefetch complete blocks; shorter ones may be alone in theirs, and
the kernel decides what to read."""

MADV_POPULATE_READ = 22
"""Of Linux 5.14 and later; a page that cannot be read is an error, not a signal:
https://man7.org/linux/man-pages/man2/madvise.2.html"""

CACHESTAT = 451
"""The number of the system call on x86-64, arm64 and most others, of Linux 6.5 and later:
https://docs.kernel.org/filesystems/cachestat.html"""

_SYSCALL = getattr(ctypes.CDLL(None), "syscall", lambda *_: -1)

Bytes = npt.NDArray[np.uint8]


class Window:
    """The part of a file that one reader has mapped; it moves to the part that is read."""

    def __init__(self) -> None:
        self._mapped: mmap.mmap | None = None
        self._descriptor = -1
        self._start = 0
        self._may_be_large = pages.are_allowed()

    def over(self, descriptor: int, path: Path, start: int, stop: int) -> Bytes:
        """The bytes from `start` to `stop` of an open file, valid until the window is moved.

        Raises `UserError` when the file ends before `stop` or cannot be mapped.
        """
        mapped = self._over(descriptor, path, start, stop)
        array: Bytes = np.frombuffer(mapped, np.uint8)
        return array[start - self._start : stop - self._start]

    def pull(self, descriptor: int, path: Path, start: int, stop: int) -> None:
        """Prefetch the blocks of an open file that a read from `start` to `stop` needs, as huge
        pages where possible. Errors are left to the read itself."""
        if stop - start < PULLED_BYTES or not self._may_be_large:
            return
        for block in range(start - start % pages.HUGE_PAGE, stop, pages.HUGE_PAGE):
            if _is_in_memory(descriptor, max(block, start)):
                continue
            try:
                mapped = self._over(descriptor, path, block, block + 1)
                mapped.madvise(MADV_POPULATE_READ, block - self._start, mmap.PAGESIZE)
            except (OSError, UserError):
                self._may_be_large = False  # an older kernel, or a file that cannot be read
                return

    def _over(self, descriptor: int, path: Path, start: int, stop: int) -> mmap.mmap:
        """A mapping that holds the bytes from `start` to `stop`."""
        size = os.fstat(descriptor).st_size
        if size < stop:
            raise ended(path)
        if self._mapped is None or descriptor != self._descriptor or not (
            self._start <= start and stop <= self._start + len(self._mapped)
        ):  # fmt: skip
            self.close()
            self._descriptor = descriptor
            self._start = start - start % max(pages.HUGE_PAGE, mmap.ALLOCATIONGRANULARITY)
            length = max(stop - self._start, min(WINDOW_BYTES, size - self._start))
            try:
                self._mapped = mmap.mmap(
                    descriptor, length, access=mmap.ACCESS_READ, offset=self._start
                )
            except OSError as error:
                raise UserError(f"{path} cannot be mapped: {error.strerror}") from error
            if self._may_be_large:
                with contextlib.suppress(OSError):  # advice
                    self._mapped.madvise(mmap.MADV_HUGEPAGE)
        return self._mapped

    def close(self) -> None:
        """Unmap it; its bytes must not be used any more."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


def _is_in_memory(descriptor: int, position: int) -> bool:
    """Whether the byte at `position` of an open file is in the page cache; False where the kernel
    does not report it: an older one, or a file of another user."""
    wanted, found = (ctypes.c_uint64 * 2)(position, 1), (ctypes.c_uint64 * 5)()
    refused = _SYSCALL(CACHESTAT, descriptor, wanted, found, 0)
    return not refused and found[0] > 0


def ended(path: Path) -> UserError:
    """The error of a file that became shorter."""
    return changed(f"{path} ended early", "it was longer when its header was read")


def changed(what: str, rule: str) -> UserError:
    """The error of a file that changed since its header was read."""
    return UserError(what, rule=rule, advice="Something writes to it: try again when that is done")
