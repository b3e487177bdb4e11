"""Strided copies: which bytes of a file go to which bytes of memory when a box is copied.

Pure. Both sides are strided views of the same box; bytes that are contiguous on both are one run:

    in the file   | . x x . |        in memory   | x x |       3 runs of 2 elements,
                  | . x x . |                    | x x |       4 elements apart in the file,
                  | . x x . |                    | x x |       2 in memory
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.layout.box import Shape


@dataclass(frozen=True, slots=True)
class StridedCopy:
    """The copy of one box. Offsets, strides and lengths are in bytes."""

    file_offset: int
    memory_offset: int
    length: int
    """Of one run."""
    loops: tuple[tuple[int, int, int], ...]
    """(count, stride in the file, stride in memory), outermost first."""

    @property
    def nbytes(self) -> int:
        """Of all runs together."""
        return self.length * math.prod(count for count, _, _ in self.loops)

    @property
    def file_span(self) -> int:
        """From the first byte of the first run to the last byte of the last one, in the file."""
        return self.length + sum((count - 1) * stride for count, stride, _ in self.loops)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(offset in the file, offset in memory, bytes) of each run, in order."""
        for at in itertools.product(*(range(count) for count, _, _ in self.loops)):
            file, memory = self.file_offset, self.memory_offset
            for index, (_, file_stride, memory_stride) in zip(at, self.loops, strict=True):
                file += index * file_stride
                memory += index * memory_stride
            yield file, memory, self.length


def strided_copy(
    size: Shape,
    item_bytes: int,
    file: tuple[int, Sequence[int]],
    memory: tuple[int, Sequence[int]],
) -> StridedCopy:
    """The copy of a box of `size` elements; `file` and `memory` are (offset, stride of each dim),
    in bytes, of its first element."""
    length, loops = item_bytes, list[tuple[int, int, int]]()
    dims = zip(reversed(size), reversed(file[1]), reversed(memory[1]), strict=True)
    for count, file_stride, memory_stride in dims:
        if count == 1:
            continue
        if not loops and file_stride == memory_stride == length:
            length *= count
            continue
        if loops:
            inner, file_inner, memory_inner = loops[-1]
            if file_stride == inner * file_inner and memory_stride == inner * memory_inner:
                loops[-1] = (inner * count, file_inner, memory_inner)
                continue
        loops.append((count, file_stride, memory_stride))
    return StridedCopy(file[0], memory[0], length, tuple(reversed(loops)))


def c_strides(shape: Sequence[int], item_bytes: int) -> list[int]:
    """Bytes from one index to the next, for each dim of a C-ordered tensor of `shape`."""
    strides, step = [], item_bytes
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return strides[::-1]
