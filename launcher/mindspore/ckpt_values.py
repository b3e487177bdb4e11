"""The values in a `.ckpt` file of MindSpore: tensors, in one or several chunks, and texts.

Owns the meaning of a value, and how values of one name are joined: a tensor of more than 512 MiB is
stored as consecutive values of the same name, dims and dtype, whose contents follow one another.
Contents are not read, except those of texts. Torch-free. Every error names the tensor and the byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.mindspore.file_bytes import FileBytes
from launcher.mindspore.protobuf_wire import BYTES, Field, Message, WireError
from launcher.weights.formats.safetensors import ITEM_BYTES, MAX_DIMS, Chunk, Entry

DTYPES = {
    "Int8": "I8", "UInt8": "U8", "Int16": "I16", "UInt16": "U16", "Int32": "I32", "UInt32": "U32",
    "Int64": "I64", "UInt64": "U64", "Float16": "F16", "Float32": "F32", "Float64": "F64",
    "Bool": "BOOL", "BFloat16": "BF16",
}  # fmt: skip
"""Names of dtypes in the file to those of safetensors."""
TEXT = "str"
"""The dtype of a text: UTF-32 without end mark."""
TENSOR_LIMIT = 1 << 20
"""Values of a file."""
CHUNK_LIMIT = 1024
"""Chunks of a tensor: 512 GiB."""
NAME_LIMIT = 1 << 14
"""Bytes of a name."""
TEXT_LIMIT = 1 << 20
"""Bytes of the texts of a file, which are kept in memory."""
TAG, TENSOR, _MAP = 1, 2, 3
DIMS, TYPE, CONTENT = 1, 2, 3
_FIELD_LIMIT = 2 * MAX_DIMS


@dataclass(frozen=True, slots=True)
class Value:
    """One value: a tensor, a chunk of it, or a text."""

    at: int
    """Its first byte in the file."""
    name: str
    dtype: str
    """As the file names it."""
    shape: Shape
    start: int
    stop: int
    """Of its content in the file."""
    text: str | None = None


def read_value(data: FileBytes, place: Field) -> Value:
    """The value in a field of the file. Raises `WireError` for one that is not valid, `UserError`
    for one of a kind that is not read."""
    message = Message(data, place.value, place.stop, _FIELD_LIMIT)
    name = _text(message, TAG, "name (tag)", NAME_LIMIT)
    if _MAP in message.fields:
        raise UserError(
            f"`{name}` at byte {place.at} is a hash map of a recommender net (MapParameter)",
            rule="tensors are read",
            advice="Export it to a tensor with MindSpore first",
        )
    with _naming(name):
        tensor = message.message(TENSOR, "tensor", _FIELD_LIMIT)
        dtype = _text(tensor, TYPE, "dtype (tensor_type)", NAME_LIMIT)
        content = tensor.content(CONTENT, "content (tensor_content)")
        if dtype == TEXT:
            text = _text_value(data, content)
            return Value(place.at, name, dtype, (), content.value, content.stop, text)
        _check_dtype(name, dtype, tensor.start)
        shape = _shape(tensor, content, ITEM_BYTES[DTYPES[dtype]])
    return Value(place.at, name, dtype, shape, content.value, content.stop)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors name the tensor."""
    try:
        yield
    except WireError as error:
        raise WireError(error.at, f"`{name}`: {error.what}") from None


def _text(message: Message, number: int, what: str, limit: int) -> str:
    """A text of at most `limit` bytes. Raises `WireError`."""
    found = message.content(number, what)
    if found.stop - found.value > limit:
        raise WireError(found.at, f"a {what} of {found.stop - found.value} bytes")
    return message.text(number, what)


