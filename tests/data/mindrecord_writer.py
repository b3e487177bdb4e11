"""A writer of MindRecord files, for tests: every type, pages, row groups, shards, both versions.

It follows the layout that MindSpore 2.10 writes: a row group is one blob page, the raw rows of
several groups share a raw page, pages are numbered as they are begun, the last one is not padded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Schema = Mapping[str, tuple[str, list[int] | None]]
"""Name -> type and shape (None for a scalar or bytes)."""

TOKENS: Schema = {"input_ids": ("int32", [-1])}
HEADER_SIZE, PAGE_SIZE = 16384, 32768
"""The smallest that MindSpore allows."""


def write_mindrecord(
    path: Path,
    schema: Schema,
    rows: Iterable[Mapping[str, Any]],
    *,
    shards: int = 1,
    header_size: int = HEADER_SIZE,
    page_size: int = PAGE_SIZE,
    version: str = "3.0",
) -> list[Path]:
    """Write rows, contiguous pieces of them to each of the shards; the files in order."""
    width = len(str(shards - 1))
    names = [path.name] if shards == 1 else [f"{path.name}{i:0{width}d}" for i in range(shards)]
    pieces: list[Iterable[Mapping[str, Any]]] = [rows]
    if shards > 1:
        every = list(rows)
        ends = [len(every) * (i + 1) // shards for i in range(shards)]
        pieces = [every[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    for number, piece in enumerate(pieces):
        with (path.parent / names[number]).open("wb") as file:
            _File(file, schema, header_size, page_size, version).write(piece, names, number)
    return [path.parent / name for name in names]


def token_rows(arrays: Iterable[Sequence[Any]], *names: str) -> Iterable[dict[str, Any]]:
    """Rows of int32 arrays: each entry is the columns `names`, or input_ids alone."""
    for values in arrays:
        yield dict(zip(names, values, strict=True)) if names else {"input_ids": values}


class _File:
    def __init__(
        self, file: BinaryIO, schema: Schema, header_size: int, page_size: int, version: str
    ) -> None:
        self.file, self.schema, self.version = file, schema, version
        self.header_size, self.page_size = header_size, page_size
        self.blobs = sorted(name for name, (kind, shape) in schema.items()
                            if shape is not None or kind == "bytes")  # fmt: skip
        self.raws = sorted(set(schema) - set(self.blobs))
        self.pages: list[dict[str, Any]] = []
        self.raw_page: dict[str, Any] | None = None
        self.row = self.group = 0

    def write(self, rows: Iterable[Mapping[str, Any]], names: list[str], number: int) -> None:
        self.number = number
        blob, raw, count = bytearray(), bytearray(), 0
        for row in rows:
            one, other = _framed(self._blob(row)), _framed(self._raw(row))
            assert max(len(one), len(other)) <= self.page_size, "a row is larger than a page"
            if max(len(blob) + len(one), len(raw) + len(other)) > self.page_size:
                self._flush(blob, raw, count)
                blob, raw, count = bytearray(), bytearray(), 0
            blob += one
            raw += other
            count += 1
        if count:
            self._flush(blob, raw, count)
        self._header(names)

    def _flush(self, blob: bytearray, raw: bytearray, count: int) -> None:
        page = self._page("BLOB_DATA", self.group, self.row, self.row + count)
        page["row_group_ids"] = [{"id": 0, "offset": 0}]
        self._put(page, 0, blob)
        if self.raw_page is None or self.raw_page["page_size"] + len(raw) > self.page_size:
            self.raw_page = self._page("RAW_DATA", 0, 0, 0)
        place = self.raw_page["page_size"]
        self.raw_page["row_group_ids"].append({"id": self.group, "offset": place})
        self._put(self.raw_page, place, raw)
        self.row += count
        self.group += 1

    def _page(self, kind: str, group: int, first: int, end: int) -> dict[str, Any]:
        page = {
            "end_row_id": end, "page_id": len(self.pages), "page_size": 0, "page_type": kind,
            "page_type_id": group, "row_group_ids": [], "shard_id": self.number,
            "start_row_id": first,
        }  # fmt: skip
        self.pages.append(page)
        return page

    def _put(self, page: dict[str, Any], place: int, content: bytes | bytearray) -> None:
        self.file.seek(self.header_size + self.page_size * page["page_id"] + place)
        self.file.write(content)
        page["page_size"] = place + len(content)

    def _header(self, names: list[str]) -> None:
        columns = {
            name: {"type": kind} if shape is None else {"shape": shape, "type": kind}
            for name, (kind, shape) in sorted(self.schema.items())
        }
        text = json.dumps({
            "header_size": self.header_size, "index_fields": None, "page": self.pages or None,
            "page_size": self.page_size, "compression_size": 0,
            "schema": [{"blob_fields": self.blobs, "desc": "", "schema": columns}],
            "shard_addresses": names, "shard_id": self.number, "statistics": None,
            "version": self.version,
        }, separators=(",", ":")).encode()  # fmt: skip
        assert len(text) + 8 <= self.header_size, "the header is too large"
        self.file.seek(0)
        self.file.write(struct.pack("<Q", len(text)) + text)

    def _blob(self, row: Mapping[str, Any]) -> bytes:
        parts = [self._part(name, row[name]) for name in self.blobs]
        if len(parts) == 1:
            return parts[0]
        return b"".join(struct.pack(">Q", len(part)) + part for part in parts) or bytes(4)

    def _part(self, name: str, value: Any) -> bytes:
        kind, shape = self.schema[name]
        if shape is None:
            return bytes(value)
        if kind.startswith("int") and self.version == "3.0":
            return narrow(np.asarray(value, dtype=np.int64).ravel())
        return np.asarray(value, dtype=np.dtype(kind).newbyteorder("<")).tobytes()

    def _raw(self, row: Mapping[str, Any]) -> bytes:
        if not self.raws:
            return b"\x81\xa2id\x00"
        assert len(self.raws) < 16
        return bytes([0x80 + len(self.raws)]) + b"".join(
            pack(name) + pack(row[name]) for name in self.raws
        )


def _framed(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def narrow(values: npt.NDArray[np.int64]) -> bytes:
    """A block of narrowed integers."""
    codes = np.zeros(len(values), dtype=np.uint8)
    for code, kind in enumerate((np.int8, np.int16, np.int32)):
        limits = np.iinfo(kind)
        codes[(values < limits.min) | (values > limits.max)] = code + 1
    filled = np.zeros(-(-len(values) // 4) * 4, dtype=np.uint8)
    filled[: len(values)] = codes
    first, second, third, fourth = filled.reshape(-1, 4).T
    packed = first << 6 | second << 4 | third << 2 | fourth
    raw = values.astype("<i8").view(np.uint8).reshape(-1, 8)
    used = np.arange(8) < (1 << codes)[:, None]
    return struct.pack(">I", len(values)) + packed.tobytes() + raw[used].tobytes()


def pack(value: str | int | float | None) -> bytes:
    """A scalar as msgpack, in the smallest form."""
    if value is None:
        return b"\xc0"
    if isinstance(value, str):
        return _text(value.encode())
    if isinstance(value, float):
        short = struct.pack(">f", value) if abs(value) < 3e38 else b""
        if short and struct.unpack(">f", short)[0] == value:
            return b"\xca" + short
        return b"\xcb" + struct.pack(">d", value)
    assert isinstance(value, int)
    if -32 <= value < 128:
        return struct.pack("b", value)
    forms = ("BHIQ", 0xCC) if value >= 0 else ("bhiq", 0xD0)
    for place, form in enumerate(forms[0]):
        bits = 8 << place
        if value < 1 << bits if value >= 0 else value >= -(1 << (bits - 1)):
            return bytes([forms[1] + place]) + struct.pack(f">{form}", value)
    raise AssertionError(value)


def _text(text: bytes) -> bytes:
    if len(text) < 32:
        return bytes([0xA0 + len(text)]) + text
    place = next(place for place in range(3) if len(text) < 1 << (8 << place))
    return bytes([0xD9 + place]) + struct.pack(f">{'BHI'[place]}", len(text)) + text
