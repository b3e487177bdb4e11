"""Where the rows of a page begin.

Owns the walk over rows that have their length in front (u64, little-endian). Where all rows of a
page are equally long, as those of a page without scalar fields are, it is one comparison.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.mindspore.mindrecord.header import LENGTH_BYTES

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_LENGTH = struct.Struct("<Q")


def row_offsets(data: Bytes, place: tuple[int, int], rows: int, path: Path, page: int) -> Ints:
    """The offsets of the lengths of `rows` rows, and where the last row ends: int64 [rows + 1].

    data: the file. place: where the first row begins and the used bytes of the page end. Raises
    UserError naming the file and the page.
    """
    begin, end = place
    if rows and (equal := _equal_rows(data, begin, end, rows)) is not None:
        return equal
    offsets = np.empty(rows + 1, dtype=np.int64)
    unpack, raw, last = _LENGTH.unpack_from, data.data, end - LENGTH_BYTES
    for row in range(rows):
        offsets[row] = begin
        if begin <= last:
            begin += LENGTH_BYTES + unpack(raw, begin)[0]
        if begin > end or offsets[row] > last:
            raise UserError(
                f"row {row} of page {page} ends after the page",
                where=str(path),
                rule=f"the page ends at byte {end}",
                advice="The file is damaged: copy it again, or write it again",
            )
    offsets[rows] = begin
    return offsets


def _equal_rows(data: Bytes, begin: int, end: int, rows: int) -> Ints | None:
    """The offsets where all rows are as long as the first; else None."""
    if begin + LENGTH_BYTES > end:
        return None
    stride = LENGTH_BYTES + int(_LENGTH.unpack_from(data.data, begin)[0])
    if begin + stride * rows > end:
        return None
    lengths = np.ndarray((rows,), dtype="<u8", buffer=data, offset=begin, strides=(stride,))
    if not bool((lengths == stride - LENGTH_BYTES).all()):
        return None
    return begin + stride * np.arange(rows + 1, dtype=np.int64)
