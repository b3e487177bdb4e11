"""Device meshes: torch's view of the layout's axes, and the process groups that come with them.

Owns how ranks are laid out for torch. Two meshes of the same ranks: one for ordinary parameters,
one for experts, whose data axes are cut differently (`launcher.layout.mesh`). In both, the first
two named axes are what FSDP needs: `copies` of each shard, and `shards`. Context-parallel ranks
hold copies: they see other tokens with the same parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from launcher.layout.mesh import Mesh

DATA_AXES = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class Meshes:
    """The meshes of one job; made when first asked for, which all ranks must do alike."""

    layout: Mesh
    device_type: str
    ulysses: int = 1
    """Context-parallel neighbours that trade tokens for heads; the rest of `cp` is a ring."""

    @cached_property
    def dense(self) -> DeviceMesh:
        """Axes copies, shards, and `tp` and `pp` where they have more than one rank."""
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
        """Axes copies, shards, and `ep`, `tp` and `pp` where they have more than one rank."""
        m = self.layout
        copies = m.data_parallel // (m.expert_shard * m.ep)
        ranks = _ranks(m.pp, copies, m.expert_shard, m.ep, m.cp, m.tp).permute(0, 1, 4, 2, 3, 5)
        sizes = {"pp": m.pp, "dp_replicate": copies * m.cp, "dp_shard": m.expert_shard, "ep": m.ep,
                 "tp": m.tp}  # fmt: skip
        return self._mesh(ranks, sizes)

    @cached_property
    def context(self) -> DeviceMesh:
        """Axes `ring` and `trade`, which make up `cp`, beside the others."""
        m = self.layout
        ring = m.cp // self.ulysses
        sizes = {"pp": m.pp, "data": m.data_parallel, "ring": ring, "ulysses": self.ulysses,
                 "tp": m.tp}  # fmt: skip
        return self._mesh(_ranks(m.pp, m.data_parallel, ring, self.ulysses, m.tp), sizes)

    def make(self, *, experts: bool) -> None:
        """Make the meshes and their groups now. All ranks must do so together, whether or not what
        they hold needs each of them: a stage of a pipeline may have no expert."""
        _ = self.dense
        if experts:
            _ = self.experts

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one on `axis` only; None when it is alone."""
        if getattr(self.layout, axis) == 1:
            return None
        return (self.experts if axis == "ep" else self.dense).get_group(axis)

    def context_group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks of this one's `ring` or `trade`; None when it is alone."""
        names = self.context.mesh_dim_names or ()
        return self.context.get_group(axis) if axis in names else None

    def _mesh(self, ranks: torch.Tensor, sizes: dict[str, int]) -> DeviceMesh:
        kept = {name: n for name, n in sizes.items() if n > 1 or name in DATA_AXES}
        return DeviceMesh(self.device_type, ranks.reshape(tuple(kept.values())),
                          mesh_dim_names=tuple(kept))  # fmt: skip


def _ranks(*sizes: int) -> torch.Tensor:
    count = 1
    for size in sizes:
        count *= size
    return torch.arange(count).view(sizes)
