"""Material of the tests of the offline tools: small saves, distinguished by their seed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file

from launcher.layout.layout import Layout, ShardSpec
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.formats.safetensors import read_header
from launcher.weights.ranks.rank_file import write_rank_file

CUTS = {
    "proj": ShardSpec(tp_dim=1),
    "embed": ShardSpec(tp_dim=0),
    "counts": ShardSpec(sharded=False),
}


def tensors(seed: int = 0, *, optimizer: bool = True) -> dict[str, torch.Tensor]:
    """A model of several dtypes, and the state of its optimizer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        "embed": torch.randn(13, 4, generator=generator),
        "proj": torch.randn(6, 8, generator=generator).bfloat16(),
        "norm": torch.randn(5, generator=generator),
        "scalar": torch.randn((), generator=generator),
        "counts": torch.randint(99, (3, 2), generator=generator),
    }
    state = {
        prefix + name: torch.randn(weights[name].shape, generator=generator)
        for prefix in ("adam_m.", "adam_v.")
        for name in ("embed", "proj", "norm")
    }
    return weights | state if optimizer else weights


def layout(named: dict[str, torch.Tensor], mesh: Mesh) -> Layout:
    """Where they lie; state lies as its parameter."""
    specs = {name: CUTS.get(name.split(".")[-1], ShardSpec()) for name in named}
    return Layout({name: tuple(tensor.shape) for name, tensor in named.items()}, mesh, specs)


def held(
    named: dict[str, torch.Tensor], mesh: Mesh, rank: int, *, without: Collection[str] = ()
) -> dict[str, Shard]:
    """What a rank holds of the tensors, but for those it is to be `without`."""
    placed, shards = layout(named, mesh).of(rank), {}
    for name, whole in named.items():
        if name not in without:
            box = placed[name].boxes[0]
            cut = tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))
            shards[name] = Shard(tuple(whole.shape), box, whole[cut].contiguous())
    return shards


def save(
    folder: Path, named: dict[str, torch.Tensor], mesh: Mesh, name: str = "CKP_rank_{}-1_1",
    *, replica_ranks: dict[str, int] | None = None,
) -> list[Path]:  # fmt: skip
    """The rank files of one save. `holders`: tensor to the only rank that writes it."""
    files = []
    for rank in range(mesh.world_size):
        path = folder / f"rank_{rank}" / f"{name.format(rank)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        others = {
            n for n in named if replica_ranks is not None and replica_ranks.get(n, rank) != rank
        }
        shards = held(named, mesh, rank, without=others)
        write_rank_file(
            path, shards, mesh=mesh, rank=rank, remove_redundancy=replica_ranks is not None
        )
        files.append(path)
    return files


def content(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether names, dtypes and bits are the same."""
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def flip(file: Path, position: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def manifest(ranks: Path, files: list[Path], name: str = "CKP-1_1") -> Path:
    """Publish a save, as far as tools look at that."""
    records = [
        {"rank": rank, "file": str(file.relative_to(ranks)), "bytes": file.stat().st_size,
         "header_xxh3_64": read_header(file).digest}
        for rank, file in enumerate(files)
    ]  # fmt: skip
    path = ranks / "manifest" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"version": 1, "files": records}))
    return path
