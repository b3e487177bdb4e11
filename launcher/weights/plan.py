"""From boxes to reads: which bytes of which file fill a box of the model.

Pure. Invariant, asserted before the first byte is read: every element of a target box is covered
exactly once by the reads planned for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.source import Piece


@dataclass(frozen=True, slots=True)
class Read:
    """Take `overlap` (global coordinates) out of `piece`."""

    piece: Piece
    overlap: Box


def plan_box(name: str, box: Box, pieces: Sequence[Piece], *, prefer_rank: int = 0) -> list[Read]:
    """The reads that fill `box` of tensor `name`.

    Where several ranks hold the same box the file of `prefer_rank` is read, else the holders are
    taken in turn, so that replicas spread over files. Raises `UserError` when parts are missing.
    """
    if box.numel == 0:
        return []
    reads = []
    for holders in _by_box(pieces).values():
        overlap = box.intersect(holders[0].box)
        if overlap is not None:
            own = [piece for piece in holders if piece.rank == prefer_rank]
            reads.append(Read((own or holders)[prefer_rank % len(own or holders)], overlap))
    covered = sum(read.overlap.numel for read in reads)
    if covered != box.numel:
        raise UserError(
            f"the files hold {covered} of the {box.numel} elements of `{name}` at {box.offset}",
            rule="every element must be held exactly once (replicas apart)",
        )
    return reads


def _by_box(pieces: Sequence[Piece]) -> dict[Box, list[Piece]]:
    holders: dict[Box, list[Piece]] = {}
    for piece in pieces:
        if piece.box.numel:
            holders.setdefault(piece.box, []).append(piece)
    return holders


def byte_runs(read: Read, target: Box) -> Iterator[tuple[int, int, int]]:
    """(offset in the file, offset in the target's memory, bytes) of each contiguous run.

    Both sides are C-ordered and of the file's dtype. Trailing dims that are whole on both sides
    are one run:

        piece  | . . . . |      overlap of whole rows: one run
               | x x x x |
               | x x x x |
    """
    item = ITEM_BYTES[read.piece.entry.dtype]
    source, goal = read.overlap.inside(read.piece.box), read.overlap.inside(target)
    size, outer_source, outer_goal = read.overlap.size, read.piece.box.size, target.size
    split = len(size)
    while split and size[split - 1 :] == outer_source[split - 1 :] == outer_goal[split - 1 :]:
        split -= 1
    split = max(split - 1, 0)
    run = math.prod(size[split:]) * item
    for index in itertools.product(*(range(n) for n in size[:split])):
        at = (*index, *(0 for _ in size[split:]))
        yield (
            read.piece.entry.start + _linear(source.offset, at, outer_source) * item,
            _linear(goal.offset, at, outer_goal) * item,
            run,
        )


def _linear(offset: Shape, index: Shape, sizes: Shape) -> int:
    position = 0
    for start, step, size in zip(offset, index, sizes, strict=True):
        position = position * size + start + step
    return position
