"""Whether a large file is still the same: what is cheap to compare, and a hash of samples of it.

`file_state` is for one machine: a file that was written again differs in it. `sampled_hash` is the
same on every machine, whatever the path and the time of the file. It covers the size, the first
and the last block and blocks at equal distances between them, 64 of 64 KiB: every byte of files of
up to 4 MiB. Of larger ones another corpus of the same size is noticed, a single byte that was
changed in between may not be.
"""

from __future__ import annotations

from pathlib import Path

from xxhash import xxh3_128

BLOCKS = 64
BLOCK_BYTES = 1 << 16


def file_state(path: Path) -> list[str | int]:
    """Path, size and modification time."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def sampled_hash(path: Path) -> str:
    """The hash of the size and of blocks of the content."""
    size = path.stat().st_size
    found = xxh3_128(size.to_bytes(8, "little"))
    with path.open("rb") as file:
        if size <= BLOCKS * BLOCK_BYTES:
            found.update(file.read())
        else:
            for number in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
                found.update(file.read(BLOCK_BYTES))
    return found.hexdigest()
