"""Ranges of bytes of a shard, and files over them.

Owns the interface between the places of shards and those who read them. Invariant: `read` returns
exactly the bytes asked for, of the version of the shard that was found, or raises UserError.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Protocol

from launcher.data.files import unreadable
from launcher.errors import UserError

SEQUENTIAL_BYTES = 4 << 20
"""Bytes of one read where a shard is read from front to back."""


class Ranges(Protocol):
    """A shard whose ranges can be read."""

    @property
    def name(self) -> str:
        """What messages call the shard."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), 0 <= start <= stop <= size."""
        ...

    def check_unchanged(self) -> None:
        """Raises UserError where the shard is not the one that was found."""
        ...


class LocalRanges:
    """A file of this machine."""

    def __init__(self, path: str, size: int, mtime_ns: int) -> None:
        self.name, self.size, self._mtime_ns = path, size, mtime_ns

    def read(self, start: int, stop: int) -> bytes:
        try:
            with Path(self.name).open("rb") as file:
                file.seek(start)
                content = file.read(stop - start)
        except OSError as error:
            raise unreadable(Path(self.name), error) from error
        if len(content) != stop - start:
            raise changed(self.name)
        return content

    def check_unchanged(self) -> None:
        try:
            status = Path(self.name).stat()
        except OSError as error:
            raise unreadable(Path(self.name), error) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime_ns):
            raise changed(self.name)


def changed(name: str, where: str = "") -> UserError:
    """The error for a shard that is another one than at the beginning of the run."""
    return UserError(
        "has changed since the run began",
        where=where or name,
        rule="the shards of a stream stay as they are, so that the order of samples is exact",
        advice="Put the shard back, or start a new run with it",
    )


class RangeFile(io.RawIOBase):
    """A read-only file over ranges of a shard, for readers that seek."""

    def __init__(self, ranges: Ranges) -> None:
        super().__init__()
        self._ranges, self._position = ranges, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    @property
    def bytes_read(self) -> int:
        """Where a file that is read from front to back has come."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._ranges.size}
        self._position = base[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = min(self._position, self._ranges.size)
        stop = min(start + len(buffer), self._ranges.size)
        content = self._ranges.read(start, stop) if stop > start else b""
        buffer[: len(content)] = content
        self._position = start + len(content)
        return len(content)
