"""Layouts cover every tensor exactly, and agree with torch's own rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.layout.box import Box, whole
from launcher.layout.layout import chunk, layout
from launcher.layout.mesh import Mesh, data_parallel_mesh

SHAPES = st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple)


@given(length=st.integers(0, 200), pieces=st.integers(1, 64))
def test_chunks_are_those_of_torch(length: int, pieces: int) -> None:
    ours = [size for index in range(pieces) if (size := chunk(length, pieces, index)[1])]
    assert ours == [len(part) for part in torch.arange(length).chunk(pieces) if len(part)]


@given(shape=SHAPES, replicate=st.integers(1, 8), shard=st.integers(1, 8))
def test_shards_of_one_copy_cover_a_tensor_once(shape, replicate: int, shard: int) -> None:
    mesh = Mesh(dp_replicate=replicate, dp_shard=shard)
    seen = torch.zeros(shape, dtype=torch.int64)
    for rank in range(mesh.world_size):
        box = layout({"w": shape}, mesh, rank)["w"].boxes[0]
        seen[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))] += 1
    assert (seen == replicate).all()


def test_scalars_and_replicated_tensors_are_whole_on_every_rank() -> None:
    mesh = Mesh(dp_shard=4)
    for rank in range(4):
        held = layout({"scalar": (), "buffer": (8,)}, mesh, rank, replicated={"buffer"})
        assert held["scalar"].boxes == (Box((), ()),)
        assert held["buffer"].boxes == (whole((8,)),)


def test_tensor_parallel_is_innermost_and_pipeline_outermost() -> None:
    mesh = Mesh(pp=2, dp_replicate=2, tp=2)
    assert mesh.coordinates(1) == {"pp": 0, "dp_replicate": 0, "dp_shard": 0, "cp": 0, "tp": 1}
    assert mesh.coordinates(2)["dp_replicate"] == 1
    assert mesh.coordinates(4)["pp"] == 1
    with pytest.raises(ValueError, match="rank 8 is outside a mesh of 8 ranks"):
        mesh.coordinates(8)


@pytest.mark.parametrize(
    ("shard_optimizer", "shard_size", "expected"),
    [(False, -1, (4, 1)), (True, -1, (1, 4)), (True, 2, (2, 2)), (True, 1, (4, 1))],
)
def test_data_parallel_axes(shard_optimizer, shard_size, expected) -> None:
    mesh = data_parallel_mesh(4, shard_optimizer=shard_optimizer, shard_size=shard_size)
    assert (mesh.dp_replicate, mesh.dp_shard) == expected
    assert [mesh.data_rank(rank) for rank in range(4)] == [0, 1, 2, 3]


def test_a_shard_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="4 data-parallel ranks cannot be cut into groups of 3"):
        data_parallel_mesh(4, shard_optimizer=True, shard_size=3)


def test_boxes_intersect_and_change_coordinates() -> None:
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (5, 3))
    overlap = a.intersect(b)
    assert overlap == Box((3, 2), (1, 1))
    assert overlap.inside(a) == Box((3, 0), (1, 1))
    assert a.intersect(Box((4, 0), (1, 9))) is None
    assert Box((), ()).numel == 1
