"""Host memory of snapshots: one buffer, pinned for a GPU, and how much the machine has left.

Owns allocating, pinning and releasing it. Pinned memory is registered in portions: the driver takes
its locks for one portion, not for the whole, so that the steps that run meanwhile queue their
kernels in between. Pages are touched before, outside of those locks. Invariant: a copy to or from a
pinned buffer lies in one portion (`HostBuffer.pieces`): CUDA refuses one that spans two
registrations.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from launcher.streams import Streams
from launcher.weights.reading.pages import use_huge_pages

PORTION_BYTES = 1 << 30
"""Bytes that are pinned at a time; a multiple of the page size."""

MOST_PINNED = 0.8
"""Share of the free memory of a machine that may be pinned: pinned pages cannot be swapped or
reclaimed, and the loader, the page cache and the other programs need some."""

MADV_POPULATE_WRITE = 23
"""Of Linux 5.14 and later: https://man7.org/linux/man-pages/man2/madvise.2.html"""

_MEMORY_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""(limit, use) of the control group of a container, version 2 and 1."""


class HostBuffer:
    """`nbytes` of host memory at the start of a page, on huge pages where possible."""

    def __init__(self, nbytes: int, streams: Streams) -> None:
        self._streams = streams
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
        use_huge_pages([(memory.data_ptr(), memory.numel())])
        start = -memory.data_ptr() % mmap.PAGESIZE
        self.memory = memory[start : start + size]
        """uint8, at least `nbytes`."""
        self._registered: list[int] = []
        """Addresses of the portions that are pinned."""

    def __del__(self) -> None:
        with suppress(Exception):  # CUDA may be shut down at the end of the process
            self.release()

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is pinned."""
        return len(self._registered) * PORTION_BYTES >= self.memory.numel()

    def pin(self) -> bool:
        """Pin it, portion by portion; whether it worked. Otherwise nothing is pinned, and copies
        are slower. To be called in a thread that launches no kernels (`Streams.register`)."""
        self._streams.enter_thread()
        base, end = self.memory.data_ptr(), self.memory.numel()
        for start in range(0, end, PORTION_BYTES):
            nbytes = min(PORTION_BYTES, end - start)
            _touch(self.memory[start : start + nbytes])
            if not self._streams.register(base + start, nbytes):
                self.release()
                return False
            self._registered.append(base + start)
        return True

    def release(self) -> None:
        """Unpin it."""
        while self._registered:
            self._streams.unregister(self._registered.pop())

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Bytes `start` to `stop` as ranges that lie in one portion each."""
        while self._registered and start // PORTION_BYTES < (stop - 1) // PORTION_BYTES:
            end = (start // PORTION_BYTES + 1) * PORTION_BYTES
            yield start, end
            start = end
        yield start, stop


def available_bytes() -> int | None:
    """Memory that new allocations can have on this machine, and in the container of this process;
    None where the system does not report it."""
    found = [*_free_in_machine(), *_free_in_container()]
    return min(found, default=None)


def _free_in_machine() -> Iterator[int]:
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) << 10


def _free_in_container() -> Iterator[int]:
    for limit, used in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # "max" is no number
            yield max(int(Path(limit).read_text()) - int(Path(used).read_text()), 0)


def _touch(memory: torch.Tensor) -> None:
    """Give every page of `memory` a physical one. Not through torch, whose threads are those of the
    steps that run meanwhile."""
    address, nbytes = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or madvise(address, nbytes, MADV_POPULATE_WRITE):
        ctypes.memset(address, 0, memory.numel())
