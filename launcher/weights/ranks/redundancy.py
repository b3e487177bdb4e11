"""Redundancy: which ranks hold the same box of a tensor of the files, and which one writes it."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.layout.layout import Layout
from launcher.layout.replicas import Ranks, Replicas, writer_ranks
from launcher.weights.reading.shard import Shard
from launcher.weights.source import OPTIMIZER_PREFIXES
from launcher.weights.tensor_mapping import MappingsOf


def file_replicas(layout: Layout, rank: int, mappings_of: MappingsOf) -> dict[str, Ranks]:
    """The ranks that hold the same as `rank`, for every tensor of files it has a part of, and for
    the optimizer state of each."""
    replica_ranks, result = Replicas(layout), dict[str, Ranks]()
    for name, placement in layout.of(rank).items():
        mappings, box = mappings_of(name, placement.shape), placement.boxes[0]
        names = [name] if mappings is None else [
            mapping.name for mapping in mappings if box.intersect(mapping.box) is not None
        ]  # fmt: skip
        for prefix in ("", *OPTIMIZER_PREFIXES):
            result |= {prefix + file_name: replica_ranks.of(name, rank) for file_name in names}
    return result


def writers_of(held: Mapping[str, Shard], replica_ranks: Mapping[str, Ranks]) -> dict[str, int]:
    """Tensor to the one of its holders that answers for it, bytes shared out evenly."""
    sizes = {name: s.tensor.numel() * s.tensor.element_size() for name, s in held.items()}
    return writer_ranks(sizes, replica_ranks)
