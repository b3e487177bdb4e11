"""Layouts of the format give the boxes MindSpore cut, and ours come out as layouts."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from launcher.layout.box import Box, Shape
from launcher.layout.layout import Layout, ShardSpec, chunk
from launcher.layout.mesh import Mesh
from launcher.mindspore.protobuf_wire import Message
from launcher.mindspore.strategy_files import read_folder
from launcher.mindspore.tensor_layout import TensorLayout, boxes, entry, full_shape
from tests.mindspore.golden import ALL, needs_all


def test_the_picture_in_the_module() -> None:
    layout = TensorLayout((4, 2), ((0, -1),), shard_step=2, shard_size=2)
    rows = [boxes(layout, (8, 3), rank)[0].offset[0] for rank in range(8)]
    assert rows == [0, 4, 2, 6, 0, 4, 2, 6]
    assert full_shape(layout, (2, 3)) == (8, 3)


@pytest.mark.parametrize(
    ("layout", "offsets"),
    [
        (TensorLayout((1,), ((-1,),)), [0]),
        (TensorLayout((2, 2), ((1,),)), [0, 0, 4, 4]),
        (TensorLayout((2, 2), ((0,),)), [0, 4, 0, 4]),
        (TensorLayout((2, 2), ((1, 0), ())), [0, 2, 4, 6]),
        (TensorLayout((2, 2), ((0, 1), ())), [0, 4, 2, 6]),
        (TensorLayout((2, 2), ((-1,),), 1, -1), [0, 2, 4, 6]),
        (TensorLayout((2, 2), ((-1,),), 1, 2), [0, 4, 0, 4]),
        (TensorLayout((2, 2), ((-1,),), 0, 2), [0, 0, 0, 0]),
        (TensorLayout((2, 2), ((1,),), 1, -1), [0, 2, 4, 6]),
        (TensorLayout((2, 2), ((0,),), 2, -1), [0, 4, 2, 6]),
    ],
)
def test_pieces_of_eight_rows(layout: TensorLayout, offsets: list[int]) -> None:
    held = [boxes(layout, (8,), rank)[0] for rank in range(layout.ranks)]
    assert [box.offset[0] for box in held] == offsets
    assert {box.size for box in held} == {(8 // layout.pieces[0],)}


@pytest.mark.parametrize(
    ("layout", "shape", "said"),
    [
        (TensorLayout((4,), ((0,),)), (6,), "dim 0 of length 6 cannot be cut into 4 equal pieces"),
        (
            TensorLayout((4,), ((-1,),), 1, -1),
            (6,),
            "dim 0 of length 6 cannot be cut into 4 equal pieces",
        ),
        (TensorLayout((4,), ((0,),)), (4, 4), "of a tensor of 1 dims, the shape is [4, 4]"),
        (TensorLayout((4,), ((0,),), field=3), (4,), "by field"),
        (TensorLayout((4,), ((0,),), param_split_shape=((1, 3),)), (4,), "by field"),
    ],
)
def test_what_has_no_boxes(layout: TensorLayout, shape: Shape, said: str) -> None:
    with pytest.raises(ValueError) as error:
        boxes(layout, shape, 0)
    assert said in str(error.value)


def test_a_rank_outside_the_stage() -> None:
    with pytest.raises(ValueError, match="rank 4 is outside a stage of 4 ranks"):
        boxes(TensorLayout((4,), ((0,),)), (4,), 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((), ((0,),)), "device matrix []"),
        (((2, 0), ((0,),)), "device matrix [2, 0]"),
        (((2,), ((1,),)), "on 1 grid axes"),
        (((2,), ((-2,),)), "on 1 grid axes"),
        (((2,), ((0, 0),)), "uses a grid axis twice"),
        (((2,), ((0,),), 1, -2), "shard size -2"),
        (((2,), ((0,),), -1, 1), "step -1"),
    ],
)
def test_layouts_that_make_no_sense(arguments, said: str) -> None:
    with pytest.raises(ValueError) as error:
        TensorLayout(*arguments)
    assert said in str(error.value)


# MindSpore's golden trees


def _families(tree: str) -> dict[str, torch.Tensor]:
    family = tree.split("_")[0] if tree.startswith(("moe", "layout")) else "llama"
    return load_file(ALL / "dist" / "full" / family / "model.safetensors")


def _held(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a rank folder of either format."""
    held: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        held |= load_file(file)
    for file in folder.glob("*.ckpt"):
        for value in Message(file.read_bytes()).messages(1):
            tensor = value.message(2, "tensor")
            (content,) = tensor.fields[3]
            name = {"BFloat16": "bfloat16"}.get(kind := tensor.text(2, "type"), kind.lower())
            flat = torch.frombuffer(
                bytearray(tensor.data[content.value : content.stop]), dtype=getattr(torch, name)
            )
            held[value.text(1, "tag")] = flat.reshape(tensor.integers(1, bits=64))
    return held


