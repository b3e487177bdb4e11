"""The protobuf wire format: bytes to numbered fields, and back.

Owns the encoding, not the meaning of fields. Supports `proto2` messages of numbers, text and nested
messages; other fields are skipped. Lengths are checked against the bytes that are left before they
are used. Every error names the byte.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol, overload

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}
_LARGEST_FIELD = (1 << 29) - 1
_VARINT_BYTES = 10
FIELD_LIMIT = 1 << 21
"""Fields of a message."""
_WIRE_NAMES = {
    VARINT: "a number",
    BYTES: "a length and bytes",
    FIXED64: "8 bytes",
    FIXED32: "4 bytes",
}


class Readable(Protocol):
    """Bytes of a message: in memory, or a file that is read where it is looked at."""

    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> int: ...
    @overload
    def __getitem__(self, index: slice, /) -> bytes: ...


class WireError(ValueError):
    """Bytes that are not a valid message."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__(f"byte {at}: {what}")
        self.at, self.what = at, what


class Field(NamedTuple):
    """One field of a message."""

    at: int
    """Byte of its tag."""
    protobuf_wire: int
    value: int
    """The number of a varint, unsigned; for the other wire types where the content starts."""
    stop: int
    """One past its last byte."""


class Message:
    """A message between two bytes of `data`; the getters check type and number of its fields."""

    __slots__ = ("data", "fields", "start")

    def __init__(
        self,
        data: Readable,
        start: int = 0,
        stop: int | None = None,
        most_fields: int = FIELD_LIMIT,
    ) -> None:
        self.data, self.start = data, start
        self.fields: dict[int, list[Field]] = {}
        for index, (number, field) in enumerate(fields_in(data, start, stop)):
            if index == most_fields:
                raise WireError(field.at, f"the message has more than {most_fields} fields")
            self.fields.setdefault(number, []).append(field)

    def integer(self, number: int, name: str, *, bits: int = 32, signed: bool = True) -> int:
        """The number in the required field `number`."""
        field = self._only(number, name, VARINT)
        return _in_range(field.value, field.at, bits, signed)

    def integers(self, number: int, *, bits: int = 32, signed: bool = True) -> tuple[int, ...]:
        """The numbers in the repeated field `number`, packed or not."""
        found: list[int] = []
        for field in self.fields.get(number, ()):
            if field.protobuf_wire == BYTES:
                at = field.value
                while at < field.stop:
                    value, after = _varint(self.data, at, field.stop)
                    found.append(_in_range(value, at, bits, signed))
                    at = after
            else:
                _expect(field, number, VARINT)
                found.append(_in_range(field.value, field.at, bits, signed))
        return tuple(found)

    def text(self, number: int, name: str) -> str:
        """The UTF-8 text in the required field `number`."""
        field = self.content(number, name)
        try:
            return self.data[field.value : field.stop].decode()
        except UnicodeDecodeError as error:
            raise WireError(field.value + error.start, f"{name} is not UTF-8") from None

    def content(self, number: int, name: str) -> Field:
        """The required field `number`, of bytes, which are not looked at."""
        return self._only(number, name, BYTES)

    def message(self, number: int, name: str, most_fields: int = FIELD_LIMIT) -> Message:
        """The message in the required field `number`."""
        field = self.content(number, name)
        return Message(self.data, field.value, field.stop, most_fields)

    def messages(self, number: int) -> list[Message]:
        """The messages in the repeated field `number`."""
        fields = self.fields.get(number, ())
        for field in fields:
            _expect(field, number, BYTES)
        return [Message(self.data, field.value, field.stop) for field in fields]

    def _only(self, number: int, name: str, protobuf_wire: int) -> Field:
        fields = self.fields.get(number, ())
        if not fields:
            raise WireError(self.start, f"the message from here on has no {name} (field {number})")
        if len(fields) > 1:
            raise WireError(fields[1].at, f"a second {name} (field {number})")
        _expect(fields[0], number, protobuf_wire)
        return fields[0]


def fields_in(
    data: Readable, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Field]]:
    """(number, field) of each field of a message, in order."""
    at, stop = start, len(data) if stop is None else stop
    while at < stop:
        number, field = _field(data, at, stop)
        yield number, field
        at = field.stop


def _field(data: Readable, at: int, stop: int) -> tuple[int, Field]:
    """(number, field) of the field whose tag begins at `at`."""
    tag, begin = _varint(data, at, stop)
    number, protobuf_wire = tag >> 3, tag & 7
    if not 1 <= number <= _LARGEST_FIELD:
        raise WireError(at, f"{number} is not a field number")
    if protobuf_wire == VARINT:
        value, after = _varint(data, begin, stop)
        return number, Field(at, protobuf_wire, value, after)
    if protobuf_wire == BYTES:
        length, begin = _varint(data, begin, stop)
    elif protobuf_wire in _FIXED:
        length = _FIXED[protobuf_wire]
    else:
        raise WireError(at, f"{protobuf_wire} is not a wire type in use")
    if length > stop - begin:
        raise WireError(at, f"field {number} claims {length} bytes, {stop - begin} are left")
    return number, Field(at, protobuf_wire, begin, begin + length)


def _varint(data: Readable, at: int, stop: int) -> tuple[int, int]:
    """(value, byte after it): 7 bits a byte, least significant first, 64 bits at most."""
    value = shift = 0
    for position in range(at, min(stop, at + _VARINT_BYTES)):
        byte = data[position]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position + 1
        shift += 7
    if stop - at < _VARINT_BYTES:
        raise WireError(at, "a number is cut off")
    raise WireError(at, f"a number has more than {_VARINT_BYTES} bytes")


def _in_range(value: int, at: int, bits: int, signed: bool) -> int:
    if signed and value >> 63:
        value -= 1 << 64
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
    if not low <= value < high:
        raise WireError(at, f"{value} does not fit {bits} bits")
    return value


def _expect(field: Field, number: int, protobuf_wire: int) -> None:
    if field.protobuf_wire != protobuf_wire:
        have, want = _WIRE_NAMES[field.protobuf_wire], _WIRE_NAMES[protobuf_wire]
        raise WireError(field.at, f"field {number} is {have}, not {want}")


def varint(value: int) -> bytes:
    """`value` as a varint; a negative one as the 10 bytes of its 64-bit complement."""
    value &= 0xFFFF_FFFF_FFFF_FFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    """Field `number` with a number."""
    return varint(number << 3 | VARINT) + varint(value)


def integers(number: int, values: Iterable[int]) -> bytes:
    """The repeated field `number`, not packed."""
    return b"".join(integer(number, value) for value in values)


def nested(number: int, content: bytes) -> bytes:
    """Field `number` with bytes: a message, or encoded text."""
    return varint(number << 3 | BYTES) + varint(len(content)) + content
