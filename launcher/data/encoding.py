"""Bytes of data files to text: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

Owns the encodings of data files. Invariant: a byte that cannot be decoded is never replaced here;
its position is reported. Files named `*.gz` are decompressed.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from launcher.data.files import unreadable
from launcher.data.progress import Meter, active_meter

_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""UTF-32 first: its little-endian mark begins with the one of UTF-16."""

_BUFFER_BYTES = 1 << 20


class NotText(Exception):
    """Bytes that cannot be decoded. Lines and columns (in bytes) count from 1, offsets from 0."""

    def __init__(self, *, encoding: str, line: int, column: int, offset: int, excerpt: str) -> None:
        super().__init__(f"not {encoding}")
        self.encoding, self.line, self.column = encoding, line, column
        self.offset, self.excerpt = offset, excerpt


def open_file(path: Path) -> IO[bytes]:
    """Open a data file for reading bytes; decompress it if its name ends in .gz. An active meter
    counts the bytes that are read from disk."""
    meter = active_meter()
    is_compressed = path.suffix.lower() == ".gz"
    if meter is None:
        return cast(IO[bytes], gzip.open(path, "rb") if is_compressed else path.open("rb"))
    counted = io.BufferedReader(_CountedFile(path, meter), _BUFFER_BYTES)
    if not is_compressed:
        return counted
    unpacked = gzip.GzipFile(fileobj=counted, mode="rb")
    cast(Any, unpacked).myfileobj = counted  # closed together with it
    return cast(IO[bytes], unpacked)


class _CountedFile(io.FileIO):
    """A file whose reads are counted by a meter."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "rb")
        self._meter = meter

    def readinto(self, buffer: Any) -> int | None:
        """As that of FileIO."""
        count = super().readinto(buffer)
        self._meter.add(count or 0)
        return count

    def readall(self) -> bytes:
        """As that of FileIO."""
        content = super().readall()
        self._meter.add(len(content))
        return content


def read_bytes(path: Path) -> bytes:
    """The content of a data file. Raises UserError when it cannot be read or decompressed."""
    try:
        with open_file(path) as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, _as_os_error(error)) from error


def encoding_of(content: bytes) -> str:
    """`utf-8`, or the encoding of the byte order mark at the beginning of a file."""
    return next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")


def decode(content: bytes) -> str:
    """The text of a file, its byte order mark removed. Raises NotText."""
    encoding = encoding_of(content)
    text, error = _decoded(content, encoding)
    if error is not None:
        line = content[: error.start].decode(encoding, errors="ignore").count("\n") + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise _not_text(content, encoding, error, line, column)
    return text.removeprefix("\ufeff")


def read_lines(path: Path) -> Iterator[tuple[int, str | NotText]]:
    """The lines of a file that are not blank, with their numbers from 1.

    A line of UTF-8 that cannot be decoded is yielded as NotText, and reading continues after it.
    Raises UserError when the file cannot be read or decompressed.
    """
    try:
        with open_file(path) as file:
            encoding = encoding_of(file.read(4))
            file.seek(0)
            if encoding == "utf-8":
                yield from lines_of_bytes(file)
            else:
                yield from _lines_of_text(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, _as_os_error(error)) from error


def lines_of_bytes(
    file: Iterable[bytes], first: int = 1, offset: int = 0
) -> Iterator[tuple[int, str | NotText]]:
    """The lines of UTF-8 that are not blank, with their numbers; the first of `file` is number
    `first` and begins at `offset`."""
    for number, line in enumerate(file, first):
        if line.strip():
            text, error = _decoded(line, "utf-8")
            if error is None:
                yield number, text.removeprefix("\ufeff") if number == 1 else text
            else:
                yield number, _not_text(line, "utf-8", error, number, error.start + 1, offset)
        offset += len(line)


def _lines_of_text(content: bytes) -> Iterator[tuple[int, str | NotText]]:
    try:
        lines = decode(content).split("\n")
    except NotText as error:
        yield error.line, error
        return
    yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())


def _decoded(content: bytes, encoding: str) -> tuple[str, UnicodeDecodeError | None]:
    try:
        return content.decode(encoding), None
    except UnicodeDecodeError as error:
        return "", error


def _not_text(
    content: bytes,
    encoding: str,
    error: UnicodeDecodeError,
    line: int,
    column: int,
    before: int = 0,
) -> NotText:
    begin = content.rfind(b"\n", 0, error.start) + 1
    shown = content[begin : begin + 200].split(b"\n")[0]
    return NotText(
        encoding=encoding.upper(),
        line=line,
        column=column,
        offset=before + error.start,
        excerpt=shown.decode(encoding, errors="backslashreplace"),
    )


def _as_os_error(error: Any) -> OSError:
    return error if isinstance(error, OSError) else OSError(str(error))
