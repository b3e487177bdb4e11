"""A box: an axis-aligned part (offset and size, in elements) of a global tensor.

Owns the form in which all else is expressed: a tensor in a file, the shard of a rank, one expert in
a stacked tensor. Invariant: `offset` and `size` have the same length and no negative entry. The box
of a scalar has empty tuples and one element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import add, sub
from typing import NamedTuple

Shape = tuple[int, ...]


class Box(NamedTuple):
    """`size` elements from `offset` on, in each dim of a global tensor."""

    offset: Shape
    size: Shape

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar, 0 when any dim is empty."""
        return math.prod(self.size)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, or None without any."""
        if self == other:
            return self if self.numel else None
        if len(self.offset) != len(other.offset):
            raise ValueError(f"{self} and {other} are boxes of different tensors")
        offset = tuple(map(max, self.offset, other.offset))
        stops = map(min, map(add, self.offset, self.size), map(add, other.offset, other.size))
        size = tuple(map(sub, stops, offset))
        return Box(offset, size) if min(size) > 0 else None

    def inside(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`, which must contain it."""
        if not any(outer.offset):
            return self
        return Box(tuple(map(sub, self.offset, outer.offset)), self.size)

    def portions(self, limit: int) -> Iterator[Box]:
        """This box in C-ordered portions of at most `limit` elements (at least 1), each a box.

        The outermost dims are cut first, so that a portion is contiguous where the box is.
        """
        if self.numel <= limit:
            yield self
            return
        dim = next(i for i, n in enumerate(self.size) if n > 1)
        step = max(limit * self.size[dim] // self.numel, 1)
        for start in range(0, self.size[dim], step):
            offset, size = list(self.offset), list(self.size)
            offset[dim] += start
            size[dim] = min(step, self.size[dim] - start)
            yield from Box(tuple(offset), tuple(size)).portions(limit)

    def as_lists(self) -> list[list[int]]:
        """`[offset, size]`, the form in file headers."""
        return [list(self.offset), list(self.size)]


def full_box(shape: Sequence[int]) -> Box:
    """The box that is the entire tensor."""
    return Box((0,) * len(shape), tuple(shape))
