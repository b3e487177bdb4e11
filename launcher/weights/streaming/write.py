"""Writing one safetensors file: from the memory of its tensors, several blocks at a time.

Owns how bytes get into a file. Torch-free. Each thread takes a block from memory, hashes it and
writes it to its place. The header, which holds the checksums, is written last; its length is known
from the start. No tensor is copied entirely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from launcher.weights.formats.rank_metadata import BLOCK_BYTES, RankFileMetadata
from launcher.weights.formats.safetensors import Header, Slot, header_bytes, parse_header
from launcher.weights.streaming.block_file import BlockFile
from launcher.weights.threads import in_parallel

WRITERS = 2
"""Blocks in flight: one is hashed while another is written."""


@dataclass(frozen=True, slots=True)
class Part(Slot):
    """One tensor to write. `read(start, stop)` gives bytes of it in C order; it may be called from
    several threads."""

    read: Callable[[int, int], memoryview]


def write_file(
    path: Path,
    parts: Sequence[Part],
    metadata: dict[str, str],
    rank_metadata: RankFileMetadata | None = None,
) -> Header:
    """Write `parts` in the given order and make the file durable (fsync). Returns its header.

    With `rank_metadata` the header holds it and the checksums of the data. The caller chooses
    `path` so that a partial file is never taken for a complete one.
    """
    total = sum(part.nbytes for part in parts)
    blocks = list(_blocks(parts))

    def header(digests: Sequence[str]) -> bytes:
        own = {} if rank_metadata is None else {"slipway": rank_metadata.text(tuple(digests))}
        return header_bytes(parts, {**metadata, **own})

    start = len(header(["0" * 16] * len(blocks)))
    with BlockFile(path, BLOCK_BYTES, WRITERS) as file:

        def write(block: tuple[int, Block]) -> str:
            pieces = [part.read(first, last) for part, first, last in block[1]]
            hasher = xxhash.xxh3_64()
            for piece in pieces if rank_metadata is not None else ():
                hasher.update(piece)
            file.write(pieces, start + block[0] * BLOCK_BYTES)
            return hasher.hexdigest()

        raw = header(in_parallel(write, enumerate(blocks), WRITERS))
        for first in range(0, len(raw), BLOCK_BYTES):
            file.write([memoryview(raw)[first : first + BLOCK_BYTES]], first)
        file.finish(start + total)
    return parse_header(path, raw[8:], start + total)


Block = list[tuple[Part, int, int]]
"""(part, first byte, last byte) of the content of one block of the data section."""


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
