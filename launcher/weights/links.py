"""Links: which box of a tensor of the model is which tensor of the files.

Owns the form of a name map. A tensor of the model that is one tensor in files under the same name
needs no link. A stack of experts has one link an expert, a fused projection one for each part:

    model: experts.gate_up_proj [4, 6, 8]          files: experts.2.gate_proj.weight [3, 8]
        box [2:3, 0:3, 0:8]  <----------------------  is this box, without the dim of size 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from launcher.layout.box import Box, Shape, whole
from launcher.weights.garbage import none_collected

if TYPE_CHECKING:  # shards hold tensors of torch, names do not
    from launcher.weights.reading.memory import Shard


class Link(NamedTuple):
    """Tensor `name` of the files is `box` of the model's tensor, without the dims `dropped`."""

    name: str
    box: Box
    dropped: tuple[int, ...] = ()
    """Dims of size 1 in `box` that the file's tensor does not have."""

    @property
    def shape(self) -> Shape:
        """Of the tensor in files."""
        return self.kept(self.box.size)

    def is_entry_of(self, shape: Shape) -> bool:
        """Whether it is all of one index of the first dim of a tensor of `shape`, as in a stack."""
        return self.dropped == (0,) and self.box.size[1:] == shape[1:]

    def kept(self, values: Sequence[int]) -> Shape:
        """`values`, one a dim of the model's tensor, without those of the dropped dims."""
        if self.dropped == (0,):
            return tuple(values[1:])
        return tuple(v for dim, v in enumerate(values) if dim not in self.dropped)


LinksOf = Callable[[str, Shape], Sequence[Link] | None]
"""(name in the model, its global shape) to its links; None: one tensor under the same name."""


def no_links(name: str, shape: Shape) -> None:
    """Every tensor of the model is one tensor of the files, under the same name."""


@none_collected()
def shapes_in_files(shapes: Mapping[str, Shape], links_of: LinksOf) -> dict[str, Shape]:
    """Name and global shape of every tensor of the files, from those of the model."""
    result: dict[str, Shape] = {}
    for name, shape in shapes.items():
        links = links_of(name, shape)
        result |= {name: shape} if links is None else {link.name: link.shape for link in links}
    return result


@none_collected()
def linked(held: Mapping[str, Shard], links_of: LinksOf) -> dict[str, Shard]:
    """The shards of the model as shards of the files' tensors, in the same memory."""
    result = {}
    for name, shard in held.items():
        links = links_of(name, shard.shape)
        if links is None:
            result[name] = shard
            continue
        entries: dict[int, Shard] | None = None
        for link in links:
            if link.is_entry_of(shard.shape):
                entries = _entries(shard) if entries is None else entries
                part = entries.get(link.box.offset[0])
            else:
                part = _part(shard, link)
            if part is not None:
                result[link.name] = part
    return result


def _entries(shard: Shard) -> dict[int, Shard]:
    """What a shard holds of each index of its first dim, as `_part` of a link with it would be."""
    rest = Box(shard.box.offset[1:], shard.box.size[1:])
    if not rest.numel:
        return {}
    shape, first = shard.shape[1:], shard.box.offset[0]
    return {
        first + row: type(shard)(shape, rest, tensor)
        for row, tensor in enumerate(shard.tensor.unbind(0))
    }


def _part(shard: Shard, link: Link) -> Shard | None:
    """What a shard holds of a link, as a shard of the file's tensor; None: nothing."""
    common = shard.box.intersect(link.box)
    if common is None:
        return None
    tensor, inside = shard.tensor, common.inside(shard.box)
    for dim in range(len(common.size) - 1, -1, -1):
        if dim in link.dropped:
            tensor = tensor.select(dim, inside.offset[dim])
        elif common.size[dim] != shard.box.size[dim]:
            tensor = tensor.narrow(dim, inside.offset[dim], common.size[dim])
    place = common.inside(link.box)
    box = Box(link.kept(place.offset), link.kept(place.size))
    return type(shard)(link.shape, box, tensor)


def stacked(names: Sequence[str], shape: Shape) -> list[Link]:
    """Links of a tensor [n, ...] whose entry i is the tensor `names[i]`."""
    rest = whole(shape[1:])
    return [
        Link(name, Box((index, *rest.offset), (1, *rest.size)), (0,))
        for index, name in enumerate(names)
    ]
