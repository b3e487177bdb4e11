"""Verification: do the bytes of a file still have the checksums its header gives?"""

from __future__ import annotations

from pathlib import Path

import xxhash

from launcher.errors import Problem, UserError
from launcher.weights.formats.safetensors import Header, read_header
from launcher.weights.source import Source


def file_faults(path: Path, *, header_digest: str | None = None) -> list[str]:
    """Every fault of one file, in words that name the file and the tensors; empty when whole.

    `header_digest`: what the header must hash to (xxh3_64, hex), where that is known.
    Files of other programs carry no checksums: for them only the header is checked.
    """
    try:
        header = read_header(path)
    except UserError as error:
        return [str(error)]
    if header_digest is not None and header.digest != header_digest:
        return [f"{path}: its header changed"]
    try:
        note = header.slipway()
        checksum = note["checksum"] if note else {"values": []}
    except (ValueError, KeyError, TypeError):
        return [f"{path}: its `slipway` metadata cannot be read"]
    faults = []
    with path.open("rb") as file:
        file.seek(header.data_start)
        for index, expected in enumerate(checksum["values"]):
            block = file.read(checksum["block_bytes"])
            if xxhash.xxh3_64_hexdigest(block) != expected:
                start = header.data_start + index * checksum["block_bytes"]
                names = ", ".join(_tensors_in(header, start, start + len(block))[:4])
                faults.append(f"{path}: bytes {start} to {start + len(block)} changed ({names})")
    return faults


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
