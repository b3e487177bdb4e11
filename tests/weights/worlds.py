"""Worlds: random models on random meshes, for property tests.

A model is a few tensors of 0 to 3 dims, odd sizes, scalars and stacked experts among them. Its
files hold every expert of a stack as a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from hypothesis import strategies as st

from launcher.layout.box import Box, Shape
from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.mesh import RANK_AXES, Mesh
from launcher.layout.shard import Shard
from launcher.weights.ranks.redundancy import file_replicas, writers_of
from launcher.weights.tensor_mapping import TensorMapping, mapped, stacked

MOMENTS = ("adam_m.", "adam_v.")


@st.composite
def meshes(draw: st.DrawFn, most: int) -> Mesh:
    """Any mesh of at most `most` ranks."""
    sizes, left = {}, most
    for axis in draw(st.permutations(RANK_AXES)):
        sizes[axis] = draw(st.sampled_from([n for n in (1, 2, 1, 3, 4, 5, 8) if n <= left]))
        left //= sizes[axis]
    data, shard = sizes["dp_replicate"] * sizes["dp_shard"], sizes["dp_shard"]
    groups = [
        ep for ep in range(1, data + 1)
        if data % ep == 0 and (ep % shard == 0 or shard % ep == 0)
    ]  # fmt: skip
    return Mesh(**sizes, ep=draw(st.sampled_from(groups)))


@dataclass(frozen=True)
class World:
    """A model, and how it lies on two meshes."""

    shapes: dict[str, Shape]
    experts: frozenset[str]
    """Tensors whose dim 0 counts experts."""
    before: Layout
    after: Layout
    leaves_copies: bool
    """Each box is saved by one of its holders."""

    def mappings_of(self, name: str, shape: Shape) -> Sequence[TensorMapping] | None:
        """An expert in files is `name.index`, of moments too."""
        base = name
        for prefix in MOMENTS:
            base = base.removeprefix(prefix)
        if base not in self.experts:
            return None
        return stacked([f"{name}.{index}" for index in range(shape[0])], shape)

    def saved(self, rank: int, values: dict[str, torch.Tensor]) -> dict[str, Shard]:
        """What `rank` writes of tensors of the model, as tensors of the files."""
        held = mapped(shards(self.before, rank, values), self.mappings_of)
        if not self.leaves_copies:
            return held
        keeper = writers_of(held, file_replicas(self.before, rank, self.mappings_of))
        return {name: shard for name, shard in held.items() if keeper[name] == rank}


@st.composite
def worlds(draw: st.DrawFn, most_ranks: int) -> World:
    """A random model on two random meshes."""
    shapes, experts = {}, set()
    layouts = [(draw(meshes(most_ranks)), dict[str, ShardSpec]()) for _ in range(2)]
    for number in range(draw(st.integers(1, 4))):
        name, shape = f"t{number}", tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
        shapes[name] = shape
        is_expert = len(shape) > 1 and draw(st.booleans())
        if is_expert:
            experts.add(name)
        tp_dim = draw(st.sampled_from([None, *range(int(is_expert), len(shape))]))
        for mesh, specs in layouts:
            stages = draw(
                st.sampled_from([None, *((s,) for s in range(mesh.pp)), (0, mesh.pp - 1)])
            )
            specs[name] = ShardSpec(tp_dim, is_expert, sharded=draw(st.booleans()), stages=stages)
    before, after = (Layout(shapes, mesh, specs) for mesh, specs in layouts)
    return World(shapes, frozenset(experts), before, after, draw(st.booleans()))


def shards(layout: Layout, rank: int, values: dict[str, torch.Tensor]) -> dict[str, Shard]:
    """The part of each tensor (and of moments) that `rank` holds, in memory of its own."""
    placed, found = layout.of(rank), {}
    for name, tensor in values.items():
        base = name
        for prefix in MOMENTS:
            base = base.removeprefix(prefix)
        if base in placed:
            box = placed[base].boxes[0]
            found[name] = Shard(tuple(tensor.shape), box, region(tensor, box).clone())
    return found


def region(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The elements of `box`, a view."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))]


def random_tensor(generator: np.random.Generator, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of random bits, NaN and infinity among them."""
    item = torch.empty(0, dtype=dtype).element_size()
    bits = generator.integers(0, 256, prod(shape) * item, np.uint8)
    values = torch.from_numpy(bits).view(dtype) if len(bits) else torch.empty(0, dtype=dtype)
    return values.reshape(shape)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, in C order; a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


def spoil(tensor: torch.Tensor) -> None:
    """Turn round every bit of a contiguous tensor: what is right afterwards has been written."""
    tensor.view(-1).view(torch.uint8).bitwise_not_()
