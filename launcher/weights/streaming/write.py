"""Writing one file of weights: from the memory of its tensors, several blocks at a time.

Owns how bytes get into a file. Torch-free. Each thread takes a block from memory, hashes it and
writes it to its place. The header, which holds the checksums, is written last; its length is known
from the start. No tensor is copied entirely.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import xxhash

from launcher.errors import UserError
from launcher.weights.formats.rank_metadata import BLOCK_BYTES, RankFileMetadata
from launcher.weights.formats.safetensors import (
    ITEM_BYTES,
    Header,
    Slot,
    header_bytes,
    parse_header,
)
from launcher.weights.streaming.block_file import BlockFile
from launcher.weights.threads import in_parallel

WRITERS = 2
"""Blocks in flight: one is hashed while another is written."""


@dataclass(frozen=True, slots=True)
class Part(Slot):
    """One tensor to write. `read(start, stop)` gives bytes of it in C order; it may be called from
    several threads."""

    read: Callable[[int, int], memoryview]


@dataclass(frozen=True)
class Container:
    """A format of files: how tensors lie in one. An entry of `launcher.extensions.FILE_FORMATS`."""

    extension: str
    start: Callable[[Sequence[Slot], Mapping[str, str]], bytes]
    """(tensors, metadata) -> everything before the data section. Its length depends only on the
    lengths of the texts."""
    framed: Callable[[Sequence[Part]], Sequence[Part]]
    """Tensors -> the data section: their bytes, and what lies between them."""
    parse: Callable[[Path, bytes, int], Header]
    """(path, what `start` gave, bytes of the file) -> the header of the new file."""
    dtypes: frozenset[str]
    """The dtypes that it can hold."""
    seal: Callable[[Path], None] | None = None
    """Adds a checksum of the entire file to its end, where the format has one."""


SAFETENSORS = Container(
    ".safetensors", header_bytes, lambda parts: parts,
    lambda path, raw, nbytes: parse_header(path, raw[8:], nbytes), frozenset(ITEM_BYTES),
)  # fmt: skip


class Staging:
    """Where the bytes of parts come from: here, memory that the host can read."""

    def block(self) -> AbstractContextManager[None]:
        """The calling thread reads the parts of one block, and uses them, inside."""
        return nullcontext()

    def arrived(self) -> None:
        """Wait until the bytes that the calling thread has read in this block are there."""


NO_STAGING = Staging()


def write_file(
    path: Path,
    parts: Sequence[Part],
    metadata: Mapping[str, str],
    rank_metadata: RankFileMetadata | None = None,
    container: Container = SAFETENSORS,
    staging: Staging = NO_STAGING,
) -> Header:
    """Write `parts` in the given order and make the file durable (fsync). Returns its header.

    With `rank_metadata` the header holds it and the checksums of the data. The caller chooses
    `path` so that a partial file is never taken for a complete one.
    """
    data = container.framed(parts)
    total = sum(part.nbytes for part in data)
    blocks = list(_blocks(data))

    def header(digests: Sequence[str]) -> bytes:
        own = {} if rank_metadata is None else {"slipway": rank_metadata.text(tuple(digests))}
        return container.start(parts, {**metadata, **own})

    start = len(header(["0" * 16] * len(blocks)))
    with BlockFile(path, BLOCK_BYTES, WRITERS) as file:

        def write(block: tuple[int, Block]) -> str:
            with staging.block():
                pieces = [part.read(first, last) for part, first, last in block[1]]
                staging.arrived()
                hasher = xxhash.xxh3_64()
                for piece in pieces if rank_metadata is not None else ():
                    hasher.update(piece)
                file.write(pieces, start + block[0] * BLOCK_BYTES)
                return hasher.hexdigest()

        raw = header(in_parallel(write, enumerate(blocks), WRITERS))
        for first in range(0, len(raw), BLOCK_BYTES):
            file.write([memoryview(raw)[first : first + BLOCK_BYTES]], first)
        file.finish(start + total)
    return container.parse(path, raw, start + total)


def check_dtypes(path: Path, parts: Sequence[Part], container: Container) -> None:
    """Check that a format has the dtypes of `parts`. Raises `UserError`."""
    for part in parts:
        if part.dtype not in container.dtypes:
            raise UserError(
                f"{path} cannot hold `{part.name}`, which is {part.dtype}",
                rule=f"{container.extension} files have {', '.join(sorted(container.dtypes))}",
                advice="Cast it first, or write safetensors",
            )


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