def _text_value(data: FileBytes, content: Field) -> str:
    nbytes = content.stop - content.value
    if nbytes > TEXT_LIMIT:
        raise WireError(content.at, f"a text of {nbytes} bytes, {TEXT_LIMIT} are read")
    try:
        return data[content.value : content.stop].decode("utf-32-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise WireError(content.value + error.start, "it is not UTF-32") from None


def _check_dtype(name: str, dtype: str, at: int) -> None:
    if dtype == "Int4":
        raise UserError(
            f"`{name}` at byte {at} has the dtype Int4",
            rule="weights that are quantised to 4 bits, two in a byte, are not read",
            advice="Save it with MindSpore in a floating dtype",
        )
    if dtype not in DTYPES:
        raise WireError(at, f"the unknown dtype {dtype[:40]!r}")


def _shape(tensor: Message, content: Field, item: int) -> Shape:
    """The shape. No dims, and `[0]` with the content of one element, as older versions wrote it,
    are a scalar."""
    at = tensor.fields.get(DIMS, [content])[0].at
    for found in tensor.fields.get(DIMS, ()):
        if found.protobuf_wire == BYTES and found.stop - found.value > 10 * MAX_DIMS:
            raise WireError(found.at, f"it has more than {MAX_DIMS} dims")
    shape = tensor.integers(DIMS, bits=64)
    if len(shape) > MAX_DIMS:
        raise WireError(at, f"it has more than {MAX_DIMS} dims")
    if any(size < 0 for size in shape):
        raise WireError(at, f"it has the shape {list(shape)}")
    return () if shape == (0,) and content.stop - content.value == item else shape


@dataclass
class Tensors:
    """The tensors and texts of a file, as its values are read one after another."""

    entries: dict[str, Entry] = field(default_factory=dict)
    chunks: dict[str, tuple[Chunk, ...]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    _open: list[Value] = field(default_factory=list)
    """Values of the last name; without those that are empty, but for the first."""
    _nbytes: int = 0
    _text_bytes: int = 0

    def add(self, value: Value) -> None:
        """Take the next value. Raises `WireError` where it does not fit those before it."""
        if self._open and self._open[0].name == value.name:
            self._check_same(self._open[0], value)
            if value.stop > value.start:
                self._open.append(value)
            if len(self._open) > CHUNK_LIMIT:
                raise WireError(value.at, f"`{value.name}` has more than {CHUNK_LIMIT} chunks")
        else:
            self.finish()
            if value.name in self.entries or value.name in self.texts:
                raise WireError(value.at, f"a second `{value.name}`, not next to the first")
            self._open, self._nbytes = [value], 0
        self._nbytes += value.stop - value.start
        self._text_bytes += value.stop - value.start if value.text is not None else 0
        if self._text_bytes > TEXT_LIMIT:
            raise WireError(value.at, f"the texts have more than {TEXT_LIMIT} bytes")

    def _check_same(self, first: Value, value: Value) -> None:
        if first.text is not None or value.text is not None:
            raise WireError(value.at, f"a second `{value.name}`")
        if (first.dtype, first.shape) != (value.dtype, value.shape):
            raise WireError(
                value.at,
                f"the next chunk of `{value.name}` is {value.dtype} {list(value.shape)}, the "
                f"first is {first.dtype} {list(first.shape)}",
            )

    def finish(self) -> None:
        """Close the tensor whose values were read last. Raises `WireError` where they do not make
        up its shape."""
        if not self._open:
            return
        first, values = self._open[0], [v for v in self._open if v.stop > v.start]
        self._open = []
        if first.text is not None:
            self.texts[first.name] = first.text
            return
        dtype = DTYPES[first.dtype]
        if math.prod(first.shape) * ITEM_BYTES[dtype] != self._nbytes:
            raise WireError(
                first.at,
                f"`{first.name}`, {first.dtype} {list(first.shape)}, does not fill its "
                f"{self._nbytes} bytes",
            )
        last = values[-1] if values else first
        self.entries[first.name] = Entry(
            dtype, first.shape, (values or [first])[0].start, last.stop
        )
        if len(values) > 1:
            self.chunks[first.name] = tuple(_chunks(values, dtype))


def _chunks(values: list[Value], dtype: str) -> Iterator[Chunk]:
    item, element = ITEM_BYTES[dtype], 0
    for value in values:
        count, rest = divmod(value.stop - value.start, item)
        if rest:
            raise WireError(
                value.at,
                f"a chunk of `{value.name}` ends inside an element: it has "
                f"{value.stop - value.start} bytes, {value.dtype} has {item}",
            )
        position = value.start
        for box in boxes_between(value.shape, element, element + count):
            stop = position + box.numel * item
            yield Chunk(box, Entry(dtype, box.size, position, stop))
            position = stop
        element += count


def boxes_between(shape: Shape, first: int, last: int) -> list[Box]:
    """The elements `first` to `last` of a C-ordered tensor, as boxes in that order: at most two for
    each dim.

        . . # #
        # # # #     the end of a row, full rows, the start of a row
        # . . .
    """
    if first >= last:
        return []
    if not shape:
        return [Box((), ())]
    inner = math.prod(shape[1:])
    row, stop = -(-first // inner), last // inner
    if row > stop:  # inside one row
        return _in_row(shape, stop, first - stop * inner, last - stop * inner)
    boxes = []
    if first < row * inner:
        boxes += _in_row(shape, row - 1, first - (row - 1) * inner, inner)
    if row < stop:
        full = tuple(shape[1:])
        boxes.append(Box((row, *(0 for _ in full)), (stop - row, *full)))
    if stop * inner < last:
        boxes += _in_row(shape, stop, 0, last - stop * inner)
    return boxes


def _in_row(shape: Shape, row: int, first: int, last: int) -> list[Box]:
    inner = boxes_between(shape[1:], first, last)
    return [Box((row, *box.offset), (1, *box.size)) for box in inner]
