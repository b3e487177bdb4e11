"""The safetensors format: reading headers that may lie, writing files with checksums.

Owns the bytes of a safetensors file (https://github.com/huggingface/safetensors#format): 8 bytes of
little-endian header length, a JSON header, the data section. Torch-free. Invariants:
- a header is believed only after every offset, shape and dtype in it has been checked against the
  size of the file; nothing is allocated on its word;
- a file is written once, from the memory of its tensors, without a copy.

Our own files carry `__metadata__["slipway"]`, a JSON text that describes the layout and holds one
xxh3_64 checksum for each block of the data section.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.layout.box import Shape

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by the dtype names of the format."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

BLOCK_BYTES = 4 << 20
"""Bytes of the data section that share one checksum."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: dtype name, shape, and where its bytes lie in the file."""

    dtype: str
    shape: Shape
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What the header of a file says, checked. `data_start` is the first byte of the data."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int
    digest: str
    """xxh3_64 of the header bytes, in hex."""

    def slipway(self) -> dict[str, Any] | None:
        """Our own part of the metadata, or None in a file of another program."""
        text = self.metadata.get("slipway")
        return None if text is None else json.loads(text)


def read_header(path: Path) -> Header:
    """The header of the safetensors file at `path`. Raises `UserError` when it cannot be true."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise _broken(path, f"it has {file_bytes} bytes and its header claims {length}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    content = _parse(path, raw)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "its `__metadata__` is not a map of texts")
    start = 8 + length
    entries = {name: _entry(path, name, value, start) for name, value in content.items()}
    _check_coverage(path, entries, start, file_bytes)
    return Header(entries, metadata, start, file_bytes, xxhash.xxh3_64_hexdigest(raw))


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _broken(path, "a key stands twice in its header")
        return result

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _broken(path, "its header is not a JSON map")
    return content


def _entry(path: Path, name: str, value: Any, data_start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of `{name}` needs dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise _broken(path, f"`{name}` has the unknown dtype {dtype!r}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"`{name}` has shape {shape!r} and offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _broken(path, f"`{name}` of shape {shape} does not fill its {end - begin} bytes")
    return Entry(dtype, tuple(shape), data_start + begin, data_start + end)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


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
        f"{path} is not a whole safetensors file",
        rule=why,
        advice="Copy the file again from its origin; nothing was loaded from it",
    )


@dataclass(frozen=True)
class Part:
    """One tensor to write. `data` gives its bytes in C order, when their turn comes."""

    name: str
    dtype: str
    shape: Shape
    data: Callable[[], memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def block_digests(parts: Iterable[memoryview], block_bytes: int = BLOCK_BYTES) -> list[str]:
    """xxh3_64 (hex) of each block of `block_bytes` of the parts laid end to end."""
    digests, hasher, room = [], xxhash.xxh3_64(), block_bytes
    for piece in parts:
        while piece:
            taken = piece[:room]
            hasher.update(taken)
            room -= len(taken)
            piece = piece[len(taken) :]
            if room == 0:
                digests.append(hasher.hexdigest())
                hasher, room = xxhash.xxh3_64(), block_bytes
    if room != block_bytes:
        digests.append(hasher.hexdigest())
    return digests


def in_file_order(parts: Sequence[Part]) -> list[Part]:
    """Widest dtype first, then by name, so that every tensor is aligned to its own item size."""
    return sorted(parts, key=lambda part: (-ITEM_BYTES[part.dtype], part.name))


def write_file(path: Path, parts: Sequence[Part], metadata: dict[str, str]) -> Header:
    """Write `parts`, in the order given, and make the file durable (fsync). Returns its header.

    The caller chooses `path` so that a half-written file is never mistaken for a whole one.
    """
    entries, position = {}, 0
    for part in parts:
        entries[part.name] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [position, position + part.nbytes],
        }
        position += part.nbytes
    raw = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(len(raw).to_bytes(8, "little") + raw))
        for part in parts:
            _write_all(file.fileno(), part.data())
        os.fsync(file.fileno())
    start = 8 + len(raw)
    checked = {name: _entry(path, name, value, start) for name, value in entries.items()}
    return Header(checked, metadata, start, start + position, xxhash.xxh3_64_hexdigest(raw))


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
