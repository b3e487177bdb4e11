"""Replica ranks of a box: computed ones equal those of a search; one of them is the writer."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from launcher.layout.layout import REPLICATED, Layout, ShardSpec
from launcher.layout.mesh import Mesh
from launcher.layout.replicas import Replicas, writer_ranks

SHAPES = {
    "embedding": (64, 8), "column": (64, 8), "row": (8, 64), "norm": (64,), "scalar": (),
    "expert": (8, 64, 16), "buffer": (8,), "first": (64, 4),
}  # fmt: skip


def layout(mesh: Mesh) -> Layout:
    last = mesh.pp - 1
    specs = {
        "embedding": ShardSpec(tp_dim=0, stages=tuple(dict.fromkeys((0, last)))),
        "column": ShardSpec(tp_dim=0, stages=(last,)), "row": ShardSpec(tp_dim=1, stages=(0,)),
        "norm": ShardSpec(stages=(last,)), "scalar": ShardSpec(), "first": ShardSpec(stages=(0,)),
        "expert": ShardSpec(tp_dim=1, expert=True, stages=(last,)), "buffer": REPLICATED,
    }  # fmt: skip
    return Layout(SHAPES, mesh, specs)


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    sizes = {axis: draw(st.sampled_from([1, 2])) for axis in ("pp", "cp", "tp")}
    replicate, shard = draw(st.sampled_from([(1, 1), (1, 4), (2, 2), (4, 1), (2, 1)]))
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if (replicate * shard) % n == 0
                               and (shard % n == 0 or n % shard == 0)]))  # fmt: skip
    return Mesh(dp_replicate=replicate, dp_shard=shard, ep=ep, **sizes)


@given(mesh=meshes())
def test_replica_ranks_equal_those_of_a_search(mesh: Mesh) -> None:
    placed = layout(mesh)
    found = defaultdict(list)
    for rank in range(mesh.world_size):
        for name, placement in placed.of(rank).items():
            found[name, placement.boxes[0]].append(rank)
    replica_ranks = Replicas(placed)
    for rank in range(mesh.world_size):
        for name, placement in placed.of(rank).items():
            assert replica_ranks.of(name, rank) == tuple(found[name, placement.boxes[0]]), name


@given(mesh=meshes())
def test_every_box_has_one_writer_rank_on_which_its_replicas_agree(mesh: Mesh) -> None:
    placed = layout(mesh)
    replica_ranks = Replicas(placed)
    kept = defaultdict(set)
    for rank in range(mesh.world_size):
        held = placed.of(rank)
        keeper = writer_ranks(
            {name: placement.boxes[0].numel for name, placement in held.items()},
            {name: replica_ranks.of(name, rank) for name in held},
        )
        for name, placement in held.items():
            kept[name, placement.boxes[0]].add(keeper[name])
            assert keeper[name] in replica_ranks.of(name, rank)
    assert all(len(ranks) == 1 for ranks in kept.values())


def test_bytes_are_divided_evenly() -> None:
    sizes = {f"layer {i}": 100 - i for i in range(40)} | {"large": 400}
    keeper = writer_ranks(sizes, dict.fromkeys(sizes, (0, 1, 2, 3)))
    loads = [sum(sizes[name] for name in sizes if keeper[name] == rank) for rank in range(4)]
    assert max(loads) - min(loads) <= 40
