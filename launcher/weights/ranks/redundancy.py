"""Redundancy: which ranks hold the same box of a tensor of the files, and which one writes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from launcher.layout.layout import Layout
from launcher.layout.replicas import Ranks, Replicas, writer_ranks
from launcher.layout.shard import Shard
from launcher.weights.optimizer_state import parameter_of
from launcher.weights.tensor_mapping import MappingsOf


def file_replicas(layout: Layout, rank: int, mappings_of: MappingsOf) -> dict[str, Ranks]:
    """The ranks that hold the same as `rank`, for every tensor of files that it has a part of.
    Optimizer state is sharded as its parameter."""
    replica_ranks, result = Replicas(layout), dict[str, Ranks]()
    for name, placement in layout.of(rank).items():
        mappings, box = mappings_of(name, placement.shape), placement.boxes[0]
        names = [name] if mappings is None else [
            mapping.name for mapping in mappings if box.intersect(mapping.box) is not None
        ]  # fmt: skip
        result |= dict.fromkeys(names, replica_ranks.of(name, rank))
    return result


def writers_of(held: Mapping[str, Shard], replica_ranks: Mapping[str, Ranks]) -> dict[str, int]:
    """Tensor to the one rank of those that hold it that reads or writes it; bytes are balanced."""
    sizes = {name: s.tensor.numel() * s.tensor.element_size() for name, s in held.items()}
    return writer_ranks(sizes, replicas_of(held, replica_ranks))


def replicas_of(names: Iterable[str], replica_ranks: Mapping[str, Ranks]) -> dict[str, Ranks]:
    """The ranks that hold the same, for parameters and optimizer state."""
    return {name: replica_ranks[parameter_of(name)] for name in names}
