"""Metadata of a rank file of Slipway, in `__metadata__["slipway"]`.

Owns that JSON text: the rank and world size that wrote the file, the mesh, global shape and box of
each tensor, an inventory of the save, and a checksum (xxh3_64) for each block of the data section.
Equal state gives equal metadata: it has no time, path or run. It is checked before it is used, as
any header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.layout.box import Box, Shape
from launcher.weights.formats.safetensors import (
    Entry,
    Header,
    are_non_negative,
    parse_json,
)

VERSION = 1
ALGORITHM = "xxh3_64"
BLOCK_BYTES = 4 << 20
"""Bytes of the data section that share one checksum."""
LARGEST_BLOCK_BYTES = 64 << 20
"""Limit: a block is in memory while it is checked."""

REDUNDANCY = "remove_redundancy"
"""Key of the metadata: whether replicas were left to other ranks."""


@dataclass(frozen=True)
class Checksums:
    """One digest (hex) for each block of the data section; empty when the writer made none."""

    block_bytes: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class Inventory:
    """All tensors of a save, of all ranks: it shows whether tensors of a lost rank are missing."""

    tensors: int
    digest: str
    """xxh3_64 (hex) of their names and shapes, by name."""


def inventory_of(shapes: Mapping[str, Shape]) -> Inventory:
    """The inventory of a save with these tensors: name to global shape."""
    hasher = xxhash.xxh3_64()
    for name in sorted(shapes):
        hasher.update(f"{name} {list(shapes[name])}\n".encode())
    return Inventory(len(shapes), hasher.hexdigest())


@dataclass(frozen=True)
class RankFileMetadata:
    """Layout and checksums of one rank file."""

    world_size: int
    rank: int
    mesh: Mapping[str, int]
    """Axis to size."""
    places: Mapping[str, tuple[Shape, Box]]
    """Tensor to its global shape and the box of it in the file."""
    checksums: Checksums = Checksums(BLOCK_BYTES, ())
    inventory: Inventory | None = None
    """Of the save; None where the writer did not know it."""

    def text(self, digests: tuple[str, ...]) -> str:
        """The JSON text; its length depends only on the number of digests."""
        tensors = {
            name: {"shape": list(shape), "boxes": [box.as_lists()]}
            for name, (shape, box) in self.places.items()
        }
        checksum = {"algorithm": ALGORITHM, "block_bytes": BLOCK_BYTES, "values": list(digests)}
        inventory = {} if self.inventory is None else {"inventory": vars(self.inventory)}
        return json.dumps({
            "version": VERSION, "world_size": self.world_size, "rank": self.rank,
            "mesh": dict(self.mesh), **inventory, "tensors": tensors, "checksum": checksum,
        })  # fmt: skip


def read_rank_metadata(path: Path, header: Header) -> RankFileMetadata | None:
    """The metadata of a file; None for files of other programs. Raises `UserError` where it is not
    valid."""
    text = header.metadata.get("slipway")
    if text is None:
        return None
    try:
        content = parse_json(text)
        if content["version"] != VERSION:
            raise UserError(
                f"{path} has the format {content['version']}",
                rule=f"this version reads format {VERSION}",
                advice="Install the version that wrote it, or a newer one",
            )
        return _rank_metadata(path, header, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError):
        raise _damaged(path, "its `slipway` metadata cannot be read") from None


def _rank_metadata(path: Path, header: Header, content: Any) -> RankFileMetadata:
    if not are_non_negative([content["world_size"], content["rank"], *content["mesh"].values()]):
        raise ValueError("not integers of 0 or more")
    places = {
        name: _place(path, name, entry, content["tensors"].get(name))
        for name, entry in header.entries.items()
    }
    return RankFileMetadata(
        content["world_size"], content["rank"], content["mesh"], places,
        _checksums(header, content["checksum"]), _inventory(content.get("inventory")),
    )  # fmt: skip


def _inventory(content: Any) -> Inventory | None:
    if content is None:
        return None
    if not are_non_negative([content["tensors"]]) or not isinstance(content["digest"], str):
        raise ValueError("not an inventory")
    return Inventory(content["tensors"], content["digest"])


def _place(path: Path, name: str, entry: Entry, place: Any) -> tuple[Shape, Box]:
    if place is None or len(place["boxes"]) != 1:
        raise _damaged(path, f"its metadata has no box for `{name}`")
    (offset, size), shape = place["boxes"][0], place["shape"]
    if not all(map(are_non_negative, (offset, size, shape))):
        raise ValueError("not integers of 0 or more")
    if tuple(size) != entry.shape:
        raise _damaged(path, f"`{name}` has shape {list(entry.shape)}, its box {size}")
    ends = [start + length for start, length in zip(offset, size, strict=True)]
    if len(shape) != len(ends) or any(end > n for end, n in zip(ends, shape, strict=True)):
        raise _damaged(path, f"the box of `{name}` is not inside its shape {shape}")
    return tuple(shape), Box(tuple(offset), entry.shape)


def _checksums(header: Header, content: Any) -> Checksums:
    block_bytes, values = content["block_bytes"], tuple(content["values"])
    is_possible = type(block_bytes) is int and 0 < block_bytes <= LARGEST_BLOCK_BYTES
    if content["algorithm"] != ALGORITHM or not is_possible:
        raise ValueError("unknown checksums")
    data_bytes = header.file_bytes - header.data_start
    if not all(isinstance(value, str) for value in values) or (
        len(values) != -(-data_bytes // block_bytes)
    ):
        raise ValueError("not one checksum for each block")
    return Checksums(block_bytes, values)


def _damaged(path: Path, why: str) -> UserError:
    return UserError(f"{path} is damaged", rule=why, advice="Choose another checkpoint")
