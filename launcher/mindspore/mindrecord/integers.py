"""The narrowed integers of MindRecord's arrays, to numpy.

Owns the one compression of the format. A block is

    u32, big-endian     n, the number of elements
    ceil(n / 4) bytes   a code of two bits for each element, the first in the top bits of a byte
    n values            little-endian and signed, 1 << code bytes each

A block is decoded without a loop over its elements: eight bytes are gathered where each value
begins, and shifted so that the sign of the value fills the rest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

COUNT_BYTES = 4
_WORD = 8
_CODES = np.array([[(byte >> shift) & 3 for shift in (6, 4, 2, 0)] for byte in range(256)])
_WIDTHS = (1 << _CODES).astype(np.uint8)
"""[256, 4]: bytes of the four elements of a code byte."""

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class NotNarrowed(ValueError):
    """The bytes are not a block of narrowed integers."""


def count_of(block: Bytes | bytes) -> int:
    """The number of elements of a block, without reading them. Raises NotNarrowed."""
    if len(block) < COUNT_BYTES:
        raise NotNarrowed(f"it has {len(block)} bytes")
    count = int.from_bytes(bytes(block[:COUNT_BYTES]), "big")
    if COUNT_BYTES + -(-count // 4) + count > len(block):
        raise NotNarrowed(f"{len(block)} bytes are too few for {count} integers")
    return count


def narrowed(block: Bytes, widest: int = _WORD) -> Ints:
    """The elements of a block (uint8 [bytes]) as int64 [n]. Raises NotNarrowed.

    widest: the bytes that a value may have.
    """
    count = count_of(block)
    values_at = COUNT_BYTES + -(-count // 4)
    widths = _WIDTHS.take(block[COUNT_BYTES:values_at], axis=0).ravel()[:count]
    if count and int(widths.max()) > widest:
        raise NotNarrowed(f"a value has {widths.max()} bytes, its type {widest}")
    ends = widths.cumsum(dtype=np.int64)
    size = int(ends[-1]) if count else 0
    if values_at + size != len(block):
        raise NotNarrowed(f"{count} integers take {values_at + size} bytes, it has {len(block)}")
    padded = np.zeros(size + _WORD, dtype=np.uint8)
    padded[:size] = block[values_at:]
    # Words that begin at every byte; most of them are not aligned, which numpy knows.
    words = np.ndarray((size + 1,), dtype="<i8", buffer=padded, strides=(1,))
    found: Ints = words.take(ends - widths)
    spare = 8 * (_WORD - widths.astype(np.int64))
    found <<= spare
    found >>= spare
    return found
