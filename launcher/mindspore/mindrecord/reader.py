"""Rows of MindRecord files, memory-mapped: any row of any file, values of every type.

Owns how the bytes of a row become values. Invariants: the order of rows is that of MindSpore
without shuffle (files in order, pages in order, rows in order); a file is read where a row is asked
for, and only the offsets of the rows of a few pages are in memory; what is wrong with the bytes is
a UserError that names file, page and row.
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from launcher.errors import UserError
from launcher.mindspore.mindrecord.header import LENGTH_BYTES, NUMBERS, Field, Header, RowGroup
from launcher.mindspore.mindrecord.integers import NotNarrowed, narrowed
from launcher.mindspore.mindrecord.msgpack import NotMsgpack, Scalar, unpack_map
from launcher.mindspore.mindrecord.walk import Bytes, Ints, row_offsets

CACHED_PAGES = 32
"""Pages of a file whose row offsets stay in memory."""

Value = npt.NDArray[Any] | str | bytes
"""An array of the schema's dtype and shape (0-d for a number), a text, or bytes."""


class FileReader:
    """The rows of one file."""

    def __init__(self, header: Header) -> None:
        """Map the file. Raises UserError where it changed since its header was read."""
        self.header = header
        self._firsts = [group.first_row for group in header.groups]
        self._offsets: OrderedDict[tuple[int, int], Ints] = OrderedDict()
        self._map = _mapped(header)
        self.data: Bytes = np.frombuffer(self._map, dtype=np.uint8)

    def __len__(self) -> int:
        return self.header.rows

    def record(self, row: int) -> dict[str, Value]:
        """Every field of a row, 0 <= row < len, in the order of the schema."""
        blob = self.blob(row)
        raw = self._raw(row)
        return {
            field.name: self._array(field, self.part(blob, field.name, row), row)
            if field.name in self.header.blob_fields
            else self._scalar(field, raw, row)
            for field in self.header.fields
        }

    def array(self, row: int, name: str) -> Value:
        """One field of a row, which is an array or bytes."""
        return self._array(self.header.by_name[name], self.part(self.blob(row), name, row), row)

    def blob(self, row: int) -> Bytes:
        """The bytes of the arrays of a row."""
        group, place = self._place(row)
        return self.row_at(int(self._group_offsets(group, group.blob, group.page)[place]))

    def offsets(self, group: RowGroup) -> Ints:
        """Where the blob rows of a group begin in the file, and where the last ends: [rows + 1]."""
        return row_offsets(self.data, group.blob, group.rows, self.header.path, group.page)

    def row_at(self, offset: int) -> Bytes:
        """The bytes of the row whose length is at `offset`."""
        begin = offset + LENGTH_BYTES
        (length,) = struct.unpack_from("<Q", self.data.data, offset)
        return self.data[begin : begin + length]

    def part(self, blob: Bytes, name: str, row: int) -> Bytes:
        """The bytes of one field in a blob row."""
        names = self.header.blob_fields
        if len(names) == 1:
            return blob
        begin = 0
        for other in names:
            if begin + LENGTH_BYTES > len(blob):
                self._damaged(row, other, "the row ends before it")
            length = int.from_bytes(blob[begin : begin + LENGTH_BYTES].tobytes(), "big")
            begin += LENGTH_BYTES
            if begin + length > len(blob):
                self._damaged(row, other, f"{length} bytes are more than the row has")
            if other == name:
                return blob[begin : begin + length]
            begin += length
        raise KeyError(name)

    def integers(self, part: Bytes, name: str, row: int) -> Ints:
        """The numbers of an array of integers, flat, as int64."""
        field = self.header.by_name[name]
        if self.header.narrowed:
            try:
                return narrowed(part, NUMBERS[field.type])
            except NotNarrowed as error:
                self._damaged(row, name, str(error))
        return self._plain(part, field, row).astype(np.int64)

    def numbers(self, part: Bytes, name: str, row: int) -> npt.NDArray[Any]:
        """The numbers of an array of any type, flat."""
        field = self.header.by_name[name]
        if field.is_integers:
            return self.integers(part, name, row)
        return self._plain(part, field, row)

    def release(self, group: RowGroup) -> None:
        """Let the system forget the pages of a group, which is not needed again soon."""
        begin = group.blob[0] // mmap.PAGESIZE * mmap.PAGESIZE
        if isinstance(self._map, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, group.blob[1] - begin)

    def group_of(self, row: int) -> RowGroup:
        """The group with a row; empty groups have none."""
        return self.header.groups[bisect_right(self._firsts, row) - 1]

    def _place(self, row: int) -> tuple[RowGroup, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        group = self.group_of(row)
        return group, row - group.first_row

    def _group_offsets(self, group: RowGroup, place: tuple[int, int], page: int) -> Ints:
        found = self._offsets.get(place)
        if found is None:
            found = row_offsets(self.data, place, group.rows, self.header.path, page)
            self._offsets[place] = found
            if len(self._offsets) > 2 * CACHED_PAGES:
                self._offsets.popitem(last=False)
        else:
            self._offsets.move_to_end(place)
        return found

    def _raw(self, row: int) -> dict[str, Scalar]:
        if len(self.header.blob_fields) == len(self.header.fields):
            return {}
        group, place = self._place(row)
        offsets = self._group_offsets(group, group.raw, group.raw_page)
        try:
            return unpack_map(self.row_at(int(offsets[place])).tobytes())
        except NotMsgpack as error:
            self._damaged(row, "its scalar fields", str(error))

    def _array(self, field: Field, part: Bytes, row: int) -> Value:
        if field.shape is None:
            return part.tobytes()
        flat = self.numbers(part, field.name, row)
        shape = _resolved(field.shape, len(flat))
        if shape is None:
            self._damaged(row, field.name, f"{len(flat)} values have not the shape "
                          f"{list(field.shape)}")  # fmt: skip
        return flat.astype(field.type).reshape(shape)

    def _scalar(self, field: Field, raw: dict[str, Scalar], row: int) -> Value:
        value = raw.get(field.name)
        found = _typed(value, field.type)
        if found is None:
            self._damaged(row, field.name, f"the value is {value!r:.60}, not {field.type}")
        return found

    def _plain(self, part: Bytes, field: Field, row: int) -> npt.NDArray[Any]:
        dtype = np.dtype(field.type).newbyteorder("<")
        if len(part) % dtype.itemsize:
            self._damaged(row, field.name, f"{len(part)} bytes are not numbers of {field.type}")
        return np.frombuffer(part.tobytes(), dtype=dtype)

    def _damaged(self, row: int, name: str, what: str) -> NoReturn:
        raise UserError(
            f"row {row}, page {self.group_of(row).page}, {name}: {what}",
            where=str(self.header.path),
            rule="the bytes of a row follow the schema of its file",
            advice="The file is damaged: copy it again, or write it again",
        )


def _typed(value: Scalar, kind: str) -> Value | None:
    """A scalar as its column has it; None where it is of another type."""
    if kind == "string":
        return value if isinstance(value, str) else None
    if kind.startswith("float"):
        with np.errstate(over="ignore"):
            return np.array(value, dtype=kind) if isinstance(value, int | float) else None
    limits = np.iinfo(kind)
    if not isinstance(value, int) or not limits.min <= value <= limits.max:
        return None
    return np.array(value, dtype=kind)


def _mapped(header: Header) -> mmap.mmap | bytes:
    try:
        with header.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size >= header.size:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})",
            where=str(header.path),
            rule="the files of a data set stay where they are",
        ) from error
    raise UserError(
        f"the file has {size} bytes, and had {header.size}",
        where=str(header.path),
        rule="the files of a data set do not change while they are read",
    )


