"""Writing rank files: what one rank holds, with its layout in the metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from launcher.extensions import FILE_FORMATS, required
from launcher.layout.mesh import Mesh
from launcher.layout.shard import Shard
from launcher.streams import streams_for
from launcher.weights.formats.rank_metadata import BLOCK_BYTES, Inventory, RankFileMetadata
from launcher.weights.formats.safetensors import Header, in_file_order
from launcher.weights.ranks.device_blocks import DeviceBlocks
from launcher.weights.reading.tensor_bytes import DTYPE_NAMES, bytes_of
from launcher.weights.streaming.write import (
    NO_STAGING,
    WRITERS,
    Container,
    Part,
    check_dtypes,
    write_file,
)


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
    tensors = {name: shard.tensor.detach().contiguous() for name, shard in shards.items()}
    streams = streams_for(_device_of(tensors.values()))
    blocks = DeviceBlocks(streams, WRITERS, BLOCK_BYTES) if streams.is_device else None
    read = _bytes if blocks is None else blocks.read
    parts = in_file_order(
        Part(name, DTYPE_NAMES[shard.tensor.dtype], shard.box.size, partial(read, tensors[name]))
        for name, shard in shards.items()
    )
    places = {part.name: (shards[part.name].shape, shards[part.name].box) for part in parts}
    rank_metadata = RankFileMetadata(
        mesh.world_size, rank, mesh.sizes(), places, inventory=inventory
    )
    metadata = {"format": "pt", "remove_redundancy": str(remove_redundancy)}
    check_dtypes(path, parts, container)
    return write_file(path, parts, metadata, rank_metadata, container, blocks or NO_STAGING)


def _device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """That of those that are not on the host, where there are some."""
    devices = {tensor.device for tensor in tensors}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _bytes(tensor: torch.Tensor, start: int, stop: int) -> memoryview:
    """Bytes of a tensor in host memory: its own."""
    return bytes_of(tensor.reshape(-1).view(torch.uint8)[start:stop])
