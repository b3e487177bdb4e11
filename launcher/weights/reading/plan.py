"""From boxes to reads: which bytes of which file fill a box of the model.

Pure. Invariant, checked before the first byte is read: every element of a target box is covered
exactly once by the reads planned for it. Each rank plans its own boxes, without communication, in
time linear in the number of overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import mul
from typing import NamedTuple

from launcher.errors import UserError
from launcher.layout.box import Box
from launcher.weights.formats.safetensors import ITEM_BYTES
from launcher.weights.pieces import Piece, Pieces
from launcher.weights.reading.strided_copy import StridedCopy, c_strides, strided_copy


class Read(NamedTuple):
    """Take `overlap` (global coordinates) out of `piece`."""

    piece: Piece
    overlap: Box

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.overlap.numel * ITEM_BYTES[self.piece.entry.dtype]


def plan_box(name: str, box: Box, pieces: Pieces, *, prefer_rank: int = 0) -> list[Read]:
    """The reads that fill `box` of tensor `name`.

    Where several ranks hold the same box, the file of `prefer_rank` is read, or else one of the
    replicas by turns, which spreads reads over files. Raises `UserError` when parts are missing or
    pieces overlap.
    """
    if box.numel == 0:
        return []
    if len(pieces) == 1 and box.intersect(pieces[0].box) == box:
        return [Read(pieces[0], box)]
    reads = []
    for replica_ranks, overlap in pieces.meeting(box):
        own = [piece for piece in replica_ranks if piece.rank == prefer_rank]
        reads.append(Read((own or replica_ranks)[prefer_rank % len(own or replica_ranks)], overlap))
    covered = sum(read.overlap.numel for read in reads)
    if covered != box.numel or not pieces.is_disjoint:
        raise UserError(
            f"the files hold {covered} of the {box.numel} elements of `{name}` at {box.offset}",
            rule="every element must be held exactly once (replicas apart)",
            advice="Copy the missing rank folders, or choose another checkpoint",
        )
    return reads


def strided_copy_of(
    read: Read, target: Box, memory: tuple[int, Sequence[int]] | None = None
) -> StridedCopy:
    """The strided copy of `read` from its file to the memory of `target`.

    `memory`: (offset, stride of each dim), in bytes, of the first element of `target`; C-ordered
    from 0 on when left out. Both sides have the dtype of the file.
    """
    piece, item = read.piece, ITEM_BYTES[read.piece.entry.dtype]
    file_strides = [n * item for n in piece.entry.strides] if piece.entry.strides is not None else (
        c_strides(piece.box.size, item))  # fmt: skip
    start, memory_strides = memory or (0, c_strides(target.size, item))
    is_complete = read.overlap == piece.box and read.overlap == target
    if is_complete and file_strides == memory_strides == c_strides(target.size, item):
        return StridedCopy(piece.entry.start, start, piece.entry.stop - piece.entry.start, ())
    inside, goal = read.overlap.inside(piece.box).offset, read.overlap.inside(target).offset
    return strided_copy(
        read.overlap.size,
        item,
        (piece.entry.start + _dot(inside, file_strides), file_strides),
        (start + _dot(goal, memory_strides), memory_strides),
    )


def _dot(index: Sequence[int], strides: Sequence[int]) -> int:
    if not any(index):
        return 0
    return sum(map(mul, index, strides))


def portions(reads: Sequence[Read], limit_bytes: int) -> Iterator[Read]:
    """The same reads in portions of at most `limit_bytes` (at least one element)."""
    for read in reads:
        if read.nbytes <= limit_bytes:
            yield read
            continue
        item = ITEM_BYTES[read.piece.entry.dtype]
        for box in read.overlap.portions(max(limit_bytes // item, 1)):
            yield Read(read.piece, box)
