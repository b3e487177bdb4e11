"""Decoding of msgpack, as far as the scalar fields of MindRecord need it.

Owns the types that MindSpore writes for a row: a map of names to strings, integers and floats, and
nil. Others (arrays, extensions, nested maps) are errors. Format: the msgpack specification, numbers
big-endian.
"""

from __future__ import annotations

import struct

Scalar = str | int | float | None

_NUMBERS = {
    0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q", 0xCA: ">f", 0xCB: ">d",
}  # fmt: skip
_STRINGS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}


class NotMsgpack(ValueError):
    """The bytes are not a map of scalars."""


def unpack_map(data: bytes) -> dict[str, Scalar]:
    """The map that `data` is. Raises NotMsgpack."""
    reader = _Reader(data)
    try:
        found = {reader.text(): reader.scalar() for _ in range(reader.map_size())}
    except struct.error as error:
        raise NotMsgpack("it ends within a value") from error
    except UnicodeDecodeError as error:
        raise NotMsgpack("a text is not UTF-8") from error
    if reader.place != len(data):
        raise NotMsgpack(f"{len(data) - reader.place} bytes follow the last value")
    return found


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def map_size(self) -> int:
        mark = self._number(">B")
        if 0x80 <= mark <= 0x8F:
            return mark & 0x0F
        if mark in _MAPS:
            size = self._number(_MAPS[mark])
            if size <= len(self.data):
                return size
        raise NotMsgpack("it is not a map of values")

    def text(self) -> str:
        name = self.scalar()
        if not isinstance(name, str):
            raise NotMsgpack("a name is not a text")
        return name

    def scalar(self) -> Scalar:
        mark = self._number(">B")
        if mark <= 0x7F:
            return mark
        if mark >= 0xE0:
            return mark - 0x100
        if mark in _NUMBERS:
            return self._number(_NUMBERS[mark])
        if 0xA0 <= mark <= 0xBF:
            return self._string(mark & 0x1F)
        if mark in _STRINGS:
            return self._string(self._number(_STRINGS[mark]))
        if mark == 0xC0:
            return None
        raise NotMsgpack(f"a value has the unknown type {mark:#x}")

    def _string(self, length: int) -> str:
        text = self.data[self.place : self.place + length]
        if len(text) != length:
            raise NotMsgpack("it ends within a text")
        self.place += length
        return text.decode()

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return value  # type: ignore[no-any-return]
