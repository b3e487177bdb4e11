"""A fingerprint of weights, to compare those of machines, and by which an adapter knows its base.

Invariant: it does not depend on how tensors are sharded or spread over files.
"""

from __future__ import annotations

from math import prod

import numpy as np
import xxhash

from launcher.layout.box import Box, Shape
from launcher.weights.optimizer_state import is_optimizer_state
from launcher.weights.pieces import Piece
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.source import Source

SAMPLED_ELEMENTS = 64
"""Of each tensor: training changes all of it, and reading all of it would be a full load."""


def content_of(source: Source) -> str:
    """`21 tensors, 3f9a52c1`: the hash is over names, shapes, dtypes and some elements, evenly
    spaced from the first corner of each tensor to the last; without the state of an optimizer.

    Raises `UserError` for what cannot be read.
    """
    digest = xxhash.xxh3_64()
    names = sorted(name for name in source.tensors if not is_optimizer_state(name))
    with Files() as files:
        for name in names:
            shape = source.shape(name)
            digest.update(f"{name} {source.dtype(name)} {shape}\n".encode())
            for point in _points(shape):
                box = Box(point, (1,) * len(shape))
                for replicas, _ in source.tensors[name].meeting(box):
                    digest.update(_element(source, files, replicas[0], point))
    return f"{len(names)} tensors, {digest.hexdigest()[:8]}"


def _points(shape: Shape) -> list[Shape]:
    """The sampled indices, without repetition."""
    if not prod(shape):
        return []
    count = SAMPLED_ELEMENTS
    points = (tuple(size * (2 * i + 1) // (2 * count) for size in shape) for i in range(count))
    return list(dict.fromkeys(points))


def _element(source: Source, files: Files, piece: Piece, point: Shape) -> bytes:
    """The bytes of one element of a tensor, which `piece` holds."""
    flat = 0
    for index, offset, size in zip(point, piece.box.offset, piece.box.size, strict=True):
        flat = flat * size + index - offset
    held = piece.entry.stop - piece.entry.start
    element = np.empty(max(held // piece.box.numel, 1), np.uint8)
    header = source.headers[piece.file]
    descriptor = files.descriptor(piece.file, header.file_bytes, header.modified)
    start = piece.entry.start + flat * held // piece.box.numel
    read_exactly(descriptor, piece.file, element.data, start)
    return element.tobytes()
