"""MindSpore's tensor layouts: a grid of devices, and the grid axis that shards each dim.

Owns the way from such a layout to the box of a rank, and from our cuts to a layout. The ranks of
one pipeline stage, counted from 0, fill a grid row by row. A dim is sharded by one grid axis or by
several (the first is the slowest) into equal pieces; with a sharded optimizer dim 0 is split once
more over the other ranks. Grid axes are counted from the right:

    grid [4, 2], map [0, -1]        column 0   column 1        dim 0 in two, by axis 0
                          row 0     rank 0     rank 1
                          row 1     rank 2     rank 3          shard size 2, step 2: each half in
                          row 2     rank 4     rank 5          two again, over rows 0-1 and, with
                          row 3     rank 6     rank 7          the same pieces, rows 2-3

A layout has no shape; the layout of a slice and the slice give the full shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.layout.box import Box, Shape

DATA_AXES = ("dp_replicate", "dp_shard", "expert_shard", "cp")
"""Axes whose cuts become optimizer shards where the format allows it, as in MindSpore."""


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The layout of one parameter in a strategy file. Raises ValueError if it is not valid."""

    dev_matrix: Shape
    """Size of each grid axis; the product is the number of ranks in a stage."""
    tensor_map: tuple[Shape, ...]
    """One entry: for each dim the grid axis that cuts it, -1 for none. More: for each dim its grid
    axes, slowest first; empty entries do not count."""
    shard_step: int = 0
    """Distance in ranks between neighbours of an optimizer group; 0: no optimizer shards."""
    shard_size: int = 0
    """Pieces the optimizer cut makes; -1: as many as ranks hold the same; 0: none."""
    field: int = 0
    param_split_shape: tuple[Shape, ...] = ((),)
    indices_offset: tuple[Shape, ...] = ((),)
    """With `field` and `param_split_shape`: unequal pieces of embeddings. Kept, not interpreted."""

    def __post_init__(self) -> None:
        axes = [axis for entry in self.tensor_map for axis in entry if axis != -1]
        if not self.dev_matrix or min(self.dev_matrix) < 1:
            raise ValueError(f"device matrix {list(self.dev_matrix)}")
        if any(not 0 <= axis < len(self.dev_matrix) for axis in axes):
            raise ValueError(f"tensor map {self.tensor_map} on {len(self.dev_matrix)} grid axes")
        if len(set(axes)) < len(axes):
            raise ValueError(f"tensor map {self.tensor_map} uses a grid axis twice")
        if self.shard_size < -1 or self.shard_step < 0:
            raise ValueError(f"shard size {self.shard_size}, step {self.shard_step}")

    @property
    def ranks(self) -> int:
        """Ranks in a stage."""
        return math.prod(self.dev_matrix)

    @property
    def positions(self) -> tuple[Shape, ...]:
        """For each dim the grid axes that shard it, slowest first, counted from the left."""
        last = len(self.dev_matrix) - 1
        if len(self.tensor_map) > 1:
            entries = [entry for entry in self.tensor_map if entry]
        else:
            entries = [(axis,) for entry in self.tensor_map for axis in entry]
        return tuple(tuple(last - axis for axis in entry if axis != -1) for entry in entries)

    @property
    def free(self) -> Shape:
        """Grid axes, from the left, that shard no dim, outermost first."""
        used = {position for dim in self.positions for position in dim}
        return tuple(axis for axis in range(len(self.dev_matrix)) if axis not in used)

    @property
    def shards(self) -> int:
        """Pieces the optimizer cut makes; 1: there is none."""
        if not (self.shard_size and self.shard_step):
            return 1
        if self.shard_size == -1:
            return math.prod(self.dev_matrix[axis] for axis in self.free)
        return self.shard_size

    @property
    def pieces(self) -> Shape:
        """For each dim the number of pieces."""
        cut = [math.prod(self.dev_matrix[axis] for axis in dim) for dim in self.positions]
        if cut:
            cut[0] *= self.shards
        return tuple(cut)


