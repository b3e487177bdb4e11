"""Writing rank files: what one rank holds, with its layout in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from launcher.extensions import FILE_FORMATS, required
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.weights.formats.rank_metadata import Inventory, RankFileMetadata
from launcher.weights.formats.safetensors import Header, in_file_order
from launcher.weights.reading.tensor_bytes import DTYPE_NAMES, bytes_of
from launcher.weights.streaming.write import Container, Part, check_dtypes, write_file


def write_rank_file(
    path: Path, shards: Mapping[str, Shard], *, mesh: Mesh, rank: int,
    remove_redundancy: bool = False, inventory: Inventory | None = None,
    file_format: str = "safetensors",
) -> Header:  # fmt: skip
    """Write what `rank` holds to `path`, durable, with layout and checksums in the header.

    `shards`: global tensor name to the local shard, on any device. `remove_redundancy`: replicas
    were left to other ranks. `inventory`: of the save, where it is known; without it the loss of a
    rank may not be detected. `file_format`: of `launcher.extensions.FILE_FORMATS`. No time, path or
    run is in the file. Raises `UserError` for a dtype that the format does not have.
    """
    container: Container = required(FILE_FORMATS, file_format, f"{path} is to be {file_format}")
    parts = in_file_order(
        Part(name, DTYPE_NAMES[shard.tensor.dtype], shard.box.size,
             partial(_bytes, shard.tensor.detach().contiguous()))
        for name, shard in shards.items()
    )  # fmt: skip
    places = {part.name: (shards[part.name].shape, shards[part.name].box) for part in parts}
    rank_metadata = RankFileMetadata(
        mesh.world_size, rank, mesh.sizes(), places, inventory=inventory
    )
    metadata = {"format": "pt", "remove_redundancy": str(remove_redundancy)}
    check_dtypes(path, parts, container)
    return write_file(path, parts, metadata, rank_metadata, container)


def _bytes(tensor: torch.Tensor, start: int, stop: int) -> memoryview:
    """Bytes of a tensor: its own memory on the CPU, a copy of them from another device."""
    flat = tensor.reshape(-1).view(torch.uint8)[start:stop]
    return bytes_of(flat.cpu())