CASES = {
    "mp2_ckpt": "mp2_predict",
    "mp2_predict_ckpt": "mp2_predict",
    "mp2_ckpt_to_mp4": "mp4_predict",
    "mp2_to_dp2mp2pp2_opt": "dp2mp2pp2_opt",
    "dp2mp2pp2_to_mp2": "mp2",
    "dp2mp2pp2_opt_to_mp4": "mp4_predict",
    "dp2mp2pp2_to_dp2pp2": "dp2pp2",
}
"""Tree to strategy, where the names differ."""
NOT_BY_A_STRATEGY = {"dp2mp2pp2_dedup_to_mp2": "wrong, a record", "dp2mp2pp2_to_whole": "whole"}


@needs_all
@pytest.mark.parametrize(
    "tree",
    [
        pytest.param(tree, id=f"{tree.parent.name}-{tree.name}")
        for kind in ("ranks", "resliced", "transformed")
        for tree in sorted((ALL / "dist" / kind).glob("*"))
        if tree.name not in NOT_BY_A_STRATEGY
    ],
)
def test_boxes_are_what_mindspore_cut(tree: Path) -> None:
    case = CASES.get(tree.name, tree.name.removesuffix("_dedup").removesuffix("_ckpt"))
    stages = read_folder(ALL / "strategies" / case).by_stage()
    full, seen = _families(tree.name), set()
    for folder in tree.iterdir():
        ranks = next(iter(stages[0].values())).ranks
        stage, local = divmod(int(folder.name[5:]), ranks)
        held = _held(folder)
        for name in stages[stage].keys() & held.keys() & full.keys():
            (box,) = boxes(stages[stage][name], full[name].shape, local)
            piece = full[name]
            for dim, (start, length) in enumerate(zip(box.offset, box.size, strict=True)):
                piece = piece.narrow(dim, start, length)
            assert held[name].shape == box.size
            assert torch.equal(held[name], piece), (folder.name, name)
            assert full_shape(stages[stage][name], held[name].shape) == tuple(full[name].shape)
            seen.add(name)
        if "dedup" not in tree.name and tree.parent.name == "ranks":
            assert stages[stage].keys() & full.keys() <= held.keys()
    if tree.parent.name == "ranks":
        assert seen == set().union(*stages.values()) & full.keys()
    assert len(seen) >= 9


# Our own cuts

MESH = {"pp": 3, "dp_replicate": 2, "dp_shard": 2, "cp": 1, "tp": 2, "ep": 1}
LONG = {**MESH, "cp": 2}
EXPERTS = {**MESH, "dp_shard": 4, "ep": 2}


@pytest.mark.parametrize(
    ("shape", "specs", "mesh", "layout"),
    [
        # As MindSpore writes dp4mp2_opt2: the optimizer cuts what tensor parallel has left.
        ((8, 6), (("tp", 0), ("dp_shard", 0)), MESH, TensorLayout((4, 2), ((0, -1),), 2, 2)),
        ((8, 6), (("tp", 1), ("dp_shard", 0)), MESH, TensorLayout((4, 2), ((-1, 0),), 2, 2)),
        ((8, 6), (("tp", 1),), MESH, TensorLayout((4, 2), ((-1, 0),))),
        ((8, 6), (), MESH, TensorLayout((8,), ((-1, -1),))),
        ((), (), MESH, TensorLayout((8,), ((),))),
        ((8,), (("dp_shard", 0),), {"dp_shard": 4}, TensorLayout((4,), ((-1,),), 1, 4)),
        ((8, 6), (), {}, TensorLayout((1,), ((-1, -1),))),
        # The tensor ranks hold the same pieces, so these are no optimizer shards.
        ((8,), (("dp_shard", 0),), MESH, TensorLayout((2, 2, 2), ((1,),))),
        # Context ranks between the two: two grid axes for one dim.
        (
            (8, 6),
            (("tp", 0), ("dp_shard", 0)),
            LONG,
            TensorLayout((2, 2, 2, 2), ((0, 2), (-1,))),
        ),
        ((8,), (("tp", 0), ("dp_shard", 0)), LONG, TensorLayout((2, 2, 2, 2), ((0, 2), ()))),
        (
            (8, 6),
            (("tp", 0), ("dp_shard", 0), ("cp", 0)),
            LONG,
            TensorLayout((8, 2), ((0, -1),), 2, 4),
        ),
        # As MindSpore writes moe_dp4mp2_opt, with the copies of the experts.
        ((4, 8, 6), (("ep", 0), ("tp", 2)), EXPERTS, TensorLayout((4, 2, 2), ((1, -1, 0),))),
        (
            (8, 6, 4),
            (("ep", 0), ("tp", 1), ("expert_shard", 0)),
            EXPERTS,
            TensorLayout((4, 2, 2), ((1, 0, -1),), 4, 2),
        ),
        # Tensor-parallel cuts outside the experts': the tools would mix up optimizer shards.
        (
            (4, 8, 6),
            (("tp", 0), ("ep", 1), ("dp_replicate", 0)),
            {**EXPERTS, "dp_shard": 2},
            TensorLayout((2, 2, 2), ((0, 2), (1,), (-1,))),
        ),
    ],
)
def test_entries(shape, specs, mesh, layout: TensorLayout) -> None:
    assert entry(shape, specs, mesh) == layout