def boxes(layout: TensorLayout, shape: Sequence[int], local_rank: int) -> tuple[Box, ...]:
    """What rank `local_rank` of a stage holds of a tensor of the full `shape`: one box.

    Raises ValueError when the layout is of another number of dims, cuts a dim into unequal pieces
    or splits an embedding by field.
    """
    if any(layout.param_split_shape) or layout.field:
        raise ValueError("the layout splits an embedding by field")
    if not 0 <= local_rank < layout.ranks:
        raise ValueError(f"rank {local_rank} is outside a stage of {layout.ranks} ranks")
    _same_dims(layout, shape)
    at = _coordinates(layout.dev_matrix, local_rank)
    index = [_index(layout.dev_matrix, at, dim) for dim in layout.positions]
    if index and layout.shards > 1:
        shard = _index(layout.dev_matrix, at, layout.free) % layout.shards
        index[0] = index[0] * layout.shards + shard
    size = []
    for dim, (length, pieces) in enumerate(zip(shape, layout.pieces, strict=True)):
        if length % pieces:
            raise ValueError(
                f"dim {dim} of length {length} cannot be cut into {pieces} equal pieces"
            )
        size.append(length // pieces)
    return (Box(tuple(i * n for i, n in zip(index, size, strict=True)), tuple(size)),)


def full_shape(layout: TensorLayout, slice_shape: Sequence[int]) -> Shape:
    """The global shape of a tensor of which a rank holds a slice of `slice_shape`."""
    _same_dims(layout, slice_shape)
    return tuple(n * pieces for n, pieces in zip(slice_shape, layout.pieces, strict=True))


def _same_dims(layout: TensorLayout, shape: Sequence[int]) -> None:
    dims = len(layout.positions)
    if dims != len(shape):
        raise ValueError(f"the layout is of a tensor of {dims} dims, the shape is {list(shape)}")


def _coordinates(dev_matrix: Shape, rank: int) -> list[int]:
    at = []
    for size in reversed(dev_matrix):
        rank, coordinate = divmod(rank, size)
        at.append(coordinate)
    return at[::-1]


def _index(dev_matrix: Shape, at: Sequence[int], axes: Sequence[int]) -> int:
    """Row-major index over `axes`, the first the slowest."""
    index = 0
    for axis in axes:
        index = index * dev_matrix[axis] + at[axis]
    return index


def entry(
    shape: Sequence[int], cuts: Sequence[tuple[str, int]], mesh: Mapping[str, int]
) -> TensorLayout | None:
    """The layout of a tensor of `shape` with these `cuts`, or None where the format has none.

    `cuts`: (axis, dim), outermost first, each in equal pieces. `mesh`: the size of each axis; one
    that is missing has size 1, `pp` does not matter. Axes: dp_replicate, dp_shard, cp, tp, and on
    the expert view of the data ranks ep and expert_shard. None means unequal pieces, or cuts over
    axes that overlap (ep and dp_shard).

    Of equivalent layouts the one is chosen that MindSpore's own tools read most reliably: an
    optimizer shard where the ranks of the group are the outermost grid axis and the other cuts are
    in the order of the dims; or else one grid axis for each dim; or else several for a dim.
    """
    ranges = _ranges(mesh)
    cuts = [(axis, dim) for axis, dim in cuts if ranges[axis][1] > 1]
    atoms = _atoms([ranges[axis] for axis, _ in cuts], math.prod(ranges["ranks"]))
    if atoms is None:
        return None
    by_dim: list[list[int]] = [[] for _ in shape]
    shard: list[int] = []
    for axis, dim in cuts:
        stride, size = ranges[axis]
        found = [i for i, (start, _) in enumerate(atoms) if stride <= start < stride * size]
        by_dim[dim] += found
        if dim == 0:
            shard = [*shard, *found] if axis in DATA_AXES else []
    claimed = [atom for atoms_of_dim in by_dim for atom in atoms_of_dim]
    if len(set(claimed)) < len(claimed):
        return None
    sizes = [size for _, size in atoms]
    if any(n % math.prod(sizes[i] for i in dim) for n, dim in zip(shape, by_dim, strict=True)):
        return None
    return _with_shards(sizes, by_dim, shard) or _with_grid(sizes, by_dim)


def _ranges(mesh: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Axis to (distance in local ranks of its neighbours, size); `ranks` is all of a stage."""
    tp, cp, ep = mesh.get("tp", 1), mesh.get("cp", 1), mesh.get("ep", 1)
    shard, replicate = mesh.get("dp_shard", 1), mesh.get("dp_replicate", 1)
    return {
        "tp": (1, tp),
        "cp": (tp, cp),
        "dp_shard": (tp * cp, shard),
        "dp_replicate": (tp * cp * shard, replicate),
        "ep": (tp * cp, ep),
        "expert_shard": (tp * cp * ep, max(shard // ep, 1)),
        "ranks": (1, tp * cp * shard * replicate),
    }


def _atoms(ranges: Sequence[tuple[int, int]], ranks: int) -> list[tuple[int, int]] | None:
    """The coarsest grid, outermost axis first, of which every range is a run of axes: (stride,
    size) of each. None when there is no such grid."""
    marks = {1, ranks}
    for stride, size in ranges:
        marks |= {stride, stride * size}
    steps = list(pairwise(sorted(marks)))
    if any(above % below for below, above in steps):
        return None
    return [(below, above // below) for below, above in reversed(steps)]


def _with_shards(
    sizes: Sequence[int], by_dim: Sequence[Sequence[int]], shard: Sequence[int]
) -> TensorLayout | None:
    """The layout with `shard`, the last cuts of dim 0, as optimizer shards.

    Only where every version of MindSpore's tools agrees: the grid is the ranks that share nothing
    but the optimizer, outermost, then the other cuts in the order of the dims.
    """
    if not shard:
        return None
    rest = [by_dim[0][: -len(shard)], *by_dim[1:]]
    used = [atom for dim in rest for atom in dim]
    first = len(sizes) - len(used)
    if used != list(range(first, len(sizes))) or list(shard) != list(range(first))[-len(shard) :]:
        return None
    return _with_grid(
        sizes, rest, step=math.prod(sizes[first:]), shards=math.prod(sizes[i] for i in shard)
    )


def _with_grid(
    sizes: Sequence[int], by_dim: Sequence[Sequence[int]], step: int = 0, shards: int = 0
) -> TensorLayout:
    """The layout whose grid is `sizes`, neighbours merged that cut one dim in a row, or nothing."""
    follows = {pair for dim in by_dim for pair in pairwise(dim)}
    used = {atom for dim in by_dim for atom in dim}
    group, grid = [], list[int]()
    for atom, size in enumerate(sizes):
        both_free = atom and atom not in used and atom - 1 not in used
        if both_free or (atom - 1, atom) in follows:
            grid[-1] *= size
        else:
            grid.append(size)
        group.append(len(grid) - 1)
    axes = [tuple(dict.fromkeys(len(grid) - 1 - group[atom] for atom in dim)) for dim in by_dim]
    tensor_map: tuple[Shape, ...] = (tuple(dim[0] if dim else -1 for dim in axes),)
    if any(len(dim) > 1 for dim in axes):
        # A single entry would be read as one axis for each dim: an empty one makes it two.
        tensor_map = tuple(dim or (-1,) for dim in axes) + ((),) * (len(axes) == 1)
    return TensorLayout(tuple(grid) or (1,), tensor_map, step, shards)
