"""The plan of which rank processes which matrix, for any layout, in one process."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from launcher.layout.box import Box
from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.mesh import Mesh
from launcher.parallel import matrices
from launcher.parallel.matrices import Matrix, MatrixExchange, matrix_exchange
from models.families import DECODERS
from models.names import mappings_of

MAPPINGS = mappings_of(DECODERS["qwen3_moe"].parameters)
SHAPES = {
    "model.layers.0.mlp.down_proj.weight": (5, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 6),
    "model.layers.1.mlp.experts.up_proj": (4, 6, 4),
}
SPECS = {
    "model.layers.0.mlp.down_proj.weight": ShardSpec(tp_dim=1),
    "model.layers.0.self_attn.q_proj.weight": ShardSpec(tp_dim=0, stages=(0,)),
    "model.layers.1.mlp.experts.up_proj": ShardSpec(tp_dim=1, expert=True),
}
MESHES = {
    "alone": Mesh(),
    "replicated": Mesh(dp_replicate=3),
    "sharded": Mesh(dp_shard=4),
    "more ranks than rows": Mesh(dp_shard=8),
    "all axes": Mesh(dp_replicate=2, dp_shard=2, tp=2, ep=2, pp=2, cp=2),
}


def plans(mesh: Mesh) -> list[MatrixExchange]:
    layout = Layout(SHAPES, mesh, SPECS if mesh.tp > 1 else {})
    return [
        matrix_exchange(list(layout.of(rank)), layout, MAPPINGS, rank, torch.device("cpu"))
        for rank in range(mesh.world_size)
    ]


def all_matrices(mesh: Mesh) -> dict[tuple[str, Box], Matrix]:
    """Every matrix of any rank; all ranks must agree on it."""
    found: dict[tuple[str, Box], Matrix] = {}
    for plan in plans(mesh):
        for matrix in (matrix for taken in plan.rounds for matrix in taken):
            assert found.setdefault((matrix.name, matrix.box), matrix) == matrix
    return found


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_parts_cover_every_matrix_once_and_its_owner_holds_one(mesh: Mesh) -> None:
    seen = {name: np.zeros(shape, int) for name, shape in SHAPES.items()}
    for matrix in all_matrices(mesh).values():
        for box, ranks in matrix.parts:
            place = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
            seen[matrix.name][place] += 1
            assert matrix.sender(ranks) in ranks
        assert any(matrix.owner in ranks for _, ranks in matrix.parts)
    assert all((count == 1).all() for count in seen.values())


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_a_matrix_is_two_dims_of_one_expert(mesh: Mesh) -> None:
    shapes = Counter((matrix.name, matrix.shape) for matrix in all_matrices(mesh).values())
    assert shapes == {
        ("model.layers.0.mlp.down_proj.weight", (5, 8)): 1,
        ("model.layers.0.self_attn.q_proj.weight", (8, 6)): 1,
        ("model.layers.1.mlp.experts.up_proj", (6, 4)): 4,
    }


def test_replicas_share_the_work() -> None:
    owners = {matrix.owner for matrix in all_matrices(Mesh(dp_replicate=3)).values()}
    assert owners == {0, 1, 2}


def test_rounds_hold_no_more_than_their_limit(monkeypatch) -> None:
    monkeypatch.setattr(matrices, "ROUND_ELEMENTS", 48)
    for plan in plans(Mesh()):
        sizes = [[matrix.shape[0] * matrix.shape[1] for matrix in taken] for taken in plan.rounds]
        assert all(sum(taken) <= 48 for taken in sizes)
        assert sum(map(len, sizes)) == 6
    held = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    results = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for part, values in plans(Mesh())[0].apply(held, lambda matrix: 2 * matrix):
        results[part.name][part.inside] += values
    assert all(torch.equal(results[name], 2 * held[name]) for name in SHAPES)
