"""Links: which part of a tensor under a MindFormers name is which part of a Hugging Face tensor.

A link of a fused projection to its query rows is, with numpy,

    fused.reshape(groups, rows, hidden)[:, :query]  ==  query.reshape(groups, query, hidden)

and where the axes of one part are swapped in the other (stacks of experts) `axes` says how.
Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from launcher.weights.geometry import Side


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
