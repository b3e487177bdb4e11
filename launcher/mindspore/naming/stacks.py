"""Stacks of experts: one tensor for all experts of a layer, as it is or with axes swapped.

E experts, each with a matrix [rows, columns] in Hugging Face files:

    stacked        [E, rows, columns]
    transposed     [E, columns, rows]
    grouped        [E, hidden, 2 width], or the same bytes as [E hidden, 2 width] or (in files of
                   earlier versions) [hidden, E 2 width]: gate and up of an expert side by side,
                   both transposed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from launcher.layout.box import Shape
from launcher.mindspore.naming.geometry import Link, link
from launcher.mindspore.naming.rule import Geometry, per
from launcher.mindspore.naming.sizes import Sizes
from launcher.weights.geometry import Side, Span


def _one(shape: Shape) -> Side:
    """All of the matrix of one expert, with a first axis of length 1."""
    rows, columns = shape
    return Side(((1, rows), (columns,)), (Span(0, 1), Span(0, rows), Span(0, columns)))


def stacked() -> Geometry:
    """Matrices, one after the other."""

    def links(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
        experts, rows, columns = _three(sizes, shape)
        all_of = (Span(number, 1), Span(0, rows), Span(0, columns))
        return [link(_one((rows, columns)), Side(((experts,), (rows,), (columns,)), all_of))]

    return Geometry(links, lambda sizes, shapes: (len(shapes), *shapes[0]))


def transposed() -> Geometry:
    """Matrices with rows and columns swapped, one after the other."""

    def links(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
        experts, columns, rows = _three(sizes, shape)
        all_of = (Span(number, 1), Span(0, columns), Span(0, rows))
        stack = Side(((experts,), (columns,), (rows,)), all_of)
        return [link(_one((rows, columns)), stack, (0, 2, 1))]

    return Geometry(links, lambda sizes, shapes: (len(shapes), *shapes[0][::-1]))


def vectors() -> Geometry:
    """Vectors as [1, experts, 1, length]."""

    def links(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
        if len(shape) != 4 or shape != (1, sizes.experts, 1, shape[-1]):
            raise ValueError(f"it is not [1, {sizes.experts}, 1, length]")
        index = (Span(0, 1), Span(number, 1), Span(0, 1), Span(0, shape[-1]))
        stack = Side(tuple((length,) for length in shape), index)
        ends = (Span(0, 1), Span(0, 1), Span(0, 1), Span(0, shape[-1]))
        return [link(Side(((1, 1, 1, shape[-1]),), ends), stack)]

    return Geometry(links, lambda sizes, shapes: (1, len(shapes), 1, *shapes[0]))


def gate_up_columns(form: str) -> Geometry:
    """Gate and up of every expert (their numbers alternate), transposed, side by side. `form`: that
    is written, a key of `FORMS`."""

    def links(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
        experts, hidden, both = _grouped(sizes, shape, sizes.hidden)
        width = per(both, 2, "gate and up")
        expert, is_up = divmod(number, 2)
        dims_of = _dims(shape, experts, hidden, both)
        index = (Span(expert, 1), Span(0, hidden), Span(is_up * width, width))
        return [link(_one((width, hidden)), Side(dims_of, index), (0, 2, 1))]

    def joined(sizes: Sizes, shapes: Sequence[Shape]) -> Shape:
        width, hidden = shapes[0]
        return FORMS[form][0]((len(shapes) // 2, hidden, 2 * width))

    return Geometry(links, joined)


def down_columns(form: str) -> Geometry:
    """Down projections, transposed. `form`: that is written, a key of `FORMS`."""

    def links(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
        width = per(math.prod(shape), sizes.experts * sizes.hidden, "experts x hidden size")
        experts, width, hidden = _grouped(sizes, shape, width)
        index = (Span(number, 1), Span(0, width), Span(0, hidden))
        dims_of = _dims(shape, experts, width, hidden)
        return [link(_one((hidden, width)), Side(dims_of, index), (0, 2, 1))]

    def joined(sizes: Sizes, shapes: Sequence[Shape]) -> Shape:
        hidden, width = shapes[0]
        return FORMS[form][1]((len(shapes), width, hidden))

    return Geometry(links, joined)


def _stack(shape: Shape) -> Shape:
    return shape


def _below(shape: Shape) -> Shape:
    return shape[0] * shape[1], shape[2]


def _earlier(shape: Shape) -> Shape:
    return shape[1], shape[0] * shape[2]


FORMS: dict[str, tuple[Callable[[Shape], Shape], Callable[[Shape], Shape]]] = {
    "three dims": (_stack, _stack),
    "two dims": (_below, _below),
    "earlier": (_earlier, _below),
}
"""Form of grouped experts to the shapes of (gate and up, down) for [E, rows, columns]."""


def _three(sizes: Sizes, shape: Shape) -> Shape:
    if len(shape) != 3 or shape[0] != sizes.experts:
        raise ValueError(f"it is not a stack of {sizes.experts} matrices")
    return shape


def _grouped(sizes: Sizes, shape: Shape, rows: int) -> Shape:
    """(experts, rows of a block, columns of a block) of a stack of any form."""
    experts = sizes.experts
    if len(shape) == 3 and shape[:2] == (experts, rows):
        return shape
    if len(shape) == 2 and shape[0] == experts * rows:
        return experts, rows, shape[1]
    if len(shape) == 2 and shape[0] == rows:
        return experts, rows, per(shape[1], experts, "the experts")
    raise ValueError(f"it is not {experts} blocks of {rows} rows")


def _dims(shape: Shape, experts: int, rows: int, columns: int) -> tuple[Shape, ...]:
    if len(shape) == 3:
        return (experts,), (rows,), (columns,)
    return (experts, rows), (columns,)