@pytest.mark.parametrize(
    ("shape", "specs", "mesh"),
    [
        ((7,), (("dp_shard", 0),), MESH),
        ((6,), (("tp", 0), ("dp_shard", 0)), MESH),
        ((8, 3), (("tp", 1),), MESH),
        ((8, 3), (("ep", 0), ("dp_shard", 0)), EXPERTS),
        ((12, 3), (("ep", 0), ("dp_shard", 1)), {"dp_replicate": 2, "dp_shard": 3, "ep": 2}),
    ],
    ids=["uneven", "uneven after tp", "uneven columns", "overlap", "no grid has both"],
)
def test_cuts_the_format_cannot_say(shape, specs, mesh) -> None:
    assert entry(shape, specs, mesh) is None


@st.composite
def meshes(draw) -> dict[str, int]:
    sizes = {"pp": draw(st.integers(1, 4))}
    left = 64
    for axis in draw(st.permutations(["dp_replicate", "dp_shard", "cp", "tp"])):
        sizes[axis] = draw(st.integers(1, min(left, 8)))
        left //= sizes[axis]
    data = sizes["dp_replicate"] * sizes["dp_shard"]
    sizes["ep"] = draw(
        st.sampled_from([
            ep for ep in range(1, data + 1)
            if data % ep == 0 and (ep % sizes["dp_shard"] == 0 or sizes["dp_shard"] % ep == 0)
        ])
    )  # fmt: skip
    return sizes


@st.composite
def cut_tensors(draw) -> tuple[Shape, list[tuple[str, int]], dict[str, int]]:
    """A mesh, and a tensor most of which can be cut evenly by cuts in any order."""
    mesh = draw(meshes())
    data = draw(st.sampled_from([("dp_replicate", "dp_shard"), ("ep", "expert_shard")]))
    axes = draw(st.permutations([*data, "cp", "tp"]))[: draw(st.integers(0, 4))]
    dims = draw(st.integers(1, 3))
    specs = [(axis, draw(st.integers(0, dims - 1))) for axis in axes]
    sizes = {**mesh, "expert_shard": max(mesh["dp_shard"] // mesh["ep"], 1)}
    shape = [draw(st.integers(1, 3)) for _ in range(dims)]
    for axis, dim in specs:
        shape[dim] *= sizes[axis] if draw(st.integers(0, 9)) else 1
    return tuple(shape), specs, mesh


def _coordinates(mesh: dict[str, int]) -> list[dict[str, int]]:
    """Of every local rank, counted the slow way."""
    axes = ("dp_replicate", "dp_shard", "cp", "tp")
    found = []
    for values in product(*(range(mesh[axis]) for axis in axes)):
        at = dict(zip(axes, values, strict=True))
        group, at["ep"] = divmod(at["dp_replicate"] * mesh["dp_shard"] + at["dp_shard"], mesh["ep"])
        at["expert_shard"] = group % max(mesh["dp_shard"] // mesh["ep"], 1)
        found.append(at)
    return found


@settings(max_examples=400, deadline=None)
@given(case=cut_tensors())
def test_entries_say_what_cutting_in_order_gives(case) -> None:
    shape, specs, mesh = case
    sizes = {**mesh, "expert_shard": max(mesh["dp_shard"] // mesh["ep"], 1)}
    layout = entry(shape, specs, mesh)
    pieces = [
        math.prod(sizes[axis] for axis, cut in specs if cut == dim) for dim in range(len(shape))
    ]
    if any(n % p for n, p in zip(shape, pieces, strict=True)):
        assert layout is None
        return
    assert layout is not None
    ranks = _coordinates(mesh)
    assert layout.ranks == len(ranks)
    for rank, at in enumerate(ranks):
        offset, size = [0] * len(shape), list(shape)
        for axis, dim in specs:
            start, size[dim] = chunk(size[dim], sizes[axis], at[axis])
            offset[dim] += start
        assert boxes(layout, shape, rank) == (Box(tuple(offset), tuple(size)),)
    if layout.shards > 1:
        # What MindSpore's tools ask of optimizer shards, see `_with_shards`.
        by_map = math.prod(layout.pieces) // layout.shards
        assert layout.shard_step == by_map
        assert layout.free == (0,)
        assert [axis for dim in layout.positions for axis in dim] == sorted(
            axis for dim in layout.positions for axis in dim
        )


@settings(max_examples=100, deadline=None)
@given(mesh=meshes(), rows=st.integers(1, 4), tp_dim=st.sampled_from([None, 0, 1]),
       expert=st.booleans(), sharded=st.booleans())  # fmt: skip
def test_entries_of_our_layouts(mesh, rows: int, tp_dim, expert: bool, sharded: bool) -> None:
    ours = Mesh(**mesh)
    shape = (rows * ours.ep * ours.tp * ours.dp_shard, 2 * ours.tp)
    layout = Layout({"w": shape}, ours, {"w": ShardSpec(tp_dim, expert, sharded)})
    for rank in range(ours.world_size):
        placement = layout.of(rank)["w"]
        said = entry(shape, placement.specs, ours.sizes())
        assert said is not None
        assert boxes(said, shape, rank % said.ranks) == placement.boxes
