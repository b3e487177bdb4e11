"""The checksum at the end of a `.ckpt` file of MindSpore (`crc_check=True`).

Owns the 17 bytes `crc_num` and a CRC-32 (zlib, big-endian, 10 bytes) over all bytes before them.
MindSpore cuts them off whether or not they are checked. Torch-free.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from launcher.errors import UserError
from launcher.weights.reading.transfer import Files, read_exactly

MAGIC = b"crc_num"
SUFFIX_BYTES = len(MAGIC) + 10
READ_BYTES = 4 << 20


def has_suffix(descriptor: int, file_bytes: int) -> bool:
    """Whether the file ends in a checksum."""
    start = file_bytes - SUFFIX_BYTES
    return start >= 0 and os.pread(descriptor, len(MAGIC), start) == MAGIC


def suffix(crc: int) -> bytes:
    """The end of a file whose bytes before it have the CRC-32 `crc`."""
    return MAGIC + crc.to_bytes(10, "big")


def check_crc(path: Path, file_bytes: int) -> None:
    """Check the checksum of a file that has one. Reads the file. Raises `UserError`."""
    end = file_bytes - SUFFIX_BYTES
    stored = np.empty(SUFFIX_BYTES, np.uint8)
    with Files() as files:
        descriptor = files.descriptor(path, file_bytes)
        read_exactly(descriptor, path, stored.data, end)
        found = crc_of(descriptor, path, end)
    if suffix(found) != stored.tobytes():
        expected = int.from_bytes(stored.tobytes()[len(MAGIC) :], "big")
        raise UserError(
            f"{path} is damaged: the CRC-32 of its bytes 0 to {end} is {found}",
            rule=f"it was written with the checksum {expected}",
            advice="Copy the file again from its origin",
        )


def crc_of(descriptor: int, path: Path, end: int) -> int:
    """The CRC-32 of the bytes before `end`."""
    memory, crc = np.empty(min(READ_BYTES, end), np.uint8), 0
    for start in range(0, end, READ_BYTES):
        view = memory.data[: min(READ_BYTES, end - start)]
        read_exactly(descriptor, path, view, start)
        crc = zlib.crc32(view, crc)
    return crc
