"""New files, written at any offset from several threads; a bounded number of them is open.

Writeback starts at each write, so that the fsync at the end waits for little.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

from launcher.weights.streaming.block_file import begin_writing, write_all

OPEN_FILES = 256
"""New files that are kept open at a time: the last used."""


class NewFiles:
    """Files by path, created at the first write."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()
        self._in_use: dict[int, int] = {}

    def write(self, path: Path, view: memoryview, position: int) -> None:
        """Write `view` to the file at `path` from `position` on."""
        descriptor = self._acquire(path)
        try:
            write_all(descriptor, view, position)
            begin_writing(descriptor, position, len(view))
        finally:
            self._release(descriptor)

    def sync(self, path: Path) -> None:
        """Make the file durable."""
        descriptor = self._acquire(path)
        try:
            os.fsync(descriptor)
        finally:
            self._release(descriptor)

    def _acquire(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            self._open.move_to_end(path)
            descriptor = self._open[path]
            self._in_use[descriptor] = self._in_use.get(descriptor, 0) + 1
            self._close_oldest()
            return descriptor

    def _release(self, descriptor: int) -> None:
        with self._lock:
            self._in_use[descriptor] -= 1

    def _close_oldest(self) -> None:
        for path, descriptor in list(self._open.items())[:-OPEN_FILES]:
            if not self._in_use.get(descriptor):
                self._in_use.pop(descriptor, None)
                os.close(self._open.pop(path))

    def __enter__(self) -> NewFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        while self._open:
            os.close(self._open.popitem()[1])