def _resolved(shape: tuple[int, ...], count: int) -> tuple[int, ...] | None:
    """The shape of `count` values, its -1 resolved; None where they do not fit."""
    known = prod(size for size in shape if size >= 0)
    if -1 not in shape:
        return shape if known == count else None
    if known == 0:
        return None if count else tuple(max(size, 0) for size in shape)
    if count % known:
        return None
    return tuple(count // known if size == -1 else size for size in shape)


class RecordReader:
    """The rows of several files, one after another."""

    def __init__(self, headers: Sequence[Header]) -> None:
        self.files = [FileReader(header) for header in headers]
        self._ends = list(accumulate(len(file) for file in self.files))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def record(self, index: int) -> dict[str, Value]:
        """Every field of a row, 0 <= index < len. Raises UserError for a damaged row."""
        file, row = self.place(index)
        return file.record(row)

    def records(self) -> Iterator[dict[str, Value]]:
        """All rows in order."""
        for file in self.files:
            for row in range(len(file)):
                yield file.record(row)

    def place(self, index: int) -> tuple[FileReader, int]:
        """The file of a row, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)


def open_records(headers: Sequence[Header]) -> RecordReader:
    """The rows of the files of `launcher.mindspore.mindrecord.files.find_records`."""
    return RecordReader(headers)


def read_rows(path: Path | str) -> RecordReader:
    """The rows of a file and its family, of a folder or a glob. Raises UserError."""
    from launcher.mindspore.mindrecord.files import find_records

    return open_records(find_records([str(path)]).headers)
