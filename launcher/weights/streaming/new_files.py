"""New files, written at any place from several threads; a bounded number of them is open.

What is written is on its way to the disk at once, so that making a file durable in the end waits
for little.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

from launcher.weights.streaming.block_file import begin_writing, write_all

OPEN_FILES = 256
"""New files that are kept open at a time: those used last."""


class NewFiles:
    """Files by path, made at the first write."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._lock = threading.Lock()
        self._in_use: dict[int, int] = {}

    def write(self, path: Path, view: memoryview, position: int) -> None:
        """Write `view` to the file at `path` from `position` on."""
        descriptor = self._take(path)
        try:
            write_all(descriptor, view, position)
            begin_writing(descriptor, position, len(view))
        finally:
            self._give_back(descriptor)

    def sync(self, path: Path) -> None:
        """Make the file durable."""
        descriptor = self._take(path)
        try:
            os.fsync(descriptor)
        finally:
            self._give_back(descriptor)

    def _take(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            self._open.move_to_end(path)
            descriptor = self._open[path]
            self._in_use[descriptor] = self._in_use.get(descriptor, 0) + 1
            self._let_go()
            return descriptor

    def _give_back(self, descriptor: int) -> None:
        with self._lock:
            self._in_use[descriptor] -= 1

    def _let_go(self) -> None:
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
