"""Layouts cover every tensor exactly, and agree with torch.chunk."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.layout.box import Box, Shape, full_box
from launcher.layout.layout import REPLICATED, Layout, ShardSpec, chunk
from launcher.layout.mesh import Mesh, training_mesh

SHAPES = st.lists(st.integers(1, 70), min_size=1, max_size=3).map(tuple)


@settings(deadline=None)
@given(length=st.integers(0, 200), pieces=st.integers(1, 64))
def test_chunks_are_those_of_torch(length: int, pieces: int) -> None:
    ours = [size for index in range(pieces) if (size := chunk(length, pieces, index)[1])]
    assert ours == [len(part) for part in torch.arange(length).chunk(pieces) if len(part)]


@st.composite
def meshes(draw, most: int = 3) -> Mesh:
    """Any mesh in which each axis has `most` ranks at most."""
    sizes = {
        axis: draw(st.integers(1, most)) for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    }
    data, shard = sizes["dp_replicate"] * sizes["dp_shard"], sizes["dp_shard"]
    possible = [
        ep for ep in range(1, data + 1)
        if data % ep == 0 and (ep % shard == 0 or shard % ep == 0)
    ]  # fmt: skip
    return Mesh(**sizes, ep=draw(st.sampled_from(possible)))


@st.composite
def sharded_tensors(draw) -> tuple[Shape, ShardSpec, Mesh]:
    """A tensor, a shard spec, and a mesh; dims that need equal shards are divisible."""
    mesh, shape = draw(meshes()), list(draw(SHAPES))
    expert = len(shape) > 1 and draw(st.booleans())
    tp_dim = draw(st.sampled_from([None, *range(int(expert), len(shape))]))
    if expert:
        shape[0] *= mesh.ep
    if tp_dim is not None:
        shape[tp_dim] *= mesh.tp
    stages = draw(
        st.sampled_from([None, *((stage,) for stage in range(mesh.pp)), (0, mesh.pp - 1)])
    )
    cut = ShardSpec(tp_dim, expert, sharded=draw(st.booleans()), stages=stages)
    return tuple(shape), cut, mesh


@settings(deadline=None)
@given(case=sharded_tensors())
def test_the_boxes_cover_a_tensor_and_each_element_has_one_owner(case) -> None:
    shape, cut, mesh = case
    layout = Layout({"w": shape}, mesh, {"w": cut})
    held = torch.zeros(shape, dtype=torch.int64)
    owned = torch.zeros(shape, dtype=torch.int64)
    replica_ranks = 0
    for rank in range(mesh.world_size):
        if "w" not in layout.of(rank):
            assert mesh.coordinates(rank)["pp"] not in (cut.stages or range(mesh.pp))
            assert not layout.is_owner("w", rank)
            continue
        (box,) = layout.of(rank)["w"].boxes
        place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
        held[place] += 1
        owned[place] += layout.is_owner("w", rank)
        replica_ranks += 1
    assert (owned == 1).all()
    assert (held == replica_ranks // _shard_count(cut, mesh)).all()


def _shard_count(cut: ShardSpec, mesh: Mesh) -> int:
    """Number of shards of a tensor, some of which may be empty."""
    data = mesh.expert_shard if cut.expert else mesh.dp_shard
    tensor = 1 if cut.tp_dim is None else mesh.tp
    return (data if cut.sharded else 1) * tensor * (mesh.ep if cut.expert else 1)


def test_scalars_and_buffers_are_replicated_on_every_rank() -> None:
    layout = Layout({"scalar": (), "buffer": (8,)}, Mesh(dp_shard=4), {"buffer": REPLICATED})
    for rank in range(4):
        held = layout.of(rank)
        assert held["scalar"].boxes == (Box((), ()),)
        assert held["buffer"].boxes == (full_box((8,)),)
    assert [layout.is_owner("buffer", rank) for rank in range(4)] == [True, False, False, False]


def test_tensor_parallel_is_innermost_and_pipeline_outermost() -> None:
    mesh = Mesh(pp=2, dp_replicate=2, tp=2)
    first = {"pp": 0, "dp_replicate": 0, "dp_shard": 0, "cp": 0, "tp": 1}
    assert mesh.coordinates(1) == {**first, "ep": 0, "expert_shard": 0, "expert_copy": 0}
    assert mesh.coordinates(2)["dp_replicate"] == 1
    assert mesh.coordinates(4)["pp"] == 1
    with pytest.raises(ValueError, match="rank 8 is outside a mesh of 8 ranks"):
        mesh.coordinates(8)


def test_experts_are_shared_by_neighbours_on_the_data_axes() -> None:
    mesh = Mesh(dp_shard=4, ep=2)  # the picture in launcher/layout/mesh.py
    at = [mesh.coordinates(rank) for rank in range(4)]
    assert [where["ep"] for where in at] == [0, 1, 0, 1]
    assert [where["expert_shard"] for where in at] == [0, 0, 1, 1]
    layout = Layout({"experts": (4, 6, 2)}, mesh, {"experts": ShardSpec(expert=True)})
    boxes = [layout.of(rank)["experts"].boxes[0] for rank in range(4)]
    assert [box.offset[0] for box in boxes] == [0, 2, 1, 3]
    assert {box.size for box in boxes} == {(1, 6, 2)}


@settings(deadline=None)
@given(mesh=meshes(4))
def test_every_rank_has_unique_coordinates_on_both_views(mesh: Mesh) -> None:
    at = [mesh.coordinates(rank) for rank in range(mesh.world_size)]
    dense = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    experts = ("pp", "expert_copy", "expert_shard", "ep", "tp")
    for axes in (dense, experts):
        assert len({tuple(where[axis] for axis in axes) for where in at}) == mesh.world_size


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"dp_shard": 4, "ep": 3}, "4 data ranks cannot be cut into groups of 3"),
        ({"dp_shard": 6, "dp_replicate": 2, "ep": 4}, "one must divide the other"),
    ],
)
def test_meshes_that_share_no_experts(sizes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mesh(**sizes)


@pytest.mark.parametrize(
    ("shard_optimizer", "shard_size", "expected"),
    [(False, -1, (4, 1)), (True, -1, (1, 4)), (True, 2, (2, 2)), (True, 1, (4, 1))],
)
def test_data_parallel_axes(shard_optimizer, shard_size, expected) -> None:
    mesh = training_mesh(data_parallel=4, shard_optimizer=shard_optimizer, shard_size=shard_size)
    assert (mesh.dp_replicate, mesh.dp_shard) == expected
    assert [mesh.data_rank(rank) for rank in range(4)] == [0, 1, 2, 3]


def test_a_shard_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="4 data-parallel ranks cannot be cut into groups of 3"):
        training_mesh(data_parallel=4, shard_optimizer=True, shard_size=3)


def test_optimizer_state_is_sharded_as_its_parameter() -> None:
    layout = Layout({"w": (8, 6)}, Mesh(dp_shard=2, tp=2), {"w": ShardSpec(tp_dim=1)})
    state = layout.alike("adam_m.")
    for rank in range(4):
        assert state.of(rank) == {"adam_m.w": layout.of(rank)["w"]}
        assert state.is_owner("adam_m.w", rank) == layout.is_owner("w", rank)


def test_ranks_and_tensors_that_are_sharded_alike_share_cached_results() -> None:
    layout = Layout({"a": (8, 6), "b": (8, 6)}, Mesh(dp_replicate=2, dp_shard=2))
    assert layout.of(1) is layout.of(3)
    assert layout.of(0)["a"] is layout.of(0)["b"]
    assert layout.of(0)["a"] != layout.of(1)["a"]


def test_boxes_intersect_and_change_coordinates() -> None:
    a, b = Box((0, 2), (4, 4)), Box((3, 0), (5, 3))
    overlap = a.intersect(b)
    assert overlap == Box((3, 2), (1, 1))
    assert overlap.inside(a) == Box((3, 0), (1, 1))
    assert a.intersect(Box((4, 0), (1, 9))) is None
    assert Box((), ()).numel == 1
