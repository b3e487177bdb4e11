"""Whether the boxes of all ranks tile each tensor exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from launcher.layout.box import Box, Shape
from launcher.layout.layout import Layout


def assert_covered(layout: Layout, names: Iterable[str]) -> None:
    """Every element of each tensor is held equally often, and has one owner."""
    for name in names:
        held: Counter[Box] = Counter()
        owned = []
        for rank in range(layout.mesh.world_size):
            placement = layout.of(rank).get(name)
            if placement is None:
                assert not layout.is_owner(name, rank), (name, rank)
                continue
            held[placement.boxes[0]] += 1
            if layout.is_owner(name, rank):
                owned.append(placement.boxes[0])
        shape = layout.shapes[name]
        assert tiles_once(shape, held), name
        assert tiles_once(shape, owned), name
        assert len({count for box, count in held.items() if box.numel}) == 1, name


def tiles_once(shape: Shape, boxes: Iterable[Box]) -> bool:
    """Whether `boxes` cover a tensor without overlap: all combinations of adjacent intervals of
    each dim. Empty ones do not count."""
    full = [box for box in boxes if box.numel]
    by_dim = [
        sorted({(box.offset[dim], box.size[dim]) for box in full}) for dim in range(len(shape))
    ]
    for length, intervals in zip(shape, by_dim, strict=True):
        ends = [start + size for start, size in intervals]
        if [0, *ends[:-1]] != [start for start, _ in intervals] or ends[-1:] != [length]:
            return False
    return len(set(full)) == len(full) == prod(map(len, by_dim))
