"""The layout: for each parameter, the boxes of the global tensor a rank holds.

Owns the function every other room asks (loader, saver, tools, tests): it needs no process group, no
file and no model in memory. What torch really made is asserted equal to it when a model is built.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from launcher.layout.box import Box, Shape, whole
from launcher.layout.mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """What one rank holds of one tensor: its global shape and the boxes, in file order."""

    shape: Shape
    boxes: tuple[Box, ...]


def chunk(length: int, pieces: int, index: int) -> tuple[int, int]:
    """(offset, size) of piece `index` when `length` rows are cut into `pieces`.

    The rule of `torch.chunk`, hence of DTensor's `Shard`: every piece but the last ones has
    ceil(length / pieces) rows; the last ones may be short or empty.
    """
    rows = -(-length // pieces)
    start = min(index * rows, length)
    return start, min(rows, length - start)


def layout(
    shapes: Mapping[str, Shape], mesh: Mesh, rank: int, *, replicated: Collection[str] = ()
) -> dict[str, Placement]:
    """For each named tensor, what `rank` holds of it on `mesh`.

    Data-parallel shards cut dim 0. Scalars and the tensors named in `replicated` (buffers) are not
    cut: every rank holds them whole.
    """
    at = mesh.coordinates(rank)
    return {
        name: Placement(
            shape,
            (whole(shape) if name in replicated else _shard(shape, mesh.dp_shard, at["dp_shard"]),),
        )
        for name, shape in shapes.items()
    }


def _shard(shape: Shape, pieces: int, index: int) -> Box:
    if not shape:
        return Box((), ())
    start, rows = chunk(shape[0], pieces, index)
    return Box((start,) + (0,) * (len(shape) - 1), (rows, *shape[1:]))
