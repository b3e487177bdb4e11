"""The layout: for each parameter, the boxes of the global tensor a rank holds.

Owns the function that loader, saver, strategy files, tools and tests all use. It needs no process
group, no file and no model in memory. When a model is built, what torch made is asserted equal to
it. A parameter is sharded in this order, each step inside the result of the one before:

    pp          a parameter is on the ranks of its stage only
    ep          experts, dim 0 in equal pieces
    tp          the dim of the family's plan in equal pieces
    dp_shard    dim 0 in pieces of ceil(rows / ranks) (experts: `expert_shard` of them)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from launcher.layout.box import Box, Shape, full_box
from launcher.layout.mesh import Mesh


@dataclass(frozen=True)
class ShardSpec:
    """How one tensor is sharded, independent of the mesh."""

    tp_dim: int | None = None
    """The dim sharded over tensor-parallel ranks; None: each of them holds all of it."""
    expert: bool = False
    """Dim 0 is experts, sharded over `ep`."""
    sharded: bool = True
    """Sharded over `dp_shard`; buffers are not."""
    stages: tuple[int, ...] | None = None
    """Pipeline ranks that hold it, the owner first; None: all."""


REPLICATED = ShardSpec(sharded=False)
SHARDED = ShardSpec()


@dataclass(frozen=True, slots=True)
class Placement:
    """What one rank holds of one tensor."""

    shape: Shape
    """Of the global tensor."""
    boxes: tuple[Box, ...]
    """In file order; empty boxes where there are more ranks than rows."""
    specs: tuple[tuple[str, int], ...] = ()
    """(axis, dim) of every cut, in order."""


def chunk(length: int, pieces: int, index: int) -> tuple[int, int]:
    """(offset, size) of piece `index` when `length` rows are split into `pieces`.

    The rule of `torch.chunk`, hence of DTensor's `Shard`: every piece but the last ones has
    ceil(length / pieces) rows; the last ones may be short or empty.
    """
    rows = -(-length // pieces)
    start = min(index * rows, length)
    return start, min(rows, length - start)


@dataclass(frozen=True)
class Layout:
    """Where every tensor of a model is on a mesh."""

    shapes: Mapping[str, Shape]
    """Global shape of every tensor, experts stacked."""
    mesh: Mesh
    specs: Mapping[str, ShardSpec] = field(default_factory=dict)
    """How each tensor is sharded; without an entry over `dp_shard` only."""
    _known: dict[tuple[int, ...], dict[str, Placement]] = field(
        default_factory=dict, repr=False, compare=False
    )
    _by_stage: dict[int, tuple[str, ...]] = field(default_factory=dict, repr=False, compare=False)
    _placed: dict[tuple[object, ...], Placement] = field(
        default_factory=dict, repr=False, compare=False
    )

    def of(self, rank: int) -> dict[str, Placement]:
        """What `rank` holds, by tensor name. Cached for ranks that hold the same."""
        at = self.mesh.coordinates(rank)
        key = (at["pp"], at["ep"], at["tp"], at["dp_shard"], at["expert_shard"])
        if key not in self._known:
            self._known[key] = {
                name: self._place(self.shapes[name], self.spec_of(name), at)
                for name in self.names(at["pp"])
            }
        return self._known[key]

    def _place(self, shape: Shape, spec: ShardSpec, at: Mapping[str, int]) -> Placement:
        """Cached for tensors that are sharded alike: layers repeat."""
        tp = None if spec.tp_dim is None else at["tp"]
        data = (at["ep"], at["expert_shard"]) if spec.expert else at["dp_shard"]
        key = (shape, spec.tp_dim, tp, spec.expert, spec.sharded, data)
        if key not in self._placed:
            self._placed[key] = place(shape, spec, self.mesh, at)
        return self._placed[key]

    def names(self, stage: int) -> tuple[str, ...]:
        """Tensors of the pipeline rank `stage`, in the model's order."""
        if stage not in self._by_stage:
            self._by_stage[stage] = tuple(
                name for name in self.shapes
                if (stages := self.spec_of(name).stages) is None or stage in stages
            )  # fmt: skip
        return self._by_stage[stage]

    def spec_of(self, name: str) -> ShardSpec:
        """How `name` is sharded."""
        return self.specs.get(name, SHARDED)

    def is_owner(self, name: str, rank: int) -> bool:
        """Whether `rank` is the first of those that hold its box of `name`: a sum over owners
        counts every element once."""
        at, spec = self.mesh.coordinates(rank), self.spec_of(name)
        copies = ["expert_copy"] if spec.expert else ["dp_replicate", "cp"]
        if not spec.sharded:
            copies += ["expert_shard"] if spec.expert else ["dp_shard"]
        if spec.tp_dim is None:
            copies.append("tp")
        first_stage = at["pp"] == (spec.stages or (0,))[0]
        return first_stage and not any(at[axis] for axis in copies)

    def alike(self, prefix: str) -> Layout:
        """The same layout with `prefix` before each name, for optimizer state."""
        return replace(
            self,
            shapes={prefix + name: shape for name, shape in self.shapes.items()},
            specs={prefix + name: spec for name, spec in self.specs.items()},
            _known={},
            _by_stage={},
            _placed={},
        )


def place(shape: Shape, spec: ShardSpec, mesh: Mesh, at: Mapping[str, int]) -> Placement:
    """The placement of a tensor of `shape` at the coordinates `at`."""
    box, specs = full_box(shape), []
    data_axis = "expert_shard" if spec.expert else "dp_shard"
    shards = mesh.expert_shard if spec.expert else mesh.dp_shard
    steps: list[tuple[str, int, int | None]] = [
        ("ep", mesh.ep, 0 if spec.expert else None),
        ("tp", mesh.tp, spec.tp_dim),
        (data_axis, shards, 0 if spec.sharded and shape else None),
    ]
    for axis, pieces, dim in steps:
        if dim is not None and pieces > 1:
            box = _cut(box, dim, pieces, at[axis])
            specs.append((axis, dim))
    return Placement(shape, (box,), tuple(specs))


def _cut(box: Box, dim: int, pieces: int, index: int) -> Box:
    start, rows = chunk(box.size[dim], pieces, index)
    offset, size = list(box.offset), list(box.size)
    offset[dim] += start
    size[dim] = rows
    return Box(tuple(offset), tuple(size))
