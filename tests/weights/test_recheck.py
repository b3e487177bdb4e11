"""A flipped bit is found as weights are loaded, wherever a rank reads what it checks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.errors import UserError
from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.formats.rank_metadata import BLOCK_BYTES
from launcher.weights.formats.safetensors import read_header
from launcher.weights.ranks.distributed import open_rank_files
from launcher.weights.ranks.rank_file import write_rank_file
from launcher.weights.reading.load import load

SHAPES = {"a": (1024, 1024), "b": (1536, 2048), "c": (64,), "adam_m.a": (1024, 1024)}


def held(mesh: Mesh, rank: int, dtype: torch.dtype, tp_dim: int = 0) -> dict[str, Shard]:
    layout = Layout(SHAPES, mesh, {name: ShardSpec(tp_dim=tp_dim) for name in SHAPES})
    return {
        name: Shard(p.shape, p.boxes[0], torch.zeros(p.boxes[0].size, dtype=dtype))
        for name, p in layout.of(rank).items()
        if tp_dim == 0 or len(p.shape) == 2
    }


def saved(folder: Path, mesh: Mesh) -> list[Path]:
    files = []
    for rank in range(mesh.world_size):
        files.append(folder / f"rank_{rank}" / f"w_rank_{rank}-1_1.safetensors")
        files[-1].parent.mkdir()
        write_rank_file(files[-1], held(mesh, rank, torch.float32), mesh=mesh, rank=rank)
    return files


def loaded(folder: Path, files: list[Path], mesh: Mesh, **options: object) -> None:
    source = open_rank_files(folder, files)
    expected = {name: shape for name, shape in SHAPES.items() if not name.startswith("adam_")}
    for rank in range(mesh.world_size):
        targets = held(mesh, rank, torch.float32, **options)  # type: ignore[arg-type]
        mine = {name: target for name, target in targets.items() if name in expected}
        load(mine, source, rank=rank, expected=expected)


@pytest.mark.parametrize("target", [Mesh(tp=2), Mesh()], ids=["its own file", "put together"])
def test_every_block_of_weights_is_checked_as_it_is_read(tmp_path: Path, target: Mesh) -> None:
    files = saved(tmp_path, Mesh(tp=2))
    header, content = read_header(files[1]), files[1].read_bytes()
    places = {name: header.entries[name].start for name in ("b", "c")}
    places["the end of b"] = header.entries["b"].stop - 1
    for name, place in places.items():
        damaged = bytearray(content)
        damaged[place] ^= 1
        files[1].write_bytes(damaged)
        with pytest.raises(UserError, match=r"rank_1/.*: bytes \d+ to \d+ changed \(") as caught:
            loaded(tmp_path, files, target)
        assert name.split()[-1] in str(caught.value)
    files[1].write_bytes(content)
    loaded(tmp_path, files, target)


def test_blocks_that_are_not_read_are_not_looked_at(tmp_path: Path) -> None:
    files = saved(tmp_path, Mesh())
    header, content = read_header(files[0]), bytearray(files[0].read_bytes())
    assert header.entries["adam_m.a"].start - header.data_start == BLOCK_BYTES
    content[header.entries["adam_m.a"].start] ^= 1
    files[0].write_bytes(content)
    loaded(tmp_path, files, Mesh())
