"""Links: which part of a tensor under a MindFormers name is which part of a Hugging Face tensor.

A link of a fused projection to its query rows is, with numpy,

    fused.reshape(groups, rows, hidden)[:, :query]  ==  query.reshape(groups, query, hidden)

and where the axes of one part are swapped in the other (stacks of experts) `axes` pairs them.
Torch-free.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from launcher.layout.box import Shape
from launcher.mindspore.ckpt_values import boxes_between
from launcher.weights.formats.safetensors import ITEM_BYTES, Entry
from launcher.weights.geometry import Side
from launcher.weights.pieces import Piece
from launcher.weights.reading.strided_copy import c_strides


class Link(NamedTuple):
    """Two parts with the same elements; `axes[i]` is the axis of `mf` along axis i of `hf`."""

    hf: Side
    mf: Side
    axes: tuple[int, ...]

    def check(self) -> None:
        """Check that the parts have one shape, inside their tensors. Raises ValueError."""
        if self.hf.size != tuple(self.mf.size[axis] for axis in self.axes):
            raise ValueError(f"parts of {self.hf.size} and {self.mf.size} elements")
        for side in (self.hf, self.mf):
            for span, length in zip(side.index, side.view, strict=True):
                last = span.start + (span.count - 1) * span.step
                if min(span.start, span.count) < 0 or last >= length:
                    raise ValueError(f"{span} is not in an axis of {length}")


def link(hf: Side, mf: Side, axes: Sequence[int] | None = None) -> Link:
    """A checked link; by default axis i runs along axis i. Raises ValueError."""
    made = Link(hf, mf, tuple(range(len(hf.index))) if axes is None else tuple(axes))
    made.check()
    return made


def inverse(axes: Sequence[int]) -> tuple[int, ...]:
    """The permutation that undoes `axes`."""
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def reshaped(pieces: Iterable[Piece], shape: Shape) -> list[Piece]:
    """The same bytes as pieces of a tensor of `shape`, which has as many elements."""
    return [made for piece in pieces for made in _reshaped(piece, shape)]


def _reshaped(piece: Piece, shape: Shape) -> Iterator[Piece]:
    """Each run of a C-ordered piece as boxes of `shape`."""
    item, box = ITEM_BYTES[piece.entry.dtype], piece.box
    strides = c_strides(piece.shape, 1)
    inner = len(box.size) - 1  # the outermost dim of a run
    while inner > 0 and box.size[inner] == piece.shape[inner]:
        inner -= 1
    run, done = math.prod(box.size[inner:]), 0
    outer = (range(at, at + n) for at, n in zip(box.offset[:inner], box.size, strict=False))
    for at in itertools.product(*outer):
        first = sum(
            index * stride
            for index, stride in zip((*at, *box.offset[inner:]), strides, strict=True)
        )
        for part in boxes_between(shape, first, first + run):
            start = piece.entry.start + done * item
            done += part.numel
            entry = Entry(piece.entry.dtype, part.size, start, start + part.numel * item)
            yield Piece(piece.file, entry, shape, part, piece.rank)
