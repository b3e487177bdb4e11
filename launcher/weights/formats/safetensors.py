"""The safetensors format: reading and writing headers.

Owns the header of a safetensors file (https://github.com/huggingface/safetensors#format): 8 bytes
of little-endian length, a JSON map, and behind it the data section. Torch-free. Invariant: a header
is used only after every offset, shape and dtype in it was checked against the size of the file;
nothing is allocated by unchecked sizes.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import xxhash

from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.weights.formats.placeholders import refuse_placeholder

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the dtype names of the format."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_DIMS = 64

CONVERT = "Convert it: python -m launcher.tools.ckpt_to_safetensors"
ZIP = b"PK\x03\x04"
"""First bytes of a file of torch; read as a length, more than a header may have."""

PAGE_BYTES = 4096
"""Blocks that share no page of the page cache can be written at the same time."""
_FIELDS = {"dtype", "shape", "data_offsets"}
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""The JSON escape of a surrogate, half a character."""


class Entry(NamedTuple):
    """One tensor of a file: dtype name, shape, and where its bytes lie in the file."""

    dtype: str
    shape: Shape
    start: int
    stop: int
    strides: Shape | None = None
    """Elements from one index to the next, for each dim; None: C-ordered, as safetensors is."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Chunk(NamedTuple):
    """A box of a tensor whose bytes lie together, and where."""

    box: Box
    entry: Entry


@dataclass(frozen=True)
class Header:
    """The checked header of a file. `data_start` is the first byte of the data."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int
    digest: str
    """xxh3_64 of the header bytes, in hex."""
    modified: int | None = None
    """Modification time of the file, in nanoseconds; None where it was not read."""
    chunks: Mapping[str, tuple[Chunk, ...]] = field(default_factory=dict)
    """Of tensors whose bytes lie in several places; their entry spans all of them. Safetensors has
    none."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Texts that lie among the tensors, by name."""
    extension: str = ".safetensors"
    """Of the format of the file, whatever its name."""
    crc: str = ""
    """Name in `launcher.extensions.FILE_CHECKS` of the check of the checksum at the end of the
    file; empty: it has none."""


def read_header(path: Path) -> Header:
    """The header of the safetensors file at `path`. Raises `UserError` when it is not valid."""
    try:
        # Non-blocking: opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path} is not a file", advice="Give a safetensors file")
            prefix = file.read(8)
            if prefix.startswith(ZIP):
                raise UserError(
                    f"{path} is a file of torch",
                    rule="a file of safetensors is needed here",
                    advice=CONVERT,
                )
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, found.st_size - 8):
                refuse_placeholder(path)
                claim = f"its header claims {length}" if len(prefix) == 8 else "a header has 8"
                raise _broken(path, f"it has {found.st_size} bytes and {claim}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return replace(parse_header(path, raw, found.st_size), modified=found.st_mtime_ns)


def parse_header(path: Path, raw: bytes, file_bytes: int) -> Header:
    """The header whose JSON text is `raw`, of a file of `file_bytes`. Raises `UserError`."""
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its `__metadata__` is not a map of texts")
    start = 8 + len(raw)
    entries = {name: _entry(path, name, value, start) for name, value in content.items()}
    _check_coverage(path, entries, start, file_bytes)
    return Header(entries, metadata, start, file_bytes, xxhash.xxh3_64_hexdigest(raw))


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _broken(path, "duplicate key in its header")
        return result

    try:
        content = parse_json(raw.decode("utf-8"), unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _broken(path, "its header is not a JSON map")
    return content


def parse_json(text: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of the JSON `text`. Raises ValueError, also for strings that cannot be encoded, and
    RecursionError."""
    content = json.loads(text, object_pairs_hook=pairs_hook)
    if _SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise _broken(path, f"the entry of `{name}` needs dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _broken(path, f"`{name}` has the unknown dtype {dtype!r}")
    if not are_non_negative(shape) or not are_non_negative(offsets) or len(offsets) != 2:
        raise _broken(path, f"`{name}` has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _broken(path, f"`{name}` of shape {shape} does not fill its {end - begin} bytes")
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def are_non_negative(value: Any) -> bool:
    """Whether `value` is a list of at most `MAX_DIMS` integers from 0 to 2^63 - 1."""
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return False
    if not value:
        return True
    return {*map(type, value)} == {int} and min(value) >= 0 and max(value) < 1 << 63


def _check_coverage(path: Path, entries: dict[str, Entry], start: int, file_bytes: int) -> None:
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise _broken(path, f"the bytes of `{name}` overlap others or leave a gap")
        position = entry.stop
    if position != file_bytes:
        raise _broken(path, f"its tensors end at byte {position}, the file at {file_bytes}")


def _broken(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not a valid safetensors file",
        rule=why if len(why) < 300 else f"{why[:300]}...",
        advice="Copy the file again from its origin; nothing was loaded from it",
    )


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a file to write: name, dtype and shape."""

    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


AnySlot = TypeVar("AnySlot", bound=Slot)


def in_file_order(slots: Iterable[AnySlot]) -> list[AnySlot]:
    """Widest dtype first, then by name, so that every tensor is aligned to its own item size."""
    return sorted(slots, key=lambda slot: (-ITEM_BYTES[slot.dtype], slot.name))


def header_bytes(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    """Everything before the data section: length and JSON, padded so that the data begins at a
    multiple of `PAGE_BYTES`. Tensors are in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for slot in slots:
        entries[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.nbytes],
        }
        position += slot.nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % PAGE_BYTES)
    return len(raw).to_bytes(8, "little") + raw
