"""Checking what was read, while it is in memory, against the checksums of its file.

Owns the checks that need almost no further reading. A block is checked where this rank has read all
of it unchanged: into CPU memory, in the dtype of the file, each of its tensors contiguous. Blocks
of which little is missing are completed from the file, up to `EXTRA` of the bytes read; a file of
at most `SMALL_FILE` is read entirely. So every byte is checked when a rank reads its own file, or
full rows. Tensors cut by columns, cast, or read to a GPU are not checked: `launcher.tools.verify`
reads everything.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import Problem, UserError
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.reading.checksums import changed
from launcher.weights.reading.plan import Read, strided_copy_of
from launcher.weights.reading.read import READERS, Fill
from launcher.weights.reading.tensor_bytes import TORCH_DTYPES, memory_of
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.source import Source
from launcher.weights.threads import in_parallel

EXTRA = 0.01
"""Bytes that may be read to complete blocks, as a fraction of the bytes read anyway."""
SMALL_FILE = 1 << 20
"""Bytes of a file that is read entirely."""


@dataclass(frozen=True)
class Segment:
    """Bytes `start` to `stop` of a file, and their memory; None when they were not read."""

    start: int
    stop: int
    view: memoryview | None


@dataclass(frozen=True)
class Block:
    """Bytes of a file that share a checksum."""

    path: Path
    digest: str
    segments: Sequence[Segment]
    """End to end."""

    @property
    def missing(self) -> int:
        """Bytes that are not in memory."""
        return sum(part.stop - part.start for part in self.segments if part.view is None)


def check_read(fills: Sequence[Fill], source: Source) -> None:
    """Check what was read. Raises `UserError` that names file and tensors of every fault."""
    found: dict[Path, list[Segment]] = {}
    read_bytes: dict[Path, int] = {}
    for job in fills:
        for read in job.reads:
            path = read.piece.file
            if path in source.checksums:
                read_bytes[path] = read_bytes.get(path, 0) + read.nbytes
                view = _as_read(job, read)
                if view is not None:
                    entry = read.piece.entry
                    found.setdefault(path, []).append(Segment(entry.start, entry.stop, view))
    blocks = [
        block for path, nbytes in read_bytes.items()
        for block in _affordable(
            _blocks(path, found.get(path, []), source),
            SMALL_FILE if source.headers[path].file_bytes <= SMALL_FILE else EXTRA * nbytes,
        )
    ]  # fmt: skip
    with Files() as files:
        faults = in_parallel(lambda block: _fault(block, files, source), blocks, READERS)
    if any(faults):
        raise UserError(
            [Problem(what=text, rule="the bytes do not have the checksum they were written with",
                     advice="Choose another checkpoint") for text in faults if text]
        )  # fmt: skip


def _as_read(job: Fill, read: Read) -> memoryview | None:
    """The memory of a piece that was read entirely and unchanged; None for others."""
    entry = read.piece.entry
    is_entire = read.overlap == read.piece.box and entry.strides is None
    is_unchanged = job.tensor.dtype == TORCH_DTYPES[entry.dtype] and job.scales is None
    if not is_entire or not is_unchanged or job.tensor.device.type != "cpu":
        return None
    memory, strides = memory_of(job.tensor)
    strided_copy = strided_copy_of(read, job.box, (0, strides))
    if strided_copy.loops:
        return None
    nbytes = read.overlap.numel * ITEM_BYTES[entry.dtype]
    return memory.data[strided_copy.memory_offset : strided_copy.memory_offset + nbytes]


def _blocks(path: Path, found: Iterable[Segment], source: Source) -> Iterator[Block]:
    """All blocks of a file, with the memory of those bytes that are in `found`."""
    header, checksums = source.headers[path], source.checksums[path]
    ordered = sorted(found, key=lambda segment: segment.start)
    starts = [segment.start for segment in ordered]
    for index, digest in enumerate(checksums.values):
        start = header.data_start + index * checksums.block_bytes
        stop = min(start + checksums.block_bytes, header.file_bytes)
        first = max(bisect_right(starts, start) - 1, 0)
        last = bisect_right(starts, stop)
        yield Block(path, digest, _end_to_end(ordered[first:last], start, stop))


def _end_to_end(found: Iterable[Segment], start: int, stop: int) -> list[Segment]:
    """`start` to `stop` in segments: those of `found`, and the gaps between them."""
    segments, position = [], start
    for segment in found:
        first, last = max(segment.start, position), min(segment.stop, stop)
        if first >= last or segment.view is None:
            continue
        if first > position:
            segments.append(Segment(position, first, None))
        view = segment.view[first - segment.start : last - segment.start]
        segments.append(Segment(first, last, view))
        position = last
    if position < stop:
        segments.append(Segment(position, stop, None))
    return segments


def _affordable(blocks: Iterable[Block], room: float) -> Iterator[Block]:
    """Those blocks that can be checked by reading at most `room` further bytes."""
    for block in sorted(blocks, key=lambda block: block.missing):
        room -= block.missing
        if room < 0:
            return
        yield block


def _fault(block: Block, files: Files, source: Source) -> str | None:
    header, hasher = source.headers[block.path], xxhash.xxh3_64()
    for segment in block.segments:
        view = segment.view
        if view is None:
            descriptor = files.descriptor(block.path, header.file_bytes, header.modified)
            view = np.empty(segment.stop - segment.start, np.uint8).data
            read_exactly(descriptor, block.path, view, segment.start)
        hasher.update(view)
    if hasher.hexdigest() == block.digest:
        return None
    return changed(block.path, header, block.segments[0].start, block.segments[-1].stop)
