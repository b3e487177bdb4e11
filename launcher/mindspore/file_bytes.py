"""The bytes of a file as a sequence, of which only the windows that are looked at are read.

Owns one window of `WINDOW` bytes. So a message with gigabytes of content between its fields is
parsed in the memory of one window.
"""

from __future__ import annotations

import os
from typing import overload

WINDOW = 4096


class FileBytes:
    """The first `length` bytes of an open file."""

    def __init__(self, descriptor: int, length: int) -> None:
        self._descriptor, self._length = descriptor, length
        self._window, self._start = b"", 0

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> bytes: ...

    def __getitem__(self, index: int | slice) -> int | bytes:
        """A byte, or the bytes of a slice without step. Raises `EOFError` where the file has become
        shorter than it was."""
        if isinstance(index, int):
            place = index - self._start
            if not 0 <= place < len(self._window):
                self._move(index, WINDOW)
                place = 0
            return self._window[place]
        start, stop, _ = index.indices(self._length)
        if stop <= start:
            return b""
        if start < self._start or stop > self._start + len(self._window):
            self._move(start, max(stop - start, WINDOW))
        found = self._window[start - self._start : stop - self._start]
        if len(found) < stop - start:
            raise EOFError
        return found

    def _move(self, start: int, nbytes: int) -> None:
        if not 0 <= start < self._length:
            raise EOFError
        self._window = os.pread(self._descriptor, min(nbytes, self._length - start), start)
        self._start = start
        if not self._window:
            raise EOFError
