"""Checksums: comparing the bytes of a file with the checksums in its header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from launcher.errors import UserError
from launcher.extensions import FILE_CHECKS, required
from launcher.weights.formats import header_of
from launcher.weights.formats.rank_metadata import Checksums, read_rank_metadata
from launcher.weights.formats.safetensors import Header
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.threads import in_parallel

READERS = 4


def file_faults(path: Path, *, header_digest: str | None = None, data: bool = True) -> list[str]:
    """Every fault of one file, with the file and the tensors; empty when it is valid.

    `header_digest`: the expected xxh3_64 (hex) of the header, where it is known. `data` False
    checks only the header, as is done for files of other programs, which have no checksums.
    """
    try:
        header = header_of(path)
        if header_digest is not None and header.digest != header_digest:
            return [f"{path}: its header changed"]
        rank_metadata = read_rank_metadata(path, header)
        if data:
            check_file(path, header)
        if rank_metadata is None or not data:
            return []
        return _changed_blocks(path, header, rank_metadata.checksums)
    except UserError as error:
        return [str(error)]


def check_file(path: Path, header: Header) -> None:
    """Check a file against the checksum at its end, if it has one. Reads all of it then. Raises
    `UserError`."""
    if header.crc:
        required(FILE_CHECKS, header.crc, f"{path} has a checksum")(path, header.file_bytes)


def _changed_blocks(path: Path, header: Header, checksums: Checksums) -> list[str]:
    with Files() as files:
        descriptor = files.descriptor(path, header.file_bytes, header.modified)

        def fault(index: int) -> str | None:
            start = header.data_start + index * checksums.block_bytes
            stop = min(start + checksums.block_bytes, header.file_bytes)
            block = np.empty(stop - start, np.uint8)
            read_exactly(descriptor, path, block.data, start)
            if xxhash.xxh3_64_hexdigest(block.data) == checksums.values[index]:
                return None
            return changed(path, header, start, stop)

        found = in_parallel(fault, range(len(checksums.values)), READERS)
    return [text for text in found if text is not None]


def changed(path: Path, header: Header, start: int, stop: int) -> str:
    """The message for bytes that do not match their checksum: it names the file and the tensors."""
    tensors = [
        name for name, entry in header.entries.items() if entry.start < stop and entry.stop > start
    ]
    return f"{path}: bytes {start} to {stop} changed ({', '.join(tensors[:4])})"
