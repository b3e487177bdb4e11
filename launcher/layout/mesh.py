"""The mesh: which coordinates a rank has on each parallel axis.

Owns the order of the axes. Pipeline is outermost, then data, then context; tensor is innermost, so
that the ranks that talk most sit next to each other (the order of MindFormers and Megatron):

    pp 2 x dp 2 x tp 2          tp0  tp1
      pp0  dp0                   0    1
           dp1                   2    3
      pp1  dp0                   4    5
           dp1                   6    7

Data parallel is two axes: `dp_replicate` copies, each cut into `dp_shard` pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Size of each axis, outermost first. The field order is the rank order."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    def sizes(self) -> dict[str, int]:
        """Axis name to size, outermost first."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.sizes().values())

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name to the coordinate of `rank`."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.world_size} ranks")
        coordinates = {}
        for axis, size in reversed(self.sizes().items()):
            rank, coordinates[axis] = divmod(rank, size)
        return {axis: coordinates[axis] for axis in self.sizes()}

    def data_rank(self, rank: int) -> int:
        """Which share of the samples `rank` takes, 0 to `data_parallel` - 1."""
        at = self.coordinates(rank)
        return at["dp_replicate"] * self.dp_shard + at["dp_shard"]


def data_parallel_mesh(degree: int, *, shard_optimizer: bool, shard_size: int = -1) -> Mesh:
    """The mesh of `degree` data-parallel ranks.

    `shard_optimizer` False keeps a whole copy on every rank. True cuts parameters, gradients and
    optimizer state over groups of `shard_size` ranks (-1: all of them), copied between groups.
    """
    if not shard_optimizer:
        return Mesh(dp_replicate=degree)
    shard = degree if shard_size in (-1, 0) else shard_size
    if degree % shard:
        raise ValueError(f"{degree} data-parallel ranks cannot be cut into groups of {shard}")
    return Mesh(dp_replicate=degree // shard, dp_shard=shard)
