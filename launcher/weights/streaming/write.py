"""Writing one safetensors file: from the memory of its tensors, several blocks at a time.

Owns how bytes reach a file. Torch-free. A block is taken from where it is, hashed and written to
its place by one thread while others do the same; the header, which holds the checksums, comes last
and has its final length from the start. Nothing is copied on the way.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from launcher.weights.formats.note import BLOCK_BYTES, Note
from launcher.weights.formats.safetensors import Header, Slot, header_bytes, parse_header
from launcher.weights.threads import in_parallel

WRITERS = 2
"""Blocks in flight: one is hashed while another is written; a file lets one in at a time."""

_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
"""Of Linux: sync_file_range(descriptor, offset, bytes, flags)."""
_BEGIN_WRITING = 2


@dataclass(frozen=True, slots=True)
class Part(Slot):
    """One tensor to write. `read(start, stop)` gives bytes of it in C order, when their turn comes;
    it may be called from several threads."""

    read: Callable[[int, int], memoryview]


def write_file(
    path: Path, parts: Sequence[Part], metadata: dict[str, str], note: Note | None = None
) -> Header:
    """Write `parts`, in the order given, and make the file durable (fsync). Returns its header.

    With `note` the header gets it, and the checksums of the data. The caller chooses `path` so that
    a half-written file is never mistaken for a whole one.
    """
    total = sum(part.nbytes for part in parts)
    blocks = list(_blocks(parts))

    def header(digests: Sequence[str]) -> bytes:
        own = {} if note is None else {"slipway": note.text(tuple(digests))}
        return header_bytes(parts, {**metadata, **own})

    start = len(header(["0" * 16] * len(blocks)))
    with path.open("wb", buffering=0) as file:
        descriptor = file.fileno()

        def write(block: tuple[int, Block]) -> str:
            position = start + block[0] * BLOCK_BYTES
            hasher = xxhash.xxh3_64()
            for part, first, last in block[1]:
                view = part.read(first, last)
                if note is not None:
                    hasher.update(view)
                write_all(descriptor, view, position)
                position += last - first
            begin_writing(descriptor, start + block[0] * BLOCK_BYTES, BLOCK_BYTES)
            return hasher.hexdigest()

        raw = header(in_parallel(write, enumerate(blocks), WRITERS))
        write_all(descriptor, memoryview(raw), 0)
        os.fsync(descriptor)
    return parse_header(path, raw[8:], start + total)


Block = list[tuple[Part, int, int]]
"""(part, first byte, last byte) of what lies in one block of the data section."""


def _blocks(parts: Sequence[Part]) -> Iterator[Block]:
    block, room = Block(), BLOCK_BYTES
    for part in parts:
        first = 0
        while first < part.nbytes:
            last = min(first + room, part.nbytes)
            block.append((part, first, last))
            room -= last - first
            first = last
            if not room:
                yield block
                block, room = [], BLOCK_BYTES
    if block:
        yield block


def begin_writing(descriptor: int, position: int, nbytes: int) -> None:
    """Send bytes of a file on their way to the disk, so that fsync waits for little."""
    if _SYNC_FILE_RANGE is not None:
        place = (ctypes.c_int64(position), ctypes.c_int64(nbytes))
        _SYNC_FILE_RANGE(descriptor, *place, _BEGIN_WRITING)


def write_all(descriptor: int, view: memoryview, position: int) -> None:
    """Write all of `view` to the file from `position` on."""
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count
