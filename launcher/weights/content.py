"""A fingerprint of complete weights, by which machines compare what they have."""

from __future__ import annotations

import numpy as np
import xxhash

from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.source import Source

SAMPLED_BYTES = 512
"""Of each tensor: training changes all of it, and reading all of it would be a full load."""


def content_of(source: Source) -> str:
    """`21 tensors, 3f9a52c1`: the hash is over names, shapes, dtypes and the middle of each tensor.

    Where tensors lie in which files does not matter. Raises `UserError` for what cannot be read.
    """
    digest = xxhash.xxh3_64()
    with Files() as files:
        for name in sorted(source.tensors):
            digest.update(f"{name} {source.dtype(name)} {source.shape(name)}\n".encode())
            for piece in source.tensors[name]:
                size = piece.entry.stop - piece.entry.start
                sample = np.empty(min(size, SAMPLED_BYTES), np.uint8)
                header = source.headers[piece.file]
                descriptor = files.descriptor(piece.file, header.file_bytes, header.modified)
                start = piece.entry.start + (size - len(sample)) // 2
                read_exactly(descriptor, piece.file, sample.data, start)
                digest.update(sample.data)
    return f"{len(source.tensors)} tensors, {digest.hexdigest()[:8]}"
