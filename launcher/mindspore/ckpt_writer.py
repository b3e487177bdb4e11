"""Writing `.ckpt` files of MindSpore: the frame around each tensor, and the metadata before them.

Owns the bytes between the contents of tensors, which stream through `launcher.weights.streaming`.
Torch-free. As MindSpore writes them: a tensor of more than `CHUNK_BYTES` becomes several values, a
scalar has no dims, an empty tensor is left out, and dims are not packed. Metadata (the layout of a
rank file and its checksums) is in a field that MindSpore skips, see `ckpt_files`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from launcher.layout.box import Shape
from launcher.mindspore.ckpt_checksum import crc_of, suffix
from launcher.mindspore.ckpt_files import METADATA_FIELD, VALUE_FIELD, read_header
from launcher.mindspore.ckpt_values import CONTENT, DIMS, DTYPES, TAG, TENSOR, TYPE
from launcher.mindspore.protobuf_wire import BYTES, integers, nested, varint
from launcher.weights.formats.safetensors import PAGE_BYTES, Header, Slot
from launcher.weights.streaming.write import Container, Part

CHUNK_BYTES = 512 << 20
"""Of one value; MindSpore cuts there because a protobuf message has at most 2 GiB."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Dtypes of safetensors that the format has, to their names in it."""


def value_start(name: str, dtype: str, shape: Shape, nbytes: int) -> bytes:
    """The bytes of a value before its content of `nbytes`. `dtype`: one of `NAMES`."""
    start = integers(DIMS, shape) + nested(TYPE, NAMES[dtype].encode())
    start += varint(CONTENT << 3 | BYTES) + varint(nbytes)
    tag = nested(TAG, name.encode())
    tensor = varint(TENSOR << 3 | BYTES) + varint(len(start) + nbytes)
    length = len(tag) + len(tensor) + len(start) + nbytes
    return varint(VALUE_FIELD << 3 | BYTES) + varint(length) + tag + tensor + start


def framed(parts: Sequence[Part]) -> list[Part]:
    """The content of a file with `parts`: the start of each value, then its bytes."""
    return [framed_part for part in parts for framed_part in _values(part)]


def _values(part: Part) -> Iterator[Part]:
    for first in range(0, part.nbytes, CHUNK_BYTES):
        nbytes = min(CHUNK_BYTES, part.nbytes - first)
        start = value_start(part.name, part.dtype, part.shape, nbytes)
        yield Part(part.name, "U8", (len(start),), partial(_bytes_of, start))
        yield Part(part.name, "U8", (nbytes,), partial(_shifted, part, first))


def _bytes_of(content: bytes, start: int, stop: int) -> memoryview:
    return memoryview(content)[start:stop]


def _shifted(part: Part, first: int, start: int, stop: int) -> memoryview:
    return part.read(first + start, first + stop)


def metadata_field(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with: `metadata` as JSON, padded so that the values begin at a multiple of
    `PAGE_BYTES`; nothing without any."""
    if not metadata:
        return b""
    raw, tag = json.dumps(dict(metadata), separators=(",", ":")).encode(), METADATA_FIELD << 3
    start = varint(tag | BYTES)
    room = -(-(len(start) + 5 + len(raw)) // PAGE_BYTES) * PAGE_BYTES - len(start)
    length = next(room - k for k in range(1, 6) if len(varint(room - k)) == k)
    return start + varint(length) + raw + b" " * (length - len(raw))


def _parsed(path: Path, raw: bytes, file_bytes: int) -> Header:
    return read_header(path)


def append_crc(path: Path) -> None:
    """Add the checksum that `crc_check=True` of MindSpore writes to a new file."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    try:
        end = os.fstat(descriptor).st_size
        os.write(descriptor, suffix(crc_of(descriptor, path, end)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


CKPT = Container(".ckpt", metadata_field, framed, _parsed, frozenset(NAMES), append_crc)
"""`.ckpt` among the formats of files that are written."""
