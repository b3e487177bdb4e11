"""Decompression of gzip files from the start of any of their members.

A gzip file (RFC 1952) is one member or several, one after another, each of which can be
decompressed by itself. `gzip` writes one, so that a position inside is reached only by
decompressing all before it; `bgzip` and concatenated files have many.
"""

from __future__ import annotations

import io
import zlib
from typing import Any

from launcher.data.streaming.ranges import SEQUENTIAL_BYTES, Ranges
from launcher.errors import UserError

_GZIP = 31
"""`wbits` of zlib for the gzip format."""
MEMBER_DISTANCE = 1 << 20
"""Bytes of content between two members that are remembered."""


class GzipFile(io.RawIOBase):
    """The content of a gzip file, read from front to back.

    `members` has (offset in the file, offset in the content) of members that begin at least
    MEMBER_DISTANCE apart, the one it starts with included.
    """

    def __init__(self, ranges: Ranges, start: tuple[int, int] = (0, 0)) -> None:
        """`start`: the member to begin with."""
        super().__init__()
        self._ranges = ranges
        self._next, self._position = start
        self._input = b""
        self._inflate: Any = None
        """Of the member that is being read; None between two."""
        self.members = [start]

    def readable(self) -> bool:
        return True

    @property
    def bytes_read(self) -> int:
        """Of the file, compressed."""
        return self._next

    def readinto(self, buffer: Any) -> int:
        content = b""
        while not content and self._is_inside_member():
            content = self._inflated(len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _is_inside_member(self) -> bool:
        """Begin the next member where one has ended; False at the end of the file."""
        if self._inflate is not None:
            return True
        self._input = self._input.lstrip(b"\0")  # padding between members
        while not self._input and self._read_on():
            self._input = self._input.lstrip(b"\0")
        if not self._input:
            return False
        if self._position - self.members[-1][1] >= MEMBER_DISTANCE:
            self.members.append((self._next - len(self._input), self._position))
        self._inflate = zlib.decompressobj(_GZIP)
        return True

    def _inflated(self, most: int) -> bytes:
        at_end = not self._input and not self._read_on()
        try:
            content: bytes = self._inflate.decompress(self._input, most)
        except zlib.error as error:
            raise self._damaged(str(error)) from error
        if self._inflate.eof:
            self._input, self._inflate = self._inflate.unused_data, None
        else:
            self._input = self._inflate.unconsumed_tail
            if at_end and not content:
                raise self._damaged("it ends early")
        return content

    def _read_on(self) -> bool:
        """Read more input; False at the end of the file."""
        stop = min(self._next + SEQUENTIAL_BYTES, self._ranges.size)
        if stop == self._next:
            return False
        self._input, self._next = self._ranges.read(self._next, stop), stop
        return True

    def _damaged(self, reason: str) -> UserError:
        return UserError(
            f"cannot be decompressed ({reason})",
            where=self._ranges.name,
            rule="a file named *.gz is a gzip file",
            advice="Copy or compress it again",
        )
