"""What a source holds, tensor by tensor, read through the plan: for comparisons bit for bit."""

from __future__ import annotations

import numpy as np

from launcher.layout.box import full_box
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.reading.plan import plan_box, strided_copy_of
from launcher.weights.reading.transfer import Files, read_strided
from launcher.weights.source import Source

Content = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name to (dtype name, shape, bytes in C order)."""


def content(source: Source) -> Content:
    """All tensors of `source`, without its extras."""
    return {name: (source.dtype(name), source.shape(name), _bytes(source, name))
            for name in source.tensors}  # fmt: skip


def extras(source: Source) -> Content:
    """What is beside the tensors."""
    together = content(source.with_extras())
    return {name: together[name] for name in source.extras}


def _bytes(source: Source, name: str) -> bytes:
    box = full_box(source.shape(name))
    memory = np.zeros(box.numel * ITEM_BYTES[source.dtype(name)], np.uint8)
    with Files() as files:
        for read in plan_box(name, box, source.tensors[name]):
            file = read.piece.file
            files.descriptor(file, source.headers[file].file_bytes)
            read_strided(files, file, strided_copy_of(read, box), memory)
    return memory.tobytes()
