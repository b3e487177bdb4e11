"""A rule: one tensor under its MindFormers name, and the Hugging Face tensors that it shares its
elements with.

Owns the form of the tables of names, and the checks of shapes. A rule holds under every prefix of
optimizer state too, which has the layout of its parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launcher.layout.box import Shape
from launcher.mindspore.naming.geometry import Link, link
from launcher.mindspore.naming.sizes import Sizes
from launcher.weights.geometry import Side, Span, full_side

Links = Callable[[Sizes, Shape, int], list[Link]]
"""(sizes, shape of the MindFormers tensor, number of the Hugging Face tensor among those of the
rule) to what they share. Raises ValueError for a shape that does not fit."""
Joined = Callable[[Sizes, Sequence[Shape]], Shape]
"""(sizes, shapes of the Hugging Face tensors) to the shape of the MindFormers tensor."""


@dataclass(frozen=True)
class Geometry:
    """How the tensors of a rule share their elements."""

    links: Links
    joined: Joined


@dataclass(frozen=True)
class Rule:
    """The tensor `mf`, and the tensors `hf` that it holds all or part of."""

    mf: str
    hf: tuple[str, ...]
    geometry: Geometry
    form: str = ""
    """Where one Hugging Face tensor is stored in several ways (`fused`, `split`, ...): which."""
    is_float32: bool = False
    """Whether converters write it in float32, whatever the others are in."""

    def below(self, mf: str, hf: str) -> Rule:
        """The same rule with prefixes before the names."""
        return replace(self, mf=mf + self.mf, hf=tuple(hf + name for name in self.hf))


def _same(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
    return [link(full_side(shape), full_side(shape))]


SAME = Geometry(_same, lambda sizes, shapes: shapes[0])
"""One tensor under two names."""


def same(mf: str, hf: str, form: str = "", *, is_float32: bool = False) -> Rule:
    """The rule of one tensor under two names."""
    return Rule(mf, (hf,), SAME, form, is_float32)


class Rows:
    """Factors of the rows of a tensor, and an index of them: `rows[:, 2:4]` as
    `Rows(8, 6)[:, 2:4]`."""

    def __init__(self, *factors: int) -> None:
        self.factors = factors
        self.index = tuple(Span(0, length) for length in factors)

    def __getitem__(self, slices: slice | tuple[slice, ...]) -> Rows:
        chosen = Rows(*self.factors)
        slices = slices if isinstance(slices, tuple) else (slices,)
        ranges = [range(length)[part] for part, length in zip(slices, self.factors, strict=True)]
        chosen.index = tuple(Span(r.start, len(r), r.step) for r in ranges)
        return chosen

    def side(self, rest: Shape) -> Side:
        """These rows of a tensor whose other dims are `rest`."""
        others = full_side(rest)
        return Side((self.factors, *others.dims), (*self.index, *others.index))


RowPairs = Callable[[Sizes, int], list[list[tuple[Rows, Rows]]]]
"""(sizes, rows of the MindFormers tensor) to, for each Hugging Face tensor, the (rows of it, rows
of the MindFormers tensor) that are the same."""


def by_rows(pairs: RowPairs, rows: Callable[[Sizes, Sequence[int]], int] | None = None) -> Geometry:
    """A geometry of rows alone: other dims, if any, are the same. `rows`: those of the MindFormers
    tensor by those of the Hugging Face ones; left out, it has all of them."""

    def links(sizes: Sizes, shape: Shape, number: int) -> list[Link]:
        if not shape:
            raise ValueError("it has no rows")
        found = pairs(sizes, shape[0])[number]
        return [link(hf.side(shape[1:]), mf.side(shape[1:])) for hf, mf in found]

    def joined(sizes: Sizes, shapes: Sequence[Shape]) -> Shape:
        counts = [shape[0] for shape in shapes]
        return (rows(sizes, counts) if rows else sum(counts), *shapes[0][1:])

    return Geometry(links, joined)


def per(total: int, count: int, what: str) -> int:
    """`total` / `count`. Raises ValueError where it is not an integer."""
    if count < 1 or total % count:
        raise ValueError(f"{total} is not a multiple of {what}, {count}")
    return total // count
