"""Redundancy: which ranks hold the same box of a tensor of the files, and which one writes it."""

from __future__ import annotations

from collections.abc import Mapping

from launcher.layout.holders import Holders, Ranks, keepers
from launcher.layout.layout import Layout
from launcher.weights.links import LinksOf
from launcher.weights.reading.memory import Shard
from launcher.weights.source import OPTIMIZER_PREFIXES


def file_holders(layout: Layout, rank: int, links_of: LinksOf) -> dict[str, Ranks]:
    """The ranks that hold the same as `rank`, for every tensor of files it has a part of, and for
    the optimizer state of each."""
    holders, result = Holders(layout), dict[str, Ranks]()
    for name, placement in layout.of(rank).items():
        links, box = links_of(name, placement.shape), placement.boxes[0]
        names = [name] if links is None else [
            link.name for link in links if box.intersect(link.box) is not None
        ]  # fmt: skip
        for prefix in ("", *OPTIMIZER_PREFIXES):
            result |= {prefix + file_name: holders.of(name, rank) for file_name in names}
    return result


def keepers_of(held: Mapping[str, Shard], holders: Mapping[str, Ranks]) -> dict[str, int]:
    """Tensor to the one of its holders that answers for it, bytes shared out evenly."""
    sizes = {name: s.tensor.numel() * s.tensor.element_size() for name, s in held.items()}
    return keepers(sizes, holders)
