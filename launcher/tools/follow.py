"""Show a growing file on the console.

Workers write to files only, so that a slow or closed console never blocks them.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from pathlib import Path
from types import TracebackType

_PERIOD_SECONDS = 0.1
_CHUNK_BYTES = 1 << 16


class Follower:
    """Copies a file to standard output, up to its content at the end of the `with` block.

    `path` need not exist yet; None follows nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def __enter__(self) -> Follower:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._path is not None:
            self._thread.join()

    def _copy(self) -> None:
        assert self._path is not None
        while not self._path.exists():
            if self._ended.wait(_PERIOD_SECONDS):
                break
        try:
            with self._path.open("rb") as file:
                while True:
                    ended = self._ended.is_set()
                    while chunk := file.read(_CHUNK_BYTES):
                        sys.stdout.buffer.write(chunk)
                        sys.stdout.buffer.flush()
                    if ended:
                        return
                    self._ended.wait(_PERIOD_SECONDS)
        except OSError:
            return  # the console is closed, or no worker has started: the log is complete


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a text file; none when it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, count)]
    except OSError:
        return []
