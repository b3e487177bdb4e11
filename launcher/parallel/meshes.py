"""Device meshes of torch for the axes of the layout, and their process groups.

There are two meshes of the same ranks: one for ordinary parameters, one for experts, whose data
axes are divided differently (`launcher.layout.mesh`). Both have the axes of HSDP, `dp_replicate`
and `dp_shard`. Context-parallel ranks belong to `dp_replicate`: they have other tokens and the same
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from launcher.layout.mesh import Mesh
from launcher.parallel.world import first_collective

DATA_AXES = ("dp_replicate", "dp_shard")
POINT_TO_POINT_AXES = ("pp", "ring")
"""Axes whose first communication would be a send."""


@dataclass(frozen=True)
class Meshes:
    """The meshes of one job, created at first use, which all ranks must do in the same order."""

    layout: Mesh
    device_type: str
    ulysses: int = 1
    """Size of the all-to-all (Ulysses) groups within `cp`; the rest of `cp` is ring attention."""

    @cached_property
    def dense(self) -> DeviceMesh:
        """Axes `dp_replicate`, `dp_shard`, and `tp` and `pp` where their size is above 1."""
        m = self.layout
        ranks = _ranks(m.pp, m.dp_replicate, m.dp_shard, m.cp, m.tp).permute(0, 1, 3, 2, 4)
        sizes = {
            "pp": m.pp,
            "dp_replicate": m.dp_replicate * m.cp,
            "dp_shard": m.dp_shard,
            "tp": m.tp,
        }
        return self._mesh(ranks, sizes)

    @cached_property
    def experts(self) -> DeviceMesh:
        """Axes `dp_replicate`, `dp_shard`, and `ep`, `tp`, `pp` where their size is above 1."""
        m = self.layout
        replicas = m.data_parallel // (m.expert_shard * m.ep)
        ranks = _ranks(m.pp, replicas, m.expert_shard, m.ep, m.cp, m.tp).permute(0, 1, 4, 2, 3, 5)
        sizes = {"pp": m.pp, "dp_replicate": replicas * m.cp, "dp_shard": m.expert_shard,
                 "ep": m.ep, "tp": m.tp}  # fmt: skip
        return self._mesh(ranks, sizes)

    @cached_property
    def context(self) -> DeviceMesh:
        """The mesh with `cp` split into `ring` and `ulysses`."""
        m = self.layout
        ring = m.cp // self.ulysses
        sizes = {"pp": m.pp, "data": m.data_parallel, "ring": ring, "ulysses": self.ulysses,
                 "tp": m.tp}  # fmt: skip
        return self._mesh(_ranks(m.pp, m.data_parallel, ring, self.ulysses, m.tp), sizes)

    def make(self, *, experts: bool) -> None:
        """Create the meshes and their groups now. All ranks must do so together, also those that
        do not need all of them: a pipeline stage may have no experts."""
        _ = self.dense
        if experts:
            _ = self.experts

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The group of this rank on `axis`; None for a size of 1."""
        if getattr(self.layout, axis) == 1:
            return None
        return (self.experts if axis == "ep" else self.dense).get_group(axis)

    def context_group(self, axis: str) -> dist.ProcessGroup | None:
        """The group of this rank on `ring` or `ulysses`; None for a size of 1."""
        names = self.context.mesh_dim_names or ()
        return self.context.get_group(axis) if axis in names else None

    def _mesh(self, ranks: torch.Tensor, sizes: dict[str, int]) -> DeviceMesh:
        kept = {name: n for name, n in sizes.items() if n > 1 or name in DATA_AXES}
        mesh = DeviceMesh(self.device_type, ranks.reshape(tuple(kept.values())),
                          mesh_dim_names=tuple(kept))  # fmt: skip
        for axis in POINT_TO_POINT_AXES:
            if axis in kept:
                first_collective(torch.device(self.device_type), mesh.get_group(axis))
        return mesh


def _ranks(*sizes: int) -> torch.Tensor:
    count = 1
    for size in sizes:
        count *= size
    return torch.arange(count).view(sizes)
