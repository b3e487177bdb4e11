"""Portions: a box of a tensor out of the files of a source, as an array of bytes. Torch-free.

Owns how tools read weights front to back. A portion is C-ordered, so it is one run of bytes of a
file; the runs are returned too, for checksums.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.layout.box import Box
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.reading.plan import Read, plan_box, strided_copy_of
from launcher.weights.reading.strided_copy import StridedCopy
from launcher.weights.reading.transfer import Bytes, Files, read_strided
from launcher.weights.source import Source

Words = npt.NDArray[np.unsignedinteger[Any]]
"""Elements as unsigned integers of their size: raw bits."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Bytes that were read, and their place in a file."""

    path: Path
    position: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class Portion:
    """A box of a tensor in memory."""

    values: Words
    taken: tuple[Taken, ...]


class PortionReader:
    """Reads portions of the tensors of `source`, from several threads; files are opened once."""

    def __init__(self, source: Source, files: Files) -> None:
        self._source, self._files = source, files

    def read(self, name: str, box: Box) -> Portion:
        """`box` of tensor `name`. Raises `UserError` when the files do not hold all of it."""
        item = ITEM_BYTES[self._source.dtype(name)]
        memory: Bytes = np.empty(box.numel * item, np.uint8)
        values = memory.view(f"u{item}").reshape(box.size)
        taken = []
        for read in plan_box(name, box, self._source.tensors[name]):
            found = self._straight(read, box, memory) or self._through(read, box, values)
            taken.append(found)
        return Portion(values, tuple(taken))

    def descriptor(self, path: Path) -> int:
        """The open file at `path`, checked against its header."""
        header = self._source.headers[path]
        return self._files.descriptor(path, header.file_bytes, header.modified)

    def _read(self, path: Path, runs: StridedCopy, memory: Bytes) -> None:
        self.descriptor(path)
        read_strided(self._files, path, runs, memory)

    def _straight(self, read: Read, box: Box, memory: Bytes) -> Taken | None:
        """Read a single run directly into its place; None where it is not one."""
        runs = strided_copy_of(read, box)
        if runs.loops:
            return None
        path = read.piece.file
        self._read(path, runs, memory)
        view = memory.data[runs.memory_offset : runs.memory_offset + runs.length]
        return Taken(path, runs.file_offset, view)

    def _through(self, read: Read, box: Box, values: Words) -> Taken:
        """Read into a buffer in one run, and scatter it in memory."""
        path = read.piece.file
        staging: Bytes = np.empty(read.nbytes, np.uint8)
        runs = strided_copy_of(read, read.overlap)
        self._read(path, runs, staging)
        cut = staging.view(values.dtype).reshape(read.overlap.size)
        values[slices(read.overlap.inside(box))] = cut
        # A tensor with strides (in a file of torch) has another order in the file.
        view = staging.data if read.piece.entry.strides is None else staging.data[:0]
        return Taken(path, runs.file_offset, view)


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index of an array."""
    return tuple(slice(start, start + n) for start, n in zip(box.offset, box.size, strict=True))
