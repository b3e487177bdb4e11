"""Verification: do the bytes of a file still have the checksums its header gives?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import Problem, UserError
from launcher.weights.formats import header_of
from launcher.weights.formats.safetensors import Header
from launcher.weights.note import Checksums, read_note
from launcher.weights.source import Source
from launcher.weights.threads import in_parallel
from launcher.weights.transfer import Files, read_exactly

READERS = 4


def file_faults(path: Path, *, header_digest: str | None = None) -> list[str]:
    """Every fault of one file, in words that name the file and the tensors; empty when whole.

    `header_digest`: what the header must hash to (xxh3_64, hex), where that is known.
    Files of other programs carry no checksums: for them only the header is checked.
    """
    try:
        header = header_of(path)
        if header_digest is not None and header.digest != header_digest:
            return [f"{path}: its header changed"]
        note = read_note(path, header)
        return [] if note is None else _changed_blocks(path, header, note.checksums)
    except UserError as error:
        return [str(error)]


def _changed_blocks(path: Path, header: Header, checksums: Checksums) -> list[str]:
    with Files() as files:
        descriptor = files.descriptor(path, header.file_bytes)

        def fault(index: int) -> str | None:
            start = header.data_start + index * checksums.block_bytes
            stop = min(start + checksums.block_bytes, header.file_bytes)
            block = np.empty(stop - start, np.uint8)
            read_exactly(descriptor, path, block.data, start)
            if xxhash.xxh3_64_hexdigest(block.data) == checksums.values[index]:
                return None
            names = ", ".join(_tensors_in(header, start, stop)[:4])
            return f"{path}: bytes {start} to {stop} changed ({names})"

        found = in_parallel(fault, range(len(checksums.values)), READERS)
    return [text for text in found if text is not None]


def verified(source: Source) -> Source:
    """`source`, after its files have been read and agree with their checksums.

    Raises `UserError` that names every fault.
    """
    faults = [fault for file in source.headers for fault in file_faults(file)]
    if faults:
        raise UserError(
            [Problem(what=fault, advice="Choose another checkpoint") for fault in faults]
        )
    return source


def _tensors_in(header: Header, start: int, stop: int) -> list[str]:
    return [
        name for name, entry in header.entries.items() if entry.start < stop and entry.stop > start
    ]
