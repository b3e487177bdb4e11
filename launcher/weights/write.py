"""Writing: rank files that describe themselves, and complete Hugging Face directories.

Owns what our files say about themselves. A rank file is written from the memory of its tensors;
equal state gives equal bytes (no time, no path, no run id in it). A complete directory is streamed
from any source, one tensor in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from launcher.errors import UserError
from launcher.layout.box import whole
from launcher.layout.mesh import Mesh
from launcher.weights.formats.safetensors import (
    BLOCK_BYTES,
    ITEM_BYTES,
    Header,
    Part,
    block_digests,
    in_file_order,
    write_file,
)
from launcher.weights.memory import DTYPE_NAMES, Shard, bytes_of
from launcher.weights.plan import byte_runs, plan_box
from launcher.weights.source import INDEX_NAME, OPTIMIZER_PREFIXES, Source

FORMAT_VERSION = 1
DEFAULT_SHARD_BYTES = 5_000_000_000


def write_rank_file(path: Path, shards: Mapping[str, Shard], *, mesh: Mesh, rank: int) -> Header:
    """Write what `rank` holds to `path`, durable, with its layout and checksums in the header.

    `shards`: global tensor name to the box held and its memory, on any device.
    """
    parts = in_file_order([
        Part(name, DTYPE_NAMES[shard.tensor.dtype], tuple(shard.tensor.shape),
             partial(bytes_of, shard.tensor.detach().cpu().contiguous()))
        for name, shard in shards.items()
    ])  # fmt: skip
    note = {
        "version": FORMAT_VERSION,
        "world_size": mesh.world_size,
        "rank": rank,
        "mesh": mesh.sizes(),
        "tensors": {
            part.name: {
                "shape": list(shards[part.name].shape),
                "boxes": [shards[part.name].box.as_lists()],
            }
            for part in parts
        },
        "checksum": {
            "algorithm": "xxh3_64",
            "block_bytes": BLOCK_BYTES,
            "values": block_digests(part.data() for part in parts),
        },
    }
    metadata = {"format": "pt", "remove_redundancy": "False", "slipway": json.dumps(note)}
    return write_file(path, parts, metadata)


@dataclass(frozen=True)
class Exported:
    """What a complete export wrote."""

    tensors: int
    total_bytes: int
    files: tuple[str, ...]


def write_complete(
    source: Source,
    directory: Path,
    *,
    keep: Callable[[str], bool] = lambda name: True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Write the tensors of `source` whose name passes `keep` as complete weights.

    Model weights become `model-0000x-of-0000y.safetensors` with an index; optimizer state becomes
    `optimizer-0000x-of-0000y.safetensors`, outside that index. `progress` is told (bytes done,
    bytes in all). `directory` exists and is ours.
    """
    names = sorted(name for name in source.tensors if keep(name))
    model = [name for name in names if not name.startswith(OPTIMIZER_PREFIXES)]
    optimizer = [name for name in names if name.startswith(OPTIMIZER_PREFIXES)]
    if not model and not optimizer:
        raise UserError(f"nothing of {source.path} is left to write after filtering")
    total, done, files = sum(_nbytes(source, name) for name in names), 0, []
    weight_map: dict[str, str] = {}
    for stem, group in (("model", model), ("optimizer", optimizer)):
        shards = _shards(source, group, max_shard_bytes)
        for index, shard in enumerate(shards, 1):
            file = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
            parts = in_file_order([_part(source, name) for name in shard])
            write_file(directory / file, parts, {"format": "pt"})
            files.append(file)
            done += sum(part.nbytes for part in parts)
            progress(done, total)
            weight_map.update(dict.fromkeys(shard, file) if stem == "model" else {})
    if weight_map:
        size = sum(_nbytes(source, name) for name in model)
        index_text = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / INDEX_NAME).write_text(json.dumps(index_text, indent=2) + "\n")
    return Exported(len(names), total, tuple(files))


def _nbytes(source: Source, name: str) -> int:
    return math.prod(source.shape(name)) * ITEM_BYTES[source.tensors[name][0].entry.dtype]


def _shards(source: Source, names: Sequence[str], limit: int) -> list[list[str]]:
    """Names in order, cut into groups of at most `limit` bytes (one tensor at least)."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = _nbytes(source, name)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _part(source: Source, name: str) -> Part:
    dtype = source.tensors[name][0].entry.dtype
    return Part(name, dtype, source.shape(name), partial(_gather, source, name))


def _gather(source: Source, name: str) -> memoryview:
    """The bytes of one whole tensor, put together from its pieces."""
    pieces = source.tensors[name]
    memory = memoryview(bytearray(_nbytes(source, name)))
    box = whole(source.shape(name))
    for read in plan_box(name, box, pieces):
        with read.piece.file.open("rb", buffering=0) as file:
            for position, start, length in byte_runs(read, box):
                file.seek(position)
                view = memory[start : start + length]
                while view:
                    view = view[file.readinto(view) or _ended(read.piece.file) :]
    return memory


def _ended(path: Path) -> int:
    raise UserError(f"{path} ended early", rule="it was longer when its header was read")
