"""Mappings between tensors of the model and tensors of files.

A tensor of the model that is one tensor in files under the same name needs none. A stack of experts
has one mapping for each expert, a fused projection one for each part:

    model: experts.gate_up_proj [4, 6, 8]          files: experts.2.gate_proj.weight [3, 8]
        box [2:3, 0:3, 0:8]  <----------------------  is this box, without the dim of size 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from launcher.layout.box import Box, Shape, full_box
from launcher.layout.shard import Shard
from launcher.weights.gc_pause import gc_paused


class TensorMapping(NamedTuple):
    """Tensor `name` of the files is `box` of the model's tensor, without the dims `dropped`."""

    name: str
    box: Box
    dropped: tuple[int, ...] = ()
    """Dims of size 1 in `box` that the file's tensor does not have."""

    @property
    def shape(self) -> Shape:
        """Shape of the tensor in files."""
        return self.kept(self.box.size)

    def is_entry_of(self, shape: Shape) -> bool:
        """Whether it is one index of the first dim of a tensor of `shape`, as in a stack."""
        return self.dropped == (0,) and self.box.size[1:] == shape[1:]

    def kept(self, values: Sequence[int]) -> Shape:
        """`values`, one for each dim of the model's tensor, without the dropped dims."""
        if self.dropped == (0,):
            return tuple(values[1:])
        return tuple(v for dim, v in enumerate(values) if dim not in self.dropped)


MappingsOf = Callable[[str, Shape], Sequence[TensorMapping] | None]
"""(name in the model, global shape) to its mappings; None: one tensor under the same name."""


def no_mapping(name: str, shape: Shape) -> None:
    """Every tensor of the model is one tensor of the files under the same name."""


@gc_paused()
def shapes_in_files(shapes: Mapping[str, Shape], mappings_of: MappingsOf) -> dict[str, Shape]:
    """Name and global shape of every tensor of the files, from those of the model."""
    result: dict[str, Shape] = {}
    for name, shape in shapes.items():
        mappings = mappings_of(name, shape)
        result |= (
            {name: shape}
            if mappings is None
            else {mapping.name: mapping.shape for mapping in mappings}
        )
    return result


@gc_paused()
def mapped(held: Mapping[str, Shard], mappings_of: MappingsOf) -> dict[str, Shard]:
    """The shards of the model as shards of the files' tensors, in the same memory."""
    result = {}
    for name, shard in held.items():
        mappings = mappings_of(name, shard.shape)
        if mappings is None:
            result[name] = shard
            continue
        entries: dict[int, Shard] | None = None
        for mapping in mappings:
            if mapping.is_entry_of(shard.shape):
                entries = _entries(shard) if entries is None else entries
                part = entries.get(mapping.box.offset[0])
            else:
                part = _part(shard, mapping)
            if part is not None:
                result[mapping.name] = part
    return result


def _entries(shard: Shard) -> dict[int, Shard]:
    """The part of a shard at each index of its first dim, as `_part` gives it."""
    rest = Box(shard.box.offset[1:], shard.box.size[1:])
    if not rest.numel:
        return {}
    shape, first = shard.shape[1:], shard.box.offset[0]
    return {
        first + row: type(shard)(shape, rest, tensor)
        for row, tensor in enumerate(shard.tensor.unbind(0))
    }


def _part(shard: Shard, mapping: TensorMapping) -> Shard | None:
    """The part of a shard that a mapping covers, as a shard of the file's tensor; None: nothing."""
    common = shard.box.intersect(mapping.box)
    if common is None:
        return None
    tensor, inside = shard.tensor, common.inside(shard.box)
    for dim in range(len(common.size) - 1, -1, -1):
        if dim in mapping.dropped:
            tensor = tensor.select(dim, inside.offset[dim])
        elif common.size[dim] != shard.box.size[dim]:
            tensor = tensor.narrow(dim, inside.offset[dim], common.size[dim])
    place = common.inside(mapping.box)
    box = Box(mapping.kept(place.offset), mapping.kept(place.size))
    return type(shard)(mapping.shape, box, tensor)


def stacked(names: Sequence[str], shape: Shape) -> list[TensorMapping]:
    """Mappings of a tensor [n, ...] whose entry i is the tensor `names[i]`."""
    rest = full_box(shape[1:])
    return [
        TensorMapping(name, Box((index, *rest.offset), (1, *rest.size)), (0,))
        for index, name in enumerate(names)
    ]
