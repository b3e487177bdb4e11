"""The mesh: which coordinates a rank has on each parallel axis.

Owns the order of the axes. Pipeline is outermost, then data, then context; tensor is innermost, so
that the ranks that communicate most are neighbours (the order of Megatron):

    pp 2 x dp 2 x tp 2          tp0  tp1
      pp0  dp0                   0    1
           dp1                   2    3
      pp1  dp0                   4    5
           dp1                   6    7

Data parallel has two axes: `dp_replicate` replicas, each sharded over `dp_shard` ranks. Expert
parallel is not a further axis but another view of the data ranks: `ep` neighbours on the data axes
share the experts of a layer, and the rest of the data axes holds replicas or shards of each expert:

    dp_shard 4, ep 2            ep0  ep1
      piece 0 of each expert     0    1
      piece 1                    2    3
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

RANK_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes whose sizes multiply to the number of ranks, outermost first."""


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Size of each axis."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    """Data ranks that share the experts of a layer; divides `data_parallel`."""

    def __post_init__(self) -> None:
        if self.data_parallel % self.ep:
            raise ValueError(f"{self.data_parallel} data ranks cannot be cut into groups of "
                             f"{self.ep} that share the experts")  # fmt: skip
        if self.dp_shard % self.ep and self.ep % self.dp_shard:
            raise ValueError(f"experts shared by {self.ep} ranks, weights by {self.dp_shard}: one "
                             "must divide the other")  # fmt: skip

    def sizes(self) -> dict[str, int]:
        """Axis name to size, outermost first, `ep` last: the form in files."""
        return {axis: getattr(self, axis) for axis in (*RANK_AXES, "ep")}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, axis) for axis in RANK_AXES)

    @property
    def data_parallel(self) -> int:
        """Number of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_shard(self) -> int:
        """Number of shards of the experts of one `ep` rank."""
        return max(self.dp_shard // self.ep, 1)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Axis name to the coordinate of `rank`; also in the expert view: `ep`, `expert_shard`, and
        `expert_copy`, the index among ranks that hold the same shards of experts."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside a mesh of {self.world_size} ranks")
        at = {}
        for axis in reversed(RANK_AXES):
            rank, at[axis] = divmod(rank, getattr(self, axis))
        at = {axis: at[axis] for axis in RANK_AXES}
        group, at["ep"] = divmod(self._data_index(at), self.ep)
        copy, at["expert_shard"] = divmod(group, self.expert_shard)
        at["expert_copy"] = copy * self.cp + at["cp"]
        return at

    def data_rank(self, rank: int) -> int:
        """Index of `rank` among the data-parallel ranks, 0 to `data_parallel` - 1."""
        return self._data_index(self.coordinates(rank))

    def _data_index(self, at: dict[str, int]) -> int:
        return at["dp_replicate"] * self.dp_shard + at["dp_shard"]


def training_mesh(
    *,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
    pipeline_stages: int = 1,
    context_parallel: int = 1,
    expert_parallel: int = 1,
    shard_optimizer: bool = False,
    shard_size: int = -1,
) -> Mesh:
    """The mesh of the configured degrees.

    `shard_optimizer` False keeps a full replica on every data rank. True shards parameters,
    gradients and optimizer state over groups of `shard_size` data ranks (-1: all of them), and
    replicates between groups. Raises ValueError when the degrees do not fit.
    """
    shard = 1
    if shard_optimizer:
        shard = data_parallel if shard_size in (-1, 0) else shard_size
    if data_parallel % shard:
        raise ValueError(
            f"{data_parallel} data-parallel ranks cannot be cut into groups of {shard}"
        )
    return Mesh(
        pp=pipeline_stages,
        dp_replicate=data_parallel // shard,
        dp_shard=shard,
        cp=context_parallel,
        tp=tensor_parallel,
        ep=expert_parallel,
    )


def layout_text(ranks: int, mesh: Mapping[str, int] | None) -> str:
    """A layout as text: `4 ranks (dp_shard 2 x tp 2)`; without axes where they are unknown."""
    axes = " x ".join(f"{axis} {size}" for axis, size in (mesh or {}).items() if size > 1)
    if ranks == 1:
        return "1 rank (not cut)"
    return f"{ranks} ranks ({axes})" if axes else f"{ranks} ranks"


def other_layout(ranks: int, sizes: Mapping[str, int] | None, mesh: Mesh) -> str:
    """How a layout of `ranks` ranks and axes of `sizes` differs from `mesh`; empty where it does
    not, as far as is known. Axes of size 1 are ignored."""
    written, here = (
        {axis: size for axis, size in found.items() if size > 1}
        for found in (sizes or {}, mesh.sizes())
    )
    if ranks == mesh.world_size and not (written and written != here):
        return ""
    return (
        f"was written by {layout_text(ranks, written)}, "
        f"this run has {layout_text(mesh.world_size, here)}"
    )
