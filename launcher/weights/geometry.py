"""Parts of tensors: a view that splits dims and an index, and the pieces of one tensor in files as
pieces of another that holds the same part.

    gate_up [2F, H], rows F..2F   ==   up [F, H]

Invariant: every piece that is made lies inside the piece it is made from; nothing is copied.
Torch-free.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from launcher.layout.box import Box, Shape
from launcher.weights.formats.safetensors import ITEM_BYTES, Entry
from launcher.weights.pieces import Piece
from launcher.weights.reading.strided_copy import c_strides


class Span(NamedTuple):
    """Indices of one axis of a view: `count` of them, `step` apart, from `start` on."""

    start: int
    count: int
    step: int = 1


class Side(NamedTuple):
    """Part of a tensor: `tensor.reshape(view)[index]`."""

    dims: tuple[Shape, ...]
    """The factors that each dim of the tensor is split into, outermost first; their product is the
    length of the dim."""
    index: tuple[Span, ...]
    """One for each axis of the view."""

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        return tuple(map(math.prod, self.dims))

    @property
    def view(self) -> Shape:
        """Shape of the view: all factors."""
        return tuple(itertools.chain(*self.dims))

    @property
    def size(self) -> Shape:
        """Shape of the part."""
        return tuple(span.count for span in self.index)

    def as_view(self) -> Side:
        """The same part of the view, taken as a tensor of its own."""
        return Side(tuple((length,) for length in self.view), self.index)


def full_side(shape: Shape) -> Side:
    """All of a tensor."""
    return Side(tuple((length,) for length in shape), tuple(Span(0, length) for length in shape))


class _Axis(NamedTuple):
    """Indices of one axis, and the distance of two of them in the file, in elements."""

    start: int
    count: int
    step: int
    stride: int


class _Run(NamedTuple):
    """Indices of one dim: `size` neighbours from `offset` on, `stride` elements apart in the file,
    `skipped` elements behind the first of the part."""

    offset: int
    size: int
    stride: int
    skipped: int


def moved(pieces: Iterable[Piece], source: Side, target: Side, axes: Sequence[int]) -> list[Piece]:
    """The pieces of the target tensor that `pieces` of the source tensor hold, as far as the two
    parts go. `axes[i]`: the axis of the source part along axis i of the target part."""
    return [made for piece in pieces for made in _moved(piece, source, target, axes)]


def _moved(piece: Piece, source: Side, target: Side, axes: Sequence[int]) -> Iterator[Piece]:
    if not piece.box.numel:
        return
    strides = piece.entry.strides or tuple(c_strides(piece.box.size, 1))
    for origin, block in _blocks(piece.box, strides, source.dims):
        cut = _cut(block, source.index)
        if cut is None:
            continue
        first, axes_in_file = cut
        yield from _placed(piece, origin + first, [axes_in_file[axis] for axis in axes], target)


def _blocks(
    box: Box, strides: Sequence[int], dims: Sequence[Shape]
) -> Iterator[tuple[int, list[_Axis]]]:
    """The box as boxes of the view: (elements from its first to theirs, their axes)."""
    cuts = [
        _split(start, start + size, factors)
        for start, size, factors in zip(box.offset, box.size, dims, strict=True)
    ]
    for chosen in itertools.product(*cuts):
        origin, axes = 0, list[_Axis]()
        for start, stride, factors, spans in zip(box.offset, strides, dims, chosen, strict=True):
            at = 0
            for (first, count), length, inner in zip(
                spans, factors, c_strides(factors, 1), strict=True
            ):
                at = at * length + first
                axes.append(_Axis(first, count, 1, stride * inner))
            origin += (at - start) * stride
        yield origin, axes


def _split(start: int, stop: int, factors: Shape) -> list[tuple[tuple[int, int], ...]]:
    """The interval of a dim as boxes of its factors: (first, count) of each factor."""
    if len(factors) == 1:
        return [((start, stop - start),)]
    inner, result = math.prod(factors[1:]), []
    head = min(-(-start // inner) * inner, stop)
    tail = max(stop // inner * inner, head)
    for low, high in ((start, head), (tail, stop)):
        if low < high:
            row = low // inner
            rest = _split(low - row * inner, high - row * inner, factors[1:])
            result += [((row, 1), *spans) for spans in rest]
    if head < tail:
        full = tuple((0, length) for length in factors[1:])
        result.append(((head // inner, (tail - head) // inner), *full))
    return result


def _cut(block: Sequence[_Axis], index: Sequence[Span]) -> tuple[int, list[_Axis]] | None:
    """The elements of a block that are in the part: (elements from the first of the block to
    theirs, their axes in the part); None without any."""
    first, axes = 0, list[_Axis]()
    for axis, span in zip(block, index, strict=True):
        low = max(-(-(axis.start - span.start) // span.step), 0)
        high = min(-(-(axis.start + axis.count - span.start) // span.step), span.count)
        if low >= high:
            return None
        first += (span.start + low * span.step - axis.start) * axis.stride
        axes.append(_Axis(low, high - low, 1, span.step * axis.stride))
    return first, axes


def _placed(piece: Piece, first: int, axes: Sequence[_Axis], target: Side) -> Iterator[Piece]:
    """The elements at `axes` of the part as boxes of the target tensor."""
    item = ITEM_BYTES[piece.entry.dtype]
    runs, position = list[list[_Run]](), 0
    for factors in target.dims:
        spans = target.index[position : position + len(factors)]
        within = [
            _Axis(span.start + axis.start * span.step, axis.count, span.step, axis.stride)
            for span, axis in zip(spans, axes[position : position + len(factors)], strict=True)
        ]
        runs.append(_joined(within, factors))
        position += len(factors)
    shape = target.shape
    for chosen in itertools.product(*runs):
        size = tuple(run.size for run in chosen)
        strides = tuple(run.stride for run in chosen)
        start = piece.entry.start + (first + sum(run.skipped for run in chosen)) * item
        span = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        entry = Entry(
            piece.entry.dtype, size, start, start + span * item,
            None if _is_c_ordered(size, strides) else strides,
        )  # fmt: skip
        box = Box(tuple(run.offset for run in chosen), size)
        yield Piece(piece.file, entry, shape, box, piece.rank)


def _joined(axes: Sequence[_Axis], factors: Shape) -> list[_Run]:
    """Indices of the factors of a dim as runs of the dim, as few as possible."""
    runs, inner = [_Run(0, 1, 0, 0)], 1
    for axis, length in zip(reversed(axes), reversed(factors), strict=True):
        (lone, *others) = runs
        is_line = axis.step == 1 or axis.count == 1
        if not others and is_line and lone.size == inner and (
            inner == 1 or axis.count == 1 or axis.stride == inner * lone.stride
        ):  # fmt: skip
            stride = axis.stride if inner == 1 else lone.stride
            runs = [_Run(axis.start * inner + lone.offset, axis.count * inner, stride, 0)]
        else:
            runs = [
                _Run((axis.start + number * axis.step) * inner + run.offset, run.size,
                     run.stride, number * axis.stride + run.skipped)
                for number in range(axis.count) for run in runs
            ]  # fmt: skip
        inner *= length
    return runs


def _is_c_ordered(size: Shape, strides: Shape) -> bool:
    expected = c_strides(size, 1)
    return all(
        n == 1 or stride == usual for n, stride, usual in zip(size, strides, expected, strict=True)
    )
