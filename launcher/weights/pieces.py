"""Pieces: the boxes of a global tensor that are in files, and their overlaps with other boxes."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from operator import add
from pathlib import Path
from typing import NamedTuple

from launcher.layout.box import Box, Shape, full_box
from launcher.weights.formats.safetensors import Entry, Header


class Piece(NamedTuple):
    """One box of a global tensor and the file entry that holds it."""

    file: Path
    entry: Entry
    shape: Shape
    """Of the global tensor."""
    box: Box
    rank: int
    """The rank that wrote it; 0 for complete weights."""


def pieces_of(
    file: Path, header: Header, name: str, place: tuple[Shape, Box] | None = None, rank: int = 0
) -> list[Piece]:
    """The pieces that a file holds of tensor `name`: one for each place where its bytes lie
    together.

    `place`: global shape, and the box that is in the file; left out, the file holds all of it.
    """
    entry = header.entries[name]
    shape, outer = place or (entry.shape, full_box(entry.shape))
    if name not in header.chunks:
        return [Piece(file, entry, shape, outer, rank)]
    return [
        Piece(file, part, shape, Box(tuple(map(add, outer.offset, box.offset)), box.size), rank)
        for box, part in header.chunks[name]
    ]


class Pieces(tuple[Piece, ...]):
    """All pieces of one tensor, including replicas, indexed by box.

    The pieces of a layout form a grid; the cells that a box overlaps are found by bisection in each
    dim. Pieces that form no grid are searched one by one.
    """

    @cached_property
    def replica_ranks(self) -> dict[Box, list[Piece]]:
        """Every non-empty box to the pieces that hold exactly that box."""
        found: dict[Box, list[Piece]] = {}
        for piece in self:
            if piece.box.numel:
                found.setdefault(piece.box, []).append(piece)
        return found

    @cached_property
    def _grid(self) -> tuple[dict[Shape, Box], list[list[int]]] | None:
        """(box by offset, offsets in each dim); None when the boxes form no grid."""
        boxes = {box.offset: box for box in self.replica_ranks}
        lines = [sorted(set(starts)) for starts in zip(*boxes, strict=True)]
        if len(boxes) < len(self.replica_ranks) or math.prod(map(len, lines)) != len(boxes):
            return None
        for box in boxes.values():
            for start, size, line in zip(box.offset, box.size, lines, strict=True):
                following = bisect_right(line, start)
                if following < len(line) and start + size > line[following]:
                    return None
        return boxes, lines

    def meeting(self, box: Box) -> Iterator[tuple[list[Piece], Box]]:
        """(replicas of a piece, its overlap with `box`) of every piece that overlaps `box`."""
        if len(self) == 1:  # complete weights
            overlap = box.intersect(self[0].box)
            if overlap is not None:
                yield [self[0]], overlap
            return
        for candidate in self._candidates(box):
            overlap = box.intersect(candidate)
            if overlap is not None:
                yield self.replica_ranks[candidate], overlap

    def _candidates(self, box: Box) -> Iterable[Box]:
        if self._grid is None:
            return self.replica_ranks
        boxes, lines = self._grid
        ranges = [
            line[max(bisect_right(line, start) - 1, 0) : bisect_left(line, start + size)]
            for line, start, size in zip(lines, box.offset, box.size, strict=True)
        ]
        return (boxes[offset] for offset in itertools.product(*ranges))

    def are_of_one_rank(self, box: Box) -> bool:
        """Whether some rank wrote `box` and no more, in one piece or several."""
        if box in self.replica_ranks:
            return True
        written: Counter[int] = Counter()
        for piece in self:
            written[piece.rank] += piece.box.numel
        inside: Counter[int] = Counter()
        for replicas, overlap in self.meeting(box):
            for piece in replicas:
                inside[piece.rank] += overlap.numel * (overlap == piece.box)
        return any(n == box.numel == written[rank] for rank, n in inside.items())

    @cached_property
    def is_disjoint(self) -> bool:
        """Whether no two different boxes share an element."""
        if len(self) == 1 or self._grid is not None:
            return True
        pairs = itertools.combinations(self.replica_ranks, 2)
        return all(a.intersect(b) is None for a, b in pairs)
