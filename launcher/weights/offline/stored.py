"""Tensors of a file as they are stored, to be written into a file of another format.

Owns the way from a header to parts whose bytes are read when they are written. Torch-free. Memory:
that of the blocks in flight. A layout and checksums of Slipway are carried over, with checksums of
the new bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np

from launcher.errors import UserError
from launcher.weights.formats.rank_metadata import RankFileMetadata, read_rank_metadata
from launcher.weights.formats.safetensors import Entry, Header
from launcher.weights.reading.transfer import Files, read_exactly
from launcher.weights.streaming.write import Part


@dataclass(frozen=True)
class _Bytes:
    """The bytes of a tensor in a file: runs that follow one another."""

    files: Files
    path: Path
    header: Header
    runs: Sequence[Entry]
    starts: Sequence[int]
    """Of each run in the tensor."""

    def __call__(self, start: int, stop: int) -> memoryview:
        """The bytes `start` to `stop` of the tensor. Raises `UserError` where they cannot be
        read."""
        header, memory, done = self.header, np.empty(stop - start, np.uint8).data, 0
        descriptor = self.files.descriptor(self.path, header.file_bytes, header.modified)
        index = bisect_right(self.starts, start) - 1
        while start + done < stop:
            run, inside = self.runs[index], start + done - self.starts[index]
            count = min(run.stop - run.start - inside, stop - start - done)
            read_exactly(descriptor, self.path, memory[done : done + count], run.start + inside)
            done, index = done + count, index + 1
        return memory


def stored_parts(path: Path, header: Header, files: Files) -> dict[str, Part]:
    """The tensors of the file at `path` in the order of the file, by name."""
    return {name: _part(path, header, files, name) for name in header.entries}


def _part(path: Path, header: Header, files: Files, name: str) -> Part:
    entry = header.entries[name]
    runs = [chunk.entry for chunk in header.chunks[name]] if name in header.chunks else [entry]
    starts = [0, *accumulate(run.stop - run.start for run in runs)][:-1]
    return Part(name, entry.dtype, entry.shape, _Bytes(files, path, header, runs, starts))


def layout_of(
    path: Path, header: Header, name_map: Mapping[str, str], kept: Sequence[Part]
) -> RankFileMetadata | None:
    """The layout that a rank file of Slipway describes, for those tensors that are `kept`, under
    their new names; None for other files. Raises `UserError`."""
    found = read_rank_metadata(path, header)
    if found is None:
        return None
    names = {part.name for part in kept}
    places = {name_map.get(name, name): place for name, place in found.places.items()}
    if name_map and found.inventory is not None:
        raise UserError(
            f"{path} lists the tensors of all ranks by their names",
            rule="rank files of Slipway are converted with the names that they have",
            advice="Merge them first: python -m launcher.tools.unified_safetensors",
        )
    return replace(found, places={name: p for name, p in places.items() if name in names})


def is_empty(part: Part) -> bool:
    """Whether a tensor has no element."""
    return math.prod(part.shape) == 0
